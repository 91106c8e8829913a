"""Sensitivities of receive coils: simulated, or estimated from the calibration lines."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.operators.fourier import ifft2c
from guided_diffusion.operators.masks import measured_centre, on_kspace
from util.errors import UserError

CALIBRATION = 32  # samples along the readout, and at most along the phase encoding
LEAST_CALIBRATION = 6  # lines
WIDE = 24  # calibration lines from which kernels of 8 samples tell better what folds over
SHARPNESS = 20  # power of the eigenvalues that weighs their eigenvectors
# Second eigenvalues between which a second image is believed in, by the kernels' size: with few
# calibration lines they stay low even where two points fold onto one another.
FOLDED = {6: (0.5, 0.95), 8: (0.8, 0.95)}
CORNER = 0.1  # share of each axis whose ends are the corners of k-space


def birdcage_maps(coils: int, height: int, width: int, radius: float = 1.5) -> torch.Tensor:
    """Smooth maps of coils on a circle about the field of view, as sigpy and others simulate them.

    Coil c stands at the angle 2πc/C, `radius` half fields of view from the centre; its sensitivity
    falls off with the distance, its phase turns about it.

    Returns:
        (C, H, W) complex64, the root sum of squares 1 everywhere.
    """
    angle = 2 * math.pi / coils * np.arange(coils)[:, None, None]
    x = (2 * np.arange(width) / width - 1) - radius * np.cos(angle)
    y = (2 * np.arange(height) / height - 1)[:, None] - radius * np.sin(angle)
    maps = np.exp(1j * (np.arctan2(x, -y) - angle)) / np.hypot(x, y)
    maps /= np.sqrt(np.sum(np.abs(maps) ** 2, axis=0))
    return torch.from_numpy(maps.astype(np.complex64))


def smooth_phase(height: int, width: int) -> torch.Tensor:
    """A phase as field inhomogeneity leaves it, (H, W) float32 radians, over two turns wide."""
    r, c = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    phase = math.pi * (0.3 + 0.5 * r - 0.4 * c + 0.6 * r * c + 0.5 * (r**2 + c**2))
    return torch.from_numpy(phase.astype(np.float32))


def simulated_maps(coils: int, height: int, width: int) -> torch.Tensor:
    """Maps with the object's phase in them, see `birdcage_maps` and `smooth_phase`."""
    phase = smooth_phase(height, width)
    return birdcage_maps(coils, height, width) * torch.polar(torch.ones_like(phase), phase)


