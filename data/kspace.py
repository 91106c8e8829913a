"""Raw k-space: fastMRI's and ISMRMRD's HDF5 files, and arrays in .npy, .npz and .mat."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.items import Format
from data.kspace_files import Raw, read_raw
from data.kspace_output import write_h5, write_nifti, write_scores
from data.volumes import Slice, Volume
from util.errors import UserError
from util.files import printable, safe_name
from util.remote import base_name, kept_file

EXTENSIONS = (".h5", ".npz", ".mat")  # .npy belongs to pictures, too: its contents decide


@dataclass(frozen=True)
class Acquisition:
    """One slice's k-space.

    Attributes:
        kspace: (C, H, W) complex64, its axes those of the image; lines not measured are 0.
        mask: what the file measured, (N,) bool, lines, or (H, W) bool, points.
        axis: along which phase is encoded, "columns" or "rows".
        white: the scan's value that is shown white, see `Volume.scale`.
        complete: whether the file has all of k-space, so that the truth is known.
    """

    kspace: NDArray[np.complex64]
    mask: NDArray[np.bool_]
    axis: str
    white: float
    complete: bool


@dataclass(frozen=True, eq=False)
class KSpaceSlice(Slice):
    """A slice of raw k-space; what is read as its image is the truth, or zero-filled."""

    volume: "KSpaceVolume"

    def acquisition(self) -> Acquisition:
        """Raises UserError, see `KSpaceVolume.load`."""
        volume = self.volume
        raw = volume.raw()
        return Acquisition(
            raw.kspace[self.index], raw.mask, raw.axis, volume.scale[1], not volume.measured
        )


class KSpaceVolume(Volume):
    """A file of k-space. Its slices share mask and scale.

    Args:
        path: of the file.
        order: of an array's axes, see `data.kspace_files.read_array`.
        measured: restored as it is; otherwise it has to be fully sampled.

    Raises:
        UserError: the file is no k-space.
    """

    clipped = False  # what is restored is not the image that is read

    def __init__(self, path: str, label: str, order: str | None, measured: bool):
        self.path, self.order, self.measured = path, order, measured
        count = read_raw(path, printable(label), order, count_only=True)
        super().__init__(safe_name(os.path.splitext(label)[0]), printable(label), count)
        self.slices = [KSpaceSlice(self, i) for i in range(count)]

    def raw(self) -> Raw:
        """The file, see `_read`."""
        return _read(self)

    def check_complete(self, mask: NDArray[np.bool_]) -> None:
        """Raises UserError where k-space has gaps, so that the truth is not known."""
        seen = np.nonzero(mask)
        block = mask[tuple(slice(i.min(), i.max() + 1) for i in seen)]
        if gaps := np.count_nonzero(~block):
            what = "lines" if mask.ndim == 1 else "points"
            raise UserError(
                f"{self.label}: {gaps} of {mask.size} {what} of k-space are empty, so it cannot be "
                "undersampled and compared; restore it as it is with data.measured: true or "
                "--measured"
            )

    def load(self) -> tuple[NDArray[np.float32], None]:
        """Root sums of squares over the coils, zero-filled."""
        return root_sum_of_squares(self.raw().kspace), None

    def _contents(self) -> list[NDArray]:
        raw = self.raw()
        return [raw.kspace, raw.mask, np.array(raw.axis == "rows")]

    def cropped(self, images: NDArray) -> NDArray:
        """The centre of images (..., H, W) that the header calls the reconstruction."""
        height, width = self.raw().size or images.shape[-2:]
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        return images[..., max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]

    def write(
        self,
        folder: str,
        voxels: NDArray[np.float32],
        padding: NDArray[np.bool_] | None,
        description: str,
        identity: str,
        kind: str = "",
        spacing: float | None = None,
    ) -> str:
        """NAME.nii.gz in `folder` and, of the restored scan, recon/NAME.h5 beside it."""
        os.makedirs(folder, exist_ok=True)
        images = self.cropped(voxels)
        path = os.path.join(folder, f"{self.name}.nii.gz")
        write_nifti(path, images, self.raw().spacing, description)
        if kind:
            return path
        results = os.path.dirname(folder)
        os.makedirs(os.path.join(results, "recon"), exist_ok=True)
        write_h5(os.path.join(results, "recon", f"{self.name}.h5"), images)
        if not self.measured:
            truth = self.raw().reference
            truth = self.cropped(self.load()[0]) if truth is None else truth
            write_scores(os.path.join(results, "fastmri.csv"), self.name, images, truth)
        return path

    def try_writing(self, factor: int, spacing: float | None) -> None:
        """Nothing of the file is needed for writing."""


@lru_cache(maxsize=1)  # slices are read one after the other; one file at a time is in memory
def _read(volume: KSpaceVolume) -> Raw:
    raw = read_raw(volume.path, volume.label, volume.order)
    if not volume.measured:
        volume.check_complete(raw.mask)
    return raw


def root_sum_of_squares(kspace: NDArray[np.complex64]) -> NDArray[np.float32]:
    """(..., C, H, W) k-space → (..., H, W) magnitudes."""
    axes = (-2, -1)
    images = np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), norm="ortho")
    images = np.fft.fftshift(images, axes=axes)
    return np.sqrt(np.sum(np.abs(images) ** 2, axis=-3)).astype(np.float32)


def recognises(head: bytes, path: str) -> bool:
    """HDF5, a .npz or MATLAB file, or a .npy file of complex numbers."""
    name = path.lower()
    if head.startswith(b"\x89HDF"):
        return name.endswith(EXTENSIONS)
    if head.startswith(b"\x93NUMPY"):
        return b"'descr': '<c" in head[:128] or b"'descr': '>c" in head[:128]
    return head.startswith(b"PK") and name.endswith(".npz") or head.startswith(b"MATLAB")


def _items(paths: Sequence[str], options: Mapping[str, Any]) -> list[Slice]:
    (path,) = paths
    volume = KSpaceVolume(
        kept_file(path), base_name(path), options.get("order"), options["measured"]
    )
    return volume.slices


FORMAT = Format("k-space", EXTENSIONS, recognises, _items)
