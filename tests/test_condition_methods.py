"""The pseudo-likelihood score and the DMPS step."""

import math

import pytest
import torch

from guided_diffusion.condition_methods import (
    check_conditioning,
    get_conditioning_method,
    pseudo_likelihood_score,
)
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.measurements import get_operator
from tests.conftest import LINEAR, rnd
from util.errors import UserError

TASKS = [
    {"name": "denoise"},
    {"name": "super_resolution", "scale_factor": 2},
    {"name": "deblur", "type": "uniform", "kernel_size": 3},
    {"name": "color"},
]


def dense(operator):
    """A as a matrix, column by column."""
    count = math.prod(operator.in_shape)
    basis = torch.eye(count, dtype=torch.float64).reshape(count, *operator.in_shape)
    return operator.forward(basis).reshape(count, -1).T


@pytest.mark.parametrize("sigma", [0.05, 0.5])
@pytest.mark.parametrize("params", TASKS, ids=lambda p: p["name"])
def test_score_is_the_gradient_of_the_gaussian_likelihood(params, sigma):
    """Of y ~ N(A x_t/√ᾱ, σ² I + r_t A Aᵀ), by autograd through the dense matrices."""
    operator = get_operator(**params, in_shape=(3, 4, 6), dtype=torch.float64)
    A, alpha_bar = dense(operator), 0.3
    x = rnd((2, 3, 4, 6), 1).double().requires_grad_()
    y = rnd((2, *operator.out_shape), 2).double()
    r_t = (1 - alpha_bar) / alpha_bar
    covariance = sigma**2 * torch.eye(len(A), dtype=torch.float64) + r_t * A @ A.T
    mean = x.reshape(2, -1) @ A.T / math.sqrt(alpha_bar)
    likelihood = torch.distributions.MultivariateNormal(mean, covariance)
    (expected,) = torch.autograd.grad(likelihood.log_prob(y.reshape(2, -1)).sum(), x)
    score = pseudo_likelihood_score(operator, x.detach(), y, sigma, alpha_bar)
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("t", [0, 10, 60, 99])
def test_update_equals_published(assert_golden, t):
    """One step of the method, around a network whose ancestral step is the identity."""
    operator = get_operator("super_resolution", (1, 3, 256, 256), scale_factor=4)
    y = operator.forward(rnd((1, 3, 256, 256), 21).clamp(-1, 1))
    y = y + 0.05 * rnd((1, 12288), 41).reshape(y.shape)

    class AncestralIdentity:
        schedule = create_sampler(**LINEAR, timestep_respacing=100)
        alphas, alphas_cumprod = schedule.alphas, schedule.alphas_cumprod

        def p_sample(self, model, x, t, randn_like):
            return x, x

    method = get_conditioning_method("dmps", operator, y, 0.05, scale=1.75)
    x, _ = method.step(AncestralIdentity(), None, rnd((1, 3, 256, 256), 31), t, None)
    assert_golden(f"dmps_sr_{t}", x)


def test_noiseless_measurement_gives_a_finite_score():
    """σ = 0 where A is blind (s = 0) must not divide 0 by 0."""
    operator = get_operator("deblur", (1, 32, 32), type="gaussian", kernel_size=61, intensity=3.0)
    assert (operator.singular_values == 0).any()
    x, y = rnd((1, 1, 32, 32), 1), rnd((1, 1, 32, 32), 2)
    score = pseudo_likelihood_score(operator, x, y, 0.0, 0.5)
    assert score.isfinite().all() and score.norm() > 0


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ilvr", {}),
        ("dmps", {"scales": 1.0}),
        ("dmps", {"scale": "big"}),
        ("dmps", {"scale": float("nan")}),
        ("vanilla", {"scale": 1.0}),
    ],
)
def test_unknown_methods_and_parameters_are_refused(name, params):
    with pytest.raises(UserError, match="conditioning"):
        check_conditioning(name, params)
