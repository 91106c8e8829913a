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
