"""Restoring with a map of σ, for noise whose strength differs from voxel to voxel.

The network knows one noise level at a time. So an image whose noise has a map is restored at a few
levels, each as if all of it were that noisy, and every voxel takes what the levels on either side
of its own made of it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

RATIO = 1.3  # from level to level, at most
MOST_LEVELS = 8
ALIKE = 1.1  # factor between the ends of a map that is restored at one level, 5 % off at most
TAILS = 0.01  # share of the map beyond the lowest and beyond the highest level


def levels_of(sigma: torch.Tensor) -> list[float]:
    """The noise levels to restore at, ascending, in even ratios of `RATIO` or less.

    None where the map is 0 throughout: nothing is known of that noise.
    """
    known = sigma[sigma > 0].cpu().numpy()
    if not known.size:
        return []
    low, high = (float(v) for v in np.quantile(known, [TAILS, 1 - TAILS]))
    if high < ALIKE * low:
        return [math.sqrt(low * high)]
    count = min(MOST_LEVELS, 1 + math.ceil(math.log(high / low) / math.log(RATIO) - 1e-6))
    return [float(level) for level in np.geomspace(low, high, count)]


def weights_of(sigma: torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    """How much each level counts at each voxel, (len(levels), *sigma.shape), summing to 1.

    Between two levels it is linear in log σ; beyond the last ones these count alone.
    """
    log_levels = torch.tensor(levels, dtype=torch.float64).log()
    place = sigma.double().clamp(min=levels[0], max=levels[-1]).log()
    if len(levels) == 1:
        return torch.ones(1, *sigma.shape)
    distance = (place - log_levels.reshape(-1, *[1] * sigma.ndim)) / (log_levels[1] - log_levels[0])
    return (1 - distance.abs()).clamp(min=0).float()


def by_levels(
    sigma: torch.Tensor, levels: Sequence[float], parts: Iterable[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Take each voxel from what was restored at the levels beside its own.

    Args:
        sigma: (N, C, H, W).
        parts: what was restored at each of the levels, with `samples` (N, K, C, H, W) and their
            `mean`; taken one by one.

    Returns:
        (samples, mean).
    """
    samples: Any = 0
    mean: Any = 0
    for weight, part in zip(weights_of(sigma, levels).numpy(), parts, strict=True):
        samples = samples + weight[:, None] * part.samples
        mean = mean + weight * part.mean
    return samples, mean


def figures_of(
    y: torch.Tensor,
    sigma: torch.Tensor,
    mean: NDArray[np.float32],
    padding: Sequence[NDArray[np.bool_] | None],
) -> list[dict[str, float]]:
    """Of each image ‖(y - x̂)/σ‖/√m, "residual", and the root mean square σ, where σ is known.

    Neither where it is known of padding alone.
    """
    found: list[dict[str, float]] = []
    each = zip(y - torch.from_numpy(mean), sigma, padding, strict=True)
    for left, strength, ignored in each:
        known = strength > 0
        if ignored is not None:
            known = known & ~torch.from_numpy(ignored)
        if not known.any():
            found.append({})
            continue
        residual = (left / strength)[known].square().mean().sqrt()
        level = strength[known].square().mean().sqrt()
        found.append({"residual": residual.item(), "sigma": level.item()})
    return found
