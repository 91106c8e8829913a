"""Raw k-space made ready: the phase that is found, and what is shown of a scan."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.kspace import Acquisition
from guided_diffusion.config import read_schedule
from guided_diffusion.operators import operator_class
from guided_diffusion.operators.coils import birdcage_maps
from guided_diffusion.operators.fourier import fft2c
from guided_diffusion.operators.several_coils import several_coils
from guided_diffusion.scan import FirstLook, Scan, prepare, to_hybrid_image
from guided_diffusion.statistics import PriorStatistics

HEIGHT, WIDTH, COILS = 64, 48, 6
FAST = "configs/diffusion_config_fast.yaml"
LAW = PriorStatistics(-0.4, (1.0, 400.0), (100.0, 100.0 / 400**2), "1/f²")


class Oracle:
    """A prior whose network knows the image: its noise is all of the state that is not x."""

    device = torch.device("cpu")
    statistics = LAW

    def __init__(self, x):
        self.x = x
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.alphas = torch.cumprod(1 - betas, 0).float()

    def network(self, state, timesteps):
        a = self.alphas[timesteps.long()].reshape(-1, 1, 1, 1)
        eps = (state - a.sqrt() * self.x) / (1 - a).sqrt()
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)


def scene(sigma=0.0, seed=0):
    """(k-space, magnitude, smooth phase, where a vessel's phase is turned by 100°)."""
    r, c = torch.linspace(-1, 1, HEIGHT)[:, None], torch.linspace(-1, 1, WIDTH)
    inside = (r / 0.8) ** 2 + (c / 0.75) ** 2 < 1
    u = inside * (1 + 0.5 * torch.cos(5 * r) * torch.cos(6 * c + 1))
    vessel = (r - 0.2) ** 2 + (c + 0.1) ** 2 < 0.01
    phase = 0.8 * r - 0.6 * c + 0.7 * r * c + vessel * np.deg2rad(100)
    z = u * torch.polar(torch.ones_like(u), phase)
    k = fft2c(birdcage_maps(COILS, HEIGHT, WIDTH) * z)
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(COILS, HEIGHT, WIDTH, 2, generator=random)
    return k + sigma * torch.view_as_complex(noise), u, phase, vessel


def measured(k, every=2, centre=14):
    mask = np.arange(WIDTH) % every == 0
    mask[WIDTH // 2 - centre // 2 : WIDTH // 2 + centre // 2] = True
    return Acquisition((k * torch.from_numpy(mask)).numpy(), mask, "columns", 2.0, False)


def prepared(acquisition, u, sigma, **parameters):
    random = torch.Generator().manual_seed(1)
    return prepare(
        acquisition,
        operator_class("mri").check(parameters),
        sigma,
        Oracle(u - 1),
        read_schedule(FAST).sampler_arguments(),
        lambda x: torch.randn(x.shape, generator=random),
    )


def unexplained(operator, y, sigma):
    """What no real image explains of y, over what noise alone would leave there."""
    seen = operator.singular_values > 1e-2
    left = y.square().sum() - torch.where(seen, operator.Ut(y), 0.0).square().sum()
    return (left / sigma**2 / (y.numel() - seen.sum())).item()


def test_what_is_left_of_a_scan_is_a_real_image():
    """A vessel has another phase than what is about it, which no smooth phase can hold."""
    k, u, _, vessel = scene(0.01)
    scan = prepared(measured(k), u * torch.cos(vessel * np.deg2rad(100)), 0.01)
    assert unexplained(scan.operator, scan.y, scan.sigma) < 2
    first = scan.first
    whole = scan.y + scan.operator.forward(torch.ones(1, 1, HEIGHT, WIDTH))
    beside = first.forward(scan.beside)[..., torch.from_numpy(scan.operator.mask)]
    whole = whole + torch.cat([beside.real, beside.imag], dim=-1)
    assert unexplained(scan.operator, whole, scan.sigma) > 5


def test_single_points_of_a_scan_are_explained_as_well_as_lines():
    """By the image that the prior knows, with the maps and the phase that were found."""
    sigma = 0.01
    k, u, _, vessel = scene(sigma)
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    mask[HEIGHT // 2 - 7 : HEIGHT // 2 + 7, WIDTH // 2 - 7 : WIDTH // 2 + 7] = True
    points = Acquisition((k * torch.from_numpy(mask)).numpy(), mask, "columns", 2.0, False)
    real = (u * torch.cos(vessel * np.deg2rad(100)))[None, None]
    left = []
    for acquisition in (measured(k), points):
        scan = prepared(acquisition, real[0, 0], sigma)
        residual = scan.y - scan.operator.forward(real - 1)
        error = scan.magnitude(real - 1)[0, 0] + 1 - u
        left.append([e.square().mean().sqrt().item() for e in (residual, error)])
    assert scan.operator.out_shape == (COILS, 1, 2 * mask.sum())
    assert left[1][0] < 1.2 * left[0][0] < 0.1 and left[1][1] < 1.2 * left[0][1] < 0.1


def known(k, maps, mask, sigma):
    """A scan of known maps, with nothing imaginary and nothing that folds over."""
    kept = torch.from_numpy(mask)
    pair = torch.stack([maps, torch.zeros_like(maps)])
    first = FirstLook(pair, to_hybrid_image(k * kept, (-1,)), kept, (-1,), sigma, LAW)
    nothing = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.complex64)
    operator = several_coils(mask, maps, "columns")
    return Scan(operator, torch.empty(0), sigma, first, nothing, nothing[:1].real)


def test_measured_lines_stay_as_they_are_if_wanted():
    k, u, *_ = scene(0.02)
    acquisition = measured(k)
    scan = prepared(acquisition, u, 0.02, keep_measured=True)
    assert scan.keep_measured and not prepared(acquisition, u, 0.02).keep_measured
    z = scan.beside + torch.cat([torch.rand(1, 1, HEIGHT, WIDTH), torch.zeros(1, 1, HEIGHT, WIDTH)])
    found = fft2c(scan.first.coil_images(z, keep_measured=True)[0])
    lines = torch.from_numpy(acquisition.mask)
    assert torch.allclose(found[..., lines], k[..., lines], atol=1e-4)
    of_z = fft2c((scan.first.maps * scan.first.turn * z).sum(0))
    assert torch.allclose(found[..., ~lines], of_z[..., ~lines], atol=1e-4)


def test_of_measured_lines_comes_back_what_the_image_misses_but_not_its_noise():
    """Beside the object itself there is only noise; beside half of it the other half."""
    sigma = 0.05
    k, u, phase, _ = scene(sigma)
    clean, *_ = scene(0.0)
    scan = known(k, birdcage_maps(COILS, HEIGHT, WIDTH), measured(k).mask, sigma)
    scan.first.turn = torch.polar(torch.ones_like(phase), phase)[None, None]
    lines = torch.from_numpy(measured(k).mask)
    fits, misses = (
        fft2c(scan.first.coil_images(z)[0])
        for z in (torch.stack([f * u, 0 * u])[:, None] + 0j for f in (1.0, 0.5))
    )
    assert torch.allclose(fits[..., ~lines], clean[..., ~lines], atol=1e-4)
    noise = (k - clean)[..., lines].abs().square().mean()
    assert (fits - clean)[..., lines].abs().square().mean() < 0.05 * noise
    assert (misses - clean)[..., lines].abs().square().mean() < 1.1 * noise


def test_the_magnitude_is_that_of_a_scan_whose_other_lines_have_no_noise():
    """Of its square, the mean over draws of the noise."""
    sigma = 0.2
    shown, complete = [], []
    for seed in range(12):
        k, u, *_ = scene(sigma, seed)
        clean, *_ = scene(0.0, seed)
        maps, mask = birdcage_maps(COILS, HEIGHT, WIDTH), measured(k).mask
        scan = replace(known(k, maps, mask, sigma), keep_measured=True)
        _, _, phase, _ = scene()
        scan.first.turn = torch.polar(torch.ones_like(phase), phase)[None, None]
        shown.append(scan.magnitude((u - 1)[None, None])[0, 0] + 1)
        kept = torch.where(torch.from_numpy(mask), k, clean)
        complete.append(fft2c(kept.conj()).abs().square().sum(0))  # an inverse, but for its phase
    found = torch.stack(shown).square().mean()
    assert found.item() == pytest.approx(torch.stack(complete).mean().item(), rel=0.02)


def test_a_complete_scan_is_shown_without_its_noise():
    sigma = 0.2
    k, u, phase, _ = scene(sigma)
    scan = known(k, birdcage_maps(COILS, HEIGHT, WIDTH), np.ones(WIDTH, bool), sigma)
    scan.first.turn = torch.polar(torch.ones_like(phase), phase)[None, None]
    error = scan.magnitude((u - 1)[None, None])[0, 0] - (u - 1)
    assert error.square().mean().sqrt() < 0.1 * sigma
