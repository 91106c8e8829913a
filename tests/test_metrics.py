"""Image metrics."""

import math

import numpy as np
import pytest

from util.metrics import high_frequency_ratio


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
