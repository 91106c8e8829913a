"""Reconstructions of k-space without a learned prior, of one weight λ each.

All see AᵀA and Aᵀy, real or complex, and return the object's image u, black at 0.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

Normal = Callable[[torch.Tensor], torch.Tensor]


def zero_filled(normal: Normal, b: torch.Tensor, weight: float) -> torch.Tensor:
    """Aᵀy alone."""
    return b


def sense(normal: Normal, b: torch.Tensor, weight: float) -> torch.Tensor:
    """CG-SENSE (Pruessmann et al. 2001): (AᵀA + λ) u = Aᵀy by 30 conjugate gradients."""
    u, left = torch.zeros_like(b), b
    direction, square = left, left.square().sum()
    enough = 1e-10 * square  # beyond it float32 has nothing to say
    for _ in range(30):
        if square <= enough:
            break
        image = normal(direction) + weight * direction
        step = square / (direction * image).sum()
        u, left = u + step * direction, left - step * image
        new = left.square().sum()
        direction, square = left + new / square * direction, new
    return u


def total_variation(normal: Normal, b: torch.Tensor, weight: float, steps=800) -> torch.Tensor:
    """min ½‖Au - y‖² + λ‖∇u‖₁ to convergence, by Condat & Vũ (2013); anisotropic, circular."""
    dual = 0.01
    primal = 1 / (0.5 + 8 * dual)
    u, p, q = b, torch.zeros_like(b), torch.zeros_like(b)
    for _ in range(steps):
        back = p.roll(1, -1) - p + q.roll(1, -2) - q
        new = u - primal * (normal(u) - b + back)
        ahead = 2 * new - u
        p = within(p + dual * (ahead.roll(-1, -1) - ahead), weight)
        q = within(q + dual * (ahead.roll(-1, -2) - ahead), weight)
        u = new
    return u


def within(x: torch.Tensor, radius: float) -> torch.Tensor:
    """x, real or complex, its magnitude at most `radius`."""
    if not x.is_complex():
        return x.clamp(-radius, radius)
    return x * (radius / x.abs().clamp(min=radius))


def wavelet(normal: Normal, b: torch.Tensor, weight: float) -> torch.Tensor:
    """min ½‖Au - y‖² + λ‖Wu‖₁, W Daubechies 4, by 100 steps of FISTA (Beck & Teboulle 2009)."""
    import pywt  # optional, of tests/requirements.txt

    u, ahead, t = b, b, 1.0
    for _ in range(100):
        image = (ahead - normal(ahead) + b).numpy()
        levels = pywt.wavedec2(image, "db4", mode="periodization", level=4)
        shrunken = [tuple(_shrunken(x, weight) for x in details) for details in levels[1:]]
        new = torch.from_numpy(pywt.waverec2([levels[0], *shrunken], "db4", mode="periodization"))
        new = new[..., : b.shape[-2], : b.shape[-1]]  # odd sizes come back one longer
        later = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead, u, t = new + (t - 1) / later * (new - u), new, later
    return u


def _shrunken(x: np.ndarray, weight: float) -> np.ndarray:
    """x, real or complex, its magnitude less by `weight`."""
    return x * np.maximum(1 - weight / np.maximum(np.abs(x), weight), 0)


def deepinv_tv(normal: Normal, b: torch.Tensor, weight: float, steps=200) -> torch.Tensor:
    """min ½‖Au - y‖² + λ‖∇u‖₁,₂ by FISTA with deepinv's proximal map of isotropic TV."""
    from deepinv.optim.prior import TVPrior  # pip install deepinv

    prior = TVPrior(n_it_max=10)  # it goes on where it ended the step before
    prior.TVModel.tau = 0.1  # its 0.01 would follow too slowly
    u, ahead, t = b, b, 1.0
    for _ in range(steps):
        new = prior.prox(ahead - normal(ahead) + b, gamma=weight)
        later = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead, u, t = new + (t - 1) / later * (new - u), new, later
    return u


CLASSICAL = {  # method: its function, and the weights of which the best in tuning is taken
    "zero_filled": (zero_filled, (0.0,)),
    "sense": (sense, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
    "wavelet": (wavelet, (0.001, 0.003, 0.008, 0.02, 0.05)),
    "tv": (total_variation, (0.0003, 0.001, 0.003, 0.008, 0.02, 0.05)),
    "deepinv_tv": (deepinv_tv, (0.0003, 0.001, 0.003, 0.008, 0.02, 0.05)),
    "tv_estimated": (total_variation, (0.0003, 0.001, 0.003, 0.008, 0.02, 0.05)),
}
