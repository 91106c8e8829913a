"""The grids of volumes: what a header says of a slice's plane, and samples from grid to grid."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Plane(NamedTuple):
    """Of a volume's slices, as a header has it.

    Attributes:
        pixel: the shorter side of a pixel in mm.
        thickness: of a slice in mm, None where the header does not say.
        square: whether a pixel's sides are as long as one another.
        world: of the axes (slice, row, column), the world axis (0 right, 1 anterior, 2 superior)
            that each is nearest to.
        upward: whether slices are counted towards right, anterior or superior.
    """

    pixel: float = 1.0
    thickness: float | None = None
    square: bool = True
    world: tuple[int, int, int] = (2, 1, 0)
    upward: bool = True


def nearest(count: int, wanted: int, ratio: float | None = None) -> NDArray[np.int_]:
    """Which of `count` samples lies nearest to each of `wanted`, both about one centre.

    Args:
        ratio: distance of the wanted, in that of the samples; by default both fill one extent.
    """
    ratio = count / wanted if ratio is None else ratio
    where = (count - 1) / 2 + (np.arange(wanted) - (wanted - 1) / 2) * ratio
    return np.clip(np.floor(where + 0.5 - 1e-9), 0, count - 1).astype(int)


def enlarge(values: NDArray, shape: tuple[int, ...], ratio: float | None = None) -> NDArray:
    """Repeat values to fill a grid of this shape that is finer by whole numbers.

    Args:
        ratio: see `nearest`, of the first axis, where it is finer by another number.
    """
    if ratio is not None:
        values = values[nearest(len(values), shape[0], ratio)]
    for axis, (size, wanted) in enumerate(zip(values.shape, shape, strict=True)):
        values = values.repeat(wanted // size, axis)
    return values
