"""Samples of the prior alone: their mean intensity, which the network does not see, and power."""

from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from guided_diffusion.unconditional import PriorStep
from tests.conftest import LINEAR, rnd, write_yaml

MEAN, SPREAD, SIDE = -0.7, 0.2, 16
DIFFUSION = create_sampler(**LINEAR)
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


def test_the_power_of_the_mean_is_its_own_where_it_was_measured():
    """The other powers have no say then; without it the lowest frequency's stands in."""
    expected = prediction(STATISTICS)[2]
    other = replace(STATISTICS, powers=tuple(9 * p for p in STATISTICS.powers))
    measured = prediction(replace(other, mean_power=(SPREAD * SIDE) ** 2))[2]
    torch.testing.assert_close(measured, expected, atol=1e-6, rtol=0)
    assert (prediction(other)[2][1] - expected[1]).abs().max() > 0.01


def test_the_next_state_follows_it_and_nothing_else_changes():
    diffusion, x, (state, x_0) = prediction(STATISTICS)
    steps = torch.full((2,), 990)
    torch.testing.assert_close(state, diffusion.q_posterior_mean(x_0, x, steps))
    plain = diffusion.p_sample(without_mean, x, 990, torch.zeros_like)[1]
    apart = x_0 - plain
    constant = apart.mean((1, 2, 3), keepdim=True).expand_as(apart)
    torch.testing.assert_close(apart, constant, atol=1e-4, rtol=0)


def test_without_statistics_of_its_own_it_is_the_network_s():
    diffusion, x, (state, x_0) = prediction(NATURAL_IMAGES)
    expected = GaussianDiffusion.p_sample(diffusion, without_mean, x, 990, torch.zeros_like)
    assert torch.equal(state, expected[0]) and torch.equal(x_0, expected[1])


P = 0.09  # variance of a Gaussian image's pixels


def too_much_noise(x, t):
    """A network that takes the noise of those images for a tenth larger than it is."""
    a = torch.from_numpy(DIFFUSION.alphas_cumprod)[t].float()[:, None, None, None]
    noise = (1 - a).sqrt() / (a * P + 1 - a) * x
    return torch.cat([1.1 * noise, torch.zeros_like(x)], dim=1)


@pytest.mark.parametrize("steps", [400, 1000])
def test_scaled_noise_gives_samples_the_power_that_too_large_a_noise_took(steps):
    """The same λ, whatever the number of steps."""
    schedule = {**LINEAR, "clip_denoised": False, "timestep_respacing": str(steps)}
    diffusion = create_sampler(**{**schedule, "model_var_type": "fixed_small"})

    def power(scale):
        generator = torch.Generator().manual_seed(0)

        def randn_like(x):
            return torch.randn(x.shape, generator=generator)

        x = torch.randn(8, 1, 32, 32, generator=generator)
        step = PriorStep(NATURAL_IMAGES, epsilon_scale=scale)
        for i in reversed(range(steps)):
            x, _ = step.step(diffusion, too_much_noise, x, i, randn_like)
        return float(x.var())

    assert power(1.0) < 0.85 * P
    assert power(1.1) == pytest.approx(P, rel=0.12)  # √(2/8192), and what the steps lose


@pytest.mark.parametrize("statistics", [NATURAL_IMAGES, STATISTICS])
@pytest.mark.parametrize("clip", [False, True])
def test_the_scaled_noise_is_the_published_step_s(statistics, clip):
    """ε/λ for ε, then x̂_0, which is clipped, then the means."""
    diffusion = create_sampler(**{**LINEAR, "clip_denoised": clip})
    x, scale, t = rnd((2, 1, SIDE, SIDE), 1), 1.03, 300
    found = PriorStep(statistics, scale).step(diffusion, without_mean, x, t, torch.zeros_like)

    def scaled(x, t):
        noise, values = without_mean(x, t).chunk(2, dim=1)
        return torch.cat([noise / scale, values], dim=1)

    expected = PriorStep(statistics).step(diffusion, scaled, x, t, torch.zeros_like)
    torch.testing.assert_close(found, expected)


def test_its_parameter_is_the_task_file_s(tiny_run, capsys):
    write_yaml("vanilla.yaml", {"conditioning": {"method": "vanilla"}})

    def run(folder, *changes):
        flags = ("--task_config", "vanilla.yaml", "--limit", "1", "--save_dir", folder)
        return tiny_run(*flags, *(part for change in changes for part in ("--set", change)))

    key = "conditioning.params.epsilon_scale"
    assert run("plain") == run("one", f"{key}=1.0") == run("two", f"{key}=1.5") == 0
    sample = "tiny/vanilla/recon/sample_000.png"
    plain, one, two = (iio.imread(f"{folder}/{sample}") for folder in ("plain", "one", "two"))
    assert np.array_equal(plain, one) and not np.array_equal(plain, two)
    assert run("three", f"{key}=0") == 2
    assert f"{key}: expected a positive number, found 0" in capsys.readouterr().err


