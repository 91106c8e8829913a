"""Volumes: scans that give slices, in the grey scale they are shown in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.grids import Plane, World, enlarge, interpolate, nearest
from data.scale import beyond, find_padding, find_scale, from_unit, to_unit
from data.slices import Slice, Whole
from data.volume_writing import reason, write_volumes
from util.errors import UserError
from util.files import values_digest

__all__ = ["Part", "Slice", "Volume", "Whole", "padding_note", "reason", "write_volumes"]

UNEVEN = 0.05  # of the usual distance, at most, that slices' distances may differ
GAPS = 4  # uneven distances that are named
TALLEST = 4096  # pixels of a volume's picture along its slice axis
SAMPLED = 16  # slices of a volume that tell how noisy it is


@dataclass(frozen=True)
class Part:
    """What volume of a file of several this is.

    Attributes:
        whole: name of the file's results.
        index: among `count` volumes.
    """

    whole: str
    index: int
    count: int


class Volume:
    """A scan that is restored slice by slice, turned as it is looked at.

    A child gives

    - `load()`: all slices as (count, H, W) float32 in the file's units, and the padding that the
      file declares, booleans like them or None;
    - `write(folder, voxels, padding, description, identity, kind="", spacing=None)`: writes
      (count, H', W') in the file's units as a scan like the file, and returns its path. `padding`
      is where the voxels are no data, or None; `description` says in a few words how they came
      about, and `identity` tells this run's settings from others'; `kind` is "" for the restored
      scan, otherwise the folder that says what else it is (see `NO_IMAGES`); with a `spacing` the
      voxels are any number of slices, so many mm apart, about the centre of the file's;
    - `try_writing(factor, spacing)`: raises whatever `write` would for a reason that can be known
      before.

    Args:
        name: of its results.
        label: what messages call it.
        count: of slices.
        spacing: mm from slice to slice, or all their positions along their normal.
        plane: what is known of the slices' plane.
        inverted: whether low values are shown bright.
        magnitude: whether -1 must be magnitude 0, see `find_scale`.

    Attributes:
        slices: its images, in the order along the slice axis.
        positions: (count,) of the slices in mm, from the first one's centre.
        remarks: what a user is to be told of its header.
        world: where its slices lie; None where nothing is known of it.
        clipped: whether what is restored lacks what is `beyond` black and white.
        part: of a file whose other volumes are restored as well, which one it is: such a child
            gives `join(parts, path)`, which makes one file of those that were written of all.
        find_head: of (count, H, W) voxels those to which the grey scale and σ are limited; None:
            all of them. What is not finite outside is no data.
        head_is_given: whether a user says where it is, so that all inside must be finite.
    """

    clipped: bool = True
    part: Part | None = None
    find_head: Callable[[NDArray[np.float32]], NDArray[np.bool_]] | None = None
    head_is_given: bool = False

    def __init__(
        self,
        name: str,
        label: str,
        count: int,
        spacing: float | Sequence[float] = 1.0,
        plane: Plane = Plane(),  # noqa: B008 - immutable
        inverted: bool = False,
        magnitude: bool = False,
    ):
        self.name = name
        self.label = label
        self.inverted = inverted
        self.magnitude = magnitude
        self.remarks: list[str] = []
        if inverted and magnitude:
            self.remarks.append(
                "its low values are meant to be bright (MONOCHROME1); for Rician noise they are "
                "taken for low magnitudes, and pictures of it are negatives"
            )
        self.world: World | None = None
        self.slices = [Slice(self, i) for i in range(count)]
        along = np.arange(count) * spacing if isinstance(spacing, float) else np.array(spacing)
        self.positions: NDArray[np.float64] = along - along[0]
        self.plane = plane
        self._writable: dict[tuple[int, float | None], UserError | None] = {}

    def load(self) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        raise NotImplementedError

    def write(
        self,
        folder: str,
        voxels: NDArray[np.float32],
        padding: NDArray[np.bool_] | None,
        description: str,
        identity: str,
        kind: str = "",
        spacing: float | None = None,
    ) -> str:
        raise NotImplementedError

    def join(self, parts: Sequence[str], path: str) -> None:
        raise NotImplementedError

    def try_writing(self, factor: int, spacing: float | None) -> None:
        raise NotImplementedError

    @property
    def spacing(self) -> float:
        """mm from slice to slice, 1 for a single one.

        Raises:
            UserError: they lie at uneven distances, so that some are missing.
        """
        gaps = self.gaps
        if gaps:
            raise UserError(
                f"{self.label}: expected slices at even distances, found {gaps}; a slice is "
                "missing, or data.volume_mode: slices restores each by itself"
            )
        # Over all of them, for headers round the positions.
        steps = len(self.positions) - 1
        return float(self.positions[-1]) / steps if steps else 1.0

    @property
    def gaps(self) -> str:
        """Where slices lie at another distance than usual, in words; "" where they do not."""
        steps = np.diff(self.positions)
        if not len(steps):
            return ""
        usual = float(np.median(steps))
        odd = np.flatnonzero(np.abs(steps - usual) > UNEVEN * usual)
        count = len(self.slices)
        places = [f"between slices {i + 1} and {i + 2} of {count}, {steps[i]:.4g} mm" for i in odd]
        more = [f"{len(places) - GAPS} more"] if len(places) > GAPS else []
        listed = "; ".join([*places[:GAPS], *more])
        return f"{usual:.4g} mm and, {listed}" if places else ""

    @cached_property
    def _judged(self) -> tuple[tuple[float, float, float], str]:
        """The scale, and what the padding is."""
        loaded, ignored = _loaded(self), self.ignored
        values = loaded.voxels if ignored is None else loaded.voxels[~ignored]
        return find_scale(values, self.inverted, self.label, self.magnitude), loaded.padding_is

    @cached_property
    def head(self) -> NDArray[np.bool_] | None:
        """(count, H, W), see `find_head`; None where nothing is limited."""
        return None if self.find_head is None else self.find_head(_loaded(self).voxels)

    @property
    def ignored(self) -> NDArray[np.bool_] | None:
        """(count, H, W), where it holds no data or no head, or None."""
        padding, head = self.padding, self.head
        if head is None:
            return padding
        return ~head if padding is None else ~head | padding

    @property
    def scale(self) -> tuple[float, float, float]:
        """(black, white, clipped): values shown as -1 and 1; the voxels' share outside them."""
        return self._judged[0]

    @property
    def note(self) -> str | None:
        """What a user is to be told of how it was read; whole once a slice has been."""
        found = [*self.remarks]
        if "_judged" in self.__dict__ and self._judged[1]:
            found.append(self._judged[1])
        return f"{self.label}: {'; '.join(found)}" if found else None

    @cached_property
    def digest(self) -> str:
        """Of its voxels, and of what its header says of their grid; see `data.items.Item`."""
        padding = self.padding
        grid = [-1.0 if v is None else v for v in (*self.plane[:3], *self.plane.world)]
        return values_digest(
            *self._contents(),
            np.zeros(0, np.bool_) if padding is None else padding,
            np.array([*self.scale[:2], *self.positions, *grid, self.plane.upward], np.float64),
        )

    def _contents(self) -> list[NDArray]:
        """The arrays that the file holds."""
        return [self.voxels]

    def read(self, index: int) -> NDArray[np.float32]:
        """(1, H, W) float32 in [-1, 1]."""
        return self._shown(index)[None]

    def read_all(self) -> NDArray[np.float32]:
        """(count, H, W) float32 in [-1, 1]."""
        return self._shown(slice(None))

    def three_planes(self, x: NDArray) -> NDArray:
        """The middle plane across each axis of (slices, H, W), one below the other, (h, w).

        Slices are repeated, so that a mm has as many pixels along them as within.
        """
        extent = self.spacing * len(self.slices) / self.plane.pixel * (x.shape[1] / self._rows)
        rows = nearest(len(x), max(1, round(min(extent, TALLEST))))
        if self.plane.upward:
            rows = rows[::-1]
        across_rows, across_cols = x[rows, x.shape[1] // 2], x[rows, :, x.shape[2] // 2]
        planes = [x[len(x) // 2], across_rows, across_cols]
        width = max(p.shape[1] for p in planes)
        sides = [divmod(width - p.shape[1], 2) for p in planes]
        padded = [
            np.pad(plane, ((0, 0), (left, left + odd)), constant_values=-1)
            for plane, (left, odd) in zip(planes, sides, strict=True)
        ]
        return np.concatenate(padded)

    @property
    def _rows(self) -> int:
        return self.shape_of_slices[1]

    @property
    def shape_of_slices(self) -> tuple[int, ...]:
        """(count, H, W)."""
        return _loaded(self).voxels.shape

    @property
    def voxels(self) -> NDArray[np.float32]:
        """(count, H, W) in the file's units."""
        return _loaded(self).voxels

    @property
    def padding(self) -> NDArray[np.bool_] | None:
        """(count, H, W), where the file holds no data, or None.

        Raises:
            UserError: values inside of a given mask are not finite.
        """
        return _loaded(self).padding if self.find_head is None else self._padding_of_head

    @cached_property
    def _padding_of_head(self):
        loaded, head = _loaded(self), self.head
        assert head is not None
        unknown = ~np.isfinite(loaded.voxels)
        if not unknown.any():
            return loaded.padding
        inside = unknown & head
        if self.head_is_given and inside.any():
            i = int(np.flatnonzero(inside.any(axis=(1, 2)))[0])
            raise UserError(
                f"{self.label}: {int(inside.sum())} values inside of data.mask are not finite, the "
                f"first of them in slice {i + 1} of {len(self.slices)}"
            )
        outside = unknown & ~head
        return outside if loaded.padding is None else loaded.padding | outside

    def sample(self) -> NDArray[np.float32]:
        """Some of the slices, evenly spaced, (up to SAMPLED, H, W) in [-1, 1]."""
        return self._shown(self.sampled)

    def sample_padding(self) -> NDArray[np.bool_] | None:
        """Where those of `sample` are no data or no head, or None."""
        ignored = self.ignored
        return None if ignored is None else ignored[self.sampled]

    @property
    def sampled(self) -> slice:
        """Which slices `sample` takes."""
        return slice(None, None, -(-len(self.slices) // SAMPLED))

    def _shown(self, index):
        black, white, _ = self.scale
        voxels, padding = _loaded(self).voxels[index], self.padding
        if padding is None:
            return to_unit(voxels, black, white)
        hidden = padding[index]
        shown = to_unit(np.where(hidden, np.float32(black), voxels), black, white)
        shown[hidden] = -1  # exactly, for that is what black is to the Rice model
        return shown

    def to_units(self, x: NDArray) -> NDArray[np.float32]:
        """The inverse of the map that `read` applies: [-1, 1] → the file's units."""
        black, white, _ = self.scale
        return from_unit(x, black, white)

    def beyond(self) -> NDArray[np.float32]:
        """(count, H, W), what `read` leaves out above white and below black, in the file's units.

        0 where that is nothing, and in the padding.
        """
        black, white, _ = self.scale
        left_out = beyond(self.voxels, black, white)
        if self.padding is not None:
            left_out[self.padding] = 0
        return left_out

    def put_together(
        self, x: NDArray, spacing: float | None = None, measured: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """(count, H', W') in [-1, 1] → in the file's units, with the file's padding; and where.

        Args:
            spacing: of the slices in mm, where it is not the file's.
            measured: whether x was restored from the file as it is, so that what is `beyond`
                black and white comes on top.
        """
        voxels, padding = self.to_units(x), self.padding
        ratio = None if spacing is None else spacing / self.spacing
        if measured and self.clipped:
            voxels += interpolate(self.beyond(), voxels.shape, ratio)
        if padding is None:
            return voxels, None
        padding = enlarge(padding, voxels.shape, ratio)
        voxels[padding] = enlarge(_loaded(self).voxels, voxels.shape, ratio)[padding]
        return voxels, padding

    def check_writable(self, factor: int = 1, spacing: float | None = None) -> None:
        """Try what `write` will need, once; raises UserError, see `data.items.Item`."""
        key = factor, spacing
        if key not in self._writable:
            self._writable[key] = None
            try:
                self.try_writing(factor, spacing)
            except UserError as error:
                self._writable[key] = error
            except Exception as error:  # noqa: BLE001 - whatever a writing library objects to
                self._writable[key] = UserError(
                    f"{self.label}: the restored volume could not be written ({reason(error)})"
                )
        found = self._writable[key]
        if found is not None:
            raise found


class Loaded(NamedTuple):
    voxels: NDArray[np.float32]  # (count, H, W)
    padding: NDArray[np.bool_] | None
    padding_is: str  # in words, for a user


@lru_cache(maxsize=1)  # slices are read one after the other; one volume at a time is in memory
def _load(volume: Volume) -> Loaded | UserError:
    try:
        voxels, padding = volume.load()
        return _find_padding(voxels, padding)
    except UserError as error:
        return error  # kept too, or each slice would read the damaged file anew


def _find_padding(voxels, declared):
    if declared is not None and declared.any() and not declared.all():
        return Loaded(voxels, declared, padding_note(declared, "declared as padding"))
    found, value = find_padding(voxels)
    if found is None:
        return Loaded(voxels, None, "")
    return Loaded(voxels, found, padding_note(found, f"{value}, taken for padding"))


def padding_note(padding: NDArray[np.bool_], what: str) -> str:
    """What a user is told of values that are no data."""
    share = f"{padding.mean():.1%} of its values are {what}"
    return f"{share}: left out, and padding again in what is written"


def check_only_volume(index: int | None, label: str) -> None:
    """Raise UserError where a file that holds one volume is asked for another."""
    if index not in (None, 0):
        raise UserError(f"{label}: data.volume: no volume {index}; it holds one, 0")


def _loaded(volume: Volume) -> Loaded:
    loaded = _load(volume)
    if isinstance(loaded, UserError):
        raise loaded
    return loaded
