"""The few-step method: its schedule, its start and its correction against direct algebra."""

import json
import math
import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods.spectral import Spectral
from guided_diffusion.methods.spectral_sample import SpectralSample
from guided_diffusion.methods.start import start_state, useful_levels
from guided_diffusion.operators import get_operator
from guided_diffusion.schedules import log_snr_timesteps
from guided_diffusion.statistics import PriorStatistics
from tests.conftest import LINEAR, SR, task, write_yaml
from util.errors import UserError
from util.random import sample_random

SIZE = 16
HEADS = PriorStatistics(  # axial slices of heads, whatever prior ships
    -0.8,
    (1, 3, 6, 12, 24, 48, 96, 192, 400),
    (425, 147, 20, 4.2, 1.0, 0.187, 0.021, 0.0009, 0.00009),
    "LGG MRI Segmentation",
)
WHITE = PriorStatistics(HEADS.mean_intensity, (1,), (0.25,), source="these tests")
OPERATORS = {
    "denoise": {"name": "denoise"},
    "sr": {"name": "super_resolution", "scale_factor": 4},
    "means": {"name": "super_resolution", "scale_factor": 4, "type": "standard"},
    "gauss": {"name": "deblur", "type": "gaussian", "kernel_size": 9, "intensity": 1.0},
    "uniform": {"name": "deblur", "type": "uniform", "kernel_size": 9},
    "color": {"name": "color"},
}
SHAPES = {"color": (3, SIZE, SIZE)}
CONFIG = {
    "sampler": "ddpm",
    "steps": 1000,
    "noise_schedule": "linear",
    "model_mean_type": "start_x",
    "model_var_type": "fixed_small",
    "dynamic_threshold": False,
    "clip_denoised": False,
    "rescale_timesteps": False,
}


def matrix_of(operator):
    """A as a dense matrix, column by column."""
    eye = torch.eye(math.prod(operator.in_shape), dtype=torch.float64)
    images = eye.reshape(-1, *operator.in_shape)
    return operator.forward(images).reshape(len(eye), -1).mT


def operator_of(name):
    in_shape = SHAPES.get(name, (1, SIZE, SIZE))
    return get_operator(in_shape=in_shape, dtype=torch.float64, **OPERATORS[name])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestSchedule:
    alphas_cumprod = create_sampler(**CONFIG).alphas_cumprod
    std = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)

    def test_steps_are_even_in_log_snr(self):
        found = log_snr_timesteps(self.alphas_cumprod, 10, 3.0, 0.1)
        logs = np.log(self.std[found])
        assert len(found) == 10
        assert np.diff(logs) == pytest.approx(math.log(30) / 9, rel=0.15)
        assert self.std[found[-1]] >= 3.0 > self.std[found[-1] - 1]

    @pytest.mark.parametrize("level", [0.001, 0.0117, 0.2, 0.203, 1e9])
    def test_one_level_is_one_step_the_nearest(self, level):
        (found,) = log_snr_timesteps(self.alphas_cumprod, 10, level, level)
        ratios = np.maximum(self.std / level, level / self.std)
        assert ratios[found] == ratios.min()
        sampler = create_sampler(
            **CONFIG, timestep_respacing="logsnr10", start="auto", levels=(level, level)
        )
        assert sampler.timestep_map == [found]

    def test_a_start_bounds_every_respacing(self):
        for respacing in ("", 7, "3,4", "logsnr5"):
            sampler = create_sampler(**CONFIG, timestep_respacing=respacing, start=400)
            assert sampler.timestep_map[-1] == 400
        assert create_sampler(**CONFIG, start=0).timestep_map == [0]

    def test_steps_keep_the_noise_of_their_timesteps(self):
        sampler = create_sampler(**CONFIG, timestep_respacing="logsnr6", start=700)
        kept = self.alphas_cumprod[sampler.timestep_map]
        assert sampler.alphas_cumprod == pytest.approx(kept, rel=1e-9)

    @pytest.mark.parametrize("start", [1000, -1, "soon", 2.5])
    def test_a_start_that_does_not_exist(self, start):
        with pytest.raises(UserError, match="start: expected auto or a timestep from 0 to 999"):
            create_sampler(**CONFIG, start=start)

    def test_auto_needs_a_measurement(self):
        with pytest.raises(UserError, match="start: auto needs a measurement"):
            create_sampler(**CONFIG, start="auto")

    def test_levels_of_denoising_meet(self):
        assert useful_levels(operator_of("denoise"), 0.3) == pytest.approx((0.3, 0.3))

    def test_a_blind_operator_starts_high(self):
        operator = operator_of("sr")
        high, low = useful_levels(operator, 0.05)
        assert (high, low) == (3.0, pytest.approx(0.005 / float(operator.singular_values.max())))


