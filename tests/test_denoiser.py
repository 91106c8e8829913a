"""The prior as a denoiser."""

import os
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from data.dataloader import read_image
from guided_diffusion.denoiser import Denoiser, deepinv_denoiser
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.prior import load_prior
from tests.conftest import LINEAR, REPOSITORY, rnd
from util.errors import UserError

MU, STD = 0.2, 0.4


class GaussianPrior(NamedTuple):
    """A stand-in for the network, optimal for pixels that are independently N(MU, STD²)."""

    network: Callable
    device: torch.device = torch.device("cpu")


def gaussian_prior():
    alpha_bar = torch.from_numpy(create_sampler(**LINEAR).alphas_cumprod)

    def network(x, timesteps):
        a = alpha_bar.to(x)[timesteps].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MU) / (a * STD**2 + 1 - a)

    return GaussianPrior(network)


def posterior_mean(x, sigma):
    noise = torch.as_tensor(sigma).reshape(-1, 1, 1, 1) ** 2
    return (STD**2 * x + noise * MU) / (STD**2 + noise)


LEVELS = pytest.mark.parametrize("level", [0.02, 0.3, 4.0, [0.1, 1.0]])


@LEVELS
def test_it_is_the_posterior_mean(level):
    x = 0.2 + 0.6 * rnd((2, 1, 8, 8), seed=0)
    sigma = torch.tensor(level) if isinstance(level, list) else level
    restored = Denoiser(gaussian_prior())(x, sigma)
    assert torch.allclose(restored, posterior_mean(x, sigma), atol=0.02)  # the t of nearest noise


def test_no_noise_leaves_an_image_as_it_is():
    x = rnd((1, 1, 8, 8), seed=0)
    assert torch.allclose(Denoiser(gaussian_prior())(x, 0.0), x, atol=1e-6)


@LEVELS
def test_deepinv_has_it_on_images_from_0_to_1(level):
    pytest.importorskip("deepinv", exc_type=(ImportError, RuntimeError))
    u = 0.6 + 0.3 * rnd((2, 1, 8, 8), seed=0)
    sigma = torch.tensor(level) if isinstance(level, list) else level
    restored = 2 * deepinv_denoiser(gaussian_prior())(u, sigma) - 1
    expected = posterior_mean(2 * u - 1, 2 * torch.as_tensor(sigma))
    assert torch.allclose(restored, expected, atol=0.02)


def test_a_missing_deepinv_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(UserError, match="deepinv cannot be imported"):
        deepinv_denoiser(gaussian_prior())


def test_what_the_page_of_the_priors_says_runs(monkeypatch):
    pytest.importorskip("deepinv", exc_type=(ImportError, RuntimeError))
    monkeypatch.chdir(REPOSITORY)
    with open(os.path.join(REPOSITORY, "models", "README.md"), encoding="utf-8") as file:
        code = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    clean = rnd((1, 1, 32, 48), seed=0).clamp(-1, 1)
    x = clean + 0.2 * rnd(clean.shape, seed=1)
    names = {"x": x, "u": (x + 1) / 2, "sigma": 0.2, "x_t": x, "t": torch.tensor([40])}
    with torch.no_grad():
        for block in code:
            exec(block, names)
    assert names["epsilon"].shape == names["variance"].shape == x.shape
    assert torch.allclose((names["x_hat"] + 1) / 2, names["u_hat"], atol=1e-5)


def test_the_shipped_prior_takes_noise_out():
    path = os.path.join(REPOSITORY, "data", "mri_256_orig", "colin27_t1_z092.png")
    x = torch.from_numpy(read_image(path))[None, :1]
    restored = Denoiser(load_prior(precision="fp32"))(x + 0.2 * rnd(x.shape, seed=0), 0.2)
    rms = (restored - x).square().mean().sqrt()
    assert rms < 0.05  # a quarter of the noise
