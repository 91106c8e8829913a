"""The operator of thick slices, and volumes of them made thin."""

import csv
import os

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from data.volumes import Volume, Whole
from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig
from guided_diffusion.operators import get_operator
from guided_diffusion.operators.base import Grid
from guided_diffusion.operators.thick_slices import ThickSlices, restored_count, slice_count
from guided_diffusion.volume_items import note_of_lengths
from tests.volume_files import (
    OBLIQUE,
    ball,
    head,
    items_of,
    series_values,
    thick_task,
    world_centre,
    write_nifti,
    write_series,
    written_by,
)
from util.errors import UserError


def thick(thickness=5.0, spacing=5.0, fine=1.0, profile="box", shape=(40, 2, 3), threshold=0):
    lengths = {"thickness": thickness, "spacing": spacing, "target_spacing": fine}
    rest = {"profile": profile, "singular_value_threshold": threshold}
    return get_operator("thick_slices", shape, dtype=torch.float64, **lengths, **rest)


def test_a_box_of_whole_voxels_is_a_block_mean():
    x = torch.randn(1, 40, 2, 3, dtype=torch.float64)
    blocks = x.reshape(1, 8, 5, 2, 3).mean(dim=2)
    torch.testing.assert_close(thick().forward(x), blocks)


@pytest.mark.parametrize("profile", ["box", "gaussian"])
@pytest.mark.parametrize(
    ("thickness", "spacing", "fine"),
    [(5, 5, 1), (4, 5, 1), (5, 3.5, 0.7), (3.3, 4.1, 0.9), (2, 2, 2)],
)
def test_a_slice_sees_its_own_place(profile, thickness, spacing, fine):
    """A linear function along the axis has, in each slice, its value at the slice's centre."""
    operator = thick(thickness, spacing, fine, profile, (60, 1, 1))
    z = (torch.arange(60, dtype=torch.float64) - 59 / 2) * fine
    y = operator.forward(z.reshape(1, 60, 1, 1)).flatten()
    centres = (torch.arange(len(y), dtype=torch.float64) - (len(y) - 1) / 2) * spacing
    inside = slice(1, -1) if profile == "gaussian" else slice(None)  # tails leave the volume
    torch.testing.assert_close(y[inside], centres[inside], atol=0.05 * fine, rtol=0)
    assert float((y - centres).abs().max()) < 0.4 * thickness
    constant = operator.forward(torch.ones(1, 60, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(constant, torch.ones_like(constant))


def test_the_gaussian_s_width_at_half_maximum_is_the_thickness():
    operator = thick(6.0, 6.0, 0.05, "gaussian", (600, 1, 1))
    point = operator.transpose(torch.eye(5, dtype=torch.float64)[2].reshape(1, 5, 1, 1)).flatten()
    width = 0.05 * float((point > point.max() / 2).sum())
    assert width == pytest.approx(6.0, abs=0.11)


def test_depths_and_counts_belong_to_one_another():
    for thickness, spacing, fine in ((5, 5, 1), (4, 5, 1), (6, 5, 0.9), (3.3, 4.1, 0.7)):
        for count in range(1, 60):
            depth = restored_count(count, thickness, spacing, fine)
            assert slice_count(depth, thickness, spacing, fine) == count
            covered = (count - 1) * spacing + thickness
            assert covered - 0.05 * fine <= depth * fine < covered + fine


@pytest.mark.parametrize("digits", [2, 3, 4, 5])
def test_headers_whose_lengths_are_rounded_make_no_slice_more(digits):
    """Positions along an oblique normal, rounded; 5 mm to 1 mm is always fivefold."""
    random = np.random.default_rng(digits)
    for count in range(2, 40):
        normal = random.standard_normal(3)
        normal /= np.linalg.norm(normal)
        places = random.uniform(-100, 100, 3) + 5 * np.arange(count)[:, None] * normal
        spacing = Volume("v", "v", count, np.round(places, digits) @ normal).spacing
        depth = restored_count(count, spacing, spacing, 1.0)
        assert depth == 5 * count
        assert slice_count(depth, spacing, spacing, 1.0) == count


def test_lengths_that_make_no_sense_are_refused():
    for lengths in ({"fine": 6.0}, {"thickness": 41.0}):
        with pytest.raises(UserError, match="measurement.operator"):
            thick(**lengths)
    with pytest.raises(UserError, match="thickness: expected a number of mm"):
        get_operator("thick_slices", (40, 2, 3))


def test_the_slices_distance_may_be_given_as_it_is_written():
    """A header has 1.2 in float32."""
    given = {"target_spacing": 1.2, "thickness": 5}
    grid = Grid(float(np.float32(1.2)), None, 1.0)
    found = ThickSlices.on_grid(ThickSlices.check(given), grid, True)
    assert found["target_spacing"] == grid.spacing
    with pytest.raises(UserError, match=r"none, as .* are 1\.2 mm apart .*, found 1\.25"):
        ThickSlices.on_grid(ThickSlices.check({**given, "target_spacing": 1.25}), grid, True)


@pytest.mark.parametrize("given", [{"target_spacing": 1e-9}, {"spacing": 1e300}])
def test_more_slices_than_can_be(given):
    grid = Grid(5.0, None, 1.0)
    try:
        complete = ThickSlices.on_grid(ThickSlices.check(given), grid, False)
        with pytest.raises(UserError, match="target_spacing: expected at least"):
            ThickSlices.restored_depth(20, complete)
    except UserError as error:
        assert "spacing: expected a finite number" in str(error)


@pytest.mark.parametrize("affine", [np.diag([1, 1, 4, 1.0]), np.diag([-1, 1, -4, 1.0]), OBLIQUE])
@pytest.mark.parametrize("fine", [1.0, 0.9])
def test_a_landmark_stays_where_it_is_in_a_nifti_volume(tmp_path, affine, fine):
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    voxels = ball((24, 26, 11), np.array([11.3, 14.2, 5.4]), sides)
    write_nifti(tmp_path / "a.nii", voxels, affine)
    volume = items_of({"root": str(tmp_path / "a.nii"), "axis": 2})[0].volume
    [(line, failed, _)] = written_by([Whole(volume, fine)], fine, tmp_path)
    assert not failed, line
    image = nib.load(tmp_path / "volumes/a.nii.gz")
    before, after = world_centre(voxels, affine), world_centre(image.get_fdata(), image.affine)
    assert np.abs(before - after).max() < 0.1 * fine
    zooms = image.header.get_zooms()
    assert zooms[2] == pytest.approx(fine) and image.shape[2] == np.ceil(
        11 * sides[2] / fine - 1e-6
    )
    # The first and the last slice are covered as acquired, and no more than a slice beyond.
    ends = [nib.affines.apply_affine(affine, [0, 0, k]) for k in (-0.5, 10.5)]
    inverse = np.linalg.inv(image.affine)
    low, high = (nib.affines.apply_affine(inverse, end)[2] for end in ends)
    assert -0.5 - 1e-5 < low < 0.5 and -0.5 - 1e-5 < image.shape[2] - 1 - high < 0.5


def test_a_landmark_stays_where_it_is_in_a_series(tmp_path):
    voxels = ball((24, 26, 11), np.array([11.3, 14.2, 5.4]), np.array([0.5, 0.75, 3.0]), 4.0)
    write_series(tmp_path / "s", voxels, SpacingBetweenSlices=3)
    volume = items_of({"root": str(tmp_path / "s")})[0].volume
    assert volume.spacing == pytest.approx(3) and volume.plane.thickness == 3
    [(line, failed, _)] = written_by([Whole(volume, 0.7)], 0.7, tmp_path)
    assert not failed, line

    def centre(folder, values):
        total, weight = np.zeros(3), 0.0
        for name, pixels in zip(sorted(os.listdir(folder)), values, strict=True):
            header = pydicom.dcmread(f"{folder}/{name}")
            weights = np.clip(pixels - 400, 0, None)
            rows, cols = np.indices(weights.shape)
            along = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            down, right = (float(v) for v in header.PixelSpacing)
            places = (
                np.array(header.ImagePositionPatient, float)
                + cols[..., None] * right * along[0]
                + rows[..., None] * down * along[1]
            )
            total, weight = (
                total + (weights[..., None] * places).sum((0, 1)),
                weight + weights.sum(),
            )
        return total / weight

    source = [
        pydicom.dcmread(tmp_path / "s" / n).pixel_array.astype(float)
        for n in sorted(os.listdir(tmp_path / "s"))
    ]
    before = centre(tmp_path / "s", source)
    result = tmp_path / "volumes/s"
    assert np.abs(centre(result, series_values(result)) - before).max() < 0.07
    headers = [pydicom.dcmread(result / n) for n in sorted(os.listdir(result))]
    assert len(headers) == 48  # of 0.7 mm, of 33 mm
    assert len({h.SOPInstanceUID for h in headers}) == 48
    assert {float(h.SliceThickness) for h in headers} == {0.7}
    assert [int(h.InstanceNumber) for h in headers] == list(range(1, 49))
    steps = np.diff([np.array(h.ImagePositionPatient, float) for h in headers], axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), 0.7, rtol=1e-4)


def test_a_measured_volume_of_thick_slices_is_restored_on_the_fine_grid(tiny_run):
    voxels = ball((32, 34, 6), np.array([15.0, 17, 2.6]), np.array([1, 1, 4]), 8.0)
    write_nifti("images/a.nii.gz", voxels)
    for name in ("a1", "a2", "a10"):
        os.remove(f"images/{name}.png")
    thick_task("images", measured=True)
    assert tiny_run("--save_dir", "out", "--batch_size", "5", "--output", "thin.nii.gz") == 0
    assert nib.load("thin.nii.gz").shape == (32, 34, 24)
    out = "out/tiny/thick_slices/header/0.05"
    image = nib.load(f"{out}/volumes/a.nii.gz")
    assert image.shape == (32, 34, 24)
    assert image.header.get_zooms()[2] == 1
    with open(f"{out}/metrics.csv", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row["image"] == "a" and float(row["residual"]) > 0
    assert sorted(os.listdir(out)) == [
        *("comparison.png", "cubic", "input", "metrics.csv", "recon", "report", "report.html"),
        *("residual", "slices", "summary.json", "volumes"),
    ]
    stamp = os.stat(f"{out}/slices/a.npy").st_mtime_ns
    assert tiny_run("--save_dir", "out", "--batch_size", "5") == 0  # resumed: nothing is left to do
    assert os.stat(f"{out}/slices/a.npy").st_mtime_ns == stamp


def test_a_simulated_volume_has_a_truth_and_its_own_grid(tiny_run):
    voxels = ball((32, 32, 20), np.array([15.0, 17, 9]), np.ones(3), 8.0)
    write_nifti("v.nii", voxels, np.diag([1, 1, 1, 1.0]))
    thick_task("v.nii", thickness=4, spacing=5)
    assert tiny_run("--save_dir", "out", "--num_samples", "2") == 0
    out = "out/tiny/thick_slices/4mm_every_5mm/0.05"
    assert nib.load(f"{out}/volumes/v.nii.gz").shape == (32, 32, 20)
    assert nib.load(f"{out}/std/v.nii.gz").get_fdata().min() >= 0
    with open(f"{out}/metrics.csv", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert float(row["psnr"]) > 5 and float(row["sample_psnr"]) > 5


def test_pixels_that_are_far_from_square_keep_to_the_slices_plane_and_say_so(tiny_run, capsys):
    write_nifti("v.nii", ball((32, 32, 20), np.array([15.0, 17, 9]), np.ones(3), 8.0),
                np.diag([1, 1.7, 1.7, 1.0]))  # fmt: skip
    thick_task("v.nii", thickness=4)
    assert tiny_run("--save_dir", "out") == 0
    assert "planes are not taken in turn" in capsys.readouterr().err


def test_thick_slices_of_a_picture_are_refused(tiny_run, capsys):
    thick_task("images", thickness=4)
    assert tiny_run("--save_dir", "out") == 2
    assert "thick_slices restores volumes (NIfTI, DICOM) as a whole" in capsys.readouterr().err


def test_a_series_with_a_missing_slice_is_named_with_where(tiny_run, capsys):
    voxels = ball((32, 32, 6), np.array([15.0, 17, 3]), np.ones(3), 8.0)
    write_series("s", voxels)
    os.remove("s/6.dcm")  # the fourth
    thick_task("s", measured=True)
    assert tiny_run("--save_dir", "out") == 2
    error = capsys.readouterr().err
    assert "between slices 3 and 4 of 5, 6 mm" in error and "a slice is missing" in error


def test_lengths_that_contradict_the_header_are_said(tmp_path):
    write_nifti(tmp_path / "a.nii", head((24, 24, 6)), np.diag([1, 1, 6, 1.0]))
    nifti = items_of({"root": str(tmp_path / "a.nii"), "axis": 2})[0].volume
    write_series(tmp_path / "s", head((24, 24, 6)), SliceThickness=2)  # every 3 mm
    series = items_of({"root": str(tmp_path / "s")})[0].volume
    noise = NoiseConfig("gaussian", 0.02)

    def note(volume, simulated=False, **lengths):
        operator = OperatorConfig("thick_slices", lengths)
        return note_of_lengths(Whole(volume, 1.0), Measurement(operator, noise, simulated))

    assert note(series) is None and note(series, thickness=2) is None
    assert note(series, thickness=5, simulated=True) is None
    assert note(series, thickness=5) == (
        "s: the task says thickness 5 mm, and the header 2 mm; left out, the header's is taken"
    )
    assert "spacing 4 mm, and the header 3 mm; thickness 5" in note(series, spacing=4, thickness=5)
    assert note(nifti, thickness=5) is None  # NIfTI has no thickness
    assert "no slice thickness; the spacing, 6 mm, is taken" in note(nifti)
    assert "header 6 mm" in note(nifti, spacing=4, thickness=5)
