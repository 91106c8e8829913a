"""Undersampling of k-space: fastMRI's Cartesian masks (Zbontar et al. 2018), and single points.

The draws of lines are those of `fastmri.data.subsample` (MIT licence) with numpy's legacy
generator, so a seed, or a file's name, has the mask here that it has in the published challenge.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guided_diffusion.operators.poisson import LEAST_OF_POINTS, centre_of, poisson_disc
from util.errors import UserError

WHERE = "measurement.operator"
POISSON = "poisson"  # the kind of mask that has points, not lines


def sampling_mask(
    height: int, width: int, axis: str, parameters: Mapping[str, Any]
) -> NDArray[np.bool_]:
    """What of k-space is measured.

    Args:
        axis: along which phase is encoded, where lines are measured.
        parameters: of the operator `mri`, complete; of `poisson`, `acceleration` counts points, and
            `center_fraction` is that of either axis.

    Returns:
        Lines, (N,) bool, or points, (H, W) bool.

    Raises:
        UserError: an impossible number, or a file that holds no such mask.
    """
    kind, lines = parameters["mask"], width if axis == "columns" else height
    acceleration, fraction = parameters["acceleration"], parameters["center_fraction"]
    seed = parameters["mask_seed"]
    if kind not in KINDS:
        return fitted(read_mask(kind), height, width, axis, f"{WHERE}.mask: {kind}")
    if kind in MASKS or acceleration == 1:
        kind = kind if kind in MASKS else "random"  # all lines, of whatever kind
        return cartesian_mask(kind, lines, acceleration, fraction, seed)
    if not 1 <= acceleration <= height * width:
        raise UserError(
            f"{WHERE}.acceleration: expected 1 to the {height * width} points, found "
            f"{acceleration:g}"
        )
    if acceleration < LEAST_OF_POINTS:
        raise UserError(
            f"{WHERE}.acceleration: mask {kind} leaves out the corners, expected 1 or at least 4/π,"
            f" found {acceleration:g}"
        )
    centre = math.prod(length for _, length in centre_of((height, width), fraction))
    points = round(height * width / acceleration)
    if centre >= points:
        raise UserError(
            f"{WHERE}.center_fraction: {fraction:g} of each axis are {centre} of "
            f"{height * width} points, and acceleration {acceleration:g} leaves {points} in all"
        )
    return poisson_disc(height, width, float(acceleration), float(fraction), _for_numpy(seed))


def cartesian_mask(kind, lines, acceleration=4, center_fraction=0.08, seed=0):
    """Which lines of k-space are measured.

    Args:
        kind: one of `MASKS`.
        lines: N, the number of phase-encoding lines.
        acceleration: R, N divided by the lines that are aimed at; `equispaced` and `magic` keep
            the centre on top of every R-th line, and R is an integer.
        center_fraction: share of lines, about the centre N // 2, that are all measured.
        seed: integer, or text (a file's name), which fastMRI takes as its character codes.

    Returns:
        (N,) bool.

    Raises:
        UserError: an impossible number.
    """
    if not 1 <= acceleration <= lines:
        raise UserError(
            f"{WHERE}.acceleration: expected 1 to the {lines} lines, found {acceleration:g}"
        )
    if not 0 <= center_fraction <= 1:
        raise UserError(f"{WHERE}.center_fraction: expected 0 to 1, found {center_fraction:g}")
    if acceleration == 1:
        return np.ones(lines, dtype=bool)
    if kind in WITH_A_STEP and acceleration % 1:
        raise UserError(
            f"{WHERE}.acceleration: mask {kind} takes every R-th line, expected an integer, found "
            f"{acceleration:g}; equispaced_fraction takes any number"
        )
    low = round(lines * center_fraction)
    if low >= lines / acceleration:
        raise UserError(
            f"{WHERE}.center_fraction: {center_fraction:g} are {low} of {lines} lines, and "
            f"acceleration {acceleration:g} leaves {lines / acceleration:g} in all"
        )
    mask = MASKS[kind](np.random.RandomState(_for_numpy(seed)), lines, acceleration, low)
    first = (lines - low + 1) // 2
    mask[first : first + low] = True
    if not mask.any():
        raise UserError(
            f"{WHERE}: mask {kind} of {lines} lines, acceleration {acceleration:g}, mask_seed "
            f"{seed!r}: nothing is measured; center_fraction measures lines about the centre"
        )
    return mask


def _for_numpy(seed):
    """A seed of its legacy generator; of a text, as fastMRI has it, the character codes."""
    if seed == "":
        raise UserError(f"{WHERE}.mask_seed: expected an integer or a text, found an empty one")
    return tuple(map(ord, seed)) if isinstance(seed, str) else seed


def random_lines(random, lines, acceleration, low):
    """Every line outside the centre with equal probability; their number is random, too."""
    return random.uniform(size=lines) < (lines / acceleration - low) / (lines - low)


def equispaced(random, lines, acceleration, low):
    """Every R-th line; with the centre on top there are more than N/R."""
    mask = np.zeros(lines, dtype=bool)
    step = int(acceleration)
    mask[random.randint(0, step) :: step] = True
    return mask


def equispaced_fraction(random, lines, acceleration, low):
    """Lines so far apart that there are, with the centre, N/R: the mask of the challenge's data."""
    step = acceleration * (low - lines) / (low * acceleration - lines)
    mask = np.zeros(lines, dtype=bool)
    offset = random.randint(0, round(step))
    mask[np.around(np.arange(offset, lines - 1, step)).astype(int)] = True
    return mask


def magic(random, lines, acceleration, low):
    """Every R-th line, with such offsets that of k and -k never both are measured."""
    step = int(acceleration)
    offset = random.randint(0, step)
    above, below = (offset + 1, offset + 2) if offset % 2 == 0 else (offset + 2, offset - 1)
    positive, negative = (np.zeros(n, dtype=bool) for n in ((lines + 1) // 2, lines // 2))
    positive[above::step] = True
    negative[below::step] = True
    return np.fft.fftshift(np.concatenate([positive, negative[::-1]]))


MASKS = {
    "random": random_lines,
    "equispaced": equispaced,
    "equispaced_fraction": equispaced_fraction,
    "magic": magic,
}

WITH_A_STEP = ("equispaced", "magic")  # whose R is the distance of lines
KINDS = (*MASKS, POISSON)


def read_mask(path: str) -> NDArray[np.bool_]:
    """The mask that a .npy file holds: one value for each line, (N,), or for each point, (H, W).

    Raises:
        UserError: there is no such file, or it holds no mask.
    """
    where = f"{WHERE}.mask: {path}"
    if not path.endswith(".npy"):
        raise UserError(
            f"{WHERE}.mask: expected one of {', '.join(KINDS)} or a .npy file, found {path!r}"
        )
    if not os.path.exists(path):
        raise UserError(f"{where}: no such file")
    try:
        mask = np.load(path, allow_pickle=False).squeeze()
    except Exception:  # noqa: BLE001 - archives and damaged headers fail in many ways
        raise UserError(f"{where}: cannot be read as .npy") from None
    if mask.dtype.kind not in "buif" or not np.isin(mask, (0, 1)).all():
        raise UserError(f"{where}: expected 0 and 1 alone")
    if mask.ndim not in (1, 2):
        raise UserError(f"{where}: expected lines or points, found {mask.ndim} axes")
    return mask.astype(bool)


def fitted(
    mask: NDArray[np.bool_], height: int, width: int, axis: str, where: str
) -> NDArray[np.bool_]:
    """A mask (N,) or (H, W), as lines if it leaves out no point of one that it measures.

    Raises:
        UserError: it has another size, or measures nothing.
    """
    lines = width if axis == "columns" else height
    if mask.ndim == 1 and len(mask) != lines:
        raise UserError(f"{where}: {len(mask)} lines, and k-space has {lines}")
    if mask.ndim == 2 and mask.shape != (height, width):
        shape = "×".join(map(str, mask.shape))
        raise UserError(f"{where}: {shape} points, and k-space has {height}×{width}")
    if not mask.any():
        raise UserError(f"{where}: nothing is measured")
    return as_lines(mask, axis)


def as_lines(mask: NDArray[np.bool_], axis: str) -> NDArray[np.bool_]:
    """A mask of points, (H, W), as lines, (N,), where it leaves out no part of any."""
    if mask.ndim == 1:
        return mask
    along = mask if axis == "columns" else mask.T
    return along[0] if (along == along[0]).all() else mask


def on_kspace(mask: NDArray[np.bool_], axis: str) -> NDArray[np.bool_]:
    """Lines, (N,), or points, (H, W), as an array that broadcasts to k-space (H, W)."""
    if mask.ndim == 2:
        return mask
    return mask.reshape((1, -1) if axis == "columns" else (-1, 1))


def measured_centre(mask: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """The unbroken block about the centre N // 2, as (first, past the last) along each axis.

    Args:
        mask: (N,) or (H, W). The block of points is a rectangle, grown evenly to all sides.
    """
    centre = [n // 2 for n in mask.shape]
    if not mask[tuple(centre)]:
        return tuple((n, n) for n in centre)
    first, end = list(centre), [n + 1 for n in centre]
    growing = True
    while growing:
        growing = False
        for ends, step in ((first, -1), (end, 1)):
            for i in range(mask.ndim):
                ends[i] += step
                block = tuple(slice(a, b) for a, b in zip(first, end, strict=True))
                if 0 <= first[i] and end[i] <= mask.shape[i] and mask[block].all():
                    growing = True
                else:
                    ends[i] -= step
    return tuple(zip(first, end, strict=True))
