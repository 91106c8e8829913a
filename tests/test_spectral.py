"""The few-step method's correction and its averages against direct algebra."""

import math

import pytest
import torch

from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods.spectral import Spectral
from guided_diffusion.statistics import PriorStatistics
from tests.spectral_cases import CONFIG, HEADS, SIZE, WHITE, dct_2d, matrix_of, noise, operator_of
from util.random import sample_random


class TestCorrection:
    """One last step with a known x̂_0 against dense linear algebra."""

    @pytest.mark.parametrize("level", [10, 300, 600])
    @pytest.mark.parametrize("name", ["denoise", "color", "sr", "means", "mirror", "mirrorbox"])
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
        method = Spectral(operator, y, sigma, HEADS, kappa=2.0, kappa_noise=2.0)
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
        operator, sigma, kappa, kappa_noise = operator_of("color"), 0.1, 2.0, 0.5
        diffusion = create_sampler(**CONFIG, **self.LEVELS)
        y = operator.forward(noise(1, 3, SIZE, SIZE))
        draws = [noise(1, 3, SIZE, SIZE, seed=10 + i) for i in range(4)]
        given = iter(draws)
        method = Spectral(operator, y, sigma, HEADS, kappa=kappa, kappa_noise=kappa_noise)
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
            v, w = (k * r * S / (k * r + S) for k in (kappa, kappa_noise))
            variance = sigma**2
            if i == 0:  # what y adds to a state that would hold it, see the test above
                variance = sigma**2 * r / (r - (sigma / s) ** 2)
            m = m + torch.outer(row / s, v * s / (variance + v * s**2) * (s * y_bar - row @ m)[0])
            P = w * sigma**2 / (sigma**2 + w * s**2)
            if before is not None:
                phi_seen, phi_blind = fresh[0] / r, fresh[1] / r
                old = r / r_before * (before - m)
                m = m + phi_seen * (seen @ old) + phi_blind * (blind @ old)
            if t == 0:
                break
            a_next = diffusion.alphas_cumprod[t - 1]
            r_next = (1 - a_next) / a_next
            fresh = ((r_next - P).clamp(min=0), (r_next - w).clamp(min=0))
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
