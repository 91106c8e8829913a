"""deepinv in the benchmark: its operator, its denoiser, its methods."""

import pytest
import torch

from guided_diffusion.measurements import get_operator
from tests.benchmarks import deepinv_methods
from tests.benchmarks.comparison import Slice
from tests.conftest import rnd
from tests.test_denoiser import MU, STD, gaussian_prior

TASKS = [
    {"name": "denoise"},
    {"name": "super_resolution", "scale_factor": 4},
    {"name": "deblur", "type": "gaussian", "kernel_size": 9, "intensity": 1.5},
    {"name": "color"},
]
tasks = pytest.mark.parametrize("params", TASKS, ids=lambda p: p["name"])


def operator_of(params):
    return get_operator(in_shape=(3, 16, 24), dtype=torch.float64, **params)


@tasks
def test_the_completed_operator_is_the_same_with_a_square_v(params):
    thin = operator_of(params)
    full = deepinv_methods.full_operator(thin)
    x, y = (rnd((2, *shape), seed=0).double() for shape in (thin.in_shape, thin.out_shape))
    assert full.singular_values.shape == thin.in_shape
    assert torch.allclose(full.forward(x), thin.forward(x), atol=1e-12)
    assert torch.allclose(full.transpose(y), thin.transpose(y), atol=1e-12)
    for one in (lambda v: full.V(full.Vt(v)), lambda v: full.Vt(full.V(v))):
        assert torch.allclose(one(x), x, atol=1e-12)
    assert torch.allclose(full.U(full.Ut(y)), y, atol=1e-12)


@pytest.fixture(scope="module")
def deepinv():
    return pytest.importorskip("deepinv", exc_type=(ImportError, RuntimeError))


@tasks
def test_physics_agrees_and_its_proximal_step_solves_the_normal_equations(deepinv, params):
    operator = operator_of(params)
    physics = deepinv_methods.physics_of(operator, 0.1)
    x = rnd((2, *operator.in_shape), seed=0).double()
    y = rnd((2, *operator.out_shape), seed=1).double()
    assert torch.allclose(physics.A(x), operator.forward(x), atol=1e-12)
    assert torch.allclose(physics.A_adjoint(y), operator.transpose(y), atol=1e-12)
    assert physics.noise_model.sigma.item() == pytest.approx(0.05)
    z = physics.prox_l2(x, y, gamma=2.0)
    left = z + 2 * operator.transpose(operator.forward(z))
    assert torch.allclose(left, x + 2 * operator.transpose(y), atol=1e-10)


SIGMA = 0.2


@pytest.mark.parametrize("name", deepinv_methods.DEEPINV)
def test_steps_are_evaluations_of_the_network(deepinv, name):
    prior, calls = gaussian_prior(), []

    def model(x, timesteps):
        calls.append(len(x))
        return prior.network(x, timesteps)

    operator = get_operator("super_resolution", (1, 16, 16), scale_factor=4)
    image = Slice("x", torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 4, 4))
    restored = prior._replace(network=model)
    deepinv_methods.restore(name, operator, image.y, SIGMA, image, restored, 7, 0)
    assert calls == [1] * 7


def test_peers_come_near_the_posterior_of_a_gaussian_prior(deepinv):
    operator = get_operator("denoise", (1, 32, 32))
    truth = MU + STD * rnd((1, 1, 32, 32), seed=0)
    image = Slice("x", truth, truth + SIGMA * rnd(truth.shape, seed=1))
    for name in ("deepinv_ddrm", "deepinv_diffpir"):
        known = name, operator, image.y, SIGMA, image, gaussian_prior(), 20, 0
        x_hat = deepinv_methods.restore(*known)
        assert torch.equal(x_hat, deepinv_methods.restore(*known))
        # a sample of the posterior is √2 as far as its mean, whose error is 0.18 here
        assert (x_hat - truth.clamp(-1, 1)).square().mean().sqrt() < 0.3
        assert x_hat.std() > STD / 2
