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
from guided_diffusion.config import DataConfig, Measurement, TaskConfig, is_map
from guided_diffusion.measuring import (
    LEAST_SIDE,
    enlargement,
    for_volume,
    interpolated,
    restored_spacing,
    takes_volumes,
)
from guided_diffusion.operators import operator_class
from guided_diffusion.operators.base import Grid
from guided_diffusion.volumes import AsVolume, is_isotropic
from util.errors import UserError
from util.random import Place

ALIKE = 0.05  # share of a length, by which a task and a header may differ without a word


def with_defaults(task: TaskConfig, items: Sequence[Any], channels: int) -> TaskConfig:
    """The task with what it leaves open of volumes, where there are any, for the record.

    Args:
        channels: of the prior.

    Raises:
        UserError: keys that exclude one another.
    """
    data, measurement = task.data, task.measurement
    if data is None or measurement is None or not any(map(_of_a_volume, items)):
        return task
    volumes = dict.fromkeys(item.volume for item in items if _of_a_volume(item))
    operator = operator_class(measurement.operator.name)
    along = operator.of_volumes
    mode, turn, correlated = data.volume_mode, data.planes_in_turn, data.correlated_noise
    if mode is None:
        can = channels == 1 and takes_volumes(measurement)
        whole = along or (can and any(can_be_whole(v, measurement) for v in volumes))
        mode = "volume" if whole else "slices"
        for uneven in [v for v in volumes if v.gaps and can and not along]:
            uneven.remarks.append("so it is restored slice by slice")
    if turn is None:
        cubic = [nearly_cubic(v, v.spacing, measurement) for v in volumes if not v.gaps]
        turn = not correlated and (along or (operator.from_all_sides and any(cubic)))
    turn = turn and mode == "volume"
    if turn and correlated:
        raise UserError(
            "data.correlated_noise: true and data.planes_in_turn: true exclude one another: from "
            "the side, noise that agrees is stripes, which the network takes for anatomy"
        )
    if correlated is None and not turn:
        correlated = True
    data = replace(data, volume_mode=mode, correlated_noise=correlated, planes_in_turn=turn)
    return replace(task, data=data)


def _of_a_volume(item: Any) -> bool:
    """Whether it is a slice of a volume of images; those of k-space go one by one."""
    return isinstance(item, Slice) and not isinstance(item, KSpaceSlice)


def can_be_whole(volume: Volume, measurement: Measurement) -> bool:
    """Whether a volume is restored as a whole where the task leaves that open."""
    if isinstance(volume, KSpaceVolume):
        return False
    acts_along = operator_class(measurement.operator.name).of_volumes
    return acts_along or (len(volume.slices) > 1 and not volume.gaps)


def whole_volumes(items: Sequence[Any], measurement: Measurement, asked: bool) -> list[Any]:
    """The volumes instead of their slices; what cannot be one becomes a `Broken` item.

    Args:
        asked: whether the task file says that volumes are restored as a whole; otherwise those
            that cannot be stay slices.
    """
    found: list[Any] = []
    for item in dict.fromkeys(i.volume if isinstance(i, Slice) else i for i in items):
        if not isinstance(item, Volume):
            found.append(item)
            continue
        if not asked and not can_be_whole(item, measurement):
            found += item.slices
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


def as_volume(
    item: Any, data: DataConfig | None, measurement: Measurement | None, batch: int, least_side: int
) -> AsVolume | None:
    """How to restore an item that is a whole volume.

    Args:
        batch: images that the network sees at once; least_side: of those that it takes.
    """
    if not isinstance(item, Whole) or data is None:
        return None
    spacing = item.spacing or item.volume.spacing
    deep = slices_of(item) >= max(LEAST_SIDE, least_side)
    in_turn = bool(data.planes_in_turn) and deep and nearly_cubic(item.volume, spacing, measurement)
    agreeing = not in_turn if data.correlated_noise is None else data.correlated_noise
    return AsVolume(
        chunk=batch,
        spacing=spacing if agreeing else None,
        in_turn=in_turn,
        world=item.volume.plane.world,
        upward=item.volume.plane.upward,
    )


def nearly_cubic(volume: Volume, spacing: float, measurement: Measurement | None) -> bool:
    """Whether the voxels of a volume restored to slices so many mm apart are nearly cubes."""
    plane, finer = volume.plane, enlargement(measurement)
    return is_isotropic(spacing, plane.pixel / finer, plane.longer / finer)


def slices_of(item: Whole) -> int:
    """How many slices are restored."""
    volume = item.volume
    return round(len(volume.slices) * volume.spacing / (item.spacing or volume.spacing))


def note_of_planes(item: Any, data: DataConfig | None, way: AsVolume | None) -> str | None:
    """What a user is told whose volume is not seen from all sides, though the run's others are."""
    if way is None or data is None or not data.planes_in_turn or way.in_turn:
        return None
    return (
        f"{item.label}: its planes are not taken in turn, as that needs nearly cubic voxels and "
        f"{LEAST_SIDE} slices; the result is coarser across slices"
    )


def note_of_lengths(item: Any, measurement: Measurement | None) -> str | None:
    """What a user is told of whose measured volume task and header differ, or say too little."""
    if measurement is None or measurement.simulated or not isinstance(item, Whole):
        return None
    if not operator_class(measurement.operator.name).of_volumes:
        return None
    grid, params, found = grid_of(item.volume), measurement.operator.params, []
    for key, header in (("spacing", grid.spacing), ("thickness", grid.thickness)):
        given = params.get(key)
        if given is not None and header is not None and abs(given - header) > ALIKE * header:
            found.append(f"{key} {given:g} mm, and the header {header:.4g} mm")
    if params.get("thickness") is None and grid.thickness is None:
        return (
            f"{item.label}: its header has no slice thickness; the spacing, "
            f"{params.get('spacing') or grid.spacing:.4g} mm, is taken, and --set "
            "measurement.operator.thickness=MM gives another"
        )
    if not found:
        return None
    return f"{item.label}: the task says {'; '.join(found)}; left out, the header's is taken"


def note_of_ranks(items: Sequence[Any], processes: int) -> str | None:
    """What a user is told whose processes are more than the images, some of them whole volumes."""
    if processes <= len(items) or not any(isinstance(item, Whole) for item in items):
        return None
    return (
        "there are more processes than images, for a volume that is restored as a whole is one; "
        "data.volume_mode: slices shares out its slices"
    )


def place_of(item: Any, data: DataConfig | None) -> Place | None:
    """Where a slice lies whose noise agrees with its neighbours'."""
    if not _of_a_volume(item) or data is None or data.correlated_noise is False:
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
    """Where the head is in the item of a volume that has a mask; None of others.

    Returns:
        (H, W) of a slice, (D, H, W) of a whole volume.
    """
    if isinstance(item, Whole):
        return item.volume.head
    head = item.volume.head if _of_a_volume(item) else None
    return None if head is None else head[item.index]


def counted_in(item: Any, truth: NDArray, mask: Any) -> Mask | None:
    """What `data.masks.open_masks` finds for an item; of a whole volume slice by slice.

    Slices outside of the mask do not count; where the whole volume is outside, all of it does.
    """
    if not isinstance(item, Whole):
        return mask(item, truth)
    slices = enumerate(item.volume.slices)
    each = [mask(piece, truth[i : i + 1], empty=False) for i, piece in slices]
    found = [part for part in each if part is not None]
    inside = np.stack(found) if len(found) == len(each) else None
    return inside if inside is not None and inside.any() else None
