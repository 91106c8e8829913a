"""Image quality against a known truth: one row of `METRICS` for each measure."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from skimage.metrics import structural_similarity

from util.errors import UserError

HAARPSI_SIDE = 16  # pixels, at least
AT_ONCE = 16  # channels, so that a volume's many wavelets need not be in memory together
SHARE = 0.9  # of the truths that an interval is to hold
Mask = NDArray[np.bool_] | None  # (H, W) or (C, H, W), the pixels that count; None for all


@dataclass(frozen=True)
class Column:
    """A number that a table holds for each image."""

    label: str
    format: str = ".4f"
    unit: str = ""

    def show(self, value: float) -> str:
        return f"{self.label} {value:{self.format}}" + (f" {self.unit}" if self.unit else "")

    @property
    def heading(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True, kw_only=True)
class Metric(Column):
    """A measure: ``function(x, truth, mask)`` of two images (C, H, W) in [0, 1], data range 1.

    line: whether it stands in the line that is printed for each image.
    """

    function: Callable[[NDArray, NDArray, Mask], float]
    line: bool = False


def psnr(x: NDArray, truth: NDArray, mask: Mask = None) -> float:
    """Peak signal-to-noise ratio, -10 log₁₀ of the mean squared error; inf for equal images."""
    error = float(np.mean(_seen(x - truth, mask) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(x: NDArray, truth: NDArray, mask: Mask = None) -> float:
    """Wang et al. 2004: Gaussian window of σ 1.5, averaged over channels."""
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    mean, local = structural_similarity(truth, x, data_range=1, channel_axis=0, full=True, **window)
    return float(mean if mask is None else np.mean(_seen(local, mask)))


def nmse(x: NDArray, truth: NDArray, mask: Mask = None) -> float:
    """‖x - truth‖² / ‖truth‖²; nan for a black truth."""
    energy = float(np.sum(_seen(truth, mask) ** 2))
    return float(np.sum(_seen(x - truth, mask) ** 2)) / energy if energy else float("nan")


def haarpsi(x: NDArray, truth: NDArray, mask: Mask = None) -> float:
    """Reisenhofer et al. 2018, HaarPSI in [0, 1], averaged over channels.

    Of the measures that need no training, the one nearest to radiologists' scores of MR images
    (Kastryulin et al. 2023). It weighs pixels by their contrast; with a mask, both images are
    black outside it, and so without weight; channels in which no pixel counts are left out. nan
    for images that its wavelets do not fit into.
    """
    if min(truth.shape[1:]) < HAARPSI_SIDE:
        return float("nan")
    try:
        import piq  # takes seconds, with torchvision
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"HaarPSI: piq cannot be imported ({str(error).splitlines()[0]}); it needs a "
            "torchvision that belongs to the installed torch, both from one source"
        ) from None

    both = x, truth
    if mask is not None:
        counts = np.broadcast_to(mask.any(axis=(-2, -1)), len(truth))
        both = np.where(mask, x, 0)[counts], np.where(mask, truth, 0)[counts]
    images = [torch.from_numpy(v) for v in both]
    scores = [
        piq.haarpsi(*(v[:, None].double() for v in few), data_range=1.0, reduction="none")
        for few in zip(*(v.split(AT_ONCE) for v in images), strict=True)  # each channel an image
    ]
    equal = (images[0] == images[1]).all(dim=-1).all(dim=-1)
    return float(torch.cat(scores).masked_fill(equal, 1.0).mean())  # of two black ones it is inf


METRICS: dict[str, Metric] = {
    "psnr": Metric(label="PSNR", format=".2f", unit="dB", function=psnr, line=True),
    "ssim": Metric(label="SSIM", function=ssim, line=True),
    "nmse": Metric(label="NMSE", function=nmse),
    "haarpsi": Metric(label="HaarPSI", function=haarpsi),
}


def _seen(values: NDArray, mask: Mask) -> NDArray:
    """The values (C, H, W) that count."""
    if mask is None:
        return values
    return values[mask] if mask.ndim == 3 else values[:, mask]


def image_metrics(x: ArrayLike, truth: ArrayLike, mask: Mask = None) -> dict[str, float]:
    """Every metric of `METRICS` for one image; nan for one of which no pixel counts.

    Args:
        x, truth: (C, H, W) in [-1, 1]; values outside are clipped first.
        mask: (H, W) or (C, H, W), the pixels that count; None for all.
    """
    if mask is not None and not mask.any():
        return dict.fromkeys(METRICS, math.nan)
    both = [np.clip((np.asarray(v, np.float64) + 1) / 2, 0, 1) for v in (x, truth)]
    return {name: metric.function(both[0], both[1], mask) for name, metric in METRICS.items()}


def high_frequency_ratio(x: ArrayLike, truth: ArrayLike) -> float:
    """Energy of x in the outer half of the spectrum, divided by the truth's: 1 is as sharp.

    Below 1 x is smoother than the truth, above 1 rougher, be it by detail or by noise.

    Args:
        x, truth: (C, H, W) arrays in [-1, 1].

    Returns:
        float, the sum of |DFT|² over the frequencies further from 0 than half of Nyquist,
        √(f_rows² + f_cols²) > 1/4 cycle a pixel; nan for a truth that has none.
    """
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    rows, cols = np.fft.fftfreq(truth.shape[-2])[:, None], np.fft.fftfreq(truth.shape[-1])
    outer = np.hypot(rows, cols) > 0.25
    energy, of_truth = (np.sum(np.abs(np.fft.fft2(v)[..., outer]) ** 2) for v in (x, truth))
    return float(energy / of_truth) if of_truth > 0 else float("nan")


def half_width(samples: int, factor: float = 1.0, share: float = SHARE) -> float:
    """Half of an interval, in standard deviations s of so many samples about their mean.

    If the truth is one more draw from the distribution of the K samples, and that is Gaussian, it
    lies within t s √(1 + 1/K) with probability `share`, Student's t of K - 1 degrees of freedom.
    """
    t = stats.t.ppf((1 + share) / 2, samples - 1)
    return factor * float(t) * math.sqrt(1 + 1 / samples)


def interval(restored: NDArray, samples: NDArray, factor: float = 1.0) -> NDArray[np.float32]:
    """Bounds between which `SHARE` of the pixels' truths lie, see `half_width`.

    Args:
        restored: (C, H, W), the image that they are about; of a scan it goes beyond white.
        samples: (K, C, H, W), K ≥ 2.
        factor: on their standard deviation.

    Returns:
        (2, C, H, W), the lower and the upper one, with the image between them; none is below
        black, -1, unless the image itself is.
    """
    half = half_width(len(samples), factor) * samples.std(axis=0, ddof=1).astype(np.float64)
    lower = np.maximum(restored - half, np.minimum(restored, -1))
    return np.stack([lower, restored + half]).astype(np.float32)


def calibration(
    samples: NDArray, truth: NDArray, floor: float = 0.04, factor: float = 1.0
) -> dict[str, float]:
    """How honest the spread of posterior samples is, where there is signal.

    Args:
        samples: (K, C, H, W), K ≥ 2; truth: (C, H, W); both in [-1, 1].
        floor: pixels whose truth is darker, as a share of the displayed range, are left out: the
            air around the head.
        factor: on s, by which the intervals are wider.

    Returns:
        dict: "in_50", "in_90", the share of pixels whose truth lies within the intervals of these
        shares, see `half_width`, and "rescale", the factor on s at which 90 % would.
    """
    seen = (np.asarray(truth) + 1) / 2 > floor
    count, error = len(samples), np.abs(truth - samples.mean(axis=0))[seen]
    score = error / np.maximum(samples.std(axis=0, ddof=1)[seen], 1e-6)
    return {
        "in_50": float(np.mean(score <= half_width(count, factor, 0.5))),
        "in_90": float(np.mean(score <= half_width(count, factor, 0.9))),
        "rescale": float(np.quantile(score, 0.9)) / half_width(count, share=0.9),
    }
