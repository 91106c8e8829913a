"""Volumes: slices out of a scan, and a restored scan out of its slices."""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.grids import Plane, World, enlarge, nearest
from data.scale import find_padding, find_scale, from_unit, to_unit
from util.errors import UserError

UNEVEN = 0.05  # of the usual distance, at most, that slices' distances may differ
GAPS = 4  # uneven distances that are named
SAMPLED = 16  # slices of a volume that tell how noisy it is


@dataclass(frozen=True, eq=False)
class Slice:
    """One image of a volume, an `Item`; index counts along the volume's slice axis.

    Its result is kept, as floats in [-1, 1], until the volume is put together.
    """

    volume: "Volume"
    index: int
    floats = ("slices", ".npy")

    @property
    def name(self) -> str:
        return f"{self.volume.name}_z{self.index:03d}"

    @property
    def label(self) -> str:
        return self.volume.label

    @property
    def note(self) -> str | None:
        return self.volume.note

    def read(self) -> NDArray[np.float32]:
        """(1, H, W) float32 in [-1, 1], turned as it is looked at."""
        return self.volume.read(self.index)

    def padding(self) -> NDArray[np.bool_] | None:
        padding = _loaded(self.volume).padding
        return None if padding is None else padding[self.index]

    def to_floats(self, x: NDArray) -> NDArray:
        return x

    def picture(self, x: NDArray) -> NDArray:
        return x

    def check_writable(self, factor: int = 1) -> None:
        self.volume.check_writable(factor)


@dataclass(frozen=True, eq=False)
class Whole:
    """A volume that is restored as a whole, an `Item`: one image whose channels are its slices.

    Attributes:
        spacing: mm between the restored slices, None where they are the volume's own.
    """

    volume: "Volume"
    spacing: float | None = None
    floats = ("slices", ".npy")

    @property
    def name(self) -> str:
        return self.volume.name

    @property
    def label(self) -> str:
        return self.volume.label

    @property
    def note(self) -> str | None:
        return self.volume.note

    def read(self) -> NDArray[np.float32]:
        """(slices, H, W) float32 in [-1, 1]."""
        return self.volume.read_all()

    def padding(self) -> NDArray[np.bool_] | None:
        return _loaded(self.volume).padding

    def to_floats(self, x: NDArray) -> NDArray:
        return x

    def picture(self, x: NDArray) -> NDArray:
        """Three planes through the middle of (slices, H, W), one below the other, (1, h, w)."""
        return self.volume.three_planes(x)[None]

    def check_writable(self, factor: int = 1) -> None:
        self.volume.check_writable(factor, self.spacing)


