"""Scans of raw k-space to test with."""

import h5py
import numpy as np
import torch

from guided_diffusion.operators.coils import birdcage_maps
from guided_diffusion.operators.fourier import fft2c

HEADER = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
<encodedSpace><matrixSize><x>96</x><y>40</y><z>1</z></matrixSize>
<fieldOfView_mm><x>384</x><y>200</y><z>5</z></fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>48</x><y>36</y><z>1</z></matrixSize>
<fieldOfView_mm><x>192</x><y>180</y><z>5</z></fieldOfView_mm></reconSpace>
<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>39</maximum>
<center>20</center></kspace_encoding_step_1></encodingLimits>
</encoding></ismrmrdHeader>"""


def head(height=48, width=40, coils=4, sigma=0.002, slices=1):
    """(k-space (slices, coils, H, W) complex64, magnitudes (slices, H, W)) of an ellipse."""
    r, c = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    inside = (r / 0.8) ** 2 + (c / 0.7) ** 2 < 1
    u = np.stack([inside * (0.6 + 0.3 * np.cos(5 * r + i) * np.cos(4 * c)) for i in range(slices)])
    maps = birdcage_maps(coils, height, width).numpy() if coils > 1 else np.ones((1, height, width))
    object_ = u * np.exp(1j * (0.4 * r - 0.3 * c))
    k = fft2c(torch.from_numpy(maps * object_[:, None])).numpy()
    random = np.random.default_rng(0)
    noise = random.standard_normal(k.shape) + 1j * random.standard_normal(k.shape)
    return (k + sigma * noise).astype(np.complex64), u


def oversampled(k, rows):
    """The same object in a field of view of `rows` rows."""
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(k, axes=(-2, -1))), axes=(-2, -1))
    wide = np.zeros((*k.shape[:-2], rows, k.shape[-1]), complex)
    top = (rows - k.shape[-2]) // 2
    wide[..., top : top + k.shape[-2], :] = images
    wide = np.fft.fft2(np.fft.ifftshift(wide, axes=(-2, -1)))
    return (np.fft.fftshift(wide, axes=(-2, -1)) * np.sqrt(k.shape[-2] / rows)).astype(np.complex64)


def write_fastmri(path, k, header=None, mask=None, reference=None):
    with h5py.File(path, "w") as file:
        file["kspace"] = k
        if header:
            file["ismrmrd_header"] = header.encode()
        if mask is not None:
            file["mask"] = mask
        if reference is not None:
            file["reconstruction_rss"] = reference


def lines(width=40, every=3, centre=10):
    mask = np.arange(width) % every == 0
    mask[width // 2 - centre // 2 : width // 2 + centre // 2] = True
    return mask


def ifft(k):
    axes = (-2, -1)
    image = np.fft.ifft2(np.fft.ifftshift(k, axes=axes), norm="ortho")
    return np.fft.fftshift(image, axes=axes)
