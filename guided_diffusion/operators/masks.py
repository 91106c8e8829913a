"""Cartesian undersampling of k-space: fastMRI's masks, line for line (Zbontar et al. 2018).

The draws are those of `fastmri.data.subsample` (MIT licence) with numpy's legacy generator, so a
seed, or a file's name, has the mask here that it has in the published challenge.
"""

import os

import numpy as np

from util.errors import UserError

WHERE = "measurement.operator"


def cartesian_mask(kind, lines, acceleration=4, center_fraction=0.08, seed=0):
    """Which lines of k-space are measured.

    Args:
        kind: one of `MASKS`, or the path of a .npy file that holds a mask.
        lines: N, the number of phase-encoding lines.
        acceleration: R, N divided by the lines that are aimed at; `equispaced` and `magic` keep
            the centre on top of every R-th line.
        center_fraction: share of lines, about the centre N // 2, that are all measured.
        seed: integer, or text (a file's name), which fastMRI takes as its character codes.

    Returns:
        (N,) bool.

    Raises:
        UserError: an impossible number, or a file that holds no such mask.
    """
    if kind not in MASKS:
        return _read(kind, lines)
    if not 1 <= acceleration <= lines:
        raise UserError(
            f"{WHERE}.acceleration: expected 1 to the {lines} lines, found {acceleration:g}"
        )
    if not 0 <= center_fraction <= 1:
        raise UserError(f"{WHERE}.center_fraction: expected 0 to 1, found {center_fraction:g}")
    if acceleration == 1:
        return np.ones(lines, dtype=bool)
    low = round(lines * center_fraction)
    if low >= lines / acceleration:
        raise UserError(
            f"{WHERE}.center_fraction: {center_fraction:g} are {low} of {lines} lines, and "
            f"acceleration {acceleration:g} leaves {lines / acceleration:g} in all"
        )
    random = np.random.RandomState(tuple(map(ord, seed)) if isinstance(seed, str) else seed)
    mask = MASKS[kind](random, lines, acceleration, low)
    first = (lines - low + 1) // 2
    mask[first : first + low] = True
    return mask


def random_lines(random, lines, acceleration, low):
    """Every line outside the centre with equal probability; their number is random, too."""
    return random.uniform(size=lines) < (lines / acceleration - low) / (lines - low)


def equispaced(random, lines, acceleration, low):
    """Every R-th line; with the centre on top there are more than N/R."""
    mask = np.zeros(lines, dtype=bool)
    step = round(acceleration)
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
    step = round(acceleration)
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


def _read(path, lines):
    """The mask a .npy file holds."""
    if not path.endswith(".npy"):
        raise UserError(
            f"{WHERE}.mask: expected one of {', '.join(MASKS)} or a .npy file, found {path!r}"
        )
    if not os.path.exists(path):
        raise UserError(f"{WHERE}.mask: {path}: no such file")
    try:
        mask = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{WHERE}.mask: {path}: cannot be read as .npy") from None
    return check_lines(mask, lines, f"{WHERE}.mask: {path}")


def check_lines(mask, lines, where):
    """A mask array, of any shape with one axis longer than 1, as (N,) bool.

    Raises:
        UserError: it is not one row of 0 and 1, has another length, or is empty.
    """
    mask = np.asarray(mask)
    longer = [n for n in mask.shape if n > 1]
    if mask.dtype.kind not in "buif":
        raise UserError(f"{where}: expected 0 and 1, found {mask.dtype}")
    if len(longer) != 1:
        shape = "×".join(map(str, mask.shape))
        raise UserError(
            f"{where}: expected one value for each phase-encoding line, found {shape} values: "
            "masks that leave out single points of a line are not supported"
        )
    mask = mask.reshape(-1)
    if len(mask) != lines:
        raise UserError(f"{where}: {len(mask)} lines, and k-space has {lines}")
    if not np.isin(mask, (0, 1)).all():
        raise UserError(f"{where}: expected 0 and 1 alone")
    if not mask.any():
        raise UserError(f"{where}: no line is measured")
    return mask.astype(bool)


def calibration_lines(mask):
    """The unbroken block of measured lines about the centre N // 2, as (first, past the last)."""
    centre = len(mask) // 2
    if not mask[centre]:
        return centre, centre
    gaps = np.flatnonzero(~mask)
    first = gaps[gaps < centre].max(initial=-1) + 1
    last = gaps[gaps > centre].min(initial=len(mask))
    return int(first), int(last)
