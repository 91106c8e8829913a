"""Image quality against a known truth."""

import numpy as np
from skimage.metrics import (
    normalized_root_mse,
    peak_signal_noise_ratio,
    structural_similarity,
)


def image_metrics(x, truth):
    """PSNR (dB), SSIM and NMSE of one image.

    Args:
        x, truth: (C, H, W) arrays in [-1, 1]; values outside are clipped first.

    Returns:
        dict; the images are compared as floats in [0, 1], data range 1. NMSE is
        ‖x - truth‖² / ‖truth‖² there. SSIM is Wang et al. 2004's, averaged over channels.
    """
    x, truth = (np.clip((np.asarray(v, np.float64) + 1) / 2, 0, 1) for v in (x, truth))
    same = np.array_equal(x, truth)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return {
        "psnr": float("inf") if same else float(peak_signal_noise_ratio(truth, x, data_range=1)),
        "ssim": float(structural_similarity(truth, x, data_range=1, channel_axis=0, **window)),
        "nmse": float(normalized_root_mse(truth, x) ** 2) if truth.any() else float("nan"),
    }


def high_frequency_ratio(x, truth):
    """Energy of x in the outer half of the spectrum, divided by the truth's: 1 is as sharp.

    Below 1 x is smoother than the truth, above 1 rougher, be it by detail or by noise.

    Args:
        x, truth: (C, H, W) arrays in [-1, 1].

    Returns:
        float, the sum of |DFT|² over the frequencies further from 0 than half of Nyquist,
        √(f_rows² + f_cols²) > 1/4 cycle a pixel; nan for a truth that has none.
    """
    x, truth = (np.asarray(v, np.float64) for v in (x, truth))
    rows, cols = np.fft.fftfreq(truth.shape[-2])[:, None], np.fft.fftfreq(truth.shape[-1])
    outer = np.hypot(rows, cols) > 0.25
    energy, of_truth = (np.sum(np.abs(np.fft.fft2(v)[..., outer]) ** 2) for v in (x, truth))
    return float(energy / of_truth) if of_truth > 0 else float("nan")
