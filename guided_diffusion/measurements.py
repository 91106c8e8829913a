"""Degradation operators y = A x + n, and the noise n.

Every operator is separable, A = A_channel ⊗ A_rows ⊗ A_cols, so its singular value
decomposition is that of three small matrices (docs: README, "Method").
"""

import math
from dataclasses import dataclass

import torch

from util.errors import UserError

SINGULAR_VALUE_THRESHOLD = 3e-2  # the published value
OPERATORS = ("denoise", "super_resolution", "deblur", "color")
SR_TYPES = ("bicubic", "standard")
SR_FACTORS = (2, 4, 8)
BLUR_TYPES = ("gaussian", "uniform", "aniso")


@dataclass
class Factor:
    """The thin SVD of one axis' matrix: U (m, k), s (k,), V (n, k); U = V = None is identity."""

    U: torch.Tensor | None
    s: torch.Tensor
    V: torch.Tensor | None


def identity_factor(size):
    return Factor(None, torch.ones(size, dtype=torch.float64), None)


def matrix_factor(matrix, threshold):
    """SVD of a float64 matrix; singular values below `threshold` are set to zero."""
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Factor(U, torch.where(s < threshold, 0.0, s), Vh.mT.contiguous())


def _along(x, axis, matrix):
    """Multiply every vector of x along `axis` (1 channels, 2 rows, 3 columns) by `matrix`."""
    if matrix is None:
        return x
    if axis == 3:
        return x @ matrix.mT
    if axis == 2:
        return matrix @ x
    return torch.einsum("dc,nchw->ndhw", matrix, x)


class SeparableOperator:
    """A = A_channel ⊗ A_rows ⊗ A_cols on images (N, C, H, W), through its SVD A = U Σ Vᵀ.

    Attributes:
        in_shape, out_shape: (C, H, W) of x and of y.
        singular_values: (c, i, j), the outer product of the three factors' singular values.
            Spectra, the tensors that `Ut` and `Vt` return, are (N, c, i, j).
    """

    def __init__(self, channel, rows, cols, device="cpu", dtype=torch.float32):
        self.factors = [
            Factor(*(None if p is None else p.to(device, dtype) for p in (f.U, f.s, f.V)))
            for f in (channel, rows, cols)
        ]
        s_c, s_h, s_w = (f.s for f in self.factors)
        self.singular_values = s_c[:, None, None] * s_h[:, None] * s_w
        self.in_shape = tuple(len(f.s) if f.V is None else f.V.shape[0] for f in self.factors)
        self.out_shape = tuple(len(f.s) if f.U is None else f.U.shape[0] for f in self.factors)

    def _apply(self, x, matrices):
        for axis, matrix in enumerate(matrices, start=1):
            x = _along(x, axis, matrix)
        return x

    def V(self, spectrum):
        """Spectrum → image, (N, c, i, j) → (N, C, H, W); the columns of V are orthonormal."""
        return self._apply(spectrum, (f.V for f in self.factors))

    def Vt(self, x):
        """Image → spectrum, the transpose of `V`."""
        return self._apply(x, (None if f.V is None else f.V.mT for f in self.factors))

    def U(self, spectrum):
        """Spectrum → measurement."""
        return self._apply(spectrum, (f.U for f in self.factors))

    def Ut(self, y):
        """Measurement → spectrum, the transpose of `U`."""
        return self._apply(y, (None if f.U is None else f.U.mT for f in self.factors))

    def forward(self, x):
        """A x, (N, *in_shape) → (N, *out_shape)."""
        return self.U(self.singular_values * self.Vt(x))

    def transpose(self, y):
        """Aᵀ y, (N, *out_shape) → (N, *in_shape)."""
        return self.V(self.singular_values * self.Ut(y))


def bicubic_kernel(factor):
    """The 4·factor taps of the bicubic (a = -0.5) downsampling kernel, normalised to sum 1."""
    a = -0.5
    taps = []
    for i in range(4 * factor):
        x = abs((i - 2 * factor + 0.5) / factor)
        if x <= 1:
            taps.append((a + 2) * x**3 - (a + 3) * x**2 + 1)
        else:
            taps.append(a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a)
    taps = torch.tensor(taps, dtype=torch.float64)
    return taps / taps.sum()


