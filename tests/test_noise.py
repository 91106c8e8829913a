"""Estimated noise against the noise that was added, and the bias of magnitude images."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm, rice, skew

from guided_diffusion.noise import rician_to_gaussian, rician_to_normal
from guided_diffusion.noise_estimation import (
    clipped_moments,
    estimate_sigma,
    estimate_sigma_map,
    rician_moments,
)
from util.errors import UserError

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


@pytest.mark.parametrize("cut_off", [False, True])
def test_noise_in_air_is_not_underestimated(cut_off):
    """Of few pixels, of which chance makes some groups look a little brighter than air."""
    x, found = head()[:, ::2, ::2], []
    for seed in range(20):
        n = 0.1 * np.random.default_rng(seed).standard_normal((2, *x.shape))
        y = np.clip(x + n[0], -1, 1) if cut_off else np.hypot(x + 1 + n[0], n[1]) - 1
        found.append(estimate_sigma(y, rician=not cut_off) / 0.1)
    assert np.mean(found) == pytest.approx(1, abs=0.03)


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
    reason = r"measurement\.noise\.sigma: (an estimate needs|no noise is found)"
    with pytest.raises(UserError, match=reason):
        estimate_sigma(y)


def test_moments_are_those_of_the_distributions():
    for t in (0.0, 0.7, 3.0):
        mean, std = rician_moments(t)
        assert (mean, std) == pytest.approx((rice.mean(t), rice.std(t)), rel=1e-6)
    for t in (-1.0, 0.0, 2.0):

        def normal(v, t=t):
            return np.exp(-((v - t) ** 2) / 2) / np.sqrt(2 * np.pi)

        first = quad(lambda v, p=normal: v * p(v), 0, 12)[0]
        second = quad(lambda v, p=normal: v**2 * p(v), 0, 12)[0]
        mean, std = clipped_moments(t)
        assert (mean, std) == pytest.approx((first, np.sqrt(second - first**2)), rel=1e-5)


def magnitudes(level, sigma):
    rng, signal = np.random.default_rng(3), np.full((1, 1, SIDE, SIDE), level + 1)
    real, imaginary = sigma * rng.standard_normal((2, *signal.shape))
    return torch.from_numpy(np.hypot(signal + real, imaginary) - 1)


def test_quantiles_of_rice_become_those_of_the_normal_distribution():
    z = np.array([-2.0, -0.5, 0.0, 1.0, 4.0])
    for signal in (0.0, 0.5, 3.0, 7.0):
        magnitude = rice.ppf(norm.cdf(z), signal)
        assert rician_to_normal(magnitude, np.full(5, signal)) == pytest.approx(z, abs=1e-6)
    magnitude = rice.ppf(norm.cdf(z), 12.0)
    assert rician_to_normal(magnitude, np.full(5, 12.0)) == pytest.approx(z, abs=0.05)
    assert np.isfinite(rician_to_normal(np.array([0.0, 40.0]), np.zeros(2))).all()


@pytest.mark.parametrize("level", [-1.0, -0.7, 0.2])
def test_a_magnitude_image_gets_gaussian_noise(level):
    sigma, y = 0.2, magnitudes(level, 0.2)
    before, after = (v.mean().item() - level for v in (y, rician_to_gaussian(y, sigma)))
    assert abs(after) < 0.1 * abs(before) + 0.002
    noise = rician_to_gaussian(y, sigma).numpy() - level
    assert noise.std() == pytest.approx(sigma, rel=0.04)
    assert abs(skew(noise, axis=None)) < 0.1


def test_what_was_painted_black_stays_black():
    y = magnitudes(-0.5, 0.1)
    y[..., : SIDE // 2] = -1
    gaussian = rician_to_gaussian(y, 0.1)
    assert (gaussian[..., : SIDE // 2] == -1).all()
    assert gaussian[..., SIDE // 2 + 3 :].mean().item() == pytest.approx(-0.5, abs=0.01)


def test_each_image_has_its_own_rician_noise():
    y = magnitudes(-0.9, 0.2)
    each = torch.tensor([0.2, 0.1], dtype=torch.float64).reshape(2, 1, 1, 1)
    both = rician_to_gaussian(torch.cat([y, y]), each)
    torch.testing.assert_close(both[:1], rician_to_gaussian(y, 0.2), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1:], rician_to_gaussian(y, 0.1), atol=1e-5, rtol=0)
    torch.testing.assert_close(rician_to_gaussian(y, 0.0), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rician", [False, True])
def test_padding_says_nothing_of_the_noise(rician):
    """Here every other pixel of a quarter is no data: their steps to it are no noise."""
    y = -0.2 + 0.1 * np.random.default_rng(0).standard_normal((1, 64, 64))
    padding = np.zeros((64, 64), bool)
    padding[:32, :32:2] = True
    y[:, padding] = -1
    assert estimate_sigma(y, rician, padding) == pytest.approx(0.1, rel=0.1)


def bump(shape):
    """σ that is twice as large in the middle of (C, H, W) as far from it."""
    rows, cols = (np.arange(n) / n - 0.5 for n in shape[1:])
    distance = np.hypot(rows[:, None], cols)
    return np.broadcast_to(0.05 * (1 + np.exp(-((distance / 0.25) ** 2))), shape)


@pytest.mark.parametrize("depth", [1, 20])
@pytest.mark.parametrize("rician", [False, True])
@pytest.mark.parametrize("varies", [False, True])
def test_a_map_follows_noise_that_varies_and_is_flat_where_it_does_not(depth, rician, varies):
    x = np.broadcast_to(head(), (depth, SIDE, SIDE))
    sigma = bump(x.shape) if varies else np.full(x.shape, 0.07)
    real, imaginary = np.random.default_rng(0).standard_normal((2, *x.shape)) * sigma
    y = np.hypot(x + 1 + real, imaginary) - 1 if rician else x + real
    found = estimate_sigma_map(y.astype(np.float32), (1, 1.5, 1.5), rician)
    assert found.shape == x.shape and found.dtype == np.float32
    ratio = (found / sigma)[x > -0.9]
    assert ratio.mean() == pytest.approx(1, abs=0.06)
    limits = {(1, False): 0.06, (1, True): 0.09, (20, False): 0.02, (20, True): 0.06}
    assert ratio.std() < limits[depth, varies]
    if varies:  # one number for all is a quarter too low in the head
        assert (estimate_sigma(y, rician) / sigma)[x > -0.9].mean() < 0.8


def test_padding_and_contrasts_are_left_out_of_a_map():
    """The right half is padding with strong noise; two contrasts have their own σ."""
    x = np.broadcast_to(head(), (2, SIDE, SIDE))
    strength = np.array([0.05, 0.1])[:, None, None]
    y = x + strength * np.random.default_rng(0).standard_normal(x.shape)
    padding = np.zeros((SIDE, SIDE), bool)
    padding[:, SIDE // 2 :] = True
    y[:, padding] += np.random.default_rng(1).standard_normal((2, padding.sum()))
    found = estimate_sigma_map(y, (np.inf, 1, 1), padding=padding)
    assert found[:, ~padding] / strength[:, 0] == pytest.approx(1, abs=0.15)


def test_too_small_an_image_has_one_sigma_and_one_without_noise_none():
    y = 0.1 * np.random.default_rng(0).standard_normal((1, 20, 20))
    found = estimate_sigma_map(y, (1, 1, 1))
    assert np.ptp(found) == 0 and found[0, 0, 0] == pytest.approx(estimate_sigma(y))
    with pytest.raises(UserError, match="needs at least"):
        estimate_sigma_map(np.zeros((1, 64, 64)), (1, 1, 1))
