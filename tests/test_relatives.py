"""The relatives of DMPS against cases whose answer is known."""

import math

import pytest
import torch

from guided_diffusion.batches import begin
from guided_diffusion.config import Schedule
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods import METHODS, get_conditioning_method, method_names
from guided_diffusion.noise import get_noise
from guided_diffusion.operators import get_operator
from guided_diffusion.statistics import PriorStatistics
from tests.conftest import LINEAR, rnd
from util.random import ImageRandom, image_generator

MU, PRIOR_STD, SIGMA = 0.2, 0.4, 0.2
WHITE = PriorStatistics(MU, (1,), (PRIOR_STD**2,), source="the prior of these tests")


def diffusion_of(steps):
    free = {"clip_denoised": False, "model_var_type": "fixed_small"}
    return create_sampler(**{**LINEAR, **free, "timestep_respacing": steps})


def gaussian_network(diffusion, std=PRIOR_STD):
    """The optimal noise predictor for pixels that are independently N(MU, std²)."""
    alpha_bar = dict(zip(diffusion.timestep_map, diffusion.alphas_cumprod, strict=True))

    def model(x, timesteps):
        a = alpha_bar[int(timesteps[0])]
        return math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * std**2 + 1 - a)

    return model


def sample(name, steps, operator, y, sigma, **params):
    diffusion = diffusion_of(steps)
    random = ImageRandom([image_generator("x", i, 0) for i in range(len(y))])
    method = get_conditioning_method(name, operator, y, sigma, WHITE, **params)
    x_T = random.randn_like(torch.zeros(len(y), *operator.in_shape))
    network = gaussian_network(diffusion)
    return diffusion.p_sample_loop(network, x_T, method.step, random.randn_like)


@pytest.mark.parametrize("name", METHODS)
def test_each_image_of_a_batch_may_have_its_own_noise(name):
    operator = get_operator("super_resolution", (1, 8, 8), scale_factor=2)
    y, sigmas = rnd((2, 1, 4, 4), 5), (0.05, 0.6)
    both = sample(name, 6, operator, y, torch.tensor(sigmas).reshape(2, 1, 1, 1))
    for i, sigma in enumerate(sigmas):
        alone = sample(name, 6, operator, y, sigma)
        torch.testing.assert_close(both[i], alone[i])


@pytest.mark.parametrize("name", method_names())
def test_auto_clips_where_a_method_needs_it(name):
    """Without it DMPS diverges in long steps; with it the air around a head turns grey."""
    x, operator = torch.zeros(1, 1, 16, 16), get_operator("denoise", (1, 16, 16))
    known = (operator, x, SIGMA) if name != "vanilla" else None
    schedule = {**LINEAR, "model_var_type": "fixed_small", "start": ""}
    clips = {}
    for clip, steps in ((True, 20), (False, 20), ("auto", 20), ("auto", 19)):
        settings = {"clip_denoised": clip, "timestep_respacing": steps}
        diffusion, *_ = begin(name, {}, Schedule(**{**schedule, **settings}), known, x)
        out = diffusion.predict(lambda x, t: -100 * torch.ones_like(x), x, 4)  # x̂_0 far above 1
        clips[clip, steps] = bool(out["pred_xstart"].max() <= 1)
    free, needs_it = name.startswith("spectral"), name in ("dps", "pigdm", "diffpir", "vanilla")
    assert clips == {
        (True, 20): True,
        (False, 20): False,
        ("auto", 20): needs_it,
        ("auto", 19): not free,
    }


# Error of the mean, in posterior standard deviations (RMS over the directions that A sees; 0.06
# is sampling error), and the ratio of standard deviations, at 100 steps: only spectral_sample,
# which knows the prior's variance, is exact; each of the others sharpens or blurs the posterior in
# its own way.
BIAS = {
    "dmps": (0.4, 0.4, 0.7),
    "dps": (0.4, 0.4, 0.7),
    "ddrm": (0.3, 0.4, 0.6),
    "pigdm": (0.8, 0.4, 0.7),
    "ddnm": (0.3, 0.4, 0.6),
    "diffpir": (0.3, 0.9, 1.3),
    "spectral": (0.3, 0.02, 0.2),  # seeks the mean
    "spectral_sample": (0.1, 0.95, 1.05),
}


