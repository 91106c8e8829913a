"""The masks of accelerated MRI equal fastMRI's; what cannot be one is refused in a sentence."""

from pathlib import Path

import numpy as np
import pytest

from guided_diffusion.operators.masks import MASKS, calibration_lines, cartesian_mask
from util.errors import UserError

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "kspace.npz")
DRAWN = [k for k in GOLDEN.files if k.startswith("mask/") and "offset" not in k]
SEEDS = {"name": "file_brain_AXT2_200.h5", "s0": 0, "s1": 1, "s42": 42, "s123456": 123456}


@pytest.mark.parametrize("key", DRAWN)
def test_equals_the_published_mask(key):
    _, kind, R, width, seed = key.split("/")
    acceleration = int(R[1:])
    fraction = {4: 0.08, 8: 0.04}[acceleration]
    mask = cartesian_mask(kind, int(width[1:]), acceleration, fraction, SEEDS[seed])
    assert np.array_equal(np.flatnonzero(mask), GOLDEN[key])


def test_every_kind_was_compared():
    assert {key.split("/")[1] for key in DRAWN} == set(MASKS)


@pytest.mark.parametrize(
    "changed, found",
    [
        ({"acceleration": 0.5}, "acceleration: expected 1 to the 64 lines, found 0.5"),
        ({"center_fraction": 0.3}, "center_fraction: 0.3 are 19 of 64 lines"),
        ({"center_fraction": -0.1}, "center_fraction: expected 0 to 1"),
        ({"kind": "poisson"}, "mask: expected one of random"),
        ({"kind": "gone.npy"}, "gone.npy: no such file"),
    ],
)
def test_impossible_masks(changed, found):
    with pytest.raises(UserError, match=found):
        cartesian_mask(**{"kind": "random", "lines": 64, **changed})


@pytest.mark.parametrize(
    "array, found",
    [
        (np.ones(60), "60 lines, and k-space has 64"),
        (np.ones((64, 64)), "single points"),
        (np.zeros(64), "no line is measured"),
        (np.arange(64), "expected 0 and 1 alone"),
        (np.array(["x"] * 64), "expected 0 and 1, found"),
    ],
)
def test_files_that_hold_no_mask(tmp_path, array, found):
    path = tmp_path / "mask.npy"
    np.save(path, array)
    with pytest.raises(UserError, match=found):
        cartesian_mask(str(path), 64)


def test_a_mask_from_a_file(tmp_path):
    mask = np.arange(64) % 4 == 0
    np.save(tmp_path / "mask.npy", mask[:, None].astype(np.float32))
    assert np.array_equal(cartesian_mask(str(tmp_path / "mask.npy"), 64), mask)


def test_calibration_lines_are_the_block_about_the_centre():
    mask = np.zeros(20, dtype=bool)
    mask[[1, 8, 9, 10, 11, 15]] = True
    assert calibration_lines(mask) == (8, 12)
    mask[10] = False
    assert calibration_lines(mask) == (10, 10)
    assert calibration_lines(np.ones(20, dtype=bool)) == (0, 20)
