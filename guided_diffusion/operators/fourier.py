"""The centred orthonormal DFT of accelerated MRI: fastMRI's, deepinv's and sigpy's convention."""

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
