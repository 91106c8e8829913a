"""The masks of accelerated MRI equal fastMRI's; what cannot be one is refused in a sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.kspace import Acquisition
from guided_diffusion import scan
from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig
from guided_diffusion.measuring import operator_of
from guided_diffusion.operators import operator_class
from guided_diffusion.operators.masks import MASKS, cartesian_mask, measured_centre, sampling_mask
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


def mask_of(height=60, width=64, axis="columns", **changed):
    """The mask of a task file with these keys."""
    return sampling_mask(height, width, axis, operator_class("mri").check(changed))


@pytest.mark.parametrize(
    "changed, found",
    [
        ({"acceleration": 100}, "acceleration: expected 1 to the 64 lines, found 100"),
        ({"center_fraction": 0.3}, "center_fraction: 0.3 are 19 of 64 lines"),
        ({"center_fraction": 1.1}, "center_fraction: expected 0 to 1"),
        ({"mask": "poison"}, "mask: expected one of random, .*, poisson or a .npy file"),
        ({"mask": "gone.npy"}, "gone.npy: no such file"),
        ({"mask": "poisson", "acceleration": 5000}, "acceleration: expected 1 to the 3840 points"),
        ({"mask": "poisson", "center_fraction": 0.6}, "0.6 of each axis are 1368 of 3840 points"),
        (
            {"mask": "poisson", "acceleration": 16, "center_fraction": 0.249},
            "0.249 of each axis are 240 of 3840 points, and acceleration 16 leaves 240 in all",
        ),
        ({"mask": "poisson", "acceleration": 1.1}, "expected 1 or at least 4/π, found 1.1"),
        ({"mask": "equispaced", "acceleration": 2.5}, "equispaced .* an integer, found 2.5"),
        ({"mask": "equispaced", "acceleration": 1.4}, "equispaced .* an integer, found 1.4"),
        ({"mask": "magic", "acceleration": 3.5}, "magic .* expected an integer, found 3.5"),
        ({"mask_seed": -1}, r"mask_seed: expected a number in \[0, 4294967295\], found -1"),
        ({"mask_seed": 2**32}, r"mask_seed: .* 4294967295\], found 4294967296"),
        ({"mask_seed": ""}, "mask_seed: expected an integer or a text, found an empty one"),
        ({"mask": "poisson", "mask_seed": ""}, "mask_seed: expected an integer or a text"),
    ],
)
def test_impossible_masks(changed, found):
    with pytest.raises(UserError, match=found):
        mask_of(**changed)


@pytest.mark.parametrize("kind", ["random", "equispaced_fraction", "poisson"])
@pytest.mark.parametrize("acceleration", [1.3, 2.5])
def test_other_masks_measure_what_any_acceleration_says(kind, acceleration):
    counts = [
        mask_of(mask=kind, acceleration=acceleration, center_fraction=0.1, mask_seed=seed).mean()
        for seed in range(20 if kind == "random" else 2)
    ]
    assert 1 / np.mean(counts) == pytest.approx(acceleration, rel=0.05)


@pytest.mark.parametrize("kind", ["equispaced", "magic"])
def test_an_acceleration_of_whole_lines_may_be_written_as_a_float(kind):
    mask = mask_of(mask=kind, acceleration=4.0, center_fraction=0)
    assert mask.sum() == 64 / 4


def test_a_mask_of_no_line_is_refused():
    """Of 16 random lines two are expected at R = 8, and now and then there is none."""
    wanted = {"mask": "random", "acceleration": 8, "center_fraction": 0}
    empty = [s for s in range(40) if not (np.random.RandomState(s).uniform(size=16) < 1 / 8).any()]
    assert empty
    for seed in range(40):
        if seed in empty:
            with pytest.raises(UserError, match=f"of 16 lines, .* {seed}: nothing is"):
                mask_of(width=16, mask_seed=seed, **wanted)
        else:
            assert mask_of(width=16, mask_seed=seed, **wanted).any()


def test_the_largest_seed():
    assert mask_of(mask_seed=2**32 - 1).any()


@pytest.mark.parametrize(
    "array, found",
    [
        (np.ones(60), "60 lines, and k-space has 64"),
        (np.ones((64, 64)), "64×64 points, and k-space has 60×64"),
        (np.ones((2, 60, 64)), "expected lines or points, found 3 axes"),
        (np.zeros(64), "nothing is measured"),
        (np.arange(64), "expected 0 and 1 alone"),
        (np.array(["x"] * 64), "expected 0 and 1 alone"),
    ],
)
def test_files_that_hold_no_mask(tmp_path, array, found):
    path = tmp_path / "mask.npy"
    np.save(path, array)
    with pytest.raises(UserError, match=found):
        mask_of(mask=str(path))


def test_a_mask_from_a_file(tmp_path):
    path, mask = str(tmp_path / "mask.npy"), np.arange(64) % 4 == 0
    np.save(path, mask[:, None].astype(np.float32))
    assert np.array_equal(mask_of(mask=path), mask)


def test_a_file_that_is_written_anew_is_another_mask(tmp_path):
    """In one process, as in a notebook."""
    path = str(tmp_path / "mask.npy")
    config = OperatorConfig("mri", {"mask": path})
    measurement = Measurement(config, NoiseConfig("clean", 0.0), simulated=True)
    for every in (4, 3, 4):
        mask = np.arange(64) % every == 0
        np.save(path, mask)
        found = operator_of(measurement, (1, 60, 64), torch.device("cpu"))
        assert np.array_equal(found.mask, mask)
        assert operator_of(measurement, (1, 60, 64), torch.device("cpu")) is found


def test_points_from_a_file_that_are_whole_lines_are_lines(tmp_path):
    path, mask = str(tmp_path / "mask.npy"), np.random.default_rng(0).random((60, 64)) < 0.3
    for points in (mask, np.broadcast_to(mask[0], mask.shape)):
        np.save(path, points)
        assert np.array_equal(mask_of(mask=path), points if points is mask else mask[0])
    assert np.array_equal(mask_of(mask=path, axis="rows"), np.broadcast_to(mask[0], mask.shape))


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("height, width", [(64, 64), (64, 48)])
def test_lines_of_a_complete_file_whose_readout_was_filled_up(tmp_path, axis, height, width):
    """Measured is where the task takes the line and the file is not filled up with zeros."""
    row, column = np.mgrid[:height, :width]
    line, readout = (column, row) if axis == "columns" else (row, column)
    taken, held = line % 3 == 0, (readout >= 8) & (readout < readout.max() - 8)
    path = str(tmp_path / "mask.npy")
    np.save(path, taken[0] if axis == "columns" else taken[:, 0])
    acquisition = Acquisition(np.zeros((1, height, width), np.complex64), held, axis, 1.0, True)
    found = scan.mask_of(acquisition, operator_class("mri").check({"mask": path}))
    assert np.array_equal(found, taken & held)


class TestPoissonDisc:
    def points(self, height=120, width=100, **changed):
        changed = {"mask": "poisson", "acceleration": 4, "center_fraction": 0.1, **changed}
        return mask_of(height, width, **changed)

    def test_as_many_as_asked_for_and_the_centre(self):
        mask = self.points()
        assert mask.shape == (120, 100) and mask.sum() == 3000
        assert mask[54:66, 45:55].all()
        assert not mask[:5, :5].any() and not mask[-5:, -5:].any()

    def test_points_keep_a_distance_that_grows(self):
        """No two points but those of the centre are nearer than the law of distances lets them."""
        mask = self.points(acceleration=10)
        rows, cols = np.nonzero(mask)
        rho = np.hypot((rows - 60) / 60, (cols - 50) / 50)
        apart = np.hypot(rows[:, None] - rows, cols[:, None] - cols) + 1e9 * np.eye(len(rows))
        nearest = apart.min(axis=1)
        outside = (np.abs(rows - 60) > 6) | (np.abs(cols - 50) > 5)
        inner, outer = (nearest[outside & (rho > a) & (rho < b)] for a, b in ((0.1, 0.3), (0.7, 1)))
        assert outer.min() > 1.4 and outer.mean() > 1.4 * inner.mean()

    def test_density_falls_from_the_centre(self):
        mask = self.points(200, 200, acceleration=6)
        rho = np.hypot(*np.ogrid[-1:1:200j, -1:1:200j])
        shares = [mask[(rho >= a) & (rho < a + 0.2)].mean() for a in (0.1, 0.3, 0.5, 0.7)]
        assert shares == sorted(shares, reverse=True) and shares[0] > 2 * shares[-1]

    def test_the_seed_decides(self):
        assert np.array_equal(self.points(mask_seed="a.h5"), self.points(mask_seed="a.h5"))
        assert not np.array_equal(self.points(mask_seed=0), self.points(mask_seed=1))

    def test_no_acceleration_measures_all(self):
        assert self.points(acceleration=1).all()


def test_the_measured_centre_is_the_block_about_the_middle():
    mask = np.zeros(20, dtype=bool)
    mask[[1, 8, 9, 10, 11, 15]] = True
    assert measured_centre(mask) == ((8, 12),)
    mask[10] = False
    assert measured_centre(mask) == ((10, 10),)
    assert measured_centre(np.ones(20, dtype=bool)) == ((0, 20),)
    points = np.zeros((20, 30), dtype=bool)
    points[7:14, 10:18] = points[::3, ::3] = True
    assert measured_centre(points) == ((7, 14), (10, 18))
