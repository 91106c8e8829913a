"""The classical methods that the benchmarks compare DMPS with."""

import pytest
import torch

from guided_diffusion.measurements import get_operator
from tests.benchmarks.classical import CLASSICAL, bicubic, tv_deconvolution, wiener
from tests.conftest import rnd
from util.metrics import image_metrics


def blocks(size):
    """A piecewise constant image, (1, 1, size, size) in [-1, 1]."""
    x = torch.full((1, 1, size, size), -1.0)
    x[..., size // 4 : 3 * size // 4, size // 3 : 5 * size // 6] = 0.5
    x[..., size // 2 :, : size // 3] = 0.0
    return x


@pytest.mark.parametrize("kind", ["bicubic", "standard"])
@pytest.mark.parametrize("factor", [2, 4])
def test_bicubic_has_no_half_pixel_shift(kind, factor):
    size = 64
    ramp = torch.linspace(-1, 1, size, dtype=torch.float64)
    x = (0.7 * ramp[:, None] + 0.3 * ramp)[None, None]  # another slope for rows than for columns
    operator = get_operator(
        "super_resolution",
        (1, size, size),
        dtype=torch.float64,
        type=kind,
        scale_factor=factor,
        singular_value_threshold=0.0,
    )
    x_hat = bicubic(operator, operator.forward(x), 0.0)
    inner = (..., slice(24, 40), slice(24, 40))  # the reflection at the edges bends a ramp
    pixel = 0.3 * 2 / (size - 1)
    assert (x_hat - x)[inner].abs().max() < 0.01 * pixel


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("super_resolution", {"scale_factor": 2}),
        ("deblur", {"type": "gaussian", "kernel_size": 9, "intensity": 1.5}),
    ],
)
def test_wiener_equals_the_dense_ridge_solution(name, params):
    operator = get_operator(name, (1, 8, 12), dtype=torch.float64, **params)
    n = 8 * 12
    A = operator.forward(torch.eye(n, dtype=torch.float64).reshape(n, 1, 8, 12)).reshape(n, -1).T
    y = rnd((1, *operator.out_shape), seed=0).double()
    sigma, strength = 0.1, 2.0
    # least squares for u = x + 1, the image above black
    gram = A.T @ A + (strength * sigma) ** 2 * torch.eye(n, dtype=torch.float64)
    u = torch.linalg.solve(gram, A.T @ (y.flatten() + A @ torch.ones(n, dtype=torch.float64)))
    x = wiener(operator, y, sigma, strength).flatten()
    assert torch.allclose(x, u - 1, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("deblur", {"type": "gaussian", "kernel_size": 13, "intensity": 1.5}),
        ("deblur", {"type": "uniform", "kernel_size": 5}),
        ("super_resolution", {"scale_factor": 2}),
    ],
)
def test_tv_deconvolution_minimises_its_objective_and_beats_wiener(name, params):
    x, sigma, strength = blocks(48), 0.05, 2.0
    operator = get_operator(name, (1, 48, 48), **params)
    y = operator.forward(x)
    y = y + sigma * rnd(y.shape, seed=1)

    def objective(v):
        steps = [torch.diff(v, dim=d, append=v.narrow(d, 47, 1)) for d in (2, 3)]
        tv = torch.hypot(*steps).sum()
        return (operator.forward(v) - y).square().sum() / 2 + strength * sigma**2 * tv

    x_hat = tv_deconvolution(operator, y, sigma, strength, steps=100)
    smoothed = tv_deconvolution(operator, y, sigma, 1.5 * strength, steps=100)
    sharper = tv_deconvolution(operator, y, sigma, strength / 1.5, steps=100)
    assert objective(x_hat) < min(map(objective, (smoothed, sharper, x)))
    others = [wiener(operator, y, sigma, s) for s in (0.5, 1, 2, 4, 8)]
    if y.shape == x.shape:
        others.append(y)
    psnr = [image_metrics(v[0].numpy(), x[0].numpy())["psnr"] for v in (x_hat, *others)]
    assert psnr[0] > max(psnr[1:]) + 1


@pytest.mark.parametrize("name", [k for k, v in CLASSICAL.items() if "denoise" in v.operators])
@pytest.mark.parametrize("sigma", [0.2, 0.75])
def test_denoisers_halve_the_error(name, sigma):
    if name == "bm3d":
        pytest.importorskip("bm3d")
    x = blocks(48)
    y = x + sigma * rnd(x.shape, seed=2)
    x_hat = CLASSICAL[name].restore(get_operator("denoise", (1, 48, 48)), y, sigma, strength=1)
    assert (x_hat - x).square().mean().sqrt() < sigma / 2
