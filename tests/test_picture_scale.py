"""Measured float pictures: what lies beyond [0, 1] or [-1, 1] is noise, or the picture's units."""

import os

import imageio.v3 as iio
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from tests.conftest import REPOSITORY
from tests.volume_files import items_of

SLICE = os.path.join(REPOSITORY, "data/mri_256_orig/colin27_t1_z104.png")


def slice_of(side):
    """A head in [0, 1] with black air, (side, side); the brightest 1/1000 is white."""
    pixels = iio.imread(SLICE).astype(float) / 255
    return pixels.reshape(side, 256 // side, side, 256 // side).mean(axis=(1, 3))


def rician(values, sigma):
    real, imaginary = sigma * np.random.default_rng(0).standard_normal((2, *values.shape))
    return np.hypot(values + real, imaginary)


def gaussian(values, sigma):
    return values + sigma * np.random.default_rng(0).standard_normal(values.shape)


def poisson(x, sigma):
    """Of noise that follows the brightness of x in [-1, 1]."""
    peak = 2 * (x + 1).mean() / sigma**2
    return 2 * np.random.default_rng(0).poisson((x + 1) / 2 * peak) / peak - 1


def normalised(values):
    return (values - values.mean()) / values.std()


def read(path, values):
    np.save(path / "a.npy", values.astype(np.float32))
    [item] = items_of({"root": str(path / "a.npy"), "measured": True})
    return item, item.read()[0]


AS_IT_IS = {
    "[-1, 1], little noise": lambda u: gaussian(2 * u - 1, 0.05),
    "[-1, 1]": lambda u: gaussian(2 * u - 1, 0.3),
    "[-1, 1], loud": lambda u: gaussian(2 * u - 1, 1.0),
    "[-1, 1], bright background": lambda u: gaussian(1 - 2 * u, 0.3),
    "[-1, 1], noise of photons": lambda u: poisson(2 * u - 1, 0.3),
    "[-1, 1], ringing": lambda u: np.where(u > 0.5, 1.05, 2 * u - 1),
    "[0, 1], about black": lambda u: gaussian(u, 0.1),
    "[0, 1], about black, loud": lambda u: gaussian(u, 0.5),
    "[0, 1]": lambda u: rician(u, 0.1),
    "[0, 1], loud": lambda u: rician(u, 0.5),
}


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("case", AS_IT_IS)
def test_noise_may_leave_the_range(tmp_path, case, side):
    values = AS_IT_IS[case](slice_of(side)).astype(np.float32)
    item, found = read(tmp_path, values)
    np.testing.assert_array_equal(found, 2 * values - 1 if case.startswith("[0") else values)
    assert item.note is None


IN_OTHER_UNITS = {
    "twice as bright": lambda u: rician(2.5 * u, 0.02),
    "twice as bright, noisy": lambda u: rician(2.5 * u, 0.5),
    "normalised": lambda u: normalised(u) - 0.9,
    "normalised, noisy": lambda u: gaussian(normalised(u), 0.2),
}


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("case", IN_OTHER_UNITS)
def test_brightness_beyond_the_range_is_another_unit_and_is_said(tmp_path, case, side):
    values = IN_OTHER_UNITS[case](slice_of(side)).astype(np.float32)
    item, found = read(tmp_path, values)
    low, white = np.percentile(values, (0.1, 99.9))
    black = 0 if values.min() >= 0 else low
    expected = np.clip(2 * (values - black) / (white - black) - 1, -1, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "than noise does" in item.note and f"white {white:.4g}" in item.note
    np.testing.assert_allclose(item.to_floats(found[None])[0], values, atol=1e-4)


def test_padding_counts_for_no_brightness(tmp_path):
    """It comes back as well; the note says both."""
    values = rician(2.5 * slice_of(256), 0.1)
    values[:60] = -1024
    item, found = read(tmp_path, values)
    assert (found[:60] == -1).all() and item.padding()[:60].all()
    assert "taken for padding" in item.note and "than noise does" in item.note
    np.testing.assert_allclose(item.to_floats(found[None])[0], values, atol=1e-4)
    values[60:] = gaussian(2 * slice_of(256) - 1, 0.5)[60:]
    _, found = read(tmp_path, values)
    np.testing.assert_allclose(found[60:], values[60:], atol=1e-6)


def test_smooth_noise_is_taken_for_noise_and_a_user_told(tmp_path):
    smooth = gaussian_filter(np.random.default_rng(0).standard_normal((256, 256)), 0.8)
    values = 2 * slice_of(256) - 1 + 0.5 / smooth.std() * smooth
    item, found = read(tmp_path, values)
    np.testing.assert_allclose(found, values, atol=1e-6)
    assert "taken for [-1, 1] and smooth noise" in item.note and item.padding() is None
