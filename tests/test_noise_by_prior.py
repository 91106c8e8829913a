"""Noise that the prior tells from anatomy, against a network that is optimal for its images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig, read_schedule
from guided_diffusion.item_noise import ItemSigmas
from guided_diffusion.measuring import sigma_of
from guided_diffusion.noise import get_noise
from guided_diffusion.noise_by_prior import FEW, sigma_by_prior
from guided_diffusion.noise_estimation import estimate_sigma
from guided_diffusion.restoration import FAST

GAUSSIAN, RICIAN = (get_noise(name, "auto") for name in ("gaussian", "rician"))
MU, STD = -0.2, 0.3  # each pixel is MU + STD or MU - STD, independently


class Binary:
    """What `Denoiser` is of such images: E[x|y], and what it says of its network."""

    network = type("Network", (), {"least_side": 8})
    device = torch.device("cpu")

    def __init__(self):
        self.shapes = []

    def __call__(self, y, sigma):
        self.shapes.append(tuple(y.shape))
        return MU + STD * torch.tanh(STD * (y - MU) / sigma**2)


def measured(shape, sigma, rician=False, seed=0):
    x, real, imaginary = np.random.default_rng(seed).standard_normal((3, *shape))
    y = MU + STD * np.sign(x) + sigma * real
    return (np.hypot(y + 1, sigma * imaginary) - 1 if rician else y).astype(np.float32)


@pytest.mark.parametrize("noise", [GAUSSIAN, RICIAN])
@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_anatomy_as_fine_as_the_pixels_is_no_noise(noise, sigma):
    """Where the network can tell it from noise, which at 0.2 it hardly does; never too little."""
    y = measured((1, 1, 96, 96), sigma, noise is RICIAN)
    first = noise.estimate(y[0])
    assert first == pytest.approx(np.hypot(sigma, STD), rel=0.1)
    found = sigma_by_prior(y, first, Binary(), noise)
    assert found == pytest.approx(sigma, rel=0.05) if sigma < 0.2 else sigma < found < first
    assert found == sigma_by_prior(y, first, Binary(), noise)


@pytest.mark.parametrize("wide", [20, 64])
def test_where_the_air_has_noise_the_network_is_not_asked(wide):
    y = measured((1, 1, 96, 96), 0.1)
    y[..., :wide] = -1
    assert sigma_by_prior(y, 0.3, Binary(), GAUSSIAN) == pytest.approx(0.1, rel=0.05)
    y[..., :wide] = np.random.default_rng(1).normal(-1, 0.1, (96, wide))
    air = np.zeros((96, 96), bool)
    air[:, :wide] = True
    for padding in (None, air):  # a mask of the head
        denoiser = Binary()
        assert sigma_by_prior(y, 0.3, denoiser, GAUSSIAN, padding) == 0.3 and not denoiser.shapes


@pytest.mark.parametrize("kept", [1.0, 0.9])
def test_a_network_that_takes_out_next_to_nothing_tells_nothing(kept):
    class Idle(Binary):
        def __call__(self, y, sigma):
            return MU + kept * (y - MU)

    y = measured((1, 1, 96, 96), 0.1)
    assert sigma_by_prior(y, 0.3, Idle(), GAUSSIAN) == 0.3


def test_some_of_many_slices_and_their_middle_are_looked_at():
    denoiser, y = Binary(), measured((11, 1, 40, 300), 0.1)
    padding = np.zeros((11, 40, 300), bool)
    padding[:, 5:30, 60:240:3] = True  # holes in the head
    y[padding[:, None]] = -1
    found = sigma_by_prior(y, 0.3, denoiser, GAUSSIAN, padding)
    assert found == pytest.approx(0.1, rel=0.12)
    assert set(denoiser.shapes) == {(FEW, 1, 40, 256)}
    small = measured((1, 1, 7, 96), 0.1)
    assert sigma_by_prior(small, 0.3, denoiser, GAUSSIAN) == 0.3


@pytest.mark.parametrize(
    ("operator", "channels", "helps"),
    [
        ({"name": "denoise"}, 1, True),
        ({"name": "super_resolution", "params": {"scale_factor": 2}}, 1, True),
        ({"name": "deblur"}, 1, False),  # has no anatomy as fine as the pixels
        ({"name": "denoise"}, 3, False),  # of other channels than the prior's images
    ],
)
def test_the_prior_helps_with_images_of_its_kind(operator, channels, helps, monkeypatch):
    monkeypatch.setattr("guided_diffusion.measuring.Denoiser", lambda *arguments: Binary())
    measurement = Measurement(OperatorConfig(**operator), NoiseConfig("gaussian", "auto"), False)
    prior = SimpleNamespace(channels=1)
    y = measured((1, channels, 96, 96), 0.1)
    found = sigma_of(y, measurement, prior, read_schedule(FAST))
    alone = estimate_sigma(y[0])
    assert found < 0.85 * alone if helps else found == alone


def test_an_estimated_map_is_lowered_in_the_head(monkeypatch):
    """Each time by the same: a volume's map is kept for all its slices."""
    monkeypatch.setattr("guided_diffusion.measuring.Denoiser", lambda *arguments: Binary())
    measurement = Measurement(OperatorConfig("denoise"), NoiseConfig("gaussian", "local"), False)
    y = measured((1, 96, 96), 0.1)
    y[..., :24] = -1
    kept = np.full(y.shape, 0.3, np.float32)
    sigmas = ItemSigmas(SimpleNamespace(channels=1), read_schedule(FAST), lambda item: kept)
    item = SimpleNamespace(name="a", padding=lambda: None, read=lambda: y)
    for _ in range(2):
        sigmas.find(item, torch.from_numpy(y), measurement)
        found = sigmas.take([item], torch.from_numpy(y)[None], measurement)
        assert found.shape == (1, 1, 96, 96)
        assert found[..., 40:].numpy() == pytest.approx(0.1, rel=0.05)
        assert found[..., :16].numpy() == pytest.approx(0.3)
