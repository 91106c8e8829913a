"""Samples of the few-step method beside the posterior of a Gaussian."""

import math

import pytest
import torch

from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods.spectral_sample import SpectralSample
from guided_diffusion.methods.start import start_state, useful_levels
from tests.spectral_cases import CONFIG, HEADS, SIZE, WHITE, dct_2d, matrix_of, noise, operator_of
from util.random import sample_random


class TestSample:
    """Images that are Gaussian with a known spectrum have a known posterior."""

    @staticmethod
    def draw(operator, y, sigma, statistics, count, start, draws):
        """`count` samples by 40 evaluations of the optimal denoiser, (count, 1, SIZE, SIZE)."""
        levels = useful_levels(operator, sigma, sample=True)
        diffusion = create_sampler(
            **CONFIG, timestep_respacing="logsnr40", start=start, levels=levels
        )
        alpha_bar = dict(zip(diffusion.timestep_map, diffusion.alphas_cumprod, strict=True))
        basis, S = dct_2d(SIZE), statistics.power_spectrum(SIZE, SIZE).flatten()
        mean = statistics.mean_intensity

        def denoise(x, timesteps):
            a = alpha_bar[int(timesteps[0])]
            gain = math.sqrt(a) * S / (a * S + 1 - a)
            rest = (x - math.sqrt(a) * mean).flatten(2) @ basis.mT
            return mean + ((gain * rest) @ basis).reshape(x.shape)

        y = y.expand(count, *y.shape[1:])
        x_T = draws(noise(count, *operator.in_shape))
        if start == "auto":
            x_T = start_state(operator, y, sigma, diffusion, x_T, statistics)
        method = SpectralSample(operator, y, sigma, statistics)
        return diffusion.p_sample_loop(denoise, x_T, method.step, draws)

    @staticmethod
    def problem(name, statistics, sigma):
        """(operator, y, mean and covariance of the posterior) of an image of these statistics."""
        operator, basis = operator_of(name), dct_2d(SIZE)
        S = statistics.power_spectrum(SIZE, SIZE).flatten()
        prior = basis.mT @ torch.diag(S) @ basis
        prior = torch.block_diag(*[prior] * operator.in_shape[0])
        A = matrix_of(operator)
        errors = noise(operator.in_shape[0], SIZE**2) * S.sqrt()
        truth = statistics.mean_intensity + (errors @ basis).flatten()
        y = A @ truth + sigma * noise(len(A), seed=1)
        gain = (
            prior
            @ A.mT
            @ torch.linalg.inv(A @ prior @ A.mT + sigma**2 * torch.eye(len(A), dtype=torch.float64))
        )
        mean = statistics.mean_intensity + gain @ (y - statistics.mean_intensity * A.sum(dim=1))
        return operator, y.reshape(1, *operator.out_shape), mean, prior - gain @ A @ prior

    @pytest.mark.parametrize(
        ("name", "statistics", "start", "within"),
        [
            ("denoise", HEADS, "", 0.04),
            ("denoise", HEADS, "auto", 0.1),  # y itself, and as exact as the reverse steps are
            ("color", HEADS, "", 0.04),
            ("mirror", HEADS, "", 0.04),
            ("sr", WHITE, "auto", 0.04),
            ("gauss", WHITE, "auto", 0.04),
        ],
    )
    def test_its_mean_and_covariance_are_those_of_the_posterior(
        self, name, statistics, start, within
    ):
        """Where the correction is diagonal: with a white spectrum, for every operator."""
        sigma = 0.3
        operator, y, mean, covariance = self.problem(name, statistics, sigma)
        generator = torch.Generator().manual_seed(3)

        def draws(x):
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

        found = self.draw(operator, y, sigma, statistics, 2000, start, draws).flatten(1)
        directions = torch.linalg.eigh(covariance)
        std = directions.eigenvalues.clamp(min=0).sqrt()
        open_ = std > 0.2 * sigma  # what lies below the last level is left at its mean
        assert open_.sum() > 20
        spread = ((found - mean) @ directions.eigenvectors)[:, open_] / std[open_]
        assert spread.mean(dim=0).square().mean().sqrt() < 0.05  # 0.022 is sampling error
        assert spread.std(dim=0).mean().item() == pytest.approx(1, abs=within)

    @pytest.mark.parametrize("name", ["sr", "gauss"])
    def test_elsewhere_it_is_near_the_posterior(self, name):
        """The spectrum of heads: correlations between singular directions are left out."""
        sigma = 0.3
        operator, y, mean, covariance = self.problem(name, HEADS, sigma)
        generator = torch.Generator().manual_seed(3)

        def draws(x):
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

        found = self.draw(operator, y, sigma, HEADS, 1000, "auto", draws).flatten(1)
        ratio = found.var(dim=0).mean() / covariance.diagonal().mean()
        bias = (found.mean(dim=0) - mean).square().mean() / covariance.diagonal().mean()
        assert bias < 0.01
        assert 0.85 < ratio < 1.1

    @pytest.mark.parametrize(
        ("name", "statistics", "start"),
        [("denoise", HEADS, ""), ("sr", WHITE, "auto"), ("gauss", WHITE, "auto")],
    )
    def test_the_mean_of_two_mirrored_samples_is_the_posterior_s(self, name, statistics, start):
        """A Gaussian's denoiser is linear, so that of their noise nothing is left."""
        sigma = 0.3
        operator, y, mean, covariance = self.problem(name, statistics, sigma)
        random = sample_random(["x"], range(2), seed=0)

        def draws(x):
            return random.randn_like(x).to(x)

        first, second = self.draw(operator, y, sigma, statistics, 2, start, draws).flatten(1)
        rms = covariance.diagonal().mean().sqrt()
        assert (first - mean).square().mean().sqrt() > 0.5 * rms
        assert ((first + second) / 2 - mean).square().mean().sqrt() < 0.02 * rms

    def test_a_neighbour_s_noise_changes_nothing(self):
        """One image is a state already, by its noise, the other is not."""
        operator, y = operator_of("denoise"), noise(2, 1, SIZE, SIZE)
        sigmas = torch.tensor([0.5, 0.1], dtype=torch.float64).reshape(2, 1, 1, 1)
        levels = useful_levels(operator, 0.5, sample=True)
        diffusion = create_sampler(
            **CONFIG, timestep_respacing="logsnr6", start="auto", levels=levels
        )

        def run(rows):
            generators = [torch.Generator().manual_seed(i) for i in rows]

            def draws(x):
                shape = x.shape[1:]
                return torch.stack([torch.randn(shape, generator=g).to(x) for g in generators])

            sigma = sigmas[rows]
            x_T = start_state(operator, y[rows], sigma, diffusion, draws(y[rows]), HEADS)
            method = SpectralSample(operator, y[rows], sigma, HEADS)
            return diffusion.p_sample_loop(lambda x, t: 0.9 * x, x_T, method.step, draws)

        torch.testing.assert_close(run([0, 1]), torch.cat([run([0]), run([1])]))
