"""Denoising of a volume beyond what the network sees of it plane by plane.

The mean of what it makes of three planes is the pilot of an empirical Wiener filter in three
dimensions: first of overlapping blocks, then of groups of blocks that look alike (the second stage
of BM4D, Maggioni et al. 2013, written anew). It gives back to the volume the detail that all planes
lost, and takes out noise that is none in three dimensions. After either the network looks once more
at the three planes, of which little noise is left.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn, idctn
from scipy.ndimage import uniform_filter

from guided_diffusion.config import Measurement, Schedule
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods import METHODS
from guided_diffusion.noise import Noise
from guided_diffusion.operators import operator_class
from guided_diffusion.operators.base import Sigma

BLOCKS = ((8, 3), (12, 4))  # (side, distance) of blocks in voxels; the mean of their filters counts
LEFT = (0.3, 0.15)  # of σ: what the network is told is left after either filter
SIDE, DISTANCE = 4, 3  # of the blocks that are grouped
REACH = 4  # voxels along each axis, to the blocks that a group may be made of
ALIKE = 20  # blocks in a group
ROUNDS = 2  # of the groups' filter, each with the last one's result as its pilot
STAGES = 3 + ROUNDS  # of `refined`: filters and looks
AT_ONCE = 2048  # groups
SLAB = 24  # slices whose groups are looked for at once
FAR = np.float32(1e6)  # more unlike than any two blocks

Volume = NDArray[np.float32]
Index = NDArray[np.int64]


def block_wiener(y: Volume, pilot: Volume, sigma: float, side: int, distance: int) -> Volume:
    """Wiener-filter y in overlapping blocks, by the pilot's power at each of their frequencies.

    In the orthonormal DCT of a block a coefficient of the pilot P takes P²/(P² + σ²) of y's; the
    block's mean is y's own. Where blocks overlap those count more that let less noise through.

    Args:
        y: (D, H, W) with white noise of standard deviation sigma > 0; pilot: like y, denoised.
        side, distance: of the blocks, and from one to the next.
    """
    sides = [min(side, n) for n in y.shape]
    starts = [_starts(n, b, distance) for n, b in zip(y.shape, sides, strict=True)]
    window = _window(sides)
    total, weights = np.zeros_like(y), np.zeros_like(y)
    blocks = [np.lib.stride_tricks.sliding_window_view(v, sides) for v in (y, pilot)]
    for i in starts[0]:
        for j in starts[1]:
            noisy, clean = (v[i, j, starts[2]] for v in blocks)
            filtered, weight = _wiener(noisy, clean, sigma)
            weight = window * weight
            for k, x, w in zip(starts[2], filtered * weight, weight, strict=True):
                place = np.s_[i : i + sides[0], j : j + sides[1], k : k + sides[2]]
                total[place] += x
                weights[place] += w
    return total / weights


def group_wiener(y: Volume, pilot: Volume, sigma: float) -> Volume:
    """Like `block_wiener`, of groups: to each block those about it that are like it in the pilot.

    The transform is the DCT along the three axes of the blocks and along the group.

    Args:
        y, pilot, sigma: see `block_wiener`.
    """
    sides = [min(SIDE, n) for n in y.shape]
    strides = np.array([y.shape[1] * y.shape[2], y.shape[2], 1])
    inside = np.indices(sides).reshape(3, -1).T @ strides
    window = _window(sides).ravel()
    total, weights = np.zeros(y.size), np.zeros(y.size)
    for groups in _groups(pilot, sides, strides):
        index = groups[:, :, None] + inside
        noisy, clean = (v.ravel()[index].reshape(*groups.shape, *sides) for v in (y, pilot))
        filtered, weight = _wiener(noisy, clean, sigma)
        weight = np.broadcast_to(window * weight.reshape(-1, 1, 1), index.shape)
        values = filtered.reshape(index.shape) * weight
        total += np.bincount(index.ravel(), values.ravel(), y.size)
        weights += np.bincount(index.ravel(), weight.ravel(), y.size)
    return (total / weights).reshape(y.shape).astype(np.float32)


def _groups(pilot: Volume, sides: Sequence[int], strides: Index) -> Iterator[Index]:
    """Yield (groups, blocks): where in the flat volume each block of a group begins, itself first.

    Blocks are the more alike the smaller the mean of their squared difference is.
    """
    starts = [_starts(n, b, DISTANCE) for n, b in zip(pilot.shape, sides, strict=True)]
    reach = [min(REACH, n - b) for n, b in zip(pilot.shape, sides, strict=True)]
    offsets = np.indices([2 * r + 1 for r in reach]).reshape(3, -1).T - reach
    count = min(ALIKE, len(offsets))
    first = 0
    while first < len(starts[0]):
        planes = [z for z in starts[0][first:] if z < starts[0][first] + SLAB]
        first += len(planes)
        corners = np.stack(np.meshgrid(planes, *starts[1:], indexing="ij"), -1).reshape(-1, 3)
        unlike = _unlikeness(pilot, corners, offsets, sides, reach[0])
        unlike[len(offsets) // 2] = -1  # itself, also where all are alike: every voxel is covered
        best = np.argpartition(unlike, count - 1, axis=0)[:count]
        order = np.take_along_axis(unlike, best, axis=0).argsort(axis=0, kind="stable")
        chosen = offsets[np.take_along_axis(best, order, axis=0)].swapaxes(0, 1)
        places = (corners[:, None] + chosen) @ strides
        for i in range(0, len(places), AT_ONCE):
            yield places[i : i + AT_ONCE]


def _unlikeness(pilot, corners, offsets, sides, reach) -> Volume:
    """(offsets, corners): mean squared difference of the blocks there and so far away."""
    low, high = corners[0, 0] - reach, corners[-1, 0] + sides[0] + reach
    low, high = max(low, 0), min(high, len(pilot))
    slab = pilot[low:high]
    at = corners - [low, 0, 0]
    found = np.full((len(offsets), len(corners)), FAR, np.float32)
    for row, offset in zip(found, offsets, strict=True):
        here, there = zip(
            *[
                (slice(max(0, -o), n - max(0, o)), slice(max(0, o), n + min(0, o)))
                for o, n in zip(offset, slab.shape, strict=True)
            ],
            strict=True,
        )
        squared = (slab[there] - slab[here]) ** 2
        mean = uniform_filter(squared, sides, origin=[-(b // 2) for b in sides], mode="nearest")
        moved = at - [s.start for s in here]
        fits = (moved >= 0).all(axis=1) & (moved + sides <= squared.shape).all(axis=1)
        row[fits] = mean[tuple(moved[fits].T)]
    return found


def _wiener(noisy, clean, sigma):
    """Blocks or groups (n, ...) filtered, and how much each counts, (n, 1, ...)."""
    axes = tuple(range(1, noisy.ndim))
    power = dctn(clean, axes=axes, norm="ortho") ** 2
    gain = power / (power + np.float32(sigma**2))
    constant = (slice(None), *[0] * len(axes))
    gain[constant] = 1
    filtered = idctn(gain * dctn(noisy, axes=axes, norm="ortho"), axes=axes, norm="ortho")
    return filtered, 1 / (gain**2).sum(axis=axes, keepdims=True)


def _starts(size: int, side: int, distance: int) -> list[int]:
    """Where blocks begin along an axis, the last one at its end."""
    return sorted({*range(0, size - side + 1, distance), size - side})


def _window(sides: Sequence[int]) -> Volume:
    """Of a block: it fades towards its edges."""
    window = np.ones(sides, np.float32)
    for axis, b in enumerate(sides):
        edge = np.sin(np.pi * (np.arange(b) + 0.5) / b).astype(np.float32)
        window *= edge.reshape([-1 if i == axis else 1 for i in range(len(sides))])
    return window


def is_denoising(measurement: Measurement | None) -> bool:
    return measurement is not None and operator_class(measurement.operator.name).is_identity


def network_at(
    schedule: Schedule, method: str, network: Callable, x: torch.Tensor, sigma: float
) -> torch.Tensor:
    """What the network makes of volumes x, (N, D, H, W), with noise σ, in one evaluation."""
    arguments = {**schedule.sampler_arguments(), "timestep_respacing": "logsnr1", "start": "auto"}
    unclipped_from = METHODS[method].unclipped_from
    arguments |= {"unclipped_from": unclipped_from, "slices": True}
    once = create_sampler(**arguments, levels=(sigma, sigma))
    with torch.inference_mode():
        state = math.sqrt(once.alphas_cumprod[0]) * x
        return once.predict(network, state, 0)["pred_xstart"].float()


def refined(
    pilot: torch.Tensor,
    y: torch.Tensor,
    sigma: Sigma,
    noise: Noise,
    look: Callable[[torch.Tensor, float], torch.Tensor],
    done: Callable[[int, torch.Tensor], None] = lambda stage, pilot: None,
) -> torch.Tensor:
    """The pilots (N, D, H, W) made better, see the module.

    Args:
        y: the measurements, like the pilots; sigma: of their noise, a number or (N, 1, 1, 1).
        noise: its model; with the pilot for the signal it is made Gaussian anew in each round.
        look: what the network makes of (1, D, H, W) with noise of a standard deviation.
        done: called after each of the volumes' `STAGES`, counted from 1 on, with the volume's
            pilot (1, D, H, W).
    """
    sigmas = sigma.flatten().tolist() if torch.is_tensor(sigma) else [float(sigma)] * len(y)
    stages = itertools.count(1)

    def next_done(pilot: torch.Tensor) -> None:
        done(next(stages), pilot)

    each = zip(pilot, y, sigmas, strict=True)
    return torch.cat(
        [_refined(x[None], one[None], s, noise, look, next_done) for x, one, s in each]
    )


def _refined(pilot, y, sigma, noise, look, done):
    def gaussian():
        return noise.to_gaussian(y, sigma, signal=pilot)[0].float().cpu().numpy()

    def as_pilot(volume):
        return torch.from_numpy(volume)[None].to(y)

    noisy, clean = gaussian(), pilot[0].float().cpu().numpy()
    blocks = sum(block_wiener(noisy, clean, sigma, *block) for block in BLOCKS)
    pilot = as_pilot(blocks / len(BLOCKS))
    done(pilot)
    pilot = (pilot + look(pilot, LEFT[0] * sigma)) / 2
    done(pilot)
    for _ in range(ROUNDS):
        pilot = as_pilot(group_wiener(gaussian(), pilot[0].cpu().numpy(), sigma))
        done(pilot)
    pilot = (pilot + look(pilot, LEFT[1] * sigma)) / 2
    done(pilot)
    return pilot
