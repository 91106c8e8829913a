"""Values that mean "no data": they set no grey scale, and they come back."""

import os
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement

from data.scale import find_padding
from data.volumes import Whole, write_volumes
from tests.conftest import LINEAR, task, write_yaml
from tests.volume_files import (
    circle,
    head,
    items_of,
    series_values,
    write_back,
    write_nifti,
    write_series,
)


def same_but_for_padding(padded, black, outside):
    """Items of the two sources give the same images, black outside, and say where that is."""
    for item, reference in zip(padded, black, strict=True):
        image = item.read()
        hidden = item.padding()
        assert hidden.shape == image.shape[1:] and hidden.sum() == outside[..., 0].sum()
        np.testing.assert_array_equal(image[:, hidden], -1)
        np.testing.assert_allclose(image[:, ~hidden], reference.read()[:, ~hidden], atol=0.02)
        assert reference.padding() is None
    note = padded[0].note
    assert "padding" in note and all(i.note == note for i in padded)


@pytest.mark.parametrize("value", [-32768, -1024, -2000.0, np.nan, 32767, -3.4e38])
@pytest.mark.parametrize("enlarge", [1, 2])
def test_an_undeclared_constant_of_a_nifti(tmp_path, value, enlarge):
    outside = circle()
    kind = np.float32 if isinstance(value, float) else np.int16
    write_nifti(tmp_path / "pad.nii", np.where(outside, value, head()).astype(kind))
    write_nifti(tmp_path / "black.nii", np.where(outside, 0, head()).astype(np.int16))
    items = items_of({"root": str(tmp_path / "pad.nii")})
    same_but_for_padding(items, items_of({"root": str(tmp_path / "black.nii")}), outside)
    assert "taken for padding" in items[0].note
    write_back(items, tmp_path, enlarge)
    voxels = nib.load(tmp_path / "volumes/pad.nii.gz").get_fdata()
    fine = outside.repeat(enlarge, 0).repeat(enlarge, 1)
    np.testing.assert_array_equal(voxels[fine], np.float32(value))
    expected = head().repeat(enlarge, 0).repeat(enlarge, 1)[~fine]
    white = np.percentile(head()[~outside], 99.9)
    np.testing.assert_allclose(voxels[~fine], np.clip(expected, 0, white), atol=0.01)