@pytest.mark.parametrize("t", [300, 800, 990])
def test_the_rim_is_a_witness_as_good_as_the_noise_lets_it_be(t):
    """On a grid: the mean as x_t tells it, times how well the rim of x̂_0 then fits its own law."""
    rim, spread = -0.95, 0.03
    diffusion, x, (_, x_0) = prediction(replace(STATISTICS, rim=(rim, spread)), t=t)
    a = float(diffusion.alphas_cumprod[t])
    noise = (1 - a) / a / SIDE**2
    error = 1 / (1 / SPREAD**2 + 1 / noise)
    grid = np.linspace(-3, 3, 600001)
    for row, found in zip(x, x_0, strict=True):
        seen, level = float(row.double().mean()) / a**0.5, float(found.double().mean())
        at_rim = (float(found[:, [0, -1]].sum()) + float(found[:, 1:-1, [0, -1]].sum())) / 60
        surprise = ((grid - MEAN) / SPREAD) ** 2 + (seen - grid) ** 2 / noise
        surprise += (grid + at_rim - level - rim) ** 2 / (error + spread**2)
        weights = np.exp((surprise.min() - surprise) / 2)
        assert level == pytest.approx((weights * grid).sum() / weights.sum(), abs=2e-4)


def test_samples_have_black_air():
    """Of a square that is grey or white in black air, by a network that knows it but no means."""
    squares = torch.full((2, 1, SIDE, SIDE), -1.0)
    squares[0, :, 4:12, 4:12], squares[1, :, 4:12, 4:12] = 0.0, 1.0
    shapes = squares - squares.mean((1, 2, 3), keepdim=True)
    statistics = PriorStatistics.measure([(1, x.numpy()) for x in squares], "a test")
    diffusion = create_sampler(**{**LINEAR, "clip_denoised": False, "timestep_respacing": "100"})

    def network(x, t):
        a = torch.from_numpy(DIFFUSION.alphas_cumprod)[t].float()[:, None, None, None]
        apart = x - x.mean((1, 2, 3), keepdim=True)
        distance = (apart[:, None] - a[:, None] ** 0.5 * shapes).square().sum((2, 3, 4))
        weights = (distance / (2 * a[:, 0, 0] - 2)).softmax(dim=1)
        x_0 = torch.einsum("nk,kchw->nchw", weights, shapes)
        noise = (apart - a**0.5 * x_0) / (1 - a) ** 0.5
        return torch.cat([noise, torch.zeros_like(x)], dim=1)

    def air(statistics):
        generator = torch.Generator().manual_seed(0)

        def randn_like(x):
            return torch.randn(x.shape, generator=generator)

        x = torch.randn(16, 1, SIDE, SIDE, generator=generator)
        step = PriorStep(statistics)
        for i in reversed(range(100)):
            x, _ = step.step(diffusion, network, x, i, randn_like)
        assert ((x[:, 0, 8, 8] - x[:, 0, 0, 0]) > 0.7).all()  # all are squares
        return x[:, 0, 0]

    assert (air(statistics) + 1).abs().max() < 0.15
    assert (air(replace(statistics, rim=None)) + 1).abs().max() > 0.3


@pytest.mark.parametrize("known", [{"rim": (-0.99, 0.02)}, {"mean_power": 200.0}])
def test_only_samples_of_the_prior_depend_on_the_rim_and_the_means(tiny_run, capsys, known):
    """So that restorations that were begun before these were measured go on."""
    law = PriorStatistics(-0.7, (1.0, 400.0), (300.0, 300.0 / 400**2), "a test")
    write_yaml("vanilla.yaml", {"conditioning": {"method": "vanilla"}})
    runs = {
        "task": ("--method", "spectral", "--limit", "1"),
        "vanilla": ("--task_config", "vanilla.yaml", "--limit", "1"),
    }
    for added, statuses in (({}, (0, 0)), (known, (0, 2))):
        replace(law, **added).save("tiny.json")
        found = [tiny_run(*flags, "--save_dir", name) for name, flags in runs.items()]
        assert tuple(found) == statuses
    assert "another statistics" in capsys.readouterr().err