def espirit(
    calibration: torch.Tensor, height: int, width: int, kernel: int = 6, threshold: float = 0.02
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of ESPIRiT at every pixel (Uecker et al. 2014).

    The coils' images at a pixel are, where nothing folds over, a multiple of the eigenvector whose
    eigenvalue is 1. With kernels of so few samples the matrix at a pixel is a short Fourier sum;
    its coefficients are the kernels' correlations, and one transform gives all pixels.

    Args:
        calibration: (C, rows, cols) complex, the centre of k-space, fully sampled.
        kernel: side of the kernels; those of singular values below `threshold` of the largest
            are noise.

    Returns:
        (eigenvalues (H, W, C), ascending; vectors (H, W, C, C), the last axis their number).
    """
    coils = len(calibration)
    sides = [min(kernel, n) for n in calibration.shape[1:]]
    patches = calibration.to(torch.complex128).unfold(1, sides[0], 1).unfold(2, sides[1], 1)
    patches = patches.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)  # (position, C·kernel²)
    squares, vectors = torch.linalg.eigh(patches.mT @ patches.conj())
    signal = squares > threshold**2 * squares[-1]
    kernels = vectors[:, signal].reshape(coils, *sides, -1)

    # Σ_n v_n[c, a] conj(v_n[d, b]), summed over equal a - b, is a coefficient of the matrix (c, d).
    correlation = torch.einsum("cijn,dkln->cdijkl", kernels, kernels.conj())
    spans = [2 * n - 1 for n in sides]
    sums = torch.zeros(coils, coils, *spans, dtype=correlation.dtype)
    for i in range(sides[0]):
        for j in range(sides[1]):
            into = sums[:, :, sides[0] - 1 - i : spans[0] - i, sides[1] - 1 - j : spans[1] - j]
            into += correlation[:, :, :, :, i, j]
    grid = torch.zeros(coils, coils, height, width, dtype=torch.complex128)
    at = [n // 2 - (side - 1) for n, side in zip((height, width), sides, strict=True)]
    grid[:, :, at[0] : at[0] + spans[0], at[1] : at[1] + spans[1]] = sums
    # ifft2c's norm is √(HW); the factor makes 1 the largest possible eigenvalue.
    matrices = ifft2c(grid) * math.sqrt(height * width) / math.prod(sides)
    return torch.linalg.eigh(matrices.permute(2, 3, 0, 1).to(torch.complex64))


def calibration_block(
    kspace: torch.Tensor, mask: NDArray[np.bool_], axis: str
) -> tuple[torch.Tensor, tuple[slice, slice]]:
    """The measured centre of k-space (C, H, W), and where it stands.

    Raises:
        UserError: fewer than `LEAST_CALIBRATION` lines about the centre are measured.
    """
    size = kspace.shape[-2:]
    ends = measured_centre(np.broadcast_to(on_kspace(mask, axis), size))
    least = min(end - first for first, end in ends)
    if least < LEAST_CALIBRATION:
        raise UserError(
            f"{least} lines about the centre of k-space are measured, and coil maps need "
            f"{LEAST_CALIBRATION} to be calibrated"
        )
    half = CALIBRATION // 2
    rows, cols = (
        slice(max(first, n // 2 - half), min(end, n // 2 + half))
        for (first, end), n in zip(ends, size, strict=True)
    )
    return kspace[:, rows, cols], (rows, cols)


def estimate_maps(kspace: torch.Tensor, mask: NDArray[np.bool_], axis: str) -> torch.Tensor:
    """Two sets of maps by ESPIRiT, the first with the object's low-pass phase in it.

    Where the head is larger than the field of view, two of its points share a pixel, and two
    eigenvalues are near 1 (soft SENSE, Uecker et al. 2014). Within the span of their eigenvectors
    the first map follows the low-pass image, which is how the coils see the pixel on average, and
    the second is at a right angle to it, 0 where there is no second eigenvalue.

    Args:
        kspace: (C, H, W) complex; mask, axis: what of it is measured, see `Scanned`.

    Returns:
        (2, C, H, W) complex64, of root sum of squares 1 or, in the second, less.

    Raises:
        UserError: see `calibration_block`.
    """
    block, where = calibration_block(kspace, mask, axis)
    coils, height, width = kspace.shape
    kernel = 8 if min(block.shape[1:]) >= WIDE else 6
    values, vectors = espirit(block, height, width, kernel)
    rows, cols = (torch.hann_window(n + 2, periodic=False)[1:-1] for n in block.shape[1:])
    low = torch.zeros_like(kspace)
    low[:, where[0], where[1]] = block * (rows[:, None] * cols)
    weights = values.clamp(min=0) ** SHARPNESS
    first = torch.einsum(
        "hwck,hwk,hwdk,dhw->chw", vectors, weights + 0j, vectors.conj(), ifft2c(low)
    )
    first = first / first.abs().square().sum(dim=0).sqrt().clamp(min=1e-12)
    if coils == 1:
        return torch.stack([first, torch.zeros_like(first)])
    pair, (low_end, high_end) = vectors[..., -2:], FOLDED[kernel]
    a, b = torch.einsum("hwck,chw->khw", pair.conj(), first)
    norm = torch.hypot(a.abs(), b.abs()).clamp(min=1e-12)
    second = (
        pair[..., 1].permute(2, 0, 1) * a.conj() - pair[..., 0].permute(2, 0, 1) * b.conj()
    ) / norm
    second = second * ((values[..., -2] - low_end) / (high_end - low_end)).clamp(0, 1)
    # Eigenvectors have any phase: it is fixed by the combination of coils that sees most of it.
    _, axes = torch.linalg.eigh(torch.einsum("chw,dhw->cd", second, second.conj()))
    phase = torch.einsum("c,chw->hw", axes[:, -1].conj(), second)
    return torch.stack([first, second * torch.polar(torch.ones_like(phase.real), -phase.angle())])


def noise_of_coils(kspace: torch.Tensor, mask: NDArray[np.bool_], axis: str) -> torch.Tensor:
    """Standard deviation of each coil's noise, of real and imaginary part, (C,).

    By the median of |k|², 2 ln 2 σ², in the outer corners of k-space, where there is hardly any
    signal; of single points in the same share of them, those farthest from the centre. Samples that
    are exactly 0 were filled in.

    Raises:
        UserError: no noise is there.
    """
    if mask.ndim == 2:
        radius = np.hypot(*np.ogrid[[slice(-1, 1, 1j * n) for n in mask.shape]])[mask]
        count = max(1, round((2 * CORNER) ** 2 * len(radius)))
        corners = kspace[:, torch.from_numpy(mask.copy())][:, np.argsort(radius)[-count:].copy()]
    else:
        lines = kspace.mT if axis == "rows" else kspace
        measured = np.flatnonzero(mask)
        count = max(1, round(CORNER * len(measured)))
        lines = lines[:, :, np.r_[measured[:count], measured[-count:]]]
        count = max(1, round(CORNER * lines.shape[1]))
        corners = torch.cat([lines[:, :count], lines[:, -count:]], dim=1).flatten(1)
    squares = corners.abs().square()
    found = [float(c[c > 0].median()) if (c > 0).any() else 0.0 for c in squares]
    sigma = torch.tensor(found).div(2 * math.log(2)).sqrt()
    if not (sigma > 0).all():
        raise UserError("the corners of k-space hold no noise; give measurement.noise.sigma")
    return sigma
