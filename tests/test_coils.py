"""Coil maps: simulated ones as published, estimated ones against the maps that made the data."""

import numpy as np
import pytest
import torch

from guided_diffusion.operators.coils import (
    birdcage_maps,
    espirit,
    estimate_maps,
    noise_of_coils,
    simulated_maps,
)
from guided_diffusion.operators.fourier import fft2c
from util.errors import UserError

HEIGHT, WIDTH, COILS = 96, 80, 6
SIGPY = {
    (0, 0, 0): (0.011727 - 0.029317j),
    (1, 128, 128): -0.353553j,
    (3, 200, 17): (-0.292267 - 0.66344j),
    (7, 255, 255): (-0.031838 - 0.034036j),
}


def scene(sigma=0.01):
    """The published test of ESPIRiT: (k-space, maps, magnitude, phase)."""
    r, c = np.linspace(-1, 1, HEIGHT)[:, None], np.linspace(-1, 1, WIDTH)
    head = (r / 0.8) ** 2 + (c / 0.7) ** 2 < 1
    spot = (r + 0.2) ** 2 + (c - 0.2) ** 2 < 0.05
    u = 2 * head * (0.5 + 0.3 * np.cos(6 * r + 1) * np.cos(5 * c) - 0.3 * spot)
    a = (2 * np.pi * np.arange(COILS) / COILS)[:, None, None]
    maps = np.exp(-((r - 1.2 * np.sin(a)) ** 2 + (c - 1.2 * np.cos(a)) ** 2) / 2)
    maps = maps * np.exp(1j * (0.7 * a + 0.9 * r * np.cos(a) + 0.6 * c * np.sin(a)))
    maps /= np.sqrt(np.sum(np.abs(maps) ** 2, axis=0))
    phase = 0.5 * r - 0.3 * c + 0.4 * r * c
    random = np.random.default_rng(0)
    shape = (COILS, HEIGHT, WIDTH)
    noise = random.standard_normal(shape) + 1j * random.standard_normal(shape)
    k = fft2c(torch.from_numpy(maps * u * np.exp(1j * phase))) + sigma * torch.from_numpy(noise)
    return k.to(torch.complex64), torch.from_numpy(maps), torch.from_numpy(u), phase


def error(maps, true, u):
    """Relative error in the head, each pixel turned to the true maps' phase; least correlation."""
    turned = maps * torch.exp(1j * (maps.conj() * true).sum(0).angle())
    head = u > 0
    difference = (turned - true).abs().square().sum(0)[head].sum().sqrt()
    correlation = (maps.conj() * true).sum(0).abs()[head].min()
    return (difference / true.abs().square().sum(0)[head].sum().sqrt()).item(), correlation.item()


@pytest.mark.parametrize("sigma, published", [(0.0, 0.0037), (0.01, 0.0054), (0.05, 0.0189)])
def test_espirit_is_as_close_as_sigpys(sigma, published):
    k, true, u, _ = scene(sigma)
    values, vectors = espirit(k[:, 36:60, 28:52], HEIGHT, WIDTH)
    maps = vectors[..., -1].permute(2, 0, 1)
    found, correlation = error(maps, true, u)
    assert found == pytest.approx(published, abs=6e-5)
    assert correlation > 0.997
    assert values.max() < 1.001
    share = (values[..., -1] > 0.95).double().mean().item()
    assert share == pytest.approx({0.0: 0.581, 0.01: 0.581, 0.05: 0.593}[sigma], abs=2e-3)


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_maps_of_undersampled_data_hold_the_objects_phase(axis):
    k, true, u, phase = scene()
    lines = WIDTH if axis == "columns" else HEIGHT
    mask = np.arange(lines) % 4 == 0
    mask[lines // 2 - 10 : lines // 2 + 10] = True
    k = k * torch.from_numpy(mask if axis == "columns" else mask[:, None])
    first, second = estimate_maps(k, mask, axis)
    assert error(first, true, u)[0] < 0.02
    turned = (first.conj() * true).sum(0) * torch.exp(1j * torch.from_numpy(phase))
    inside = torch.nn.functional.avg_pool2d((u > 0)[None].float(), 9, 1, 4)[0] == 1
    assert turned.angle()[inside].abs().quantile(0.95) < 0.1
    assert second.abs()[:, u > 0].max() < 0.2  # nothing folds over


def test_maps_of_points_are_calibrated_by_their_centre():
    k, true, u, _ = scene()
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3
    mask[38:58, 28:52] = True  # a rectangle of 20 × 24
    maps, _ = estimate_maps(k * torch.from_numpy(mask), mask, "columns")
    assert error(maps, true, u)[0] < 0.02
    mask[48, 42:46] = False
    with pytest.raises(UserError, match="3 lines about the centre"):
        mask[48, 37:39] = False
        estimate_maps(k * torch.from_numpy(mask), mask, "columns")


def test_second_maps_hold_what_folds_over():
    """A head twice as wide as the field of view: two points of it in every pixel."""
    k, true, u, phase = scene(0)
    object_ = true * u * torch.exp(1j * torch.from_numpy(phase))
    folded = fft2c(object_ + object_.roll(WIDTH // 2, -1)).to(torch.complex64)
    maps = estimate_maps(folded, np.ones(WIDTH, bool), "columns")
    both = (u > 0) & (u > 0).roll(WIDTH // 2, -1)
    images = object_ + object_.roll(WIDTH // 2, -1)
    left = images - sum(m * (m.conj() * images).sum(0) for m in maps)
    alone = images - maps[0] * (maps[0].conj() * images).sum(0)
    assert left[:, both].norm() < 0.05 * images[:, both].norm()
    assert alone[:, both].norm() > 2 * left[:, both].norm()


def test_noise_is_found_in_the_corners():
    """σ of each coil, whatever is at the centre; zeros that were filled in do not count."""
    random = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.01, 0.02, 0.04])
    k = sigma[:, None, None, None] * torch.randn(3, 96, 80, 2, generator=random)
    k = torch.view_as_complex(k.contiguous())
    k[:, 38:58, 30:50] += 5
    k[:, :, :8] = 0
    mask = np.ones(80, bool)
    assert torch.allclose(noise_of_coils(k, mask, "columns"), sigma, rtol=0.15)
    assert torch.allclose(noise_of_coils(k.mT, mask, "rows"), sigma, rtol=0.15)
    points = random.manual_seed(1) and torch.rand(96, 80, generator=random) < 0.5
    k[:, ~points] = 0
    assert torch.allclose(noise_of_coils(k, points.numpy(), ""), sigma, rtol=0.15)
    with pytest.raises(UserError, match="no noise"):
        noise_of_coils(0 * k, mask, "columns")


def test_no_calibration_centre():
    k, *_ = scene()
    mask = np.arange(WIDTH) % 4 == 0
    with pytest.raises(UserError, match="1 lines about the centre"):
        estimate_maps(k, mask, "columns")


def test_simulated_maps_are_normalised_and_smooth():
    maps = simulated_maps(8, 64, 48)
    assert maps.shape == (8, 64, 48)
    assert torch.allclose(maps.abs().square().sum(0), torch.ones(64, 48), atol=1e-5)
    steps = (maps[:, 1:] - maps[:, :-1]).abs()
    assert steps.max() < 0.3


def test_birdcage_maps_equal_sigpys():
    """sigpy.mri.birdcage_maps((8, 256, 256), r=1.5) over its root sum of squares, 0.1.27."""
    maps = birdcage_maps(8, 256, 256)
    for at, value in SIGPY.items():
        assert abs(maps[at].item() - value) < 1e-5