class TestStart:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_seen_directions_hold_the_measurement_and_noise_of_r(self, name):
        """Over many draws, A x_t/√ᾱ has mean y and variance r s² in all, its own noise counted."""
        operator, sigma = operator_of(name), 0.05
        diffusion = create_sampler(
            **CONFIG, timestep_respacing="logsnr5", start="auto", levels=(1.0, 0.05)
        )
        alpha_bar = diffusion.alphas_cumprod[-1]
        r = (1 - alpha_bar) / alpha_bar
        y = operator.forward(noise(1, *operator.in_shape))
        draws = noise(4000, *operator.in_shape, seed=1)
        states = start_state(operator, y, sigma, diffusion, draws, HEADS) / math.sqrt(alpha_bar)
        s = operator.singular_values
        used = (s > 0) & ((sigma / s.clamp(min=1e-9)) ** 2 <= r)
        assert used.any()
        spectrum = operator.Vt(states)
        expected = (operator.Ut(y) / s.clamp(min=1e-9))[0]
        error = (spectrum.mean(dim=0) - expected)[used].abs().max()
        assert error < 6 * math.sqrt(r / 4000)
        own = (sigma / s[used]) ** 2
        ratio = spectrum.var(dim=0)[used] / (r - own)
        assert ratio.mean().item() == pytest.approx(1, abs=0.02)

    @pytest.mark.parametrize("sigma", [0.012, 0.2, 0.5])
    def test_denoising_starts_at_y_itself(self, sigma):
        """Nothing is drawn, and nothing of y is left to correct x̂_0 by."""
        operator = operator_of("denoise")
        levels = useful_levels(operator, sigma)
        diffusion = create_sampler(
            **CONFIG, timestep_respacing="logsnr5", start="auto", levels=levels
        )
        y = noise(2, 1, SIZE, SIZE)
        draws = noise(2, 1, SIZE, SIZE, seed=1)
        state = start_state(operator, y, sigma, diffusion, draws, HEADS)
        assert diffusion.num_timesteps == 1
        torch.testing.assert_close(state / math.sqrt(diffusion.alphas_cumprod[0]), y)
        x_0 = torch.ones_like(y)
        _, found = Spectral(operator, y, sigma, HEADS).step(
            diffusion, lambda x, t: x_0, state, 0, torch.randn_like
        )
        torch.testing.assert_close(found, x_0)

    def test_noise_far_below_the_lowest_level_is_filled_up(self):
        operator, sigma = operator_of("denoise"), 0.005
        diffusion = create_sampler(
            **CONFIG, timestep_respacing="logsnr5", start="auto", levels=(sigma, sigma)
        )
        assert diffusion.timestep_map == [0]
        y, draws = noise(1, 1, SIZE, SIZE), noise(1, 1, SIZE, SIZE, seed=1)
        state = start_state(operator, y, sigma, diffusion, draws, HEADS)
        alpha_bar = diffusion.alphas_cumprod[0]
        left = (state / math.sqrt(alpha_bar) - y).std().item()
        assert left == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar - sigma**2), rel=0.1)


