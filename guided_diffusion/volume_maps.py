"""What is written of a volume besides the restored one: volumes of the same grid and units."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.slices import Slice, Whole
from data.volumes import Volume
from guided_diffusion.config import is_map
from guided_diffusion.item_noise import ItemSigmas
from guided_diffusion.job import Job
from guided_diffusion.volume_denoising import is_denoising
from util.metrics import half_width

Voxels = NDArray[np.float32]


@dataclass(frozen=True)
class Maps:
    """Residual and σ of a volume that was its own noisy image, bounds of one that was sampled.

    Attributes:
        denoised: whether the volumes are measurements of the grid that is restored.
        sigma: of a volume, in units of the [-1, 1] image, a number or (count, H, W); None where
            there is none.
        width: half of an interval, in standard deviations of the samples; None of one sample.
    """

    denoised: bool
    sigma: Callable[[Volume], float | Voxels | None]
    width: float | None

    def __call__(
        self, volume: Volume, restored: Voxels, std: Voxels | None
    ) -> Iterator[tuple[str, Voxels]]:
        """Yield (folder, voxels in the file's units); `restored` and `std` are in these."""
        black, white, _ = volume.scale
        if self.denoised:
            residual = volume.voxels - restored
            if volume.padding is not None:
                residual[volume.padding] = 0
            yield "residual", residual
            sigma = self.sigma(volume)
            if sigma is not None:
                in_units = np.float32(abs(white - black) / 2) * sigma
                yield "sigma", np.broadcast_to(in_units, restored.shape).astype(np.float32)
        if std is not None and self.width is not None:
            half = np.float32(self.width) * std
            # Black is no signal at all; only what the file itself has below it is lower.
            floor = np.minimum(restored, np.float32(min(black, white)))
            yield "lower", np.maximum(restored - half, floor)
            yield "upper", restored + half


def maps_of(
    job: Job, sigmas: ItemSigmas, rows: Mapping[str, Mapping[str, Any]], factor: float | None
) -> Maps:
    """The maps of a run.

    Args:
        sigmas: of its noise, as far as they are maps.
        rows: what is known of each item that was restored, of which an estimated "sigma" counts.
        factor: on the standard deviation of samples, see `guided_diffusion.intervals`; None: 1.
    """
    measurement = job.task.measurement
    assert measurement is not None
    given = measurement.noise.sigma
    first: dict[Volume, Any] = {}
    for item in job.items:
        if isinstance(item, (Slice, Whole)):
            first.setdefault(item.volume, item)

    def sigma(volume: Volume) -> float | Voxels | None:
        if job.sigma_map is not None:
            return sigmas.map_of(Whole(volume), measurement)
        if is_map(given) or given == "auto":
            found = rows[first[volume].name].get("sigma")
            return None if found is None else float(found)
        return float(given) if given else None

    samples = job.options.num_samples
    width = half_width(samples, factor or 1.0) if samples > 1 else None
    denoised = not measurement.simulated and is_denoising(measurement)
    return Maps(denoised, sigma, width)