@pytest.mark.parametrize("name", METHODS)
def test_gaussian_posterior_within_the_stated_bias(name):
    """Prior N(MU, PRIOR_STD²), so the posterior is Gaussian and known."""
    operator = get_operator("super_resolution", (1, 8, 8), scale_factor=2, type="standard")
    s = operator.singular_values
    truth = MU + PRIOR_STD * rnd((1, 1, 8, 8), 1)
    y = operator.forward(truth) + SIGMA * rnd((1, 1, 4, 4), 2)
    spectrum = operator.Vt(sample(name, 100, operator, y.expand(256, -1, -1, -1), SIGMA))
    prior_mean = operator.Vt(torch.full((1, 1, 8, 8), MU))
    precision = 1 / PRIOR_STD**2 + s**2 / SIGMA**2
    mean = (prior_mean / PRIOR_STD**2 + s * operator.Ut(y) / SIGMA**2) / precision
    std = precision.rsqrt()
    bias = ((spectrum.mean(0) - mean[0]) / std).square().mean().sqrt().item()
    ratio = (spectrum.std(0) / std).mean().item()
    largest, low, high = BIAS[name]
    assert bias < largest
    assert low < ratio < high


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("noise", ["gaussian", "poisson", "clean"])
def test_every_method_takes_every_task(name, noise):
    shape, model = (3, 8, 8), get_noise(noise, SIGMA)
    x = MU + PRIOR_STD * rnd((4, *shape), seed=3).clamp(-2, 2)
    for task in (
        {"name": "denoise"},
        {"name": "super_resolution", "scale_factor": 2},
        {"name": "deblur", "type": "gaussian", "kernel_size": 5, "intensity": 1.0},
        {"name": "deblur", "type": "uniform", "kernel_size": 3},
        {"name": "color"},
    ):
        operator = get_operator(in_shape=shape, **task)
        torch.manual_seed(0)
        x_hat = sample(name, 20, operator, model(operator.forward(x)), model.sigma)
        # the prior alone is √2 away, an exact sample of ×2's posterior √1.75
        assert (x_hat - x).square().mean().sqrt() < 1.37 * PRIOR_STD


@pytest.mark.parametrize("name", METHODS)
def test_unseen_directions_keep_the_prior(name):
    operator = get_operator("super_resolution", (1, 8, 8), scale_factor=2, type="standard")
    y = operator.forward(MU + PRIOR_STD * rnd((1, 1, 8, 8), 1))
    x = sample(name, 100, operator, y.expand(256, -1, -1, -1), SIGMA)
    blind = x - operator.V(operator.Vt(x))
    std = math.sqrt(blind.var(0).sum().item() / (64 - 16))
    assert blind.mean(0).abs().max() < 0.12
    least = 0.0 if name == "spectral" else 0.8  # which seeks the mean
    assert least * PRIOR_STD < std < 1.05 * PRIOR_STD


