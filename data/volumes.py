"""Volumes: slices out of a scan, and a restored scan out of its slices."""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.scale import find_padding, find_scale, from_unit, to_unit
from util.errors import UserError

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

    def check_writable(self, factor: int = 1) -> None:
        self.volume.check_writable(factor)


class Volume:
    """A scan that is restored slice by slice, turned as it is looked at.

    A child gives

    - `load()`: all slices as (count, H, W) float32 in the file's units, and the padding that the
      file declares, booleans like them or None;
    - `write(folder, voxels, padding, description, identity, std=False)`: writes (count, H', W')
      in the file's units as a scan like the file, and returns its path. `padding` is where the
      voxels are no data, or None; `description` says in a few words how they came about, and
      `identity` tells this run's settings from others'; `std` is for standard deviations;
    - `try_writing(factor)`: raises whatever `write` would for a reason that can be known before.

    Args:
        name: of its results.
        label: what messages call it.
        count: of slices.
        inverted: whether low values are shown bright.
        magnitude: whether -1 must be magnitude 0, see `find_scale`.

    Attributes:
        slices: its images, in the order along the slice axis.
        remarks: what a user is to be told of its header.
    """

    def __init__(
        self, name: str, label: str, count: int, inverted: bool = False, magnitude: bool = False
    ):
        self.name = name
        self.label = label
        self.inverted = inverted
        self.magnitude = magnitude
        self.remarks: list[str] = []
        self.slices = [Slice(self, i) for i in range(count)]
        self._writable: dict[int, UserError | None] = {}

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
    ) -> str:
        raise NotImplementedError

    def try_writing(self, factor: int) -> None:
        raise NotImplementedError

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

    def put_together(self, x: NDArray) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """(count, H', W') in [-1, 1] → in the file's units, with the file's padding; and where."""
        voxels, loaded = self.to_units(x), _loaded(self)
        if loaded.padding is None:
            return voxels, None
        padding = enlarge(loaded.padding, voxels.shape)
        voxels[padding] = enlarge(loaded.voxels, voxels.shape)[padding]
        return voxels, padding

    def check_writable(self, factor: int = 1) -> None:
        """Try what `write` will need, once; raises UserError, see `data.items.Item`."""
        if factor not in self._writable:
            self._writable[factor] = None
            try:
                self.try_writing(factor)
            except UserError as error:
                self._writable[factor] = error
            except Exception as error:  # noqa: BLE001 - whatever a writing library objects to
                self._writable[factor] = UserError(
                    f"{self.label}: the restored volume could not be written ({reason(error)})"
                )
        found = self._writable[factor]
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


def enlarge(values: NDArray, shape: tuple[int, ...]) -> NDArray:
    """Repeat values to fill a grid of this shape that is finer by whole numbers."""
    for axis, (size, wanted) in enumerate(zip(values.shape, shape, strict=True)):
        values = values.repeat(wanted // size, axis)
    return values


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
    """Put the volumes together whose slices have all been restored.

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
    for volume in dict.fromkeys(item.volume for item in items if isinstance(item, Slice)):
        count = len(volume.slices)
        restored = sum(s.name in done for s in volume.slices)
        if restored < count:
            line = f"{volume.label}: {restored} of {count} slices restored, no volume written"
            yield Written(line, False)
            continue
        try:
            yield Written(_write_volume(volume, folder, description, identity), False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            yield Written(_failure(volume, folder, error), True)
        except Exception as error:  # noqa: BLE001 - whatever a writing library objects to
            yield Written(_failure(volume, folder, error), True)


def _failure(volume, folder, error):
    where = os.path.join(folder, "slices", f"{volume.name}_z*.npy")
    return (
        f"{volume.label}: the restored volume cannot be written ({reason(error)}); its slices, "
        f"in [-1, 1], are kept in {where}"
    )


def _write_volume(volume, folder, description, identity):
    black, white, clipped = volume.scale
    mean, padding = volume.put_together(_stack(volume, os.path.join(folder, "slices")))
    path = volume.write(os.path.join(folder, "volumes"), mean, padding, description, identity)
    if os.path.exists(os.path.join(folder, "std", f"{volume.slices[0].name}.npy")):
        std = _stack(volume, os.path.join(folder, "std")) * (abs(white - black) / 2)
        if padding is not None:
            std[padding] = 0
        std = std.astype(np.float32)
        std_folder = os.path.join(folder, "std")
        volume.write(std_folder, std, None, f"{description} std", identity, std=True)
    return (
        f"{os.path.relpath(path, folder)}: {len(volume.slices)} slices; {black:g} to {white:g} "
        f"were -1 to 1, the {clipped:.2%} of voxels outside were clipped"
    )


def _stack(volume, folder):
    """(count, H, W) of the slices' files; several channels are averaged."""
    paths = (os.path.join(folder, f"{s.name}.npy") for s in volume.slices)
    return np.stack([np.load(path).mean(axis=0) for path in paths])
