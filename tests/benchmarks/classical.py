"""Restoration without a learned prior: what DMPS is measured against.

Each method of `CLASSICAL` restores one grey image: ``restore(operator, y, sigma, **parameters)``
with y (1, 1, h, w) and the result (1, 1, H, W), both in [-1, 1] but for noise and overshoot;
sigma is the standard deviation of y's noise. Weights are in units of the noise, so that one grid
of them serves every noise level.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.ndimage import zoom
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

BLACK = -1.0
PROX_STEPS = 20  # of Chambolle's iteration, which starts afresh for every proximal step


def bicubic(operator, y, sigma):
    """Interpolate y by a cubic spline.

    Pixel i of y is centred on f·i + (f-1)/2, the middle of a block of f pixels of x: pixels are
    areas (grid_mode), not points, and edges are reflected between pixels.
    """
    factors = [n / m for n, m in zip(operator.in_shape[1:], y.shape[2:], strict=True)]
    x = zoom(y[0, 0].double().numpy(), factors, order=3, mode="grid-mirror", grid_mode=True)
    return torch.from_numpy(x)[None, None]


def on_unit_range(denoise):
    """The method that applies ``denoise(u, sigma, strength)`` to u = (y+1)/2, (H, W) in [0, 1]."""

    def restore(operator, y, sigma, strength):
        u = (y[0, 0].double().numpy() + 1) / 2
        return torch.from_numpy(2 * denoise(u, sigma / 2, strength) - 1)[None, None]

    return restore


def block_matching(u, sigma, strength):
    """BM3D, told `strength` times the true noise."""
    from bm3d import bm3d  # an optional package, of tests/requirements.txt

    return bm3d(u, strength * sigma)


def total_variation(u, sigma, strength):
    return denoise_tv_chambolle(u, weight=strength * sigma, eps=1e-5)


def nl_means(u, sigma, strength):
    return denoise_nl_means(u, patch_size=5, patch_distance=9, h=strength * sigma, sigma=sigma)


def wiener(operator, y, sigma, strength):
    """argmin_x ‖Ax - y‖² + μ‖x - b‖², b black, μ = (strength·σ)²: Tikhonov's solution.

    It is Wiener's for pixels that are independent with mean b and standard deviation 1/strength.
    x = b + V s/(s²+μ) (Uᵀy - s Vᵀb).
    """
    s = operator.singular_values
    b = torch.full((1, *operator.in_shape), BLACK, dtype=y.dtype)
    gain = s / (s**2 + (strength * sigma) ** 2)
    return b + operator.V(gain * (operator.Ut(y) - s * operator.Vt(b)))


def tv_deconvolution(operator, y, sigma, strength, steps):
    """argmin_x ½‖Ax - y‖² + w TV(x), w = strength·σ², by FISTA (Beck & Teboulle 2009, eq. 4.1-4.3).

    `steps` is a parameter like the weight: stopped early, FISTA is often nearer to the truth.
    """
    L = operator.singular_values.max().item() ** 2  # Lipschitz constant of Aᵀ(Ax - y)
    weight = strength * sigma**2 / L
    x = z = wiener(operator, y, sigma, 1.0)
    t = 1.0
    for _ in range(steps):
        gradient = operator.transpose(operator.forward(z) - y)
        x_next = tv_prox(z - gradient / L, weight)
        t_next = (1 + math.sqrt(1 + 4 * t**2)) / 2
        z = x_next + (t - 1) / t_next * (x_next - x)
        x, t = x_next, t_next
    return x


def tv_prox(v, weight):
    """argmin_z ½‖z - v‖² + weight·TV(z), v (1, 1, H, W)."""
    image = v[0, 0].double().numpy()
    z = denoise_tv_chambolle(image, weight=weight, eps=1e-6, max_num_iter=PROX_STEPS)
    return torch.from_numpy(z).to(v.dtype)[None, None]


class Classical(NamedTuple):
    """A method, the operators it is for, and the values that each of its parameters may take."""

    restore: Callable
    operators: tuple[str, ...]
    parameters: dict[str, tuple[float, ...]]

    @property
    def grid(self):
        """Every combination of parameters, as keyword arguments."""
        names, values = self.parameters.keys(), self.parameters.values()
        return [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]


LINEAR = ("super_resolution", "deblur")
CLASSICAL = {
    "bicubic": Classical(bicubic, ("super_resolution",), {}),
    "bm3d": Classical(
        on_unit_range(block_matching), ("denoise",), {"strength": (0.8, 1, 1.2, 1.4, 1.7)}
    ),
    "tv": Classical(
        on_unit_range(total_variation), ("denoise",), {"strength": (0.5, 0.7, 1, 1.4, 2, 2.8)}
    ),
    "nl_means": Classical(
        on_unit_range(nl_means), ("denoise",), {"strength": (0.4, 0.5, 0.6, 0.7, 0.8, 1)}
    ),
    "wiener": Classical(wiener, LINEAR, {"strength": (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8)}),
    "tv_deconvolution": Classical(
        tv_deconvolution, LINEAR, {"strength": (0.5, 1, 2, 4, 8), "steps": (10, 20, 40, 100)}
    ),
}
