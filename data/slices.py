"""The items that a volume gives: its slices one by one, or all of them as one image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from data.volumes import Volume

# Results that are no images: they have no padding and no range to display; samples and bounds have.
NO_IMAGES = ("std", "residual", "sigma")


@dataclass(frozen=True, eq=False)
class _Part:
    """What is restored of a volume; its result is kept, as floats, until that is put together."""

    volume: "Volume"
    floats = ("slices", ".npy")

    @property
    def label(self) -> str:
        return self.volume.label

    @property
    def note(self) -> str | None:
        return self.volume.note

    @property
    def digest(self) -> str:
        return self.volume.digest

    def to_floats(self, x: NDArray) -> NDArray:
        return x


@dataclass(frozen=True, eq=False)
class Slice(_Part):
    """One image of a volume, an `Item`; index counts along the volume's slice axis."""

    index: int

    @property
    def name(self) -> str:
        return f"{self.volume.name}_z{self.index:03d}"

    def read(self) -> NDArray[np.float32]:
        """(1, H, W) float32 in [-1, 1], turned as it is looked at."""
        return self.volume.read(self.index)

    def padding(self) -> NDArray[np.bool_] | None:
        padding = self.volume.padding
        return None if padding is None else padding[self.index]

    def picture(self, x: NDArray) -> NDArray:
        return x

    def check_writable(self, factor: int = 1) -> None:
        self.volume.check_writable(factor)


@dataclass(frozen=True, eq=False)
class Whole(_Part):
    """A volume that is restored as a whole, an `Item`: one image whose channels are its slices.

    Attributes:
        spacing: mm between the restored slices, None where they are the volume's own.
    """

    spacing: float | None = None

    @property
    def name(self) -> str:
        return self.volume.name

    def read(self) -> NDArray[np.float32]:
        """(slices, H, W) float32 in [-1, 1]."""
        return self.volume.read_all()

    def padding(self) -> NDArray[np.bool_] | None:
        return self.volume.padding

    def picture(self, x: NDArray) -> NDArray:
        """Three planes through the middle of (slices, H, W), one below the other, (1, h, w)."""
        return self.volume.three_planes(x)[None]

    def check_writable(self, factor: int = 1) -> None:
        self.volume.check_writable(factor, self.spacing)
