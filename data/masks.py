"""The part of an image that counts for its metrics: the head, not the air around it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from data.dataloader import list_items
from data.volumes import Slice, Volume
from util.errors import UserError

Mask = NDArray[np.bool_]
SMOOTHING = 2.0  # pixels, so that noise in the air makes no islands
SHARE_OF_OTSU = 0.4  # scalp and fluid lie far below the threshold between air and brain
ROUGHLY = (0.1, 99.9)  # percentiles of a volume that are black and white until its mask is known
OFF_GRID = 0.25  # of a pixel, to which a volume may be off another on the same grid
LEAST_SHARE = 0.01  # of the pixels; less is no head


def head_mask(image: NDArray, empty: bool = True) -> Mask:
    """Where the head is: the largest bright part of a slice, its holes filled.

    Args:
        image: (C, H, W) in [-1, 1], without noise.

    Returns:
        (H, W); where nothing stands out from a background all pixels, none if `empty` is False.
    """
    light = ndimage.gaussian_filter((np.mean(image, axis=0, dtype=np.float64) + 1) / 2, SMOOTHING)
    whole = np.full(light.shape, empty)
    if np.ptp(light) < 1e-3:
        return whole
    bright = light > SHARE_OF_OTSU * threshold_otsu(light)
    labels, count = ndimage.label(bright)
    if not count:
        return whole
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    filled = ndimage.binary_fill_holes(ndimage.binary_closing(largest, iterations=3) | largest)
    return filled if filled.mean() >= LEAST_SHARE else whole


def limit_volumes(items: Sequence[Any], mask: str | None, find: Callable[..., Mask | None]) -> None:
    """Limit the grey scale of volumes, and what is estimated of their noise, to the mask.

    Args:
        items: images, of which the slices of volumes count.
        mask, find: what `open_masks` takes and returns.
    """
    if mask is None:
        return
    for volume in dict.fromkeys(i.volume for i in items if isinstance(i, Slice)):
        volume.find_head = partial(_head_of, volume, mask, find)
        volume.head_is_given = mask != "auto"


def _head_of(volume, mask, find, voxels):
    """(count, H, W), the mask of a volume's slices."""
    slices = volume.slices
    known = np.nan_to_num(voxels, nan=float(np.nanmin(voxels)))
    low, high = np.percentile(known, ROUGHLY)
    rough = np.clip(2 * (known - low) / max(high - low, 1e-9) - 1, -1, 1)
    found = [find(p, x[None], empty=False) for p, x in zip(slices, rough, strict=True)]
    head = np.stack(found)
    if head.any():
        return head
    if mask != "auto":
        raise UserError(f"data.mask: {mask} is 0 everywhere on the grid of {volume.label}")
    return ~head  # nothing stands out from a background


def open_masks(
    mask: str | None, options: dict[str, Any], items: Sequence[Any]
) -> Callable[..., Mask | None]:
    """How to find the mask of each item's image.

    Args:
        mask: None; "auto", see `head_mask`; or a file or folder of masks, pictures or volumes of
            the images' own grid, in which what is not 0 counts: one for all images, one for each
            in the same order, or one volume for all volumes.
        options: the task's `data`, of which a volume of masks takes `axis` and `volume`.
        items: all images of data.root.

    Returns:
        (item, its truth (C, H, W), empty=True) → (H, W), or None where all pixels count. Where
        nothing is inside all do, unless `empty` is False. It raises UserError for a mask that
        cannot be read or has another size.

    Raises:
        UserError: the masks cannot be listed, or are more or fewer than the images.
    """
    if mask is None:
        return lambda item, truth, empty=True: None
    if mask == "auto":
        return lambda item, truth, empty=True: head_mask(truth, empty)
    kept = {k: v for k, v in options.items() if k in ("axis", "volume")}
    masks = list_items({"root": mask, "measured": False, **kept}, key="data.mask")
    if len(masks) in (1, len(items)):
        both = {item.name: masks[i if len(masks) > 1 else 0] for i, item in enumerate(items)}
    elif _is_one_for_all(masks, items):
        both = {item.name: masks[item.index] for item in items}
    else:
        raise UserError(
            f"data.mask: expected one mask, one for each of {len(items)} images, or one volume of "
            f"as many slices as each of theirs, found {len(masks)} in {mask}"
        )
    backwards: dict[tuple[Any, Any], bool] = {}
    for item in items:
        found = both[item.name]
        if isinstance(item, Slice) and isinstance(found, Slice):
            pair = found.volume, item.volume
            if pair not in backwards:
                backwards[pair] = check_grid("data.mask", *pair)
    # A volume of masks is read once as a whole: read slice by slice, it and the images' volume
    # would take turns in the place that the reader has for one.
    volumes: dict[Any, NDArray[np.bool_]] = {}

    def of(item: Any, truth: NDArray, empty: bool = True) -> Mask:
        found = both[item.name]
        if not isinstance(found, Slice):
            seen = np.any(found.read() > -1, axis=0)
        else:
            volume = found.volume
            if volume not in volumes:
                volumes.clear()
                volumes[volume] = np.nan_to_num(volume.load()[0]) != 0
            last = len(volume.slices) - 1
            turned = isinstance(item, Slice) and backwards[volume, item.volume]
            seen = volumes[volume][last - found.index if turned else found.index]
        if seen.shape != truth.shape[1:]:
            size = "×".join(map(str, seen.shape[::-1]))
            raise UserError(
                f"data.mask: {found.label} has {size} pixels, and {item.label} has "
                f"{truth.shape[2]}×{truth.shape[1]}"
            )
        if empty and not seen.any():  # a slice above the head; its metrics are of all pixels
            return ~seen
        return seen

    return of


def _is_one_for_all(masks, items):
    """Whether the masks are one volume's slices, as many as each volume of the items has."""
    whole = all(isinstance(m, Slice) for m in masks) and len({m.volume for m in masks}) == 1
    return whole and all(
        isinstance(i, Slice) and len(i.volume.slices) == len(masks) == len(masks[0].volume.slices)
        for i in items
    )


def check_grid(key: str, volume: Volume, image: Volume) -> bool:
    """Find out whether a volume that `key` names is on the grid of that of the images.

    Of a volume that does not say where it lies, the number of voxels alone counts.

    Returns:
        Whether its slices are in the opposite order.

    Raises:
        UserError: it lies elsewhere, or has other voxels.
    """
    if volume.world is None or image.world is None:
        return False
    if volume.world.shape != image.world.shape:
        worlds = volume.world, image.world
        seen, expected = ("×".join(map(str, world.shape[::-1])) for world in worlds)
        raise UserError(
            f"{key}: {volume.label} has {seen} voxels, and {image.label} has {expected}"
        )
    apart, turned = (image.world.apart(w) for w in (volume.world, volume.world.backwards()))
    if min(apart, turned) > OFF_GRID * image.plane.pixel:
        raise UserError(
            f"{key}: {volume.label} lies elsewhere than {image.label}, a corner {apart:.3g} mm "
            "off; resample it to the image's grid"
        )
    return turned < apart
