"""Samples of the prior alone: their mean intensity, which the network does not see."""

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from guided_diffusion.unconditional import PriorStep
from tests.conftest import LINEAR, rnd

MEAN, SPREAD, SIDE = -0.7, 0.2, 16
STATISTICS = PriorStatistics(MEAN, (1.0, 300.0), ((SPREAD * SIDE) ** 2, 1e-3), "a test")


def without_mean(x, t):
    """As group normalisation leaves it: all noise is told but the mean's."""
    return torch.cat([x - x.mean(dim=(1, 2, 3), keepdim=True), torch.zeros_like(x)], dim=1)


def prediction(statistics, channels=1, t=990, clip=False):
    diffusion = create_sampler(**{**LINEAR, "clip_denoised": clip})
    x = 0.05 + rnd((2, channels, SIDE, SIDE), 1)
    zero = torch.zeros_like
    return diffusion, x, PriorStep(statistics).step(diffusion, without_mean, x, t, zero)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mean_is_that_of_bayes_on_a_grid(channels):
    diffusion, x, (_, x_0) = prediction(STATISTICS, channels)
    a = float(diffusion.alphas_cumprod[990])
    grid = np.linspace(-3, 3, 60001)
    spread = np.sqrt((1 - a) / (channels * SIDE**2))
    for row, found in zip(x, x_0, strict=True):
        seen = float(row.double().mean())
        surprise = ((grid - MEAN) / SPREAD) ** 2 + ((seen - a**0.5 * grid) / spread) ** 2
        weights = np.exp((surprise.min() - surprise) / 2)
        expected = (weights * grid).sum() / weights.sum()
        assert float(found.mean()) == pytest.approx(expected, abs=2e-4)
        assert abs(expected - MEAN) < 0.1 < abs(seen / a**0.5 - MEAN)


def test_the_next_state_follows_it_and_nothing_else_changes():
    diffusion, x, (state, x_0) = prediction(STATISTICS)
    steps = torch.full((2,), 990)
    torch.testing.assert_close(state, diffusion.q_posterior_mean(x_0, x, steps))
    plain = diffusion.p_sample(without_mean, x, 990, torch.zeros_like)[1]
    apart = x_0 - plain
    constant = apart.mean((1, 2, 3), keepdim=True).expand_as(apart)
    torch.testing.assert_close(apart, constant, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("statistics", "t"), [(STATISTICS, 100), (NATURAL_IMAGES, 990)])
def test_where_the_noise_tells_it_or_nothing_is_known_of_it_it_is_the_network_s(statistics, t):
    diffusion, x, (state, x_0) = prediction(statistics, t=t)
    expected = GaussianDiffusion.p_sample(diffusion, without_mean, x, t, torch.zeros_like)
    assert torch.equal(state, expected[0]) and torch.equal(x_0, expected[1])