class TestCorrection:
    """One last step with a known x̂_0 against dense linear algebra."""

    @pytest.mark.parametrize("level", [10, 300, 600])
    @pytest.mark.parametrize("name", ["denoise", "color", "sr", "means"])
    def test_exact_where_no_two_directions_share_a_frequency(self, name, level):
        """The mean of the dense posterior, with the spectrum of heads."""
        operator, sigma, kappa = operator_of(name), 0.1, 1.5
        diffusion = create_sampler(**CONFIG, timestep_respacing="2", start=level)
        x_0, y = noise(1, *operator.in_shape), noise(1, *operator.out_shape, seed=2)
        method = Spectral(operator, y, sigma, HEADS, kappa=kappa)
        _, found = method.step(diffusion, lambda x, t: x_0, x_0, 0, torch.randn_like)
        covariance, gain, A = self.dense(operator, diffusion, sigma, kappa)
        expected = x_0.flatten() + gain @ (y.flatten() - A @ x_0.flatten())
        torch.testing.assert_close(found.flatten(), expected)

    @pytest.mark.parametrize(
        ("name", "at_most"), [("sr", 1e-9), ("means", 1e-9), ("gauss", 0.25), ("uniform", 0.1)]
    )
    def test_what_the_diagonal_costs(self, name, at_most):
        """Its excess mean squared error over the dense posterior's, of errors as it assumes them.

        None in super-resolution, which folds each frequency onto one direction; some in blurs, at
        whose edges frequencies mix, and these images are small.
        """
        operator, sigma, kappa = operator_of(name), 0.1, 2.0
        diffusion = create_sampler(**CONFIG, timestep_respacing="3", start=410)
        t = 1
        assert diffusion.timestep_map[t] == 205  # r = 0.55
        covariance, exact, A = self.dense(operator, diffusion, sigma, kappa, t)
        y = torch.eye(len(A), dtype=torch.float64).reshape(-1, *operator.out_shape)
        x_0 = torch.zeros(len(y), *operator.in_shape, dtype=torch.float64)
        method = Spectral(operator, y, sigma, HEADS, kappa=kappa)
        _, columns = method.step(diffusion, lambda x, t: x_0, x_0, t, torch.randn_like)
        ours = columns.reshape(len(y), -1).mT

        def mean_squared_error(K):
            rest = torch.eye(len(K), dtype=torch.float64) - K @ A
            return ((rest @ covariance @ rest.mT).trace() + sigma**2 * K.square().sum()).item()

        assert mean_squared_error(exact) <= mean_squared_error(ours) + 1e-9
        assert mean_squared_error(ours) / mean_squared_error(exact) - 1 < at_most

    @staticmethod
    def dense(operator, diffusion, sigma, kappa, t=0):
        """(covariance of x̂_0's error, the posterior mean's gain, A) as dense matrices."""
        a = diffusion.alphas_cumprod[t]
        r = (1 - a) / a
        S = HEADS.power_spectrum(SIZE, SIZE)
        v = (kappa * r * S / (kappa * r + S)).flatten()
        basis = dct_2d(SIZE)
        covariance = basis.mT @ torch.diag(v) @ basis
        covariance = torch.block_diag(*[covariance] * operator.in_shape[0])
        A = matrix_of(operator)
        system = sigma**2 * torch.eye(len(A), dtype=torch.float64) + A @ covariance @ A.mT
        return covariance, covariance @ A.mT @ torch.linalg.inv(system), A

    def test_a_state_that_holds_y_is_corrected_by_what_is_new(self):
        """A first state of variance r that y's own noise and filled up noise make together."""
        operator, sigma = operator_of("denoise"), 0.3
        diffusion = create_sampler(
            **CONFIG, timestep_respacing="logsnr5", start="auto", levels=(0.5, 0.1)
        )
        t = diffusion.num_timesteps - 1
        r = (1 - diffusion.alphas_cumprod[t]) / diffusion.alphas_cumprod[t]
        y, x_0 = noise(1, 1, SIZE, SIZE), noise(1, 1, SIZE, SIZE, seed=3)
        method = Spectral(operator, y, sigma, WHITE, kappa=1.0)
        draws = noise(1, 1, SIZE, SIZE, seed=4)
        state = math.sqrt(diffusion.alphas_cumprod[t]) * (y + draws)
        network = (lambda x, t: x_0) if t % 2 == 0 else (lambda x, t: x_0.flip(-1))
        _, found = method.step(diffusion, network, state, t, torch.randn_like)
        v = r * 0.25 / (r + 0.25)
        news = 1 / (1 / sigma**2 - 1 / r)  # y is the state's and this, in precision
        torch.testing.assert_close(found, x_0 + v / (news + v) * (y - x_0))

    @pytest.mark.parametrize("name", ["denoise", "gauss"])  # not "sr", which mixes frequencies
    def test_the_next_state_is_as_noisy_as_the_network_is_told(self, name):
        """With x̂_0's error drawn as assumed, the state's error in each DCT direction is near r."""
        operator, sigma = operator_of(name), 0.1
        diffusion = create_sampler(**CONFIG, timestep_respacing="logsnr6", start=500)
        t = 3
        a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        r, r_prev = (1 - a) / a, (1 - a_prev) / a_prev
        count = 2000
        truth = noise(1, 1, SIZE, SIZE)
        S = HEADS.power_spectrum(SIZE, SIZE)
        basis = dct_2d(SIZE)
        error = (2 * r * S / (2 * r + S)).sqrt().flatten() * noise(count, SIZE**2, seed=4)
        x_0 = truth + (error @ basis).reshape(count, 1, SIZE, SIZE)
        y = operator.forward(truth) + sigma * noise(count, *operator.out_shape, seed=5)
        method = Spectral(operator, y, sigma, HEADS, kappa=2.0)
        draws = noise(count, 1, SIZE, SIZE, seed=6)
        state, _ = method.step(diffusion, lambda x, t: x_0, x_0, t, lambda x: draws)
        found = (state / math.sqrt(a_prev) - truth).var(dim=0).mean().item()
        assert found == pytest.approx(r_prev, rel=0.1)


