"""Reconstructions of k-space as MR programs read them, and fastMRI's own scores of them."""

import csv
import os

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from util.files import replacing, replacing_text

COLUMNS = ("volume", "fastmri_psnr", "fastmri_ssim", "fastmri_nmse")


def write_h5(path: str, images: NDArray[np.float32]) -> None:
    """Write magnitudes (slices, H, W) as fastMRI's leaderboard takes them."""
    import h5py

    with replacing(path) as temporary, h5py.File(temporary, "w", locking=False) as file:
        file.create_dataset("reconstruction", data=images.astype(np.float32))


def write_nifti(
    path: str, images: NDArray[np.float32], spacing: tuple[float, float, float], description: str
) -> None:
    """Write (slices, H, W) with voxels of `spacing` mm (rows, columns, slices).

    Raw files do not say how the patient lies: columns run to the left, rows to posterior, as
    axial slices are looked at.
    """
    import nibabel

    rows, columns, slices = spacing
    affine = np.diag([-columns, -rows, slices, 1.0])
    image = nibabel.Nifti1Image(images.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    with replacing(path) as temporary:
        nibabel.save(image, temporary)


def fastmri_metrics(images: NDArray, truth: NDArray) -> dict[str, float]:
    """PSNR, SSIM and NMSE of a volume as fastMRI's evaluation takes them.

    Magnitudes in the scan's units, not clipped; the range is the truth's maximum over the volume;
    SSIM has a uniform window of 7×7 pixels and is the mean over slices; NMSE is of the volume.
    Where one is larger than the other, the centre that both have counts.

    Args:
        images, truth: (slices, H, W), their centres at H // 2 and W // 2.
    """
    common = tuple(map(min, images.shape[1:], truth.shape[1:]))
    images, truth = (_centre(v, *common).astype(np.float64) for v in (images, truth))
    top = truth.max()
    pairs = zip(truth, images, strict=True)
    return {
        "fastmri_psnr": float(peak_signal_noise_ratio(truth, images, data_range=top)),
        "fastmri_ssim": float(
            np.mean([structural_similarity(t, x, data_range=top) for t, x in pairs])
        ),
        "fastmri_nmse": float(np.sum((images - truth) ** 2) / np.sum(truth**2)),
    }


def _centre(images, height, width):
    top, left = images.shape[1] // 2 - height // 2, images.shape[2] // 2 - width // 2
    return images[:, top : top + height, left : left + width]


def write_scores(path: str, name: str, images: NDArray, truth: NDArray) -> None:
    """Add a volume's `fastmri_metrics` to a CSV, one row for each volume."""
    rows = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8", newline="") as file:
            rows = {row["volume"]: row for row in csv.DictReader(file)}
    found = fastmri_metrics(images, truth)
    rows[name] = {"volume": name} | {k: f"{v:.6g}" for k, v in found.items()}
    with replacing_text(path) as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows.values())
