"""NIfTI volumes, in one file or as .hdr and .img; Analyze 7.5 too, written back as NIfTI."""

import gzip
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.grids import Plane, World
from data.items import Format
from data.nifti_header import (
    HEADERS,
    VOXELS,
    header_file,
    read_header,
    refine,
    voxel_file,
    written_header,
)
from data.slices import NO_IMAGES
from data.volumes import Part, Slice, Volume, check_only_volume, reason
from util.errors import UserError
from util.files import open_plain, printable, read_head, replacing, safe_name
from util.remote import base_name, is_remote, kept_file

EXTENSIONS = (".nii", ".nii.gz", ".nii.bz2")
AXIAL = 2  # world axis, inferior to superior
SLICE_TIMES = ("slice_start", "slice_end", "slice_code", "slice_duration")
MOST_COMPRESSION = 1032  # of deflate: no gzip file holds more bytes than so many times its own


def volume_name(name: str) -> str:
    """A file's name without the ending of a volume, made safe."""
    for ending in sorted((*EXTENSIONS, *HEADERS, *VOXELS), key=len, reverse=True):
        if name.lower().endswith(ending):
            return safe_name(name[: -len(ending)])
    return safe_name(os.path.splitext(name)[0])


def volumes_in(path: str, label: str) -> int:
    """How many volumes a file holds along its fourth axis; raises UserError."""
    shape = read_header(path, label).header.get_data_shape()
    return int(shape[3]) if len(shape) == 4 else 1


