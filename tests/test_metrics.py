"""Image metrics."""

import math

import numpy as np
import pytest

from util.metrics import calibration, high_frequency_ratio


def wave(shape, rows, cols):
    """A cosine of that many periods along each axis, (1, *shape)."""
    i, j = np.indices(shape)
    return np.cos(2 * np.pi * (rows * i / shape[0] + cols * j / shape[1]))[None]


def test_the_ratio_is_of_energies_above_half_of_nyquist():
    shape = (32, 48)
    fine, diagonal, coarse = wave(shape, 0, 13), wave(shape, 6, 9), wave(shape, 8, 0)
    truth = 0.3 * fine + 0.2 * diagonal + coarse  # 13/48 and √(6²/32² + 9²/48²) are above 1/4
    assert high_frequency_ratio(truth, truth) == 1
    assert high_frequency_ratio(-0.5 + truth / 2, truth) == pytest.approx(0.25)
    assert high_frequency_ratio(coarse, truth) == pytest.approx(0, abs=1e-12)
    without = 0.3**2 / (0.3**2 + 0.2**2)
    assert high_frequency_ratio(0.3 * fine, truth) == pytest.approx(without)


def test_white_noise_adds_its_share_of_the_energy():
    rng = np.random.default_rng(0)
    truth, noise = rng.standard_normal((2, 3, 64, 64))
    noise *= 0.5
    assert high_frequency_ratio(truth + noise, truth) == pytest.approx(1.25, abs=0.03)


def test_a_truth_without_high_frequencies_has_no_ratio():
    assert math.isnan(high_frequency_ratio(np.ones((1, 8, 8)), np.zeros((1, 8, 8))))


def test_calibration_of_draws_from_the_truth_s_own_distribution():
    """Where truth and samples are alike, the intervals hold what they say, and no rescaling."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.05, 0.2, (1, 200, 200))
    draws = 0.3 + spread * rng.standard_normal((9, 1, 200, 200))
    found = calibration(draws[1:], draws[0])
    assert found["in_50"] == pytest.approx(0.5, abs=0.02)
    assert found["in_90"] == pytest.approx(0.9, abs=0.02)
    assert found["rescale"] == pytest.approx(1, abs=0.05)
    narrow = 0.3 + (draws[1:] - 0.3) / 2
    assert calibration(narrow, draws[0])["rescale"] == pytest.approx(2, rel=0.15)


def test_calibration_leaves_the_air_out():
    truth = np.full((1, 8, 8), -1.0)
    truth[0, 4] = 0.5
    samples = np.stack([truth - 0.1, truth + 0.1])
    samples[:, 0, :4] = 1.0  # a certain error, in the air only
    assert calibration(samples, truth)["in_90"] == 1