class TestAveraging:
    """What takes the noise of the states out of the result."""

    LEVELS = {"timestep_respacing": "logsnr6", "start": 600}

    @staticmethod
    def lopsided(x, timesteps):
        """A network that sees left from right, and errs by the level."""
        return torch.tanh(0.8 * x + 0.3 * x.roll(1, dims=3)) + 0.05 * torch.sin(timesteps[0] * x)

    def test_a_run_as_the_docstring_writes_it(self):
        """In every DCT frequency of a colour image: A sees its mean, is blind to the rest."""
        operator, sigma, kappa = operator_of("color"), 0.1, 2.0
        diffusion = create_sampler(**CONFIG, **self.LEVELS)
        y = operator.forward(noise(1, 3, SIZE, SIZE))
        draws = [noise(1, 3, SIZE, SIZE, seed=10 + i) for i in range(4)]
        given = iter(draws)
        method = Spectral(operator, y, sigma, HEADS, kappa=kappa)
        x_T = noise(1, 3, SIZE, SIZE, seed=5)
        found = diffusion.p_sample_loop(self.lopsided, x_T, method.step, lambda x: next(given))
        assert next(given) is draws[3]  # five states to make noise for, every second draw a mirror

        basis, S = dct_2d(SIZE), HEADS.power_spectrum(SIZE, SIZE).flatten()
        row = torch.tensor([0.3333, 0.3334, 0.3333], dtype=torch.float64)
        s = row.norm()
        seen, blind = torch.outer(row, row) / s**2, torch.eye(3, dtype=torch.float64)
        blind = blind - seen  # projections of the channels
        y_bar = (y.reshape(1, -1) @ basis.mT) / s  # of unit direction row/s
        noises = [draws[0], -draws[0], draws[1], -draws[1], draws[2]]
        state, before, r_before, fresh = x_T, None, None, None
        for i, t in enumerate(reversed(range(diffusion.num_timesteps))):
            a = diffusion.alphas_cumprod[t]
            r = (1 - a) / a
            steps = torch.full((1,), diffusion.timestep_map[t])
            if t % 2 == 0:
                x_0 = self.lopsided(state, steps)
            else:
                x_0 = self.lopsided(state.flip(3), steps).flip(3)
            m = x_0.reshape(3, -1) @ basis.mT
            v = kappa * r * S / (kappa * r + S)
            variance = sigma**2
            if i == 0:  # what y adds to a state that would hold it, see the test above
                variance = sigma**2 * r / (r - (sigma / s) ** 2)
            m = m + torch.outer(row / s, v * s / (variance + v * s**2) * (s * y_bar - row @ m)[0])
            P = v * sigma**2 / (sigma**2 + v * s**2)
            if before is not None:
                phi_seen, phi_blind = fresh[0] / r, fresh[1] / r
                old = r / r_before * (before - m)
                m = m + phi_seen * (seen @ old) + phi_blind * (blind @ old)
            if t == 0:
                break
            a_next = diffusion.alphas_cumprod[t - 1]
            r_next = (1 - a_next) / a_next
            fresh = ((r_next - P).clamp(min=0), (r_next - v).clamp(min=0))
            n = noises[i].reshape(3, -1) @ basis.mT
            n = fresh[0].sqrt() * (seen @ n) + fresh[1].sqrt() * (blind @ n)
            state = (math.sqrt(a_next) * (m + n) @ basis).reshape(x_T.shape)
            before, r_before = m, r
        torch.testing.assert_close(found, (m @ basis).reshape(x_T.shape))

    def test_what_the_network_leaves_of_fresh_noise_is_averaged(self):
        """Where A is blind and S small: half of each draw stays in x̂_0, less in the mean."""
        operator = operator_of("sr")
        flat = PriorStatistics(0.0, (1,), (1e-6,), source="these tests")
        diffusion = create_sampler(
            **CONFIG, timestep_respacing="logsnr12", start="auto", levels=(3.0, 0.1)
        )
        generator, count = torch.Generator().manual_seed(0), 200
        mean = torch.zeros(count, 1, SIZE, SIZE, dtype=torch.float64)

        def draws(x):
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

        method = Spectral(operator, torch.zeros(count, 1, 4, 4, dtype=torch.float64), 0.1, flat)
        x, expected, left = math.sqrt(0.9) * draws(mean), [], []
        for t in reversed(range(diffusion.num_timesteps)):
            a = diffusion.alphas_cumprod[t]
            noisy = x / math.sqrt(a) - mean
            x, mean = method.step(diffusion, lambda *_, n=noisy: n / 2, x, t, draws)
            left.append((mean - operator.V(operator.Vt(mean))).std().item())
            expected.append(math.sqrt(15 / 16) / 2 * math.sqrt((1 - a) / a))
        ratios = [found / alone for found, alone in zip(left, expected, strict=True)]
        assert all(ratio < 0.9 for ratio in ratios[2:])

    def test_one_level_takes_the_mean_over_both_reflections(self):
        """An error that grows to the right in the one grows to the left in the other."""
        operator, sigma = operator_of("denoise"), 0.3
        diffusion = create_sampler(
            **CONFIG, timestep_respacing="logsnr10", start="auto", levels=(sigma, sigma)
        )
        truth, calls = noise(1, 1, SIZE, SIZE), []
        ramp = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
        even = truth + truth.flip(3)

        def network(x, timesteps):
            calls.append(x)
            return even + ramp

        method = Spectral(operator, even, sigma, HEADS)
        (x_0, _) = method.step(diffusion, network, truth, 0, torch.randn_like)
        torch.testing.assert_close(x_0, even)
        assert len(calls) == 2
        assert torch.equal(calls[1], calls[0].flip(3))

    def test_a_second_run_knows_nothing_of_the_first(self):
        operator = operator_of("sr")
        diffusion = create_sampler(**CONFIG, **self.LEVELS)
        y, x_T = noise(1, 1, 4, 4), noise(1, 1, SIZE, SIZE, seed=5)
        method, runs = Spectral(operator, y, 0.1, HEADS), []
        for _ in range(2):
            random = sample_random(["x"], range(1), seed=0)

            def draws(x, random=random):
                return random.randn_like(x).to(x)

            runs.append(diffusion.p_sample_loop(self.lopsided, x_T, method.step, draws))
        assert torch.equal(*runs)


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