class Volume:
    """A scan that is restored slice by slice, turned as it is looked at.

    A child gives

    - `load()`: all slices as (count, H, W) float32 in the file's units, and the padding that the
      file declares, booleans like them or None;
    - `write(folder, voxels, padding, description, identity, std=False, spacing=None)`: writes
      (count, H', W') in the file's units as a scan like the file, and returns its path. `padding`
      is where the voxels are no data, or None; `description` says in a few words how they came
      about, and `identity` tells this run's settings from others'; `std` is for standard
      deviations; with a `spacing` the voxels are any number of slices, so many mm apart, about
      the centre of the file's;
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
    """

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
        std: bool = False,
        spacing: float | None = None,
    ) -> str:
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
        steps = np.diff(self.positions)
        return float(np.median(steps)) if len(steps) else 1.0

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
        loaded = _loaded(self)
        values = loaded.voxels if loaded.padding is None else loaded.voxels[~loaded.padding]
        return find_scale(values, self.inverted, self.label, self.magnitude), loaded.padding_is

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
        rows = nearest(len(x), max(1, round(extent)))
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
        return _loaded(self).voxels.shape[1]

    def sample(self) -> NDArray[np.float32]:
        """Some of the slices, evenly spaced, (up to SAMPLED, H, W) in [-1, 1]."""
        return self._shown(self._sampled)

    def sample_padding(self) -> NDArray[np.bool_] | None:
        """Where those of `sample` are no data, or None."""
        padding = _loaded(self).padding
        return None if padding is None else padding[self._sampled]

    @property
    def _sampled(self):
        return slice(None, None, -(-len(self.slices) // SAMPLED))

    def _shown(self, index):
        black, white, _ = self.scale
        loaded = _loaded(self)
        voxels = loaded.voxels[index]
        if loaded.padding is None:
            return to_unit(voxels, black, white)
        hidden = loaded.padding[index]
        shown = to_unit(np.where(hidden, np.float32(black), voxels), black, white)
        shown[hidden] = -1  # exactly, for that is what black is to the Rice model
        return shown

    def to_units(self, x: NDArray) -> NDArray[np.float32]:
        """The inverse of the map that `read` applies: [-1, 1] → the file's units."""
        black, white, _ = self.scale
        return from_unit(x, black, white)

    def put_together(
        self, x: NDArray, spacing: float | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """(count, H', W') in [-1, 1] → in the file's units, with the file's padding; and where.

        Args:
            spacing: of the slices in mm, where it is not the file's.
        """
        voxels, loaded = self.to_units(x), _loaded(self)
        if loaded.padding is None:
            return voxels, None
        ratio = None if spacing is None else spacing / self.spacing
        padding = enlarge(loaded.padding, voxels.shape, ratio)
        voxels[padding] = enlarge(loaded.voxels, voxels.shape, ratio)[padding]
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
    return f"{padding.mean():.1%} of its values are {what}: left out and kept as they are"


def reason(error: BaseException) -> str:
    """What a library's exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _loaded(volume: Volume) -> Loaded:
    loaded = _load(volume)
    if isinstance(loaded, UserError):
        raise loaded
    return loaded


class Written(NamedTuple):
    line: str  # for the terminal
    failed: bool


def write_volumes(
    items: Iterable[Any], done: set[str], folder: str, description: str, identity: str
) -> Iterator[Written]:
    """Put the volumes together that have been restored, or whose slices all have.

    Reads slices/NAME.npy, and std/NAME.npy where there is one, of each slice, (C, H, W) in the
    units of the [-1, 1] image; writes volumes/ and std/, in the units of the volumes' files. A
    volume that cannot be written keeps its slices, and the others are still written.

    Args:
        items: of the run; those that are no slices are passed over.
        done: names of the items that are restored.
        folder: of the run's results.
        description: how the volumes came about, a few words.
        identity: text that tells this run's settings from others'.

    Yields:
        One line for each volume, and whether writing it failed.
    """
    for item in items:
        if isinstance(item, Whole) and item.name in done:
            text = description, identity
            yield _try_writing(item.volume, [item.name], folder, *text, item.spacing)
    for volume in dict.fromkeys(item.volume for item in items if isinstance(item, Slice)):
        count = len(volume.slices)
        restored = sum(s.name in done for s in volume.slices)
        if restored < count:
            line = f"{volume.label}: {restored} of {count} slices restored, no volume written"
            yield Written(line, False)
            continue
        names = [piece.name for piece in volume.slices]
        yield _try_writing(volume, names, folder, description, identity, None)


def _try_writing(volume, names, folder, description, identity, spacing) -> Written:
    try:
        line = _write_volume(volume, names, folder, description, identity, spacing)
        return Written(line, False)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return Written(_failure(volume, names, folder, error), True)
    except Exception as error:  # noqa: BLE001 - whatever a writing library objects to
        return Written(_failure(volume, names, folder, error), True)


def _failure(volume, names, folder, error):
    files = f"{volume.name}_z*.npy" if len(names) > 1 else f"{names[0]}.npy"
    where = os.path.join(folder, "slices", files)
    return (
        f"{volume.label}: the restored volume cannot be written ({reason(error)}); its slices, "
        f"in [-1, 1], are kept in {where}"
    )


def _write_volume(volume, names, folder, description, identity, spacing):
    black, white, clipped = volume.scale
    whole = names == [volume.name]
    x = _stack(names, os.path.join(folder, "slices"), whole)
    mean, padding = volume.put_together(x, spacing)
    text = description, identity
    path = volume.write(os.path.join(folder, "volumes"), mean, padding, *text, spacing=spacing)
    if os.path.exists(os.path.join(folder, "std", f"{names[0]}.npy")):
        std = _stack(names, os.path.join(folder, "std"), whole) * (abs(white - black) / 2)
        if padding is not None:
            std[padding] = 0
        std = std.astype(np.float32)
        std_folder = os.path.join(folder, "std")
        text = f"{description} std", identity
        volume.write(std_folder, std, None, *text, std=True, spacing=spacing)
    return (
        f"{os.path.relpath(path, folder)}: {len(mean)} slices; {black:g} to {white:g} "
        f"were -1 to 1, the {clipped:.2%} of voxels outside were clipped"
    )


def _stack(names, folder, whole):
    """(count, H, W) of the volume's one file, or of its slices', several channels averaged."""
    paths = [os.path.join(folder, f"{name}.npy") for name in names]
    return np.load(paths[0]) if whole else np.stack([np.load(p).mean(axis=0) for p in paths])