def bicubic_matrix(size, factor):
    """(⌈size/factor⌉, size): the kernel at stride `factor`, edges reflected symmetrically."""
    kernel = bicubic_kernel(factor)
    rows = math.ceil(size / factor)
    matrix = torch.zeros(rows, size, dtype=torch.float64)
    for row in range(rows):
        centre = factor // 2 + row * factor
        for tap, weight in enumerate(kernel):
            column = (centre - 2 * factor + tap) % (2 * size)
            matrix[row, min(column, 2 * size - 1 - column)] += weight
    return matrix


def average_matrix(size, factor):
    """(⌈size/factor⌉, size): means over blocks of `factor`; the last may hold fewer pixels."""
    blocks = torch.eye(math.ceil(size / factor), dtype=torch.float64)
    blocks = blocks.repeat_interleave(factor, dim=1)[:, :size]
    return blocks / blocks.sum(dim=1, keepdim=True)


def blur_matrix(size, kernel):
    """(size, size) band matrix that correlates with a 1-D kernel, zero outside the image."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for tap, weight in enumerate(kernel):
        offset = tap - len(kernel) // 2
        if abs(offset) < size:
            matrix.diagonal(offset).fill_(weight)
    return matrix


def gaussian_kernel(kernel_size, intensity):
    """(kernel_size+1)//2 taps of a Gaussian of standard deviation `intensity`, summing to 1.

    The halving is the published program's: its "61" spans 31 pixels.
    """
    taps = (kernel_size + 1) // 2
    offsets = torch.arange(taps, dtype=torch.float64) - taps // 2
    kernel = torch.exp(-0.5 * (offsets / intensity) ** 2)
    return kernel / kernel.sum()


def get_operator(name, in_shape, device="cpu", dtype=torch.float32, **params):
    """Build a degradation operator.

    Args:
        name: one of `OPERATORS`.
        in_shape: (C, H, W), or (N, C, H, W) as published task files have it.
        params: super_resolution: `scale_factor` (2, 4, 8), `type` (bicubic, standard);
            deblur: `type` (gaussian, uniform, aniso), `kernel_size`, `intensity` (standard
            deviation in pixels; for aniso a pair: along rows, along columns);
            all: `singular_value_threshold`, below which a factor's singular values are zero.

    Raises:
        UserError: an unknown name, type or parameter, or one that does not fit the image.
    """
    channels, height, width = tuple(in_shape)[-3:]
    threshold = params.pop("singular_value_threshold", SINGULAR_VALUE_THRESHOLD)
    where = "measurement.operator"
    if name == "denoise":
        factors = [identity_factor(n) for n in (channels, height, width)]
    elif name == "super_resolution":
        factor = params.pop("scale_factor", 4)
        kind = params.pop("type", "bicubic")
        if kind not in SR_TYPES:
            raise UserError(f"{where}.type: expected one of {', '.join(SR_TYPES)}, found {kind!r}")
        if factor not in SR_FACTORS:
            raise UserError(f"{where}.scale_factor: expected 2, 4 or 8, found {factor!r}")
        matrix = bicubic_matrix if kind == "bicubic" else average_matrix
        factors = [
            identity_factor(channels),
            matrix_factor(matrix(height, factor), threshold),
            matrix_factor(matrix(width, factor), threshold),
        ]
    elif name == "deblur":
        rows, cols = _blur_kernels(where, params)
        factors = [
            identity_factor(channels),
            matrix_factor(blur_matrix(height, rows), threshold),
            matrix_factor(blur_matrix(width, cols), threshold),
        ]
    elif name == "color":
        if channels != 3:
            raise UserError(f"{where}.name: color needs images and a prior of 3 channels")
        luma = torch.tensor([[0.3333, 0.3334, 0.3333]], dtype=torch.float64)
        factors = [
            matrix_factor(luma, threshold),
            identity_factor(height),
            identity_factor(width),
        ]
    else:
        raise UserError(f"{where}.name: expected one of {', '.join(OPERATORS)}, found {name!r}")
    if params:
        raise UserError(f"{where}: {name} does not know {', '.join(params)}")
    return SeparableOperator(*factors, device=device, dtype=dtype)


def restored_size(size, name, scale_factor=4, **params):
    """(H, W) of the image whose measurement has the given (H, W); see `get_operator`."""
    factor = scale_factor if name == "super_resolution" else 1
    return size[0] * factor, size[1] * factor


def _blur_kernels(where, params):
    """The kernels along the rows' axis and along the columns' axis."""
    kind = params.pop("type", "gaussian")
    size = params.pop("kernel_size", 9 if kind == "uniform" else 61)
    intensity = params.pop("intensity", 3.0)
    if kind not in BLUR_TYPES:
        raise UserError(f"{where}.type: expected one of {', '.join(BLUR_TYPES)}, found {kind!r}")
    if size < 1:
        raise UserError(f"{where}.kernel_size: expected at least 1, found {size}")
    if kind == "uniform":  # published files give it an intensity, which it has no use for
        kernel = torch.full((size,), 1 / size, dtype=torch.float64)
        return kernel, kernel
    pair = intensity if kind == "aniso" else (intensity, intensity)
    try:
        vertical, horizontal = (float(v) for v in pair)
        valid = vertical > 0 and horizontal > 0
    except (TypeError, ValueError):
        valid = False
    if not valid:
        expected = "two positive numbers" if kind == "aniso" else "a positive number"
        raise UserError(f"{where}.intensity: {kind} expects {expected}, found {intensity!r}")
    return gaussian_kernel(size, vertical), gaussian_kernel(size, horizontal)


class GaussianNoise:
    """n ~ N(0, σ² I)."""

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, y, random=torch):
        return y + self.sigma * random.randn_like(y)


class PoissonNoise:
    """Photon noise, whose variance follows the signal and is σ² on average over each image.

    With u = (y+1)/2 the counts are Poisson(u·peak); the noise of y has variance 4u/peak, and
    peak = 4·mean(u)/σ².
    """

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, y, random=torch):
        if self.sigma == 0:
            return y
        u = ((y + 1) / 2).clamp(min=0)
        peak = 4 * u.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6) / self.sigma**2
        # What lies below black (a bicubic undershoot) emits no photons and keeps its value.
        below = (y + 1).clamp(max=0)
        return 2 * random.poisson(u * peak) / peak - 1 + below


class RicianNoise:
    """The noise of a magnitude image, M = |m + n₁ + i n₂| with n₁, n₂ ~ N(0, σ² I).

    Intensities m and M are counted from black: m = y + 1, so that σ is, where the signal is
    strong, that of Gaussian noise.
    """

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, y, random=torch):
        real = y + 1 + self.sigma * random.randn_like(y)
        return torch.hypot(real, self.sigma * random.randn_like(y)) - 1


class CleanNoise:
    """No noise: y = A x, and σ = 0 for the sampler."""

    def __init__(self, sigma=0.0):
        self.sigma = 0.0

    def __call__(self, y, random=torch):
        return y


NOISES = {
    "gaussian": GaussianNoise,
    "poisson": PoissonNoise,
    "rician": RicianNoise,
    "clean": CleanNoise,
}


def get_noise(name, sigma=0.0):
    """Build a noise model: a callable (y, random) → noisy y, with its `sigma`.

    `random` draws `randn_like` and `poisson`: a `util.random.ImageRandom`, or by default torch's
    global generator. σ is in units of the [-1, 1] image, or "auto" where it is to be estimated
    from measured images and nothing is simulated.

    Raises:
        UserError: an unknown name, or a sigma that is no standard deviation.
    """
    if name not in NOISES:
        raise UserError(
            f"measurement.noise.name: expected one of {', '.join(NOISES)}, found {name!r}"
        )
    if sigma != "auto" and not (math.isfinite(sigma) and sigma >= 0):
        raise UserError(f"measurement.noise.sigma: expected 0 or more, found {sigma}")
    return NOISES[name](sigma)