def dct_2d(size):
    """(size², size²): every row a two-dimensional cosine of unit norm."""
    k, n = np.arange(size)[:, None], np.arange(size)
    rows = np.cos(math.pi * k * (2 * n + 1) / (2 * size)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return torch.from_numpy(np.kron(rows, rows))


FAST = {**LINEAR, "timestep_respacing": "logsnr3", "start": "auto", "method": "spectral"}


def recon(out, name, folder=SR):
    return iio.imread(f"{out}/{folder}/recon/{name}.png")


class TestRun:
    """main.py with a schedule that names its own method."""

    def test_the_schedule_s_method_replaces_the_task_s_and_the_flag_both(self, tiny_run):
        write_yaml("diffusion.yaml", FAST)
        for out, arguments, method in (("a", (), "spectral"), ("b", ("--method", "ddrm"), "ddrm")):
            assert tiny_run("--save_dir", out, "--record", *arguments) == 0
            with open(f"{out}/{SR}/summary.json", encoding="utf-8") as file:
                assert (
                    json.load(file)["settings"]["task_config"]["conditioning"]["method"] == method
                )
        assert not np.array_equal(recon("a", "a1"), recon("b", "a1"))

    def test_batches_and_samples_change_nothing(self, tiny_run, capsys):
        write_yaml("diffusion.yaml", FAST)
        assert tiny_run("--save_dir", "one") == 0
        assert tiny_run("--save_dir", "two", "--batch_size", "2", "--num_samples", "2") == 0
        assert "spectral lie closer together" in capsys.readouterr().err
        for name in ("a1", "a2", "a10"):
            first = iio.imread(f"two/{SR}/samples/{name}_0.png").astype(int)
            assert np.abs(first - recon("one", name)).max() <= 1

    def test_samples_of_the_posterior_differ_in_denoising_too(self, tiny_run, capsys):
        """Where one evaluation would do for the mean."""
        write_yaml("task.yaml", task({"name": "denoise"}))
        write_yaml("diffusion.yaml", {**FAST, "method": "spectral_sample"})
        assert tiny_run("--save_dir", "out", "--num_samples", "3", "--limit", "1") == 0
        printed = capsys.readouterr().err
        assert "closer together" not in printed
        assert printed.count("no statistics of the prior's images") == 1
        (folder,) = (f for f, _, files in os.walk("out") if "summary.json" in files)
        std = np.load(f"{folder}/std/a1.npy")
        assert std.mean() > 0.01

    def test_estimated_noise_of_one_image_is_not_its_neighbour_s(self, tiny_run):
        """The estimates decide where each image starts."""
        write_yaml("diffusion.yaml", FAST)
        noise = {"name": "gaussian", "sigma": "auto"}
        config = task({"name": "denoise"}, noise)
        write_yaml("task.yaml", {**config, "data": {**config["data"], "measured": True}})
        rng = np.random.default_rng(0)
        for name, sigma in (("a1", 5), ("a2", 40)):
            pixels = iio.imread(f"images/{name}.png") + sigma * rng.standard_normal((32, 32))
            iio.imwrite(f"images/{name}.png", np.uint8(np.clip(pixels, 0, 255)))
        assert tiny_run("--save_dir", "alone", "--limit", "1") == 0
        assert tiny_run("--save_dir", "all", "--batch_size", "3", "--limit", "2") == 0
        folder = "tiny/denoise/gaussian/auto"
        assert np.array_equal(recon("alone", "a1", folder), recon("all", "a1", folder))

    @pytest.mark.parametrize("start", ["auto", 400])
    def test_the_prior_alone_has_nothing_to_start_from(self, tiny_run, capsys, start):
        write_yaml("diffusion.yaml", {**FAST, "start": start})
        assert tiny_run("--save_dir", "out", "--method", "vanilla") == 2
        assert f"start: {start} needs a measurement" in capsys.readouterr().err