class NiftiVolume(Volume):
    """A NIfTI file, restored along one of its axes.

    Slices are shown as radiologists do, patient's right on the left and anterior or superior up;
    what is written has the file's own order of voxels.

    Args:
        path: of the file, or of the header.
        label: what messages call it; its name gives that of the results.
        axis: 0, 1 or 2, the slice axis; None is the axis with the thickest voxels, and among
            equal ones that nearest to inferior-superior.
        volume: index along the fourth axis, of a file that has one.
        magnitude: see `Volume`.
        one_of_all: whether the others of a file with a fourth axis are restored as well, so that
            its results carry its number, and are joined, see `Volume.part`.

    Raises:
        UserError: the file is no NIfTI file, or not one 3-D grey image.
    """

    def __init__(
        self,
        path: str,
        label: str,
        axis: int | None = None,
        volume: int | None = None,
        magnitude: bool = False,
        one_of_all: bool = False,
    ):
        self.path = path
        header, affine, remarks = read_header(path, label)
        self._check_type(header, printable(label))
        self.stored_shape = tuple(int(n) for n in header.get_data_shape())
        self.shape = (*self.stored_shape, 1, 1)[:3]
        self.index = self._fourth_axis(self.stored_shape, volume, printable(label))
        self._check_size(header, printable(label))
        axis = self._thickest(affine) if axis is None else axis
        self.order, self.flips = self._display(affine, axis)
        self.axis = axis
        name, shown = volume_name(label), printable(label)
        part = None
        if one_of_all and self.index is not None:
            part = Part(name, self.index, self.stored_shape[3])
            name, shown = f"{name}_v{self.index:03d}", f"{shown}, volume {self.index}"
        super().__init__(
            name,
            shown,
            self.shape[axis],
            float(np.linalg.norm(affine[:3, axis])),
            self._plane(affine, self.order),
            magnitude=magnitude,
        )
        self.part = part
        self.remarks = remarks
        known = any(int(header.get(f"{form}_code", 0)) > 0 for form in ("sform", "qform"))
        self.world = self._world(affine if known else None)

    @staticmethod
    def _check_type(header, label):
        dtype = header.get_data_dtype()
        if dtype.fields:
            raise UserError(f"{label}: holds RGB colours, expected one grey value a voxel")
        if dtype.kind not in "iuf":
            raise UserError(f"{label}: expected real numbers, found {dtype}")

    @staticmethod
    def _fourth_axis(shape, volume, label):
        if len(shape) < 2 or 0 in shape:
            raise UserError(f"{label}: expected a 3-D image, found shape {shape}")
        extra = [n for n in shape[3:] if n > 1]
        if not extra:
            return None
        found = "×".join(map(str, shape))
        if len(shape) > 4:
            raise UserError(f"{label}: expected a 3-D image, found {len(shape)} axes, {found}")
        choice = f"data.volume: 0 to {shape[3] - 1} chooses one along the fourth axis"
        if volume is None:
            raise UserError(f"{label}: holds {shape[3]} volumes ({found}); {choice}")
        if not 0 <= volume < shape[3]:
            raise UserError(f"{label}: data.volume: no volume {volume}; {choice}")
        return volume

    def _check_size(self, header, label):
        """A header that claims more voxels than the file can hold may claim any amount."""
        path = voxel_file(self.path)
        if not os.path.exists(path):
            raise UserError(
                f"{label}: its voxels, {printable(os.path.basename(path))}, are missing"
            )
        holds = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(3)
        if start == b"BZh":  # bounded by nothing
            return
        if start[:2] == b"\x1f\x8b":
            holds *= MOST_COMPRESSION
        claimed = math.prod(self.stored_shape) * header.get_data_dtype().itemsize
        if header.get_data_offset() + claimed > holds:
            raise UserError(f"{label}: truncated or damaged, holds less than its header says")

    def _thickest(self, affine):
        if 1 in self.shape:
            return max(i for i in range(3) if self.shape[i] == 1)
        sides = np.linalg.norm(affine[:3, :3], axis=0)
        thickest = np.flatnonzero(sides > 0.99 * sides.max())
        return int(max(thickest, key=lambda i: abs(affine[AXIAL, i]) / sides[i]))

    @staticmethod
    def _display(affine, axis):
        """(order of the voxel axes as (slice, row, column), slices that flip them).

        World axes point right, anterior, superior; rows and columns run the opposite way.
        """
        from nibabel.orientations import io_orientation

        orientation = io_orientation(affine)
        col, row = sorted((i for i in range(3) if i != axis), key=lambda i: orientation[i, 0])
        backwards = [slice(None, None, -1 if orientation[i, 1] > 0 else 1) for i in (row, col)]
        return (axis, row, col), (slice(None), *backwards)

    @staticmethod
    def _plane(affine, order):
        from nibabel.orientations import io_orientation

        orientation = io_orientation(affine)[list(order)]
        sides = np.linalg.norm(affine[:3, :3], axis=0)[list(order[1:])]
        slices, rows, cols = (int(i) for i in orientation[:, 0])
        return Plane(
            pixel=float(sides.min()),
            longer=float(sides.max()),
            world=(slices, rows, cols),
            upward=bool(orientation[0, 1] > 0),
        )

    def _world(self, affine):
        """The affine of the voxels as they are shown, turned as in `load`."""
        shown = np.zeros((4, 4))
        shown[3, 3] = 1
        for place, axis in enumerate(self.order):
            backwards = self.flips[place].step == -1
            shown[axis, place] = -1 if backwards else 1
            shown[axis, 3] = self.shape[axis] - 1 if backwards else 0
        slices, rows, columns = (self.shape[axis] for axis in self.order)
        return World((slices, rows, columns), None if affine is None else affine @ shown)

    def load(self) -> tuple[NDArray[np.float32], None]:
        from nibabel.arrayproxy import ArrayProxy

        try:
            header = read_header(self.path, self.label).header
            with open_plain(voxel_file(self.path)) as file:
                proxy = ArrayProxy(file, header)
                voxels = proxy if self.index is None else proxy[..., self.index]
                with np.errstate(over="ignore", invalid="ignore"):  # what is infinite is refused
                    voxels = np.asarray(voxels, dtype=np.float32)
                _check_rest(file)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - decompressors have errors of their own
            raise UserError(f"{self.label}: truncated or damaged ({reason(error)})") from None
        return voxels.reshape(self.shape).transpose(self.order)[self.flips], None

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
        """Write (slices, H, W) as NAME.nii.gz with the file's header, in float32.

        Where pixels are finer than the file's, they share out the same field of view.
        """
        array = voxels[self.flips].transpose(np.argsort(self.order))
        header, affine, nifti = self._written_header(array.shape, spacing)
        if kind in NO_IMAGES:  # the range to display is for the image's values
            header["cal_min"] = header["cal_max"] = 0
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"{self.name}.nii.gz")
        image = nifti(array.reshape(header.get_data_shape()), affine, header)
        with replacing(path) as temporary:
            image.to_filename(temporary)
        return path

    def join(self, parts: Sequence[str], path: str) -> None:
        """Stack files that were written of volumes along the fourth axis, as in the source.

        Args:
            parts: the files, in this order; they are removed.
            path: of the file to write.
        """
        import nibabel as nib

        images: list[Any] = [nib.load(part) for part in parts]
        voxels = np.stack([np.asarray(i.dataobj, np.float32) for i in images], axis=3)
        header = images[0].header.copy()
        header.set_data_shape(voxels.shape)
        step = read_header(self.path, self.label).header.get_zooms()[3]
        header.set_zooms((*images[0].header.get_zooms()[:3], step))
        with replacing(path) as temporary:
            type(images[0])(voxels, images[0].affine, header).to_filename(temporary)
        for part in parts:
            os.remove(part)

    def _written_header(self, shape, spacing=None):
        """(header, affine, class) of a volume of this shape, slices `spacing` mm apart if given."""
        header, affine, _ = read_header(self.path, self.label)
        header, kind = written_header(header, affine)
        header.set_data_dtype(np.float32)
        shape = [int(n) for n in shape]
        steps = np.array(self.shape) / shape
        if spacing is not None:
            steps[self.axis] = spacing / self.spacing
        dimensions = len(self.stored_shape) if self.index is None else 3
        header.set_data_shape([*shape, *[1] * (dimensions - 3)][:dimensions])
        if spacing is not None:  # the times of slices are for the file's own
            for field in SLICE_TIMES:
                header[field] = 0
        if (steps != 1).any():
            affine = refine(header, affine, steps, self.shape, shape)
        return header, affine, kind

    def try_writing(self, factor: int, spacing: float | None) -> None:
        shape = np.array(self.shape)
        shape[list(self.order[1:])] *= factor
        header, *_ = self._written_header(shape, spacing)
        header.write_to(io.BytesIO())


