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
LEAST = 0.001  # level; the least that a prior is trained on is ten times as high
ALIKE = 1.1  # factor between the ends of a map that is restored at one level, 5 % off at most
TAILS = 0.01  # share of the map beyond the lowest and beyond the highest level


def levels_of(sigma: torch.Tensor) -> list[float]:
    """The noise levels to restore at, ascending, in even ratios of `RATIO` or less.

    None is below `LEAST`, but where all of the map is: these would make no difference.
    An empty list where the map is 0 throughout: nothing is known of that noise.
    """
    known = sigma[sigma > 0].cpu().numpy()
    if not known.size:
        return []
    low, high = (float(v) for v in np.quantile(known, [TAILS, 1 - TAILS]))
    low = max(low, min(LEAST, high))
    if high < ALIKE * low:
        return [math.sqrt(low * high)]
    count = 1 + math.ceil(math.log(high / low) / math.log(RATIO) - 1e-6)
    return [float(level) for level in np.geomspace(low, high, count)]


def by_levels(
    sigma: torch.Tensor, levels: Sequence[float], parts: Iterable[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Take each voxel from what was restored at the levels beside its own.

    Between two levels it is linear in log σ; beyond the last ones these count alone.

    Args:
        sigma: (N, C, H, W).
        levels: see `levels_of`.
        parts: what was restored at each of the levels, with `samples` (N, K, C, H, W) and their
            `mean`; taken one by one.

    Returns:
        (samples, mean).
    """
    place = _place_of(sigma, levels)
    samples: Any = 0
    mean: Any = 0
    for i, part in enumerate(parts):  # one weight at a time, for a volume's would fill the memory
        weight = np.maximum(1 - np.abs(place - i), 0)
        samples = samples + weight[:, None] * part.samples
        mean = mean + weight * part.mean
    return samples, mean


def _place_of(sigma: torch.Tensor, levels: Sequence[float]) -> NDArray[np.float32]:
    """Where each voxel's σ lies among the levels, from 0 to len(levels) - 1, even in log σ."""
    if len(levels) == 1:
        return np.zeros(sigma.shape, np.float32)
    first, second = np.log(levels[:2])
    place = np.log(np.clip(sigma.numpy(), levels[0], levels[-1], dtype=np.float32))
    place -= np.float32(first)
    place /= np.float32(second - first)
    return place


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
