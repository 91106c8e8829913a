"""σ of the items of a run: estimated, or where it differs from voxel to voxel a map of it."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.dataloader import list_items
from data.kspace import KSpaceSlice
from data.masks import check_grid, head_mask
from data.slices import Slice, Whole
from data.volumes import Volume
from guided_diffusion.config import AUTO, LOCAL, Measurement, Schedule, can_have_map
from guided_diffusion.measuring import confirmed, estimate_noise, noise_of, sigma_of
from guided_diffusion.noise import Noise
from guided_diffusion.prior import Prior
from util.errors import UserError

VARIES = 1.5  # factor between noise in one part of the head and another that is worth a note
WHERE = "measurement.noise.sigma"

Map = NDArray[np.float32]


def map_of(sigma: str, noise: Noise, options: Mapping[str, Any]) -> Callable[[Any], Map]:
    """How to find σ of each voxel of an item, see `open_map` and `estimated_map`.

    What the latter takes for noise in the head `ItemSigmas.map_of` asks the prior.
    """
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


def note_of_spread(
    noise: Noise, volume: Volume, sigma: float, share: Callable[..., float]
) -> str | None:
    """What a user is told where one σ, estimated, stands for noise that varies over the head.

    Args:
        share: `share_of_noise` of some slices and their map, where their heads are.
    """
    y = volume.sample()
    apart, height, width = _voxel(volume)
    voxel = (apart * len(volume.slices) / len(y), height, width)
    head, padding = heads(y), volume.sample_padding()
    found = noise.estimate_map(y, voxel, padding)
    if not head.any():
        return None
    low, high = (float(v) for v in np.quantile(found[head], [0.05, 0.95]))
    if high < VARIES * low:
        return None
    noisy = share(y[:, None], found, head, padding=padding)
    low, high = noisy * low, noisy * high
    if sigma < VARIES * low and high < VARIES * sigma:
        return None
    return (
        f"{volume.label}: σ is {low:.2g} to {high:.2g} in the head, and {sigma:.2g} is taken for "
        "all of it; --sigma local takes a map"
    )


def heads(y: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the head is in each of the slices (N, H, W)."""
    return np.stack([head_mask(image[None]) for image in y])


def share_of_noise(
    y: NDArray[np.float32],
    sigmas: Map,
    head: NDArray[np.bool_],
    measurement: Measurement,
    prior: Prior,
    schedule: Schedule,
    padding: NDArray[np.bool_] | None = None,
) -> float:
    """How much of an estimated map is noise in the head, and not anatomy, by the prior.

    Args:
        y: (N, C, H, W); sigmas: (N, H, W), of one image (C, H, W); head: (N, H, W); padding: of
            one image (H, W), or (N, H, W).
    """
    inside = sigmas[np.broadcast_to(head, sigmas.shape)]
    if not inside.size:
        return 1.0
    typical = float(np.sqrt(np.mean(np.square(inside, dtype=np.float64))))
    return confirmed(typical, y, measurement, prior, schedule, padding) / typical


@dataclass
class ItemSigmas:
    """σ of a run's measured items, where the task gives no number.

    Attributes:
        schedule: of the prior's training.
        sigma_map: see `map_of`; None where σ is one number, of a picture's contrast or a volume.
        found: of items that wait for their restoration, by name.
        of_volumes: estimated, a slice's for a slice may be empty; shares: see `share_of_noise`.
    """

    prior: Prior
    schedule: Schedule
    sigma_map: Callable[[Any], Map] | None
    found: dict[str, torch.Tensor] = field(default_factory=dict)
    of_volumes: dict[Volume, float] = field(default_factory=dict)
    shares: dict[Volume, float] = field(default_factory=dict)

    def find(self, item: Any, image: torch.Tensor, measurement: Measurement) -> str | None:
        """Find what `take` is to give for an item; returns what a user is to be told.

        Args:
            image: (C, H, W) that fits.

        Raises:
            UserError: there is no noise to be found, or no map for this item.
        """
        if self.sigma_map is not None:
            self.found[item.name] = torch.from_numpy(self.map_of(item, measurement))[None]
        elif measurement.noise.sigma != AUTO or isinstance(item, KSpaceSlice):
            return None
        elif isinstance(item, (Slice, Whole)):
            told = item.volume in self.of_volumes
            sigma = self.of_volume(item.volume, measurement)
            self.found[item.name] = torch.tensor([sigma])
            if not told and can_have_map(measurement):
                share = partial(share_of_noise, **self._known(measurement))
                return note_of_spread(noise_of(measurement), item.volume, sigma, share)
        else:
            known = self._known(measurement)
            self.found[item.name] = estimate_noise(image, padding=item.padding(), **known)
        return None

    def of_volume(self, volume: Volume, measurement: Measurement) -> float:
        """The one σ of a volume's noise."""
        if volume not in self.of_volumes:
            y, padding = volume.sample()[:, None], volume.sample_padding()
            self.of_volumes[volume] = sigma_of(y, padding=padding, **self._known(measurement))
        return self.of_volumes[volume]

    def map_of(self, item: Any, measurement: Measurement) -> Map:
        """σ of each voxel of an item; raises UserError, see `estimated_map` and `open_map`."""
        assert self.sigma_map is not None
        found = self.sigma_map(item)
        if measurement.noise.sigma != LOCAL:
            return found
        y = item.read()
        if isinstance(item, (Slice, Whole)):
            head, share = heads(y), self._share_of(item.volume, measurement)
        else:
            head, known = head_mask(y)[None], self._known(measurement)
            share = share_of_noise(y[None], found, head, padding=item.padding(), **known)
        return np.where(head, np.float32(share) * found, found)

    def _share_of(self, volume: Volume, measurement: Measurement) -> float:
        if volume not in self.shares:
            assert self.sigma_map is not None
            y, sigmas = volume.sample(), self.sigma_map(Whole(volume))[volume.sampled]
            padding, known = volume.sample_padding(), self._known(measurement)
            self.shares[volume] = share_of_noise(
                y[:, None], sigmas, heads(y), padding=padding, **known
            )
        return self.shares[volume]

    def _known(self, measurement: Measurement) -> dict[str, Any]:
        return {"measurement": measurement, "prior": self.prior, "schedule": self.schedule}

    def take(
        self, items: Sequence[Any], images: torch.Tensor, measurement: Measurement | None
    ) -> torch.Tensor | None:
        """σ of a batch, (rows,) or maps (N, C, H, W); None where the task or a scan says it."""
        if measurement is None:
            return None
        for item, image in zip(items, images, strict=True):
            if item.name not in self.found:  # an earlier run restored it, and not its neighbours
                self.find(item, image, measurement)
        taken = [self.found.pop(item.name) for item in items if item.name in self.found]
        return torch.cat(taken) if taken else None


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
        UserError for an item that is no volume, has another grid or lies elsewhere.

    Raises:
        UserError: the map cannot be read, or holds no standard deviations.
    """
    kept = {k: v for k, v in options.items() if k in ("axis", "volume")}
    found = list_items({"root": path, "measured": False, **kept}, key=WHERE)
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
        there = values[::-1] if check_grid(WHERE, volume, other) else values
        black, white, _ = other.scale
        chosen = there if isinstance(item, Whole) else there[item.index : item.index + 1]
        return chosen * np.float32(2 / abs(white - black))

    return of


def _grid(shape: Sequence[int], spacing: float) -> str:
    slices, height, width = shape
    return f"{slices} slices of {width}×{height}, {spacing:.4g} mm apart"