def _check_rest(file):
    """Read on to the checksum at the end of a gzip file; what follows that does not matter."""
    try:
        while file.read(1 << 20):
            pass
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" not in str(error):
            raise


def recognises(head: bytes, path: str) -> bool:
    """Whether a file is a header of NIfTI-1 or 2, or of Analyze, or has such a one beside it."""
    if _is_header(head):
        return True
    name = path.lower()
    if name.endswith(VOXELS) and not is_remote(path):
        header = header_file(path)
        return header.lower().endswith(HEADERS) and recognises(read_head(header), header)
    analyze = head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") and len(head) >= 348
    return analyze and name.endswith(HEADERS)


def _is_header(head):
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def _groups(paths: Sequence[str]) -> list[list[str]]:
    """The headers alone, each of which leads to its voxels."""
    headers = []
    for path in paths:
        alone = not path.lower().endswith(VOXELS) or is_remote(path) or _is_header(read_head(path))
        headers.append(path if alone else header_file(path))
    return [[path] for path in dict.fromkeys(headers)]


def _items(paths: Sequence[str], options: Mapping[str, Any]) -> list[Slice]:
    [path] = paths
    if is_remote(path) and not base_name(path).lower().endswith(EXTENSIONS):
        raise UserError(f"{base_name(path)}: a volume in two files is read from a local folder")
    where, chosen = (kept_file(path), base_name(path)), options.get("volume")
    how = options.get("axis"), options.get("magnitude", False)

    def volume(index: int | None, one_of_all: bool = False) -> NiftiVolume:
        return NiftiVolume(*where, how[0], index, how[1], one_of_all)

    count = volumes_in(*where)
    if chosen is not None or count <= 1:
        found = volume(chosen)
        if options.get("exact") and found.index is None:
            check_only_volume(chosen, found.label)
        return found.slices
    return [piece for i in range(count) for piece in volume(i, one_of_all=True).slices]


FORMAT = Format("NIfTI", EXTENSIONS, recognises, _items, _groups)
