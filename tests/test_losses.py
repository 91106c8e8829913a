"""The objective of training: weights of the loss, timesteps, the learned variance."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.losses import (
    discretized_gaussian_nll,
    loss_weights,
    timestep_probabilities,
    training_loss,
    variational_term,
)
from tests.conftest import LINEAR, rnd


def test_lognormal_timesteps():
    """Nine in ten follow the normal distribution of ln √r, one the uniform one of t."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    found = timestep_probabilities("lognormal", alpha_bar)
    level = np.log(np.sqrt(1 / alpha_bar - 1))
    assert found.sum() == pytest.approx(1)
    for below in (-2.4, -1.2, 0.0, 2.0):
        seen = level < below
        known = stats.norm.cdf([below, level[0]], -1.2, 1.2)
        expected = 0.9 * (known[0] - known[1]) / (1 - known[1]) + 0.1 * seen.mean()
        assert found[seen].sum() == pytest.approx(expected, abs=0.01)
    assert timestep_probabilities("uniform", alpha_bar) == pytest.approx(1e-3)


def test_loss_weights():
    alpha_bar = np.array([0.99, 0.5, 0.01])
    snr = alpha_bar / (1 - alpha_bar)
    assert loss_weights("uniform", alpha_bar).tolist() == [1, 1, 1]
    p2 = loss_weights("p2", alpha_bar)
    torch.testing.assert_close(p2[0] / p2[2], torch.tensor((1 + snr[2]) / (1 + snr[0])).float())
    weights = loss_weights("min_snr", alpha_bar)
    assert weights[1] == weights[2] and weights[0] / weights[1] == pytest.approx(5 / snr[0])
    assert weights.mean().item() == pytest.approx(1)
    gentle = loss_weights("min_snr", alpha_bar, gamma=20.0)
    assert gentle[0] / gentle[1] == pytest.approx(20 / snr[0])
    raised = loss_weights("min_snr", alpha_bar, high_noise=0.5)
    expected = weights.numpy() * [(1 / 0.99) ** 0.5, 2**0.5, 10]  # 1 + 1/SNR = 1/ᾱ
    torch.testing.assert_close(raised, torch.from_numpy(expected).float())


@pytest.mark.parametrize("bounds", [{}, {"dynamic_threshold": True}])
def test_variational_term_is_the_kl_divergence_and_trains_the_variance_alone(bounds):
    """Of the mean that the network gives, be x̂_0 beyond [-1, 1]."""
    diffusion = create_sampler(**LINEAR | bounds)
    x_0, noise = rnd((1, 1, 6, 6), 1).clamp(-0.9, 0.9), rnd((1, 1, 6, 6), 2)
    t = torch.tensor([300])
    x_t = diffusion.q_sample(x_0, t, noise)
    eps, values = noise + 0.5 * rnd((1, 1, 6, 6), 3), rnd((1, 1, 6, 6), 4)
    output = torch.cat([eps, values], 1).requires_grad_()
    a, previous = diffusion.alphas_cumprod[300], diffusion.alphas_cumprod[299]
    beta = 1 - a / previous

    def mean(x_0):
        towards_x0 = previous**0.5 * beta / (1 - a) * x_0
        return towards_x0 + (a / previous) ** 0.5 * (1 - previous) / (1 - a) * x_t

    x_hat = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
    assert x_hat.abs().max() > 1.5
    std = math.sqrt(beta * (1 - previous) / (1 - a))
    true = torch.distributions.Normal(mean(x_0), std)
    share = (values + 1) / 2  # between the logarithms of both bounds, IDDPM eq. 15
    log_variance = share * math.log(beta) + (1 - share) * math.log(std**2)
    predicted = torch.distributions.Normal(mean(x_hat), (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(true, predicted).mean() / math.log(2)
    term = variational_term(diffusion, output, x_0, x_t, t)
    torch.testing.assert_close(term[0], expected, rtol=1e-3, atol=1e-5)
    term.sum().backward()
    assert output.grad[:, 0].abs().max() == 0 and output.grad[:, 1].abs().min() > 0


def test_discretized_likelihood_sums_to_one_over_the_256_values():
    x = (torch.arange(256) / 127.5 - 1).reshape(1, 1, 16, 16)
    mean, log_scale = torch.full_like(x, 0.1), torch.full_like(x, math.log(0.3))
    assert torch.exp(-discretized_gaussian_nll(x, mean, log_scale)).sum().item() == pytest.approx(
        1, 1e-4
    )


def test_loss_of_a_perfect_prediction_is_its_variational_part():
    diffusion = create_sampler(**{**LINEAR, "model_var_type": "fixed_small"})
    x_0, noise = rnd((2, 1, 6, 6), 1), rnd((2, 1, 6, 6), 2)
    t = torch.tensor([10, 800])
    ones = torch.ones(1000)
    loss, simple = training_loss(diffusion, lambda x, t: noise, x_0, t, noise, ones)
    assert loss == 0 and simple.tolist() == [0, 0]
    loss, simple = training_loss(diffusion, lambda x, t: noise + 0.5, x_0, t, noise, 2 * ones)
    assert loss.item() == pytest.approx(0.5) and simple[0].item() == pytest.approx(0.25)
