"""The grids of volumes: what a header says of a slice's plane, and samples from grid to grid."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Plane(NamedTuple):
    """Of a volume's slices, as a header has it.

    Attributes:
        pixel: the shorter side of a pixel in mm; longer: the other one.
        thickness: of a slice in mm, None where the header does not say.
        world: of the axes (slice, row, column), the world axis (0 right, 1 anterior, 2 superior)
            that each is nearest to.
        upward: whether slices are counted towards right, anterior or superior.
    """

    pixel: float = 1.0
    longer: float = 1.0
    thickness: float | None = None
    world: tuple[int, int, int] = (2, 1, 0)
    upward: bool = True

    @property
    def square(self) -> bool:
        """Whether a pixel's sides are as long as one another."""
        return self.longer - self.pixel < 0.01 * self.longer


class World(NamedTuple):
    """Where the slices of a volume lie, as they are shown.

    Attributes:
        shape: (slices, rows, columns).
        affine: (4, 4), from (slice, row, column) to right, anterior, superior in mm; None where
            the file does not say.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64] | None

    def apart(self, other: "World") -> float:
        """mm between the two grids' corners, the greatest distance; 0 where one is not known."""
        if self.affine is None or other.affine is None:
            return 0.0
        ends = np.array(self.shape) - 1
        corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * ends
        difference = (self.affine - other.affine)[:3]
        return float(np.linalg.norm(corners @ difference[:, :3].T + difference[:, 3], axis=1).max())

    def backwards(self) -> "World":
        """The same grid, its slices counted from the last."""
        if self.affine is None:
            return self
        turn = np.eye(4)
        turn[0, 0], turn[0, 3] = -1, self.shape[0] - 1
        return self._replace(affine=self.affine @ turn)


def nearest(count: int, wanted: int, ratio: float | None = None) -> NDArray[np.int_]:
    """Which of `count` samples lies nearest to each of `wanted`, both about one centre.

    Args:
        ratio: distance of the wanted, in that of the samples; by default both fill one extent.
    """
    ratio = count / wanted if ratio is None else ratio
    where = (count - 1) / 2 + (np.arange(wanted) - (wanted - 1) / 2) * ratio
    return np.clip(np.floor(where + 0.5 - 1e-9), 0, count - 1).astype(int)


def interpolate(values: NDArray, shape: tuple[int, ...], ratio: float | None = None) -> NDArray:
    """Linear interpolation on a grid of this shape; at its ends the last value goes on.

    Args:
        ratio: see `nearest`, of the first axis; the others fill one extent.
    """
    for axis, (count, wanted) in enumerate(zip(values.shape, shape, strict=True)):
        apart = count / wanted if ratio is None or axis else ratio
        if count == wanted and apart == 1:
            continue
        where = (count - 1) / 2 + (np.arange(wanted) - (wanted - 1) / 2) * apart
        where = where.clip(0, count - 1)
        low = np.minimum(where.astype(int), max(count - 2, 0))
        high = np.minimum(low + 1, count - 1)
        share = (where - low).astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1 - axis))
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values


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
