"""How noisy a measured image is, with the network to tell its noise from anatomy.

What `noise_estimation` finds in the high frequencies is noise, and anatomy as fine as the pixels
where the air has no noise of its own: where it was cut away or painted black. The network knows
anatomy. Of y = x + n, n ~ N(0, σ²), it leaves x̂(y), and takes out, to first order,
r = y - x̂(y) = x - x̂(x) + (I - J) n with J = ∂x̂/∂y. So for every direction h of the pixels

    E[(hᵀr)²] ≥ σ² |(I - J)ᵀh|² ≥ σ² (‖h‖² - hᵀJh)² / ‖h‖²,

and a random probe measures hᵀJh, as in Monte Carlo SURE (Ramani et al. 2008). With the high passes
about pixels of like brightness for h this is a bound of σ from above, and the lower the less of the
anatomy is taken out: so the network is told the bound, until it finds none that is lower. Where the
air has noise the estimate stays: a real scan's noise is not white, and some of it the network takes
for anatomy.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import convolve

from data.masks import head_mask
from guided_diffusion.denoiser import Denoiser
from guided_diffusion.noise import Noise
from guided_diffusion.noise_estimation import GREY_LEVELS, HIGH_PASS, QUANTILE, high_passed

ROUNDS = 5
NEAR = 0.02  # estimates closer than this agree
PROBE = 0.1  # of σ, the probe's standard deviation
KEPT = 0.7  # hᵀJh/‖h‖² from which on the network hardly tells noise from anatomy
LEAST_GROUPS = GREY_LEVELS // 3  # that tell something
AIR = 0.1  # share of the pixels with noise, from which on the air has some
FEW = 4  # images of which σ is one
SIDE = 256  # pixels, at most, of rows and columns about the middle


def sigma_by_prior(
    y: NDArray[np.float32],
    sigma: float,
    denoiser: Denoiser,
    noise: Noise,
    padding: NDArray[np.bool_] | None = None,
) -> float:
    """σ, no higher than an estimate without the network.

    Args:
        y: (N, C, H, W) in [-1, 1], with white noise of one σ; C is the prior's.
        sigma: `noise.estimate` of it.
        padding: (H, W) or (N, H, W), see `estimate_sigma`.
    """
    if len(y) > FEW:  # none of them at the ends of a volume
        chosen = np.linspace(0, len(y) - 1, FEW + 2)[1:-1].round().astype(int)
        y, padding = y[chosen], _of(padding, chosen)
    y, padding = _middle(y), None if padding is None else _middle(padding)
    if min(y.shape[-2:]) < denoiser.network.least_side:
        return sigma
    flat = y.reshape(-1, *y.shape[-2:])
    if padding is not None and padding.ndim == 3:
        padding = padding.repeat(y.shape[1], axis=0)
    head = np.stack([head_mask(image) for image in y]).repeat(y.shape[1], axis=0)
    anywhere, _, around = high_passed(flat, None)
    if (anywhere & ~head).sum() > AIR * anywhere.sum():  # also where a mask leaves it out
        return sigma
    varies = high_passed(flat, padding)[0] & head
    groups = np.array_split(np.argsort(around[varies], kind="stable"), GREY_LEVELS)
    groups = [group for group in groups if len(group)]
    for _ in range(ROUNDS):
        found = _sigma_at(sigma, y, varies, groups, denoiser, noise)
        if found is None or found > (1 - NEAR) * sigma:
            break
        sigma = found
    return sigma


def _sigma_at(sigma, y, varies, groups, denoiser, noise):
    """The bound that the network, told σ, finds for it; None where it finds none."""
    with torch.inference_mode():
        gaussian = noise.to_gaussian(torch.from_numpy(y), sigma).to(denoiser.device)
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(gaussian)
        x = denoiser(gaussian, sigma)
        moved = (denoiser(gaussian + PROBE * sigma * probe, sigma) - x) / (PROBE * sigma)
    taken, probed, left = (
        convolve(v.double().cpu().numpy().reshape(varies.shape), HIGH_PASS)[varies]
        for v in (gaussian - x, probe, moved)
    )
    found = []
    for group in groups:
        kept = np.mean(probed[group] * left[group]) / np.mean(probed[group] ** 2)
        if kept < KEPT:
            found.append(math.sqrt(np.mean(taken[group] ** 2)) / (1 - max(kept, 0)))
    return float(np.quantile(found, QUANTILE)) if len(found) >= LEAST_GROUPS else None


def _middle(values):
    sides = values.shape[-2:]
    rows, cols = (slice((n - min(n, SIDE)) // 2, (n + min(n, SIDE)) // 2) for n in sides)
    return values[..., rows, cols]


def _of(padding, chosen):
    return padding[chosen] if padding is not None and padding.ndim == 3 else padding
