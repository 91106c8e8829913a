"""Samples of the prior alone."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics


class PriorStep:
    """`GaussianDiffusion.p_sample`, with the mean intensity that images of the prior have.

    Group normalisation takes the mean out of what an ADM network sees. Where the noise is so large
    that x_t does not tell the image's mean either, x̂_0 has that of the noise, up to ±0.4 of the
    [-1, 1] range, and the steps that follow take it for true: heads in grey air. There the mean of
    x̂_0 is set to its expectation given that of x_t, both Gaussian.

    Args:
        statistics: of the prior's images; without its own, steps are left as they are.
    """

    def __init__(self, statistics: PriorStatistics):
        self.statistics = statistics
        self.known = statistics is not NATURAL_IMAGES
        self.unclipped_from = 20 if self.known else math.inf  # else x̂_0 has to be held in its range

    def step(self, diffusion: GaussianDiffusion, model, x: torch.Tensor, t: int, randn_like):
        """x_t, (N, C, H, W) → (x_{t-1}, x̂_0), of the same shape."""
        out = diffusion.predict(model, x, t)
        r = 1 / float(diffusion.alphas_cumprod[t]) - 1
        if self.known and r > self.power(x):
            x_0 = out["pred_xstart"]
            x_0 = x_0 + self.mean(x, r) - x_0.mean(dim=(1, 2, 3), keepdim=True)
            steps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
            out |= {"pred_xstart": x_0, "mean": diffusion.q_posterior_mean(x_0, x, steps)}
        return diffusion.sample_from(out, x, t, randn_like), out["pred_xstart"]

    def power(self, x: torch.Tensor) -> float:
        """Variance over images of their orthonormal DCT's first coefficient: of mean · √(HW)."""
        return float(self.statistics.power_spectrum(*x.shape[-2:])[0, 0])

    def mean(self, x: torch.Tensor, r: float) -> torch.Tensor:
        """E[mean of x_0 | mean of x_t], (N, 1, 1, 1), where (1-ᾱ)/ᾱ = r."""
        seen = x.mean(dim=(1, 2, 3), keepdim=True) * math.sqrt(1 + r)
        noise, power = r / x.shape[1], self.power(x)  # contrasts share one mean
        return (power * seen + noise * self.statistics.mean_intensity) / (power + noise)
