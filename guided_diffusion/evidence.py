"""What is known of a restored image without its truth: the residual, and the image's contrast.

Of each image a run keeps, for its report,

    residual/NAME.png   the residual (y - A x̂)/σ, black at -4 and white at 4
    report/NAME.json    an `Evidence`

What the data and the prior explain leaves noise behind: each pixel's residual says nothing of its
neighbours'. Where an image was smoothed, sharpened or shifted, its anatomy stands in the residual,
which then correlates from pixel to pixel.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from data.grids import nearest
from data.kspace import KSpaceSlice
from data.masks import head_mask
from data.volumes import SAMPLED, Whole
from guided_diffusion.batches import Restored
from guided_diffusion.config import Measurement, Schedule
from guided_diffusion.measuring import confirmed, noise_of
from guided_diffusion.prior import Prior
from guided_diffusion.statistics import BANDS, NATURAL_IMAGES, PriorStatistics, bands_of
from util.errors import UserError
from util.files import replacing_text
from util.image_files import write_png
from util.results import Results

REACH = 7  # pixels, to which the autocorrelation is taken
SHOWN = 4.0  # of the residual in σ, black to white
FINEST = 96  # half cycles in 256 pixels: beyond it, power is a matter of resolution
# Autocorrelation that is called structure: this much, and so many standard errors of white noise.
# With the right σ it stayed below 0.01 on the shipped slices, but for ×4: 0.05, of 1900 pixels.
STRUCTURE, ERRORS = 0.03, 3.0
DOUBTED = 1.2  # times the σ given: an estimate that the prior is asked to confirm


@dataclass(frozen=True)
class Evidence:
    """Of one image, or of a volume as a whole.

    Attributes:
        rms: of the residual, in units of σ; None where no noise was assumed.
        correlation: (2·REACH + 1)² rows of the residual's autocorrelation, 1 in the middle.
        pixels: of which it was taken: those of the head.
        across: the correlation of neighbouring slices' residuals; None for a single slice.
        mean: intensity of the restored image in [-1, 1].
        spectrum: how far its power spectrum is from that of the prior's training images: the root
            mean square, over octaves of frequency, of log10 of their ratio; None where the prior
            has no statistics.
        sigma: of the noise, estimated from a measured image whose σ was given; None elsewhere.
        note: what a user was told of how the image was read, or "".
    """

    rms: float | None = None
    correlation: list[list[float]] | None = None
    pixels: int = 0
    across: float | None = None
    mean: float = 0.0
    spectrum: float | None = None
    sigma: float | None = None
    note: str = ""

    def save(self, path: str) -> None:
        with replacing_text(path) as file:
            json.dump(asdict(self), file)
            file.write("\n")

    @classmethod
    def load(cls, path: str) -> "Evidence | None":
        """What `save` wrote; None where that is missing, damaged or another version's."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls(**json.load(file))
        except (OSError, ValueError, TypeError):
            return None


def keep(
    results: Results,
    item: Any,
    i: int,
    restored: Restored,
    measurement: Measurement,
    prior: Prior,
    schedule: Schedule,
    ignored: NDArray[np.bool_] | None,
) -> None:
    """Write the files of an item, the i-th of those that were restored; see above.

    Args:
        ignored: (H, W) or (C, H, W), True where the file has no data, or is not to be judged.
    """
    known = None if prior.statistics is NATURAL_IMAGES else prior.statistics
    residual = restored.residuals[i]
    found = measure(restored.mean[i], residual, ignored, known, isinstance(item, Whole))
    sigma = _noise_of(item, restored.measurements[i], ignored, measurement, prior, schedule)
    if residual is not None:
        shown = np.clip(residual / SHOWN, -1, 1).astype(np.float32)
        write_png(results.path("residual", f"{item.name}.png"), item.picture(shown))
    found = replace(found, sigma=sigma, note=item.note or "")
    found.save(results.path("report", f"{item.name}.json"))


