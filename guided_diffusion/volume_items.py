"""The volumes of a run: restored as a whole or slice by slice, and what their headers decide."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.items import Broken
from data.kspace import KSpaceSlice, KSpaceVolume
from data.masks import Mask
from data.volumes import Slice, Volume, Whole
from guided_diffusion.config import DataConfig, Measurement, TaskConfig
from guided_diffusion.measuring import for_volume, interpolated, restored_spacing
from guided_diffusion.noise_maps import is_map
from guided_diffusion.operators import operator_class
from guided_diffusion.operators.base import Grid
from guided_diffusion.volumes import AsVolume, is_isotropic
from util.errors import UserError
from util.random import Place


def with_defaults(task: TaskConfig, items: Sequence[Any]) -> TaskConfig:
    """The task with what it leaves open of volumes, where there are any, for the record."""
    data, measurement = task.data, task.measurement
    if data is None or measurement is None or not any(map(_of_a_volume, items)):
        return task
    along = operator_class(measurement.operator.name).of_volumes
    mode = data.volume_mode or ("volume" if along else "slices")
    turn = along if data.planes_in_turn is None else data.planes_in_turn
    correlated = data.correlated_noise is not False
    turn = turn and mode == "volume"
    data = replace(data, volume_mode=mode, correlated_noise=correlated, planes_in_turn=turn)
    return replace(task, data=data)


def _of_a_volume(item: Any) -> bool:
    """Whether it is a slice of a volume of images; those of k-space go one by one."""
    return isinstance(item, Slice) and not isinstance(item, KSpaceSlice)


def whole_volumes(items: Sequence[Any], measurement: Measurement) -> list[Any]:
    """The volumes instead of their slices; what cannot be one becomes a `Broken` item."""
    found: list[Any] = []
    for item in dict.fromkeys(i.volume if isinstance(i, Slice) else i for i in items):
        if not isinstance(item, Volume):
            found.append(item)
            continue
        try:
            if isinstance(item, KSpaceVolume):
                raise UserError(
                    f"{item.label}: k-space is restored slice by slice, data.volume_mode: slices"
                )
            complete = for_volume(measurement, grid_of(item))
            spacing = None if measurement.simulated else restored_spacing(complete)
            found.append(Whole(item, spacing))
        except UserError as error:
            found.append(Broken(item.name, item.label, error))
    if len(found) == 1 and isinstance(found[0], Broken):
        found[0].read()
    return found


def grid_of(volume: Volume) -> Grid:
    """Raises UserError where slices lie at uneven distances."""
    return Grid(volume.spacing, volume.plane.thickness, volume.plane.pixel)


def measurement_of(item: Any, measurement: Measurement | None) -> Measurement | None:
    """How an item was measured; of a whole volume by what its header says.

    Noise that has a map is of unknown σ here: the map is each item's own.
    """
    if measurement is not None and is_map(measurement.noise.sigma):
        measurement = replace(measurement, noise=replace(measurement.noise, sigma="auto"))
    if measurement is None or not isinstance(item, Whole):
        return measurement
    return for_volume(measurement, grid_of(item.volume))


def as_volume(item: Any, data: DataConfig | None, batch: int, least_side: int) -> AsVolume | None:
    """How to restore an item that is a whole volume.

    Args:
        batch: images that the network sees at once; least_side: of those that it takes.
    """
    if not isinstance(item, Whole) or data is None:
        return None
    volume, plane = item.volume, item.volume.plane
    spacing = item.spacing or volume.spacing
    slices = round(len(volume.slices) * volume.spacing / spacing)
    fits = plane.square and is_isotropic(spacing, plane.pixel) and slices >= least_side
    return AsVolume(
        chunk=batch,
        spacing=spacing if data.correlated_noise else None,
        in_turn=bool(data.planes_in_turn) and fits,
        world=plane.world,
        upward=plane.upward,
    )


def place_of(item: Any, data: DataConfig | None) -> Place | None:
    """Where a slice lies whose noise agrees with its neighbours'."""
    if not _of_a_volume(item) or data is None or not data.correlated_noise:
        return None
    return Place(item.volume.name, float(item.volume.positions[item.index]))


def interpolated_of(
    item: Any, measurement: Measurement | None, y: NDArray | None, x: NDArray
) -> NDArray | None:
    """A whole volume's measurement interpolated to the grid of x; None of other items."""
    complete = measurement_of(item, measurement)
    if complete is None or y is None or not isinstance(item, Whole):
        return None
    return interpolated(y, len(x), complete)


def head_of(item: Any) -> NDArray[np.bool_] | None:
    """Where the head is in the item of a volume that has a mask, (C, H, W); None of others."""
    if isinstance(item, Whole):
        return item.volume.head
    head = item.volume.head if _of_a_volume(item) else None
    return None if head is None else head[item.index : item.index + 1]


def mask_of(item: Any, truth: NDArray, mask: Any) -> Mask | None:
    """What `data.masks.open_masks` finds for an item; of a whole volume slice by slice."""
    if not isinstance(item, Whole):
        return mask(item, truth)
    each = [mask(piece, truth[i : i + 1]) for i, piece in enumerate(item.volume.slices)]
    found = [part for part in each if part is not None]
    return np.stack(found) if len(found) == len(each) else None
