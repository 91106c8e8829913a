"""Estimated noise against the noise that was added, and the bias of magnitude images."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import rice

from util.errors import UserError
from util.noise_level import clipped_moments, correct_rician_bias, estimate_sigma, rician_moments

SIDE = 128


def head():
    """(1, H, W): smooth tissue with an edge in air that is nearly black, in [-1, 1]."""
    rows, cols = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    tissue = -0.4 + 0.25 * np.cos(9 * rows) * np.cos(7 * cols)
    return np.where(np.hypot(rows, cols) < 0.33, tissue, -0.97)[None]


def file_of(y, kind):
    if kind == "float":
        return y
    levels = {"uint8": 255, "uint16": 65535}[kind]
    return np.rint(np.clip((y + 1) / 2, 0, 1) * levels) / levels * 2 - 1


@pytest.mark.parametrize("kind", ["float", "uint16", "uint8"])
@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("rician", [False, True])
def test_sigma_is_found_also_where_the_file_cuts_it_off(sigma, kind, rician):
    rng = np.random.default_rng(1)
    y = head() + sigma * rng.standard_normal((1, SIDE, SIDE))
    if rician:
        y = np.hypot(y + 1, sigma * rng.standard_normal((1, SIDE, SIDE))) - 1
    assert estimate_sigma(file_of(y, kind), rician) == pytest.approx(sigma, rel=0.1)


def test_air_that_was_painted_black_has_no_say():
    y = head() + 0.1 * np.random.default_rng(2).standard_normal((1, SIDE, SIDE))
    y[:, :60] = -1
    assert estimate_sigma(np.clip(y, -1, 1)) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    "y",
    [
        np.full((1, 64, 64), 0.3),
        head()[:, :4, :4],
        np.linspace(-1, 1, 64)[None, None] * np.ones((1, 64, 1)),
    ],
)
def test_nothing_to_estimate_from(y):
    with pytest.raises(UserError, match=r"measurement\.noise\.sigma: auto"):
        estimate_sigma(y)


def test_moments_are_those_of_the_distributions():
    for t in (0.0, 0.7, 3.0):
        mean, std = rician_moments(t)
        assert (mean, std) == pytest.approx((rice.mean(t), rice.std(t)), rel=1e-6)
    for t in (-1.0, 0.0, 2.0):
        normal = lambda v, t=t: np.exp(-((v - t) ** 2) / 2) / np.sqrt(2 * np.pi)
        first = quad(lambda v, p=normal: v * p(v), 0, 12)[0]
        second = quad(lambda v, p=normal: v**2 * p(v), 0, 12)[0]
        mean, std = clipped_moments(t)
        assert (mean, std) == pytest.approx((first, np.sqrt(second - first**2)), rel=1e-5)


def test_a_magnitude_image_loses_its_bias():
    sigma, rng = 0.2, np.random.default_rng(3)
    for level in (-1.0, -0.7, 0.2):
        signal = np.full((1, 1, SIDE, SIDE), level + 1)
        real = signal + sigma * rng.standard_normal(signal.shape)
        y = torch.from_numpy(np.hypot(real, sigma * rng.standard_normal(signal.shape)) - 1)
        before, after = (v.mean().item() - level for v in (y, correct_rician_bias(y, sigma)))
        assert abs(after) < 0.1 * abs(before) + 0.002
    rows = torch.cat([y, y])
    each = torch.tensor([0.2, 0.1], dtype=torch.float64).reshape(2, 1, 1, 1)
    torch.testing.assert_close(correct_rician_bias(rows, each)[1:], correct_rician_bias(y, 0.1))
    assert torch.equal(correct_rician_bias(y, 0.0).round(decimals=5), y.round(decimals=5))
