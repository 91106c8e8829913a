"""Variable-density Poisson-disc sampling of two phase-encoding directions."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LEAST_OF_POINTS = 4 / math.pi  # acceleration, of all points but the corners
HALVINGS = 10  # of the interval in which the density's slope is looked for
JITTER = 0.75  # share by which slopes vary, so that the density falls smoothly on a grid
FINEST = 4  # steps of a sample's width that distances are rounded to


@lru_cache(maxsize=16)
def poisson_disc(
    height: int, width: int, acceleration: float, center_fraction: float, seed: int | tuple
) -> NDArray[np.bool_]:
    """Points that keep a distance from one another, a larger one the farther from the centre.

    As in the programs that scanners' sequences are planned with (Lustig's, BART, sigpy), points
    stay 1 + slope·ρ samples apart, ρ the distance from the centre, 1 at the ends of the axes; the
    slope is that which gives the acceleration. Points are tried in random order until none fits
    (dart throwing). The corners, ρ > 1, are not measured, so the least acceleration is
    `LEAST_OF_POINTS`.

    Args:
        acceleration: H·W over the points measured, `LEAST_OF_POINTS` or more.
        center_fraction: of each axis, the centre that is measured whole.
        seed: of numpy's legacy generator.

    Returns:
        (H, W) bool, not to be written to.
    """
    random = np.random.RandomState(seed)
    rows, cols = ((np.arange(n) - n // 2) / (n / 2) for n in (height, width))
    rho = np.hypot(rows[:, None], cols)
    centre = np.zeros((height, width), dtype=bool)
    (top, tall), (left, wide) = centre_of((height, width), center_fraction)
    centre[top : top + tall, left : left + wide] = True
    steep = rho * random.uniform(1 - JITTER, 1 + JITTER, rho.shape)
    draw = _darts((rho <= 1) & ~centre, random.permutation(height * width))
    wanted = round(height * width / acceleration) - centre.sum()

    low, high = 0.0, 1.0
    found = draw(np.ones_like(rho))
    while len(draw(1 + high * steep)) > wanted:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        slope = (low + high) / 2
        points = draw(1 + slope * steep)
        if len(points) < wanted:
            high = slope
        else:
            low, found = slope, points
    mask = centre.copy()
    mask.ravel()[found[:wanted]] = True
    mask.setflags(write=False)
    return mask


def centre_of(sizes: Sequence[int], fraction: float) -> list[tuple[int, int]]:
    """(first, length) of the centre along each axis, as fastMRI's masks have it."""
    lengths = [round(size * fraction) for size in sizes]
    return [((n - low + 1) // 2, low) for n, low in zip(sizes, lengths, strict=True)]


def _darts(
    allowed: NDArray[np.bool_], order: NDArray[np.integer]
) -> Callable[[NDArray[np.floating]], list[int]]:
    """A function of the distances (H, W) that returns the points taken, as flat indices."""
    height, width = allowed.shape

    def draw(distances: NDArray[np.floating]) -> list[int]:
        rounded = np.rint(FINEST * distances).astype(int)
        margin = int(rounded[allowed].max(initial=0)) // FINEST + 1
        wide = width + 2 * margin  # so that discs may reach beyond the edges
        blocked = np.ones((height + 2 * margin, wide), dtype=bool)
        blocked[margin:-margin, margin:-margin] = ~allowed
        blocked = blocked.ravel()
        rows, cols = np.mgrid[-margin : margin + 1, -margin : margin + 1]
        steps, apart = (rows * wide + cols).ravel(), FINEST * np.hypot(rows, cols).ravel()
        places = (np.arange(height)[:, None] + margin) * wide + np.arange(width) + margin
        discs: dict[int, NDArray[np.integer]] = {}
        taken = []
        of = zip(order.tolist(), places.ravel()[order], rounded.ravel()[order], strict=True)
        for point, place, distance in of:
            if blocked[place]:
                continue
            taken.append(point)
            if distance not in discs:
                discs[distance] = steps[(apart < distance) | (apart == 0)]
            blocked[discs[distance] + place] = True
        return taken

    return draw
