"""How noisy a measured image is: one σ for all of it, or a map of σ.

A high pass leaves the noise, whose standard deviation is taken among pixels of like brightness, for
where the file's range ends it is cut off, and in a magnitude image it is Rice distributed. There,
their mean over their standard deviation tells how far above black (or below white) they are, hence
what is missing: for Rice the fixed point of Koay & Basser 2006, for the cut-off normal distribution
the same with its moments. Edges and texture make some of the estimates too large, so a low quantile
of them counts.
"""

import numpy as np
from scipy.ndimage import convolve, gaussian_filter, maximum_filter, minimum_filter
from scipy.special import i0e, i1e, ndtr

from util.errors import UserError

Moments = tuple[np.ndarray, np.ndarray]

# Immerkær 1996: takes away what is locally linear, and leaves white noise its variance.
HIGH_PASS = np.outer([1, -2, 1], [1, -2, 1])[None] / 6
ERROR = 1.4  # relative, times √pixels: of the standard deviation of what it leaves of white noise
LOCAL_MEAN = (1, 5, 5)
AROUND = np.pad(np.zeros((1, 3, 3)), ((0, 0), (1, 1), (1, 1)), constant_values=1 / 16)
GREY_LEVELS = 12  # groups of pixels of like brightness
QUANTILE = 1 / 3  # of the groups' estimates
LEAST_PIXELS = 10 * GREY_LEVELS
LEAST_SIGMA = 1e-4  # below the rounding of 8 and 12 bits
SIGNAL = np.linspace(-2, 8, 501)  # of the tables, in units of σ above black

REACH = 12.0  # mm, the standard deviation of the window in which σ is one number
CELLS = 3  # into which it is divided
LEAST_IN_WINDOW = 100  # pixels of a brightness, for an estimate 10 % off
SOME = 16  # slices that tell how bright a volume is, and how noisy on the whole


def clipped_moments(signal: np.ndarray) -> Moments:
    """Mean and standard deviation of max(0, signal + n), n ~ N(0, 1)."""
    density, below = np.exp(-(signal**2) / 2) / np.sqrt(2 * np.pi), ndtr(signal)
    mean = signal * below + density
    return mean, np.sqrt((signal**2 + 1) * below + signal * density - mean**2)


def rician_moments(signal: np.ndarray) -> Moments:
    """Mean and standard deviation of |signal + n₁ + i n₂|, n₁, n₂ ~ N(0, 1); signal >= 0."""
    x = signal**2 / 2
    mean = np.sqrt(np.pi / 2) * ((1 + x) * i0e(x / 2) + x * i1e(x / 2))
    return mean, np.sqrt(np.maximum(signal**2 + 2 - mean**2, 0))


def estimate_sigma(y: np.ndarray, rician: bool = False, padding: np.ndarray | None = None) -> float:
    """Standard deviation of an image's white noise, in units of the [-1, 1] image.

    Args:
        y: (C, H, W) in [-1, 1]; beyond it only where it was not cut off.
        rician: whether y is a magnitude image.
        padding: (H, W) or (C, H, W), True where y is no data; these pixels and those beside them
            say nothing.

    Raises:
        UserError: too few pixels, a constant image, or one without noise.
    """
    varies, noise, around = high_passed(y, padding)
    if varies.sum() < LEAST_PIXELS:
        raise UserError(
            f"measurement.noise.sigma: an estimate needs at least {LEAST_PIXELS} pixels whose "
            f"neighbours differ, found {varies.sum()}; give the noise as a number"
        )
    noise, level = noise[varies], y[varies]
    groups = np.array_split(np.argsort(around[varies], kind="stable"), GREY_LEVELS)
    measured = np.array([np.sqrt(np.mean(noise[group] ** 2)) for group in groups])
    levels = np.array([np.mean(level[group]) for group in groups])
    counts = np.array([len(group) for group in groups])
    found = _complete(measured, levels, counts, _is_cut_off(y), rician)
    sigma = float(np.quantile(found, QUANTILE))
    if sigma < LEAST_SIGMA:
        raise UserError(
            "measurement.noise.sigma: no noise is found; give it as a number, or name: clean"
        )
    return sigma


