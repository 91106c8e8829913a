"""Volumes: slices out of a scan, and a restored scan out of its slices."""

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from util.errors import UserError

PERCENTILES = (0.1, 99.9)  # of a volume's voxels: what is shown from black to white
SAMPLED = 16  # slices of a volume that tell how noisy it is


@dataclass(frozen=True, eq=False)
class Slice:
    """One image of a volume; index counts along the volume's slice axis.

    Its result is kept, as floats in [-1, 1], until the volume is put together.
    """

    volume: "Volume"
    index: int
    floats = ("slices", ".npy")

    @property
    def name(self):
        return f"{self.volume.name}_z{self.index:03d}"

    @property
    def label(self):
        """What messages call its source."""
        return self.volume.label

    def read(self):
        """(1, H, W) float32 in [-1, 1], turned as it is looked at."""
        return self.volume.read(self.index)

    def to_floats(self, x):
        return x


@dataclass(frozen=True)
class Broken:
    """A file or series that gives no image; its error is raised when it is read."""

    name: str
    label: str
    error: UserError

    def read(self):
        raise self.error


class Volume:
    """A scan that is restored slice by slice.

    A child gives `load()`, all slices as (count, H, W) float32 in the file's units, and
    `write(folder, voxels, ...)`, which writes such an array as a scan like the file. Slices are
    turned as they are looked at.

    Attributes:
        name: of its results. label: what messages call it.
        inverted: whether low values are shown bright.
        slices: its images, in the order along the slice axis.
    """

    def __init__(self, name, label, count, inverted=False):
        self.name = name
        self.label = label
        self.inverted = inverted
        self.slices = [Slice(self, i) for i in range(count)]

    @cached_property
    def scale(self):
        """(black, white, clipped): values shown as -1 and 1; the voxels' share outside them."""
        voxels = _voxels(self)
        return find_scale(voxels, self.inverted, self.label)

    def read(self, index):
        black, white, _ = self.scale
        return to_unit(_voxels(self)[index], black, white)[None]

    def sample(self):
        """Some of the slices, evenly spaced, (up to SAMPLED, H, W) in [-1, 1]."""
        black, white, _ = self.scale
        return to_unit(_voxels(self)[:: -(-len(self.slices) // SAMPLED)], black, white)

    def to_units(self, x):
        """The inverse of the map that `read` applies: [-1, 1] → the file's units."""
        black, white, _ = self.scale
        return from_unit(x, black, white)


@lru_cache(maxsize=1)  # slices are read one after the other; one volume at a time is in memory
def _load(volume):
    try:
        return volume.load()
    except UserError as error:
        return error  # kept too, or each slice would read the damaged file anew


def _voxels(volume):
    loaded = _load(volume)
    if isinstance(loaded, UserError):
        raise loaded
    return loaded


def to_unit(values, black, white):
    """Map black to -1 and white to 1, as float32; what lies outside is clipped."""
    return np.clip(2 * (values - black) / (white - black) - 1, -1, 1).astype(np.float32)


def from_unit(x, black, white):
    """The inverse of `to_unit`, as float32."""
    return (black + (x + 1) * ((white - black) / 2)).astype(np.float32)


def find_scale(values, inverted, label):
    """The values to show as -1 (black) and as 1 (white).

    Black is 0 where no value is negative, as in a magnitude image, else the 0.1th percentile;
    white is the 99.9th. An inverted volume (MONOCHROME1) is black at the 99.9th percentile and
    white at the 0.1th.

    Returns:
        (black, white, share of values outside them).

    Raises:
        UserError: values that are not finite, or all the same.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # a NaN among them is the minimum
        raise UserError(f"{label}: holds values that are not finite")
    if low == high:
        raise UserError(f"{label}: every value is {low:g}, so there is no image in it")
    bottom, top = (float(p) for p in np.percentile(values, PERCENTILES))
    if low >= 0 and not inverted:
        bottom = 0.0
    if bottom >= top:  # nearly all values are one
        bottom, top = low, high
    clipped = float(np.mean((values < bottom) | (values > top)))
    return (top, bottom, clipped) if inverted else (bottom, top, clipped)


def write_volumes(items, done, folder, description, identity):
    """Put the volumes together whose slices have all been restored.

    Reads slices/NAME.npy, and std/NAME.npy where there is one, of each slice, (C, H, W) in the
    units of the [-1, 1] image; writes volumes/ and std/, in the units of the volumes' files.

    Args:
        items: of the run; those that are no slices are passed over.
        done: names of the items that are restored.
        folder: of the run's results.
        description: how the volumes came about, a few words.
        identity: text that tells this run's settings from others'.

    Yields:
        One line a volume, for the terminal.
    """
    for volume in dict.fromkeys(item.volume for item in items if isinstance(item, Slice)):
        count = len(volume.slices)
        restored = sum(s.name in done for s in volume.slices)
        if restored < count:
            yield f"{volume.label}: {restored} of {count} slices restored, no volume written"
            continue
        black, white, clipped = volume.scale
        mean = volume.to_units(_stack(volume, os.path.join(folder, "slices")))
        path = volume.write(os.path.join(folder, "volumes"), mean, description, identity)
        if os.path.exists(os.path.join(folder, "std", f"{volume.slices[0].name}.npy")):
            std = _stack(volume, os.path.join(folder, "std")) * (abs(white - black) / 2)
            std = std.astype(np.float32)
            volume.write(os.path.join(folder, "std"), std, f"{description} std", identity, std=True)
        yield (
            f"{os.path.relpath(path, folder)}: {count} slices; {black:g} to {white:g} were "
            f"-1 to 1, the {clipped:.2%} of voxels outside were clipped"
        )


def _stack(volume, folder):
    """(count, H, W) of the slices' files; several channels are averaged."""
    paths = (os.path.join(folder, f"{s.name}.npy") for s in volume.slices)
    return np.stack([np.load(path).mean(axis=0) for path in paths])
