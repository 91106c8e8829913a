"""Image metrics."""

import math
import sys

import numpy as np
import pytest
from scipy.signal import convolve2d

from util.errors import UserError
from util.metrics import (
    METRICS,
    calibration,
    half_width,
    high_frequency_ratio,
    image_metrics,
    interval,
)


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
    wider = calibration(narrow, draws[0], factor=2)
    assert wider["in_90"] == pytest.approx(0.9, abs=0.02) and wider["in_50"] > 0.48
    low, high = interval(narrow.mean(axis=0), narrow, factor=2)
    held = (low <= draws[0]) & (draws[0] <= high)
    assert held.mean() == pytest.approx(wider["in_90"], abs=1e-6)


def test_an_interval_holds_the_image_that_it_is_about():
    """Above white, as scans go, and where samples' magnitudes are brighter than their mean's."""
    samples = np.array([-0.9, -0.5, 0.2, 1.4])[:, None, None, None] + np.zeros((4, 1, 1, 3))
    samples[:, 0, 0, 1:] = [[0.9, -1.0], [1.3, -1.0], [1.5, -1.0], [1.7, -1.0]]
    restored = np.array([[[-0.95, 1.3, -1.0]]])
    low, high = interval(restored, samples, factor=0.5)
    half = 0.5 * 2.353363 * np.sqrt(1.25) * np.std([-0.9, -0.5, 0.2, 1.4], ddof=1)
    assert low[0, 0, 0] == -1 and high[0, 0, 0] == pytest.approx(-0.95 + half, rel=1e-5)
    half = 0.5 * 2.353363 * np.sqrt(1.25) * np.std([0.9, 1.3, 1.5, 1.7], ddof=1)
    assert [low[0, 0, 1], high[0, 0, 1]] == pytest.approx([1.3 - half, 1.3 + half], rel=1e-5)
    assert low[0, 0, 2] == high[0, 0, 2] == -1


def test_half_of_an_interval_is_student_s():
    """Quantiles of the table: t_0.95 of 3 degrees of freedom is 2.353363, t_0.75 of 1 is 1."""
    assert half_width(4) == pytest.approx(2.353363 * math.sqrt(1.25), rel=1e-6)
    assert half_width(2, factor=1.3, share=0.5) == pytest.approx(1.3 * math.sqrt(1.5))


def test_calibration_leaves_the_air_out():
    truth = np.full((1, 8, 8), -1.0)
    truth[0, 4] = 0.5
    samples = np.stack([truth - 0.1, truth + 0.1])
    samples[:, 0, :4] = 1.0  # a certain error, in the air only
    assert calibration(samples, truth)["in_90"] == 1


def test_a_mask_leaves_out_what_lies_outside_it():
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (1, 48, 48))
    mask = np.zeros((48, 48), bool)
    mask[8:40, 8:40] = True
    x = truth + 0.1 * rng.standard_normal(truth.shape)
    wrong = np.where(mask, x, 1.0)
    inside = image_metrics(x[:, 8:40, 8:40], truth[:, 8:40, 8:40])
    for image in (x, wrong):  # whatever the outside is
        found = image_metrics(image, truth, mask)
        assert found["psnr"] == pytest.approx(inside["psnr"])
        assert found["nmse"] == pytest.approx(inside["nmse"])
    apart = [image_metrics(image, truth, mask)["haarpsi"] for image in (x, wrong)]
    assert apart[0] == pytest.approx(apart[1])
    assert image_metrics(x, truth, np.ones_like(mask))["ssim"] == pytest.approx(
        image_metrics(x, truth)["ssim"], abs=0.01
    )  # the whole takes no windows that reach over the border
    half = mask.copy()
    half[:, :24] = False
    only_left = np.where(half, truth, x)
    assert image_metrics(only_left, truth, half)["psnr"] == np.inf


def test_haarpsi_of_a_volume_is_the_mean_of_its_slices():
    volume = np.random.default_rng(2).uniform(-1, 1, (2, 19, 24, 24))  # more than at once
    each = [image_metrics(x[None], t[None])["haarpsi"] for x, t in zip(*volume, strict=True)]
    assert image_metrics(*volume)["haarpsi"] == pytest.approx(np.mean(each), rel=1e-9)


def test_haarpsi_against_its_definition():
    """Reisenhofer et al. 2018, eq. 7-12: C = 30, α = 4.2, weights of the third scale."""
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 1, 32, 32))
    halves = [255 * (v[0].reshape(16, 2, 16, 2).mean(axis=(1, 3)) + 1) / 2 for v in images]

    def coefficients(image, scale):
        size = 2**scale
        kernel = np.ones((size, size)) / size  # 2^-scale, and its lower half negative
        kernel[size // 2 :] *= -1
        full = [np.abs(convolve2d(image, k)) for k in (kernel, kernel.T)]
        first = size // 2  # of the middle part, as MATLAB's "same" cuts it
        return [v[first : first + 16, first : first + 16] for v in full]

    above = below = 0.0
    for direction in (0, 1):
        a, b = ([coefficients(v, s)[direction] for s in (1, 2, 3)] for v in halves)
        pairs = zip(a[:2], b[:2], strict=True)
        local = sum((2 * p * q + 30) / (p**2 + q**2 + 30) for p, q in pairs)
        weight = np.maximum(a[2], b[2])
        above += np.sum(weight / (1 + np.exp(-4.2 * local / 2)))
        below += np.sum(weight)
    expected = (np.log(above / (below - above)) / 4.2) ** 2
    assert image_metrics(*images)["haarpsi"] == pytest.approx(expected, rel=1e-6)
    assert math.isnan(image_metrics(*images[:, :, :12])["haarpsi"])


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    """Without one that fits, `import piq` raises RuntimeError or ImportError."""
    monkeypatch.setitem(sys.modules, "piq", None)
    x = np.zeros((1, 32, 32))
    with pytest.raises(UserError, match="torchvision"):
        image_metrics(x, x)


def test_haarpsi_of_equal_images_is_one():
    """Also of black ones, which have no contrast, and beside others in a volume."""
    black = np.full((1, 32, 32), -1.0)
    assert image_metrics(black, black)["haarpsi"] == 1
    x, truth = np.random.default_rng(3).uniform(-1, 1, (2, 1, 32, 32))
    other = image_metrics(x, truth)["haarpsi"]
    both = image_metrics(np.concatenate([black, x]), np.concatenate([black, truth]))["haarpsi"]
    assert both == pytest.approx((1 + other) / 2)


@pytest.mark.filterwarnings("error")
def test_an_image_of_which_no_pixel_counts_has_no_metrics():
    x = np.zeros((1, 16, 16), np.float32)
    found = image_metrics(x, x, np.zeros((16, 16), bool))
    assert set(found) == set(METRICS) and all(np.isnan(v) for v in found.values())
