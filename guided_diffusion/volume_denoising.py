"""Denoising of a volume beyond what the network sees of it plane by plane.

The mean of what it makes of three planes is the pilot of an empirical Wiener filter of 3-D blocks
(the second stage of BM3D, Dabov et al. 2007, without grouping), which gives back to the volume the
detail that all planes lost and takes out noise that is none in three dimensions. Of that the
network takes out what still looks unlike an image, and the mean of both is the result.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

from guided_diffusion.noise import Noise
from guided_diffusion.operators.base import Sigma

BLOCKS = ((8, 3), (12, 4))  # (side, distance) of blocks in voxels; the mean of their filters counts
LEFT = 0.3  # of σ: the noise that the network is told is left after the filter

Volume = NDArray[np.float32]


def block_wiener(y: Volume, pilot: Volume, sigma: float, side: int, distance: int) -> Volume:
    """Wiener-filter y in overlapping blocks, by the pilot's power at each of their frequencies.

    In the orthonormal DCT of a block a coefficient of the pilot P takes P²/(P² + σ²) of y's; the
    block's mean is y's own. Where blocks overlap those count more that let less noise through.

    Args:
        y: (D, H, W) with white noise of standard deviation sigma > 0; pilot: like y, denoised.
        side, distance: of the blocks, and from one to the next.
    """
    sides = [min(side, n) for n in y.shape]
    starts = [
        sorted({*range(0, n - b + 1, distance), n - b}) for n, b in zip(y.shape, sides, strict=True)
    ]
    window = np.ones(sides, np.float32)
    for axis, b in enumerate(sides):
        edge = np.sin(np.pi * (np.arange(b) + 0.5) / b).astype(np.float32)
        window *= edge.reshape([-1 if i == axis else 1 for i in range(3)])
    total, weights = np.zeros_like(y), np.zeros_like(y)
    blocks = [np.lib.stride_tricks.sliding_window_view(v, sides) for v in (y, pilot)]
    axes = (1, 2, 3)
    for i in starts[0]:
        for j in starts[1]:
            noisy, clean = (dctn(v[i, j, starts[2]], axes=axes, norm="ortho") for v in blocks)
            gain = clean**2 / (clean**2 + np.float32(sigma**2))
            gain[:, 0, 0, 0] = 1
            filtered = idctn(gain * noisy, axes=axes, norm="ortho")
            weight = window / (gain**2).sum(axis=axes)[:, None, None, None]
            filtered *= weight
            for k, x, w in zip(starts[2], filtered, weight, strict=True):
                place = np.s_[i : i + sides[0], j : j + sides[1], k : k + sides[2]]
                total[place] += x
                weights[place] += w
    return total / weights


def refined(
    pilot: torch.Tensor,
    y: torch.Tensor,
    sigma: Sigma,
    noise: Noise,
    denoise: Callable[[torch.Tensor, float], torch.Tensor],
) -> torch.Tensor:
    """The pilots (N, D, H, W) made better, see the module.

    Args:
        y: the measurements, like the pilots; sigma: of their noise, a number or (N, 1, 1, 1).
        noise: its model; with the pilot for the signal it is made Gaussian anew.
        denoise: what the network makes of (1, D, H, W) with noise of a standard deviation.
    """
    sigmas = sigma.flatten().tolist() if torch.is_tensor(sigma) else [float(sigma)] * len(y)
    gaussian = noise.to_gaussian(y, sigma, signal=pilot)
    return torch.cat([
        _refined(x[None], one[None], s, denoise)
        for x, one, s in zip(pilot, gaussian, sigmas, strict=True)
    ])  # fmt: skip


def _refined(pilot, y, sigma, denoise):
    noisy, clean = (v[0].float().cpu().numpy() for v in (y, pilot))
    of_blocks: Sequence[Volume] = [block_wiener(noisy, clean, sigma, *block) for block in BLOCKS]
    filtered = torch.from_numpy(sum(of_blocks) / len(BLOCKS))[None].to(pilot)
    return (filtered + denoise(filtered, LEFT * sigma)) / 2