@pytest.mark.parametrize("name", ["ddrm", "ddnm", "diffpir"])
@pytest.mark.parametrize("steps", [5, 20])
def test_a_noiseless_measurement_is_met_exactly(name, steps):
    operator = get_operator("super_resolution", (1, 8, 8), scale_factor=2)
    y = operator.forward(rnd((3, 1, 8, 8), 1))
    x = sample(name, steps, operator, y, 0.0)
    torch.testing.assert_close(operator.forward(x), y, rtol=1e-3, atol=1e-3)
    assert x.std(0).min() > 0.01  # and yet the samples differ


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_its_images(name):
    """Also where a norm or a gradient is taken: every image has its own."""
    operator = get_operator("deblur", (1, 16, 16), type="uniform", kernel_size=5)
    y = operator.forward(rnd((3, 1, 16, 16), 1)) * torch.tensor([0.1, 1, 5]).reshape(3, 1, 1, 1)
    diffusion = diffusion_of(10)

    def network(x, timesteps):  # not linear, so that Jacobians differ from image to image
        return torch.tanh(0.5 * x) + 0.1 * x.roll(1, dims=3)

    def run(rows):
        random = ImageRandom([image_generator(str(i), 0, 0) for i in rows])
        method = get_conditioning_method(name, operator, y[rows], 0.1)
        x_T = random.randn_like(y[rows])
        return diffusion.p_sample_loop(network, x_T, method.step, random.randn_like)

    together = run([0, 1, 2])
    alone = torch.cat([run([i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together.isfinite().all() and not together.requires_grad


def dense(operator):
    """A as a matrix, column by column."""
    count = math.prod(operator.in_shape)
    basis = torch.eye(count, dtype=operator.singular_values.dtype)
    basis = basis.reshape(count, *operator.in_shape)
    return operator.forward(basis).reshape(count, -1).T


def test_gaussian_posterior_mean_equals_the_dense_ridge_solution():
    operator = get_operator("super_resolution", (1, 4, 6), scale_factor=2, dtype=torch.float64)
    A, variance, sigma = dense(operator), 0.3, 0.2
    x_0, y = rnd((2, 1, 4, 6), 1).double(), rnd((2, *operator.out_shape), 2).double()
    left = A.T @ A / sigma**2 + torch.eye(24, dtype=torch.float64) / variance
    right = y.reshape(2, -1) @ A / sigma**2 + x_0.reshape(2, -1) / variance
    expected = torch.linalg.solve(left, right.T).T.reshape(x_0.shape)
    mean = operator.posterior_mean(x_0, operator.Ut(y), sigma, variance)
    torch.testing.assert_close(mean, expected)


def one_step(name, x, t, operator, y, sigma, network, **params):
    diffusion = diffusion_of(50)
    method = get_conditioning_method(name, operator, y, sigma, **params)
    with torch.inference_mode():
        guided, _ = method.step(diffusion, network, x, t, torch.zeros_like)
    return diffusion, guided


def test_dps_steps_down_the_gradient_of_the_residual_norm():
    operator = get_operator("deblur", (1, 6, 6), type="uniform", kernel_size=3)
    x, y, t = rnd((1, 1, 6, 6), 1), rnd((1, 1, 6, 6), 2), 20

    def network(x, timesteps):
        return torch.sin(x)

    diffusion, guided = one_step("dps", x, t, operator, y, 0.1, network, scale=0.7)
    plain, _ = diffusion.p_sample(network, x, t, torch.zeros_like)
    a = diffusion.alphas_cumprod[t]

    def norm(x):
        x_0 = (x - math.sqrt(1 - a) * torch.sin(x)) / math.sqrt(a)
        return (y - operator.forward(x_0)).norm()

    gradient = torch.autograd.functional.jacobian(norm, x)
    torch.testing.assert_close(guided, plain - 0.7 * gradient, rtol=1e-3, atol=1e-4)


def test_pigdm_guidance_is_a_vector_jacobian_product():
    operator = get_operator("super_resolution", (1, 4, 4), scale_factor=2)
    x, y, t, sigma = rnd((1, 1, 4, 4), 1), rnd((1, 1, 2, 2), 2), 20, 0.3

    def network(x, timesteps):
        return torch.sin(x)

    diffusion, guided = one_step("pigdm", x, t, operator, y, sigma, network)
    a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]

    def x_0_hat(x):
        return (x - math.sqrt(1 - a) * torch.sin(x)) / math.sqrt(a)

    A, r2 = dense(operator), 1 - a
    residual = y.flatten() - A @ x_0_hat(x).flatten()
    v = torch.linalg.solve(r2 * A @ A.T + sigma**2 * torch.eye(4), residual) @ A
    jacobian = torch.autograd.functional.jacobian(x_0_hat, x).reshape(16, 16)
    g = r2 * (v @ jacobian).reshape(x.shape)
    c_1 = math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
    expected = math.sqrt(a_prev) * x_0_hat(x) + math.sqrt(1 - a_prev - c_1**2) * torch.sin(x)
    torch.testing.assert_close(guided, expected + math.sqrt(a * a_prev) * g, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("t", [1, 20, 45])
def test_pigdm_under_a_flat_prior_takes_ddim_s_step_from_the_measurement(t):
    """There x̂_0 = x_t/√ᾱ_t knows nothing that a noiseless y does not know better: E[x_0|y] = y."""
    operator = get_operator("denoise", (1, 4, 4))
    x, y, eps = rnd((1, 1, 4, 4), 1), rnd((1, 1, 4, 4), 2), rnd((1, 1, 4, 4), 3)
    diffusion, guided = one_step("pigdm", x, t, operator, y, 0.0, lambda x, t: eps, eta=0.0)
    a_prev = diffusion.alphas_cumprod_prev[t]
    expected = math.sqrt(a_prev) * y + math.sqrt(1 - a_prev) * eps
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [1, 10, 40])
def test_ddrm_as_its_paper_writes_it_for_denoising(t):
    """A = I, where every singular value is 1 and the equations are scalar."""
    operator = get_operator("denoise", (1, 4, 4))
    x, y, sigma, eta = rnd((1, 1, 4, 4), 1), rnd((1, 1, 4, 4), 2), 0.4, 0.85

    def network(x, timesteps):
        return torch.sin(x)

    diffusion, ddrm = one_step("ddrm", x, t, operator, y, sigma, network)
    a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
    x_0 = (x - math.sqrt(1 - a) * torch.sin(x)) / math.sqrt(a)
    std = math.sqrt((1 - a_prev) / a_prev)
    if std < sigma:  # Kawar et al. 2022, eq. 8, second case; noise is zero here
        expected = x_0 + math.sqrt(1 - eta**2) * std * (y - x_0) / sigma
    else:  # third case with η_b = 1
        expected = y
    torch.testing.assert_close(ddrm, math.sqrt(a_prev) * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["denoise", "super_resolution"])
@pytest.mark.parametrize("t", [0, 1, 10, 25, 49])
def test_noisy_ddnm_is_ddrm_that_trusts_the_measurement(task, t):
    operator = get_operator(task, (1, 8, 8))
    x, noise, y = rnd((1, 1, 8, 8), 1), rnd((1, 1, 8, 8), 3), rnd((1, *operator.out_shape), 2)
    diffusion, steps = diffusion_of(50), {}
    for name, params in (("ddnm", {}), ("ddrm", {"eta_b": 1.0})):
        method = get_conditioning_method(name, operator, y, 0.3, **params)
        steps[name], _ = method.step(diffusion, lambda x, t: torch.sin(x), x, t, lambda _: noise)
    torch.testing.assert_close(steps["ddnm"], steps["ddrm"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [1, 10, 40])
def test_noiseless_ddnm_is_ddim_from_the_rectified_x_0(t):
    """Wang et al. 2023, Algorithm 1: x̂_0 + A⁺(y - A x̂_0), with DDIM's two parts of noise."""
    operator = get_operator("super_resolution", (1, 8, 8))
    x, noise, y = rnd((1, 1, 8, 8), 1), rnd((1, 1, 8, 8), 3), rnd((1, 1, 2, 2), 2)
    diffusion, eta = diffusion_of(50), 0.85
    method = get_conditioning_method("ddnm", operator, y, 0.0, eta=eta)
    found, _ = method.step(diffusion, lambda x, t: torch.sin(x), x, t, lambda _: noise)
    a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
    x_0 = (x - math.sqrt(1 - a) * torch.sin(x)) / math.sqrt(a)
    pinv = torch.linalg.pinv(dense(operator))
    x_0 = x_0 + ((y - operator.forward(x_0)).flatten() @ pinv.T).reshape(x.shape)
    std = math.sqrt(1 - a_prev)
    expected = math.sqrt(a_prev) * x_0 + std * (math.sqrt(1 - eta**2) * torch.sin(x) + eta * noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [0, 10, 40])
def test_diffpir_s_data_step_minimises_the_published_objective(t):
    """‖y - A x‖² + ρ‖x - x̂_0‖² on [0, 1] images, where the noise is σ/2; by gradient."""
    operator = get_operator("deblur", (1, 8, 8), type="uniform", kernel_size=3)
    x, y, sigma, lambda_ = rnd((1, 1, 8, 8), 1), rnd((1, 1, 8, 8), 2), 0.2, 7.0
    diffusion = diffusion_of(50)
    method = get_conditioning_method("diffpir", operator, y, sigma, lambda_=lambda_)
    _, found = method.step(diffusion, lambda x, t: torch.sin(x), x, t, torch.zeros_like)
    a = diffusion.alphas_cumprod[t]
    x_0 = (x - math.sqrt(1 - a) * torch.sin(x)) / math.sqrt(a)
    rho = lambda_ * (sigma / 2) ** 2 / ((1 - a) / a)
    u = found.clone().requires_grad_()
    offset = operator.forward(torch.ones_like(u))  # images on [0, 1] have A (x+1)/2 for data

    def objective(u):
        data = (y + offset) / 2 - operator.forward((u + 1) / 2)
        return data.square().sum() + rho * ((u - x_0) / 2).square().sum()

    (gradient,) = torch.autograd.grad(objective(u), u)
    (start,) = torch.autograd.grad(objective(v := x_0.clone().requires_grad_()), v)
    assert gradient.norm() < 1e-3 * start.norm()