DECLARED = {
    "unsigned": (np.uint16, 4095, {"PixelPaddingValue": 4095}),
    "signed": (np.int16, -2000, {"PixelPaddingValue": -2000, "PixelRepresentation": 1}),
    # a signed value written as unsigned, as some scanners do
    "of the other sign": (
        np.int16,
        -2000,
        {"PixelPaddingValue": DataElement(0x00280120, "US", 63536), "PixelRepresentation": 1},
    ),
    "range": (np.int16, None, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1000,
                               "PixelRepresentation": 1}),
    "undeclared": (np.int16, -32768, {"PixelRepresentation": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARED)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("enlarge", [1, 2])
def test_padding_of_a_dicom_series(tmp_path, case, photometric, enlarge):
    """In stored values, before the rescale; written back, and declared."""
    kind, value, tags = DECLARED[case]
    outside = circle()
    if value is None:
        value = np.random.default_rng(0).integers(-2000, -1000, outside.shape, endpoint=True)
    tags = {**tags, "RescaleSlope": 2, "RescaleIntercept": 3}
    stored = np.where(outside, value, head()).astype(kind)
    write_series(tmp_path / "pad", stored, PhotometricInterpretation=photometric, **tags)
    items = items_of({"root": str(tmp_path / "pad")})
    units = 2 * np.where(outside, value, head()).astype(float) + 3
    low, high = np.percentile(units[~outside], (0.1, 99.9))
    expected = (high, low) if photometric == "MONOCHROME1" else (0, high)
    assert items[0].volume.scale[:2] == pytest.approx(expected)
    for item in items:
        hidden = item.padding()
        assert np.array_equal(hidden, outside[..., 0])
        assert (item.read()[0][hidden] == -1).all()
    write_back(items, tmp_path, enlarge)
    folder = tmp_path / "volumes/pad"
    found = np.moveaxis(series_values(folder), 0, 2)
    fine = outside.repeat(enlarge, 0).repeat(enlarge, 1)
    inside = np.clip(units, min(expected), max(expected)).repeat(enlarge, 0).repeat(enlarge, 1)
    step = (max(expected) - min(expected)) / 65534
    np.testing.assert_allclose(found[~fine], inside[~fine], atol=0.52 * step)
    again = items_of({"root": str(folder)})
    assert np.array_equal(again[1].padding(), fine[..., 0])
    dataset = pydicom.dcmread(folder / "pad_z000.dcm")
    black = 65535 if photometric == "MONOCHROME1" else 0
    assert dataset.PixelPaddingValue == black and "PixelPaddingRangeLimit" not in dataset
    assert np.array_equal(dataset.pixel_array == black, fine[..., 0])


def test_padding_of_float_pixels_leaves_the_tissue_its_steps(tmp_path):
    """Also in a posterior sample."""
    outside, voxels = circle(), head().astype(np.float32)
    stored = np.where(outside, np.float32(-3.4e38), voxels)
    write_series(tmp_path / "s", head())
    for k in range(3):
        dataset = pydicom.dcmread(tmp_path / f"s/{9 - k}.dcm")
        del dataset.PixelData
        dataset.BitsAllocated = 32
        dataset.FloatPixelData = stored[..., k].tobytes()
        dataset.save_as(tmp_path / f"s/{9 - k}.dcm")
    whole = Whole(items_of({"root": str(tmp_path / "s")})[0].volume)
    for folder, name in (("slices", "s"), ("samples", "s_0")):
        os.makedirs(tmp_path / folder)
        np.save(tmp_path / folder / f"{name}.npy", whole.read())
    list(write_volumes([whole], {"s"}, str(tmp_path), "", "", None, True))
    for folder in ("volumes/s", "samples/0/s"):
        found = np.moveaxis(series_values(tmp_path / folder), 0, 2)
        step = np.ptp(voxels[~outside]) / 65534
        np.testing.assert_allclose(found[~outside], voxels[~outside], atol=0.52 * step)
        again = items_of({"root": str(tmp_path / folder)})
        assert np.array_equal(again[2].padding(), outside[..., 2])


@pytest.mark.parametrize("value", [np.nan, -1024.0])
def test_padding_of_an_array(tmp_path, value):
    outside = circle()[..., 0]
    np.save(tmp_path / "a.npy", np.where(outside, value, head()[..., 0] / 1000))
    [item] = items_of({"root": str(tmp_path)})
    image = item.read()
    expected = np.where(outside, -1, 2 * head()[..., 0] / 1000 - 1)
    np.testing.assert_allclose(image[0], expected, atol=1e-5)
    assert np.array_equal(item.padding(), outside) and "padding" in item.note
    fine = item.to_floats(image.repeat(2, 1).repeat(2, 2))[0]
    expected = np.where(outside, value, head()[..., 0] / 1000).repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(fine, expected, atol=1e-5)


NO_PADDING = {
    "magnitude with black air": np.where(circle(), 0, head()),
    "skull-stripped far from 0": np.where(circle(), 0, head() + 2000),
    "signed, without a gap": np.clip(head() - 400.0, -200, None),
    "a saturated spot": np.where(np.arange(3072).reshape(32, 32, 3) % 97 == 50, 32767, head()),
    "normalised, with what was 0": (np.where(circle(), 0, head() + 500) - 600) / 300.7,
    "a mask": circle().astype(float),
    "a few outliers": np.where(np.arange(32 * 32 * 3).reshape(32, 32, 3) == 1500, -9999.0, head()),
    "few NaN": np.where(np.arange(32 * 32 * 3).reshape(32, 32, 3) == 0, np.nan, head()),
    "NaN within": np.where((np.abs(np.mgrid[:32, :32, :3] - 15).max(0) < 9), np.nan, head()),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_PADDING)
def test_what_is_no_padding(case):
    assert find_padding(np.moveaxis(NO_PADDING[case], 2, 0)) == (None, "")


@pytest.mark.parametrize("form", ["nifti", "dicom"])
def test_a_run_on_padded_files_restores_the_tissue_as_if_it_were_black(tiny_run, form, capsys):
    """The same measurement with -32768 and with 0 outside; several samples, twice as fine."""
    outside = circle()
    shutil.rmtree("images")
    for name, value in (("pad", -32768), ("black", 0)):
        voxels = np.where(outside, value, head()).astype(np.int16)
        if form == "nifti":
            os.makedirs(name)
            write_nifti(f"{name}/v.nii", voxels)
        else:
            write_series(f"{name}/v", voxels, PixelPaddingValue=-32768, PixelRepresentation=1)
        root = f"{name}/v" if form == "dicom" else name
        operator = {"name": "super_resolution", "scale_factor": 2}
        write_yaml(f"{name}.yaml", task(operator, {"name": "gaussian", "sigma": 0.1}, root))
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 3})
    results = {}
    for name in ("black", "pad"):
        assert tiny_run("--task_config", f"{name}.yaml", "--measured", "--save_dir", f"out_{name}",
                        "--num_samples", "2") == 0  # fmt: skip
        folder = f"out_{name}/tiny/super_resolution/x2/0.1"
        results[name] = {
            "nifti": lambda f: nib.load(f"{f}/volumes/v.nii.gz").get_fdata(),
            "dicom": lambda f: np.moveaxis(series_values(f"{f}/volumes/v"), 0, 2),
        }[form](folder)
    heard = capsys.readouterr().err
    assert heard.count("-32768" if form != "dicom" else "declared as padding") == 1
    fine = outside.repeat(2, 0).repeat(2, 1)
    if form == "nifti":
        np.testing.assert_array_equal(results["pad"][fine], -32768)
    tissue = results["black"][~fine]
    assert np.abs(results["pad"][~fine] - tissue).max() < 0.01 * np.ptp(tissue)
