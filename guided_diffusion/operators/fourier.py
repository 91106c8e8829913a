"""The centred orthonormal DFT of accelerated MRI: fastMRI's, deepinv's and sigpy's convention."""

import math

import torch


def fft1c(x, dim):
    """Centred orthonormal DFT along one axis."""
    x = torch.fft.fft(torch.fft.ifftshift(x, dim=dim), dim=dim, norm="ortho")
    return torch.fft.fftshift(x, dim=dim)


def ifft1c(x, dim):
    """The inverse of `fft1c`."""
    x = torch.fft.ifft(torch.fft.ifftshift(x, dim=dim), dim=dim, norm="ortho")
    return torch.fft.fftshift(x, dim=dim)


def fft2c(x):
    """Centred orthonormal DFT of the last two axes: image → k-space."""
    return fft1c(fft1c(x, -1), -2)


def ifft2c(x):
    """The inverse of `fft2c`: k-space → image."""
    return ifft1c(ifft1c(x, -1), -2)


def low_pass(z: torch.Tensor, width: float) -> torch.Tensor:
    """An image (..., H, W), real or complex, under a periodic Gaussian of std `width` pixels."""
    rows, cols = (torch.fft.fftfreq(n, device=z.device) for n in z.shape[-2:])
    window = torch.exp(-2 * (math.pi * width) ** 2 * (rows[:, None] ** 2 + cols**2))
    smooth = torch.fft.ifft2(torch.fft.fft2(z) * window.to(z.real))
    return smooth if z.is_complex() else smooth.real
