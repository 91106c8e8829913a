"""The few-step method's schedule and its first state."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods.spectral import Spectral
from guided_diffusion.methods.start import start_state, useful_levels
from guided_diffusion.schedules import log_snr_timesteps
from tests.spectral_cases import (
    CONFIG,
    HEADS,
    OPERATORS,
    SIZE,
    noise,
    operator_of,
)
from util.errors import UserError


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
        assert (high, low) == (1.5, pytest.approx(0.005 / float(operator.singular_values.max())))
        assert useful_levels(operator, 0.05, sample=True)[0] == 3.0


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
