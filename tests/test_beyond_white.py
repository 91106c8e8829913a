"""What a measured volume has above white and below black comes back."""

import os

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import zoom

from data.grids import interpolate
from data.volumes import Whole, write_volumes
from guided_diffusion.volume_maps import Maps
from tests.volume_files import circle, head, items_of, write_back, write_nifti


def outliers(shape=(32, 32, 3)):
    """Voxels far above white and below black, in a volume too large for them to set the scale."""
    voxels = head(shape).astype(np.float32) - 300
    voxels[4:6, 9, 1], voxels[20, 3:5, 2] = 2000, -900
    return voxels


def test_what_a_measured_volume_has_beyond_black_and_white_comes_back(tmp_path):
    voxels = outliers()
    write_nifti(tmp_path / "a.nii", voxels)
    [line] = write_back(items_of({"root": str(tmp_path / "a.nii")}), tmp_path, measured=True)
    assert "% of voxels outside were kept there" in line.line
    found = nib.load(tmp_path / "volumes/a.nii.gz").get_fdata()
    np.testing.assert_allclose(found, voxels, atol=1e-3)


def test_a_posterior_sample_has_it_as_well(tmp_path):
    write_nifti(tmp_path / "a.nii", outliers())
    whole = Whole(items_of({"root": str(tmp_path / "a.nii")})[0].volume)
    for folder, name in (("slices", "a"), ("samples", "a_0"), ("samples", "a_1")):
        os.makedirs(tmp_path / folder, exist_ok=True)
        np.save(tmp_path / folder / f"{name}.npy", whole.read())
    assert not any(
        w.failed for w in write_volumes([whole], {"a"}, str(tmp_path), "", "", None, True)
    )
    for name in ("volumes", "samples/0", "samples/1"):
        found = nib.load(tmp_path / f"{name}/a.nii.gz").get_fdata()
        np.testing.assert_allclose(found, outliers(), atol=1e-3)


def test_bounds_hold_what_lies_between_them(tmp_path):
    """Also where that is below black, which is the least that a bound says of all else."""
    write_nifti(tmp_path / "a.nii", outliers())
    volume = items_of({"root": str(tmp_path / "a.nii")})[0].volume
    restored, black = volume.voxels, volume.scale[0]
    std = np.full_like(restored, 40)
    bounds = dict(Maps(False, lambda v: None, 1.0)(volume, restored, std))
    assert (bounds["lower"] <= restored).all() and (restored < black).any()
    np.testing.assert_allclose(
        bounds["lower"][restored > black], np.maximum(restored - 40, black)[restored > black]
    )
    np.testing.assert_allclose(bounds["upper"], restored + 40)


def test_what_is_beyond_white_is_interpolated_on_a_finer_grid(tmp_path):
    voxels = outliers()
    write_nifti(tmp_path / "a.nii", voxels)
    items = items_of({"root": str(tmp_path / "a.nii")})
    write_back(items, tmp_path, enlarge=2, measured=True)
    found = nib.load(tmp_path / "volumes/a.nii.gz").get_fdata()
    black, white, _ = items[0].volume.scale
    inside = np.clip(voxels, black, white)
    beyond = zoom(voxels - inside, (2, 2, 1), order=1, mode="nearest", grid_mode=True)
    expected = inside.repeat(2, 0).repeat(2, 1) + beyond
    np.testing.assert_allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("ratio", [0.2, 0.35, 1.0])
def test_slices_are_interpolated_at_their_own_distance(ratio):
    """A linear function keeps its slope, about the same centre."""
    values = np.arange(9, dtype=np.float32)[:, None, None].repeat(2, 1)
    found = interpolate(values, (21, 2, 1), ratio)[:, 1, 0]
    np.testing.assert_allclose(found, np.clip(4 + ratio * np.arange(-10, 11), 0, 8), atol=1e-5)


def test_padding_is_not_beyond_white(tmp_path):
    outside, voxels = circle(), head().astype(np.float32)
    voxels[14, 15, 1] = 3000
    write_nifti(tmp_path / "pad.nii", np.where(outside, -32768, voxels))
    write_back(items_of({"root": str(tmp_path / "pad.nii")}), tmp_path, enlarge=2, measured=True)
    found = nib.load(tmp_path / "volumes/pad.nii.gz").get_fdata()
    fine = outside.repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(found[fine], -32768)
    assert found[~fine].min() >= head()[~outside].min() - 0.01
    write_back(items_of({"root": str(tmp_path / "pad.nii")}), tmp_path, measured=True)
    found = nib.load(tmp_path / "volumes/pad.nii.gz").get_fdata()
    np.testing.assert_allclose(found, np.where(outside, -32768, voxels), atol=0.01)
