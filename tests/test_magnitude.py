"""The Rice model needs -1 to be magnitude 0: files are read so, or refused."""

import csv
import shutil

import numpy as np
import pytest

from tests.conftest import LINEAR, task, write_yaml
from tests.volume_files import head, items_of, write_nifti, write_series
from util.errors import UserError

BLACK = -1.0


@pytest.mark.parametrize("form", ["MONOCHROME1", "MONOCHROME2", "offset"])
def test_magnitude_0_is_black(tmp_path, form):
    """Stored as it may be: inverted for display, or with the rescale undone by an offset."""
    voxels = np.clip(head() - 300, 0, None).astype(np.uint16)
    tags = {"PhotometricInterpretation": "MONOCHROME2" if form == "offset" else form}
    if form == "offset":
        tags |= {"RescaleIntercept": -100, "RescaleSlope": 2}
        stored = voxels // 2 + 50
    else:
        stored = voxels
    write_series(tmp_path, stored, **tags)
    items = items_of({"root": str(tmp_path)}, magnitude=True)
    white = np.percentile(voxels // 2 * 2 if form == "offset" else voxels, 99.9)
    for k, item in enumerate(items):
        expected = np.clip(2 * voxels[..., k] / white - 1, -1, 1)
        np.testing.assert_allclose(item.read()[0], expected, atol=2.5 / white)
        assert (item.read()[0][voxels[..., k] == 0] == BLACK).all()
    volume = items[0].volume
    np.testing.assert_allclose(volume.to_units(np.array([-1.0, 1])), [0, white], atol=1e-3)
    assert ("pictures of it are negatives" in (items[0].note or "")) is (form == "MONOCHROME1")


def test_a_little_below_0_by_interpolation_is_black(tmp_path):
    voxels = np.where(head() < 300, -2.0, head()).astype(np.float32)
    write_nifti(tmp_path / "a.nii", voxels)
    items = items_of({"root": str(tmp_path)}, magnitude=True)
    assert items[0].volume.scale[0] == 0
    assert (items[0].read()[0] == BLACK).any()


@pytest.mark.parametrize("form", ["nii", "npy"])
def test_negative_values_are_no_magnitudes(tmp_path, form):
    voxels = head().astype(np.float32) - 300
    if form == "nii":
        write_nifti(tmp_path / "a.nii", voxels)
    else:
        np.save(tmp_path / "a.npy", voxels[..., 0].astype(np.int16))
    [item, *_] = items_of({"root": str(tmp_path)}, magnitude=True)
    with pytest.raises(UserError, match=r"a\.n.*: holds negative values .*rician needs"):
        item.read()
    items_of({"root": str(tmp_path)})[0].read()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_run_finds_the_noise_of_an_inverted_series(tiny_run, photometric):
    """The same noise whichever way the series is to be shown."""
    shutil.rmtree("images")
    rng = np.random.default_rng(0)
    clean = np.clip(head((32, 32, 3)) - 250, 0, None)
    noise = rng.normal(0, 30, (2, *clean.shape))
    voxels = np.rint(np.hypot(clean + noise[0], noise[1])).astype(np.uint16)
    write_series("images", voxels, PhotometricInterpretation=photometric)
    write_yaml("task.yaml", task({"name": "denoise"}, {"name": "rician", "sigma": "auto"}))
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 2})
    assert tiny_run("--save_dir", "out", "--measured") == 0
    with open("out/tiny/denoise/rician/auto/metrics.csv", encoding="utf-8") as file:
        sigmas = [float(row["sigma"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(sigmas, 60 / np.percentile(voxels, 99.9), rtol=0.2)