def estimate_sigma_map(
    y: np.ndarray,
    voxel: tuple[float, float, float],
    rician: bool = False,
    padding: np.ndarray | None = None,
) -> np.ndarray:
    """The same where it varies slowly, as parallel imaging makes it: σ of each voxel.

    About each voxel it is estimated as `estimate_sigma` does in the whole, in a Gaussian window,
    and the logarithm of the estimates is smoothed with the same window, which also carries it to
    where nothing could be estimated.

    Args:
        y: (slices, H, W), see `estimate_sigma`; or (C, H, W) with contrasts infinitely far apart.
        voxel: its sides in mm.

    Returns:
        (slices, H, W) float32; one number everywhere where the windows hold too few pixels.

    Raises:
        UserError: see `estimate_sigma`.
    """
    some = _some(y)
    everywhere, cut_off = estimate_sigma(y[some], rician, _of(padding, some)), _is_cut_off(y)
    cell = [max(1, int(REACH / CELLS / side)) for side in voxel]
    window = [REACH / side / n for side, n in zip(voxel, cell, strict=True)]
    counts, squares, levels = _in_cells(y, padding, cell)
    shape = counts.shape[1:]
    # Of independent pixels a Gaussian's mean is as sure as that of √(4π) std pixels on each axis.
    pixels = np.prod(
        [
            min(max(np.sqrt(4 * np.pi) * std, 1), cells) * n
            for std, cells, n in zip(window, shape, cell, strict=True)
        ]
    )

    def about(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, window, mode="constant", truncate=3.0)

    whole = about(np.ones(shape)) * np.prod(cell)
    found, weights = [], []
    for count, square, level in zip(counts, squares, levels, strict=True):
        share = about(count)
        known = share * pixels >= LEAST_IN_WINDOW * whole
        divisor = np.where(known, share, 1)
        measured = np.sqrt(about(square) / divisor)
        pixels_of = np.where(known, share * pixels / whole, 1)
        found.append(_complete(measured, about(level) / divisor, pixels_of, cut_off, rician))
        weights.append(np.where(known, share, 0))
    sigma, known = _weighted_quantile(np.stack(found), np.stack(weights))
    if not known.any():
        return np.full(y.shape, everywhere, np.float32)
    logarithm = about(np.where(known, np.log(np.maximum(sigma, LEAST_SIGMA)), 0))
    logarithm = logarithm - np.log(everywhere) * about(known.astype(float))
    smooth = logarithm / np.maximum(about(known.astype(float)), 1e-6)
    for axis, n in enumerate(cell):
        smooth = _finer(smooth, n, y.shape[axis], axis)
    return (everywhere * np.exp(smooth)).astype(np.float32)


def high_passed(y, padding):
    """(where y says anything of its noise, its noise, how bright it is about), each (C, H, W).

    What is about a pixel shares none with its high pass: where noise is cut off or Rice distributed
    a pixel that it made dark has little of it, and groups of these would make σ too low.
    """
    y = y.astype(np.float64)
    size = (1, 3, 3)
    varies = maximum_filter(y, size) > minimum_filter(y, size)  # air may be painted black
    varies[:, [0, -1]] = varies[:, :, [0, -1]] = False
    if padding is not None:
        varies &= ~maximum_filter(np.broadcast_to(padding, y.shape), LOCAL_MEAN)
    return varies, convolve(y, HIGH_PASS), convolve(y, AROUND)


def _is_cut_off(y):
    return y.min() >= -1 and y.max() <= 1


def _complete(measured, level, pixels, cut_off, rician):
    """σ of noise that was measured where the mean is `level`: with what black or white cut off.

    A faint signal hardly changes the ratio of Rice noise's mean and standard deviation, and what
    so many `pixels` cannot tell from air's is taken for it, or chance would make σ too low.
    """
    if not (rician or cut_off):
        return measured
    signal = SIGNAL[SIGNAL >= 0] if rician else SIGNAL
    mean, std = (rician_moments if rician else clipped_moments)(signal)
    above = level + 1
    clear = above if rician else np.minimum(above, 2 - above)
    ratio = clear / np.maximum(measured, 1e-9)
    if rician:
        ratio = np.where(ratio < mean[0] / std[0] * (1 + ERROR / np.sqrt(pixels)), 0, ratio)
    return measured / np.interp(ratio, mean / std, std)


def _in_cells(y, padding, cell):
    """Sums over cells of pixels of each of `GREY_LEVELS`: number, squared noise, brightness.

    Returns:
        three arrays (GREY_LEVELS, cells along each axis).
    """
    some = _some(y)
    varies, _, around = high_passed(y[some], _of(padding, some))
    edges = np.quantile(around[varies], np.linspace(0, 1, GREY_LEVELS + 1)[1:-1])
    depth, rows, cols = (-(-size // n) for size, n in zip(y.shape, cell, strict=True))
    sums = np.zeros((3, GREY_LEVELS, depth, rows * cols))
    place = np.arange(y.shape[1])[:, None] // cell[1] * cols + np.arange(y.shape[2]) // cell[2]
    for i in range(len(y)):  # one by one, for a volume's would fill the memory
        this = slice(i, i + 1)
        varies, noise, around = (part[0] for part in high_passed(y[this], _of(padding, this)))
        where = np.digitize(around[varies], edges) * rows * cols + place[varies]
        for total, values in zip(sums, (None, noise[varies] ** 2, y[i][varies]), strict=True):
            found = np.bincount(where, values, GREY_LEVELS * rows * cols)
            total[:, i // cell[0]] += found.reshape(GREY_LEVELS, -1)
    return sums.reshape(3, GREY_LEVELS, depth, rows, cols)


def _some(y):
    return slice(None, None, -(-len(y) // SOME))


def _of(padding, slices):
    return padding[slices] if padding is not None and padding.ndim == 3 else padding


def _weighted_quantile(values, weights):
    """`QUANTILE` along the first axis, and where there is any weight."""
    order = np.argsort(values, axis=0)
    values = np.take_along_axis(values, order, axis=0)
    share = np.take_along_axis(weights, order, axis=0).cumsum(axis=0)
    least = (share >= QUANTILE * share[-1]).argmax(axis=0)
    return np.take_along_axis(values, least[None], axis=0)[0], share[-1] > 0


def _finer(values, n, size, axis):
    """From the centres of cells of n pixels to each of `size` pixels, linearly, along an axis."""
    last = values.shape[axis] - 1
    at = np.clip((np.arange(size) + 0.5) / n - 0.5, 0, last)
    low = np.minimum(at.astype(int), max(last - 1, 0))
    weight = (at - low).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    first = np.take(values, low, axis)
    return first + weight * (np.take(values, np.minimum(low + 1, last), axis) - first)
