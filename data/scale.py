"""The grey scale of a scan: which values are no data, which is shown black and which white."""

import numpy as np
from numpy.typing import NDArray

from util.errors import UserError

PERCENTILES = (0.1, 99.9)  # of the values: what is shown from black to white
LEAST_PADDING = 0.001  # share of the values; fewer are outliers, which the percentiles cut off
FAR_OFF = 0.2  # of the other values' range: what lies a smaller gap away may be tissue
BLOCK = 4  # pixels, the side of blocks whose means tell noise from brightness
LEAST_BLOCKS = 256  # of 64×64 pixels; fewer tell nothing
SURE = 4.0  # standard deviations that the noise of a block's mean does not reach
RINGING = 0.05  # of a range, to which an image may leave it without noise
TOO_MANY = 0.005  # share of the blocks, above which the range is not the image's
QUARTILE = 0.3186  # of |n|, n ~ N(0, 1); of details few are anatomy below it
MEDIAN = 0.6745  # likewise
NEGATIVE = 0.01  # of white: how far a magnitude image may go below 0, by interpolation


def to_unit(values: NDArray, black: float, white: float) -> NDArray[np.float32]:
    """Map black to -1 and white to 1, as float32; what lies outside is clipped."""
    return np.clip(2 * (values - black) / (white - black) - 1, -1, 1).astype(np.float32)


def from_unit(x: NDArray, black: float, white: float) -> NDArray[np.float32]:
    """The inverse of `to_unit`, as float32."""
    return (black + (x + 1) * ((white - black) / 2)).astype(np.float32)


def beyond(values: NDArray, black: float, white: float) -> NDArray[np.float32]:
    """What of the values `to_unit` clips, float32 in their units: 0 between black and white."""
    return (values - np.clip(values, min(black, white), max(black, white))).astype(np.float32)


def shares_beyond(image: NDArray, low: float, high: float) -> tuple[float, float]:
    """How much of a noisy image lies further beyond a range than noise takes it, see `TOO_MANY`.

    The mean of a block of pixels has a fraction of their noise. White noise is told by the Haar
    detail of the pixels where it counts, smooth noise by that of the blocks' means among each
    other, of which anatomy is a part.

    Args:
        image: (C, H, W), NaN where it is no data.
        low, high: of the values without noise.

    Returns:
        Share of the blocks beyond the range, whatever the noise is like; and if it is white. 0 of
        an image of few blocks.
    """
    channels, height, width = image.shape
    rows, cols = height // BLOCK, width // BLOCK
    blocks = image[:, : rows * BLOCK, : cols * BLOCK].astype(np.float64)
    means = blocks.reshape(channels, rows, BLOCK, cols, BLOCK).mean(axis=(2, 4))
    outside = np.maximum(low - means, means - high)
    if np.isfinite(outside).sum() < LEAST_BLOCKS or not (outside > 0).any():
        return 0.0, 0.0
    half = BLOCK // 2
    squares = (_details(blocks)[:, ::2, ::2] ** 2).reshape(channels, rows, half, cols, half)
    white = float(np.sqrt(squares.mean(axis=(2, 4))[outside > 0].mean())) / BLOCK
    among = np.abs(_details(means))
    among = among[among > 0]  # air may be painted black
    smooth = float(np.quantile(among, 0.25)) / QUARTILE if among.size else 0.0
    outside = outside[np.isfinite(outside)]
    least = RINGING * (high - low)
    shares = [np.mean(outside > max(SURE * s, least)) for s in (max(white, smooth), white)]
    return float(shares[0]), float(shares[1])


def white_noise(image: NDArray) -> float:
    """Standard deviation of an image's white noise, (C, H, W), by its Haar details' median."""
    return float(np.nanmedian(np.abs(_details(image)))) / MEDIAN


def _details(image):
    """Diagonal Haar detail of each 2×2 pixels (C, H, W), of the standard deviation of its noise."""
    across = image[:, :, 1:] - image[:, :, :-1]
    return (across[:, 1:] - across[:, :-1]) / 2


def find_scale(
    values: NDArray, inverted: bool, label: str, magnitude: bool = False
) -> tuple[float, float, float]:
    """The values to show as -1 (black) and as 1 (white).

    Black is 0 where no value is negative, as in a magnitude image, else the 0.1th percentile;
    white is the 99.9th. An inverted volume (MONOCHROME1) is black at the 99.9th percentile and
    white at the 0.1th.

    Args:
        values: of any shape, without those of the padding.
        magnitude: black must be magnitude 0, as for the Rice model; `inverted` then does not
            count.

    Returns:
        (black, white, share of values outside them).

    Raises:
        UserError: values that are not finite, all the same, or negative where they may not be.
    """
    if not values.size:
        raise UserError(f"{label}: every value is padding, so there is no image in it")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # a NaN among them is the minimum
        raise UserError(f"{label}: holds values that are not finite")
    if low == high:
        raise UserError(f"{label}: every value is {low:g}, so there is no image in it")
    bottom, top = (float(p) for p in np.percentile(values, PERCENTILES))
    if magnitude:
        if bottom < -NEGATIVE * max(top, 0):
            raise UserError(
                f"{label}: holds negative values (down to {low:g}), so it is no magnitude image, "
                "which measurement.noise.name: rician needs; take gaussian"
            )
        inverted, low = False, max(low, 0.0)
    if low >= 0 and not inverted:
        bottom = 0.0
    if bottom >= top:  # nearly all values are one
        bottom, top = low, high
    clipped = float(np.mean((values < bottom) | (values > top)))
    return (top, bottom, clipped) if inverted else (bottom, top, clipped)


def find_padding(values: NDArray) -> tuple[NDArray[np.bool_] | None, str]:
    """Recognise the constant that a file holds where there is no data, though it does not say so.

    That is NaN, or a negative whole number far below all others (-32768, -1024, -3.4e38), or one
    far above all others, if more than LEAST_PADDING of the values have it. NaN must also reach the
    edge of the image, and a high value fill most of its corners: elsewhere they are damage, or
    saturation.

    Args:
        values: (..., H, W) in the file's units.

    Returns:
        (where, like `values`, and the constant, as text); (None, "") where there is none.
    """
    unknown = ~np.isfinite(values)
    if unknown.any():
        if unknown.all() or unknown.mean() < LEAST_PADDING or not _reaches_edge(unknown):
            return None, ""
        return unknown, "NaN" if np.isnan(values[unknown]).all() else "not finite"
    for extreme in (np.min, np.max):
        value = extreme(values)
        whole = float(value).is_integer()  # others may be what 0 became in a normalisation
        if not whole or (extreme is np.min and value >= 0):
            continue
        where = values == value
        if where.mean() < LEAST_PADDING or where.all():
            continue
        rest = values[~where].astype(np.float64)
        gap = abs(float(extreme(rest)) - float(value))
        low, high = np.percentile(rest, PERCENTILES)
        if not high > low or gap < FAR_OFF * (high - low):
            continue
        if extreme is np.min or (gap > high - low and _fills_corners(where)):
            return where, f"{value:g}"
    return None, ""


def _reaches_edge(where):
    return bool(where[..., [0, -1], :].any() or where[..., [0, -1]].any())


def _fills_corners(where):
    return where[..., [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.5