def _noise_of(item, y, ignored, measurement, prior, schedule):
    """See `Evidence.sigma`."""
    noise = measurement.noise.sigma
    if measurement.simulated or y is None or not isinstance(noise, float | int):
        return None
    if isinstance(item, KSpaceSlice) or not noise_of(measurement).can_be_estimated:
        return None
    whole = isinstance(item, Whole)
    y = y[:: -(-len(y) // SAMPLED), None] if whole else y[None]
    if ignored is not None and ignored.ndim == 3:
        ignored = ignored[:: -(-len(ignored) // SAMPLED)]
    try:
        found = noise_of(measurement).estimate(y.reshape(-1, *y.shape[-2:]), ignored)
        if found > DOUBTED * noise:
            found = confirmed(found, y, measurement, prior, schedule, ignored)
    except UserError:  # an image without noise
        return None
    return float(found)


def measure(
    image: NDArray[np.float32],
    residual: NDArray[np.float32] | None,
    ignored: NDArray[np.bool_] | None,
    statistics: PriorStatistics | None,
    volume: bool,
) -> Evidence:
    """What an image and its residual show.

    Args:
        image: (C, H, W) in [-1, 1], restored; of a volume the channels are its slices.
        residual: (c, h, w) in units of σ; None where there is none.
        ignored: see `keep`.
        statistics: of the prior's images, if any were measured.
        volume: whether the channels are slices.
    """
    mean = float(image.mean(dtype=np.float64))
    spectrum = None if statistics is None else spectrum_distance(image, statistics)
    if residual is None:
        return Evidence(mean=mean, spectrum=spectrum)
    inside = _head(image, residual.shape, volume)
    if ignored is not None:
        inside &= ~_onto(ignored.reshape(-1, *ignored.shape[-2:]), residual.shape)
    if not inside.any():
        inside[:] = True
    seen = residual[inside].astype(np.float64)
    rows = autocorrelation(residual, inside)
    across = across_slices(residual, inside) if volume and len(residual) > 1 else None
    return Evidence(
        rms=float(np.sqrt(np.mean(seen**2))),
        correlation=[[round(float(v), 5) for v in row] for row in rows],
        pixels=int(inside.sum()),
        across=across,
        mean=mean,
        spectrum=spectrum,
    )


def combined(found: Sequence[Evidence]) -> Evidence:
    """What is known of a volume whose slices were restored one by one."""
    seen = [e for e in found if e.rms is not None and e.correlation is not None]
    noises = [e.sigma for e in found if e.sigma is not None]
    spectra = [e.spectrum for e in found if e.spectrum is not None]
    pixels = sum(e.pixels for e in seen)
    energy = [e.pixels * (e.rms or 0) ** 2 for e in seen]
    rows = None
    if sum(energy) > 0:
        maps = np.array([e.correlation for e in seen])
        rows = np.average(maps, axis=0, weights=energy).round(5).tolist()
    return Evidence(
        rms=math.sqrt(sum(energy) / pixels) if pixels else None,
        correlation=rows,
        pixels=pixels,
        across=found[0].across if len(found) == 1 else None,
        mean=float(np.mean([e.mean for e in found])),
        spectrum=float(np.median(spectra)) if spectra else None,
        sigma=float(np.median(noises)) if noises else None,
        note=next((e.note for e in found if e.note), ""),
    )


def autocorrelation(
    residual: NDArray[np.floating], inside: NDArray[np.bool_], reach: int = REACH
) -> NDArray[np.float64]:
    """(2·reach + 1, 2·reach + 1): the mean product of pixels so far apart, over their mean square.

    By the Wiener-Khinchin theorem, on images padded with zeros; of pixels `inside` alone.

    Args:
        residual, inside: (C, H, W); channels are averaged.
    """
    height, width = residual.shape[1:]
    shape = [scipy.fft.next_fast_len(n + reach, real=True) for n in (height, width)]
    products = np.zeros((shape[0], shape[1] // 2 + 1))
    pairs = np.zeros_like(products)
    for image, mask in zip(residual, inside, strict=True):
        products += np.abs(scipy.fft.rfft2(np.where(mask, image, 0).astype(np.float64), shape)) ** 2
        pairs += np.abs(scipy.fft.rfft2(mask.astype(np.float64), shape)) ** 2
    lags = np.arange(-reach, reach + 1)
    near = np.ix_(lags, lags)
    total = scipy.fft.irfft2(products, shape)[near]
    count = scipy.fft.irfft2(pairs, shape)[near].round()
    square = total[reach, reach] / max(count[reach, reach], 1)
    if square <= 0:
        return np.zeros_like(total)
    return np.where(count > 0, total / np.maximum(count, 1), 0) / square


def rings(correlation: NDArray[np.floating]) -> NDArray[np.float64]:
    """Means over the lags of about 1, 2, 3, … pixels' length."""
    reach = len(correlation) // 2
    lags = np.arange(-reach, reach + 1)
    distance = np.rint(np.hypot(lags[:, None], lags)).astype(int)
    return np.array([correlation[distance == d].mean() for d in range(1, reach + 1)])


def limit(pixels: int) -> float:
    """The autocorrelation above which a residual of so many pixels is said to have structure."""
    return STRUCTURE + ERRORS / math.sqrt(max(pixels, 1))


def spectrum_distance(image: NDArray[np.floating], statistics: PriorStatistics) -> float:
    """See `Evidence.spectrum`; a coefficient of `BANDS` up to `FINEST` each."""
    counts, _, found = bands_of(image)
    _, _, expected = bands_of(image, statistics.power_spectrum(*image.shape[1:]).numpy())
    known = (counts > 0) & (found > 0) & (BANDS[1:] <= FINEST)
    if not known.any():
        return 0.0
    return float(np.sqrt(np.mean(np.log10(found[known] / expected[known]) ** 2)))


def _head(image, shape, volume):
    """The head, on the grid of the measurement."""
    heads = [head_mask(piece[None]) for piece in image] if volume else [head_mask(image)]
    return _onto(np.stack(heads), shape)


def _onto(mask, shape):
    """A mask (C, H, W), or one for all channels, on another grid of the same extent."""
    channels = nearest(len(mask), shape[0])
    rows, cols = nearest(mask.shape[1], shape[1]), nearest(mask.shape[2], shape[2])
    return mask[np.ix_(channels, rows, cols)]


def across_slices(residual: NDArray[np.floating], inside: NDArray[np.bool_]) -> float:
    """The correlation of each slice's residual with the next one's."""
    both = inside[1:] & inside[:-1]
    if not both.any():
        return 0.0
    first, second = (r[both].astype(np.float64) for r in (residual[:-1], residual[1:]))
    scale = math.sqrt(float(np.mean(first**2) * np.mean(second**2)))
    return float(np.mean(first * second)) / scale if scale else 0.0
