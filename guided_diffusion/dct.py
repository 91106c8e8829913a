"""The orthonormal DCT-II, in which the power spectrum of images is diagonal."""

import numpy as np
import scipy.fft
import torch


def dct_matrix(size: int) -> torch.Tensor:
    """The orthonormal DCT-II of `size` points as a (frequency, point) float64 matrix."""
    return torch.from_numpy(scipy.fft.dct(np.eye(size), norm="ortho", axis=0))
