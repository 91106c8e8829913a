"""σ of the items of a run where it differs from voxel to voxel: a map, read or estimated."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.dataloader import list_items
from data.masks import head_mask
from data.slices import Slice, Whole
from data.volumes import Volume
from guided_diffusion.config import LOCAL
from guided_diffusion.noise import Noise
from util.errors import UserError

VARIES = 1.5  # factor between noise in one part of the head and another that is worth a note
WHERE = "measurement.noise.sigma"

Map = NDArray[np.float32]


def map_of(sigma: str, noise: Noise, options: Mapping[str, Any]) -> Callable[[Any], Map]:
    """How to find σ of each voxel of an item, see `open_map` and `estimated_map`."""
    return estimated_map(noise) if sigma == LOCAL else open_map(sigma, options)


def estimated_map(noise: Noise) -> Callable[[Any], Map]:
    """How to estimate σ of each voxel of an item: item → (C, H, W), see `estimate_sigma_map`.

    It raises UserError for an item without noise. A slice's is that of its place in the volume.
    """

    @functools.lru_cache(maxsize=1)  # slices come one after the other
    def of_volume(volume: Volume) -> Map:
        return noise.estimate_map(volume.read_all(), _voxel(volume), volume.ignored)

    def of(item: Any) -> Map:
        if not isinstance(item, (Slice, Whole)):
            return noise.estimate_map(item.read(), (math.inf, 1.0, 1.0), item.padding())
        found = of_volume(item.volume)
        return found if isinstance(item, Whole) else found[item.index : item.index + 1]

    return of


def note_of_spread(noise: Noise, volume: Volume, sigma: float) -> str | None:
    """What a user is told where one σ, estimated, stands for noise that varies over the head."""
    y = volume.sample()
    apart, height, width = _voxel(volume)
    voxel = (apart * len(volume.slices) / len(y), height, width)
    head = np.stack([head_mask(image[None]) for image in y])
    found = noise.estimate_map(y, voxel, volume.sample_padding())[head]
    low, high = (float(v) for v in np.quantile(found, [0.05, 0.95])) if head.any() else (1.0, 1.0)
    if high < VARIES * low:
        return None
    return (
        f"{volume.label}: σ is {low:.2g} to {high:.2g} in the head, and {sigma:.2g} is taken for "
        "all of it; --sigma local takes a map"
    )


def _voxel(volume: Volume) -> tuple[float, float, float]:
    """Sides in mm, of uneven distances the usual one."""
    steps = np.diff(volume.positions)
    apart = float(np.median(steps)) if len(steps) else 1.0
    return apart, volume.plane.pixel, volume.plane.pixel


def open_map(path: str, options: Mapping[str, Any]) -> Callable[[Any], Map]:
    """How to find σ of each voxel of an item.

    Args:
        path: a NIfTI volume of standard deviations, in the units and on the grid of the volume
            that is restored; 0 where it is not known, outside of the head.
        options: the task's `data`, of which `axis` and `volume` count.

    Returns:
        item, a volume or a slice of one → (C, H, W), in units of the [-1, 1] image. It raises
        UserError for an item that is no volume or has another grid.

    Raises:
        UserError: the map cannot be read, or holds no standard deviations.
    """
    kept = {k: v for k, v in options.items() if k in ("axis", "volume")}
    found = list_items({"root": path, "measured": False, **kept})
    volumes = list(dict.fromkeys(i.volume for i in found if isinstance(i, Slice)))
    if len(volumes) != 1 or len(volumes[0].slices) != len(found):
        raise UserError(f"{WHERE}: expected one volume of standard deviations in {path}")
    [volume] = volumes
    values, _ = volume.load()
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() > 0):
        raise UserError(
            f"{WHERE}: {volume.label}: expected standard deviations, finite and not below 0"
        )

    def of(item: Any) -> Map:
        if not isinstance(item, (Slice, Whole)):
            raise UserError(f"{item.label}: no volume, and {WHERE} is the map of one, {path}")
        other = item.volume
        size = other.shape_of_slices
        same = values.shape == size and math.isclose(volume.spacing, other.spacing, rel_tol=0.01)
        if not same:
            raise UserError(
                f"{WHERE}: {volume.label} has {_grid(values.shape, volume.spacing)}, and "
                f"{other.label} {_grid(size, other.spacing)}"
            )
        black, white, _ = other.scale
        chosen = values if isinstance(item, Whole) else values[item.index : item.index + 1]
        return chosen * np.float32(2 / abs(white - black))

    return of


def _grid(shape: Sequence[int], spacing: float) -> str:
    slices, height, width = shape
    return f"{slices} slices of {width}×{height}, {spacing:.4g} mm apart"
