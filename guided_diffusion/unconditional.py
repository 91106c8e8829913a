"""Samples of the prior alone."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics, rim_of


class PriorStep:
    """`GaussianDiffusion.p_sample`, with the mean intensity that images of the prior have.

    Group normalisation takes the mean out of what an ADM network sees, so x̂_0 has that of x_t with
    all its noise, up to ±0.4 of the [-1, 1] range, and the steps that follow keep it: heads in grey
    air. What the prior's statistics say of it is put in its place, see `mean`.

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
        if self.known:
            r = 1 / float(diffusion.alphas_cumprod[t]) - 1
            shape = out["pred_xstart"] - _mean(out["pred_xstart"])
            x_0 = shape + self.mean(_mean(x) * math.sqrt(1 + r), shape, r)
            steps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
            out |= {"pred_xstart": x_0, "mean": diffusion.q_posterior_mean(x_0, x, steps)}
        return diffusion.sample_from(out, x, t, randn_like), out["pred_xstart"]

    def mean(self, seen: torch.Tensor, shape: torch.Tensor, r: float) -> torch.Tensor:
        """The mean of x_0, (N, 1, 1, 1), from two witnesses with Gaussian errors.

        One is `seen`, the mean of x_0 with noise, beside the prior's own mean and its variance over
        images. The other is the rim of x̂_0, which is air as black as the training images'; that of
        `shape` was found to err by as much as the first witness does, at every noise level.

        Args:
            seen: (N, 1, 1, 1), the mean of x_t/√ᾱ_t.
            shape: (N, C, H, W), x̂_0 without its mean.
            r: (1-ᾱ_t)/ᾱ_t.
        """
        _, channels, height, width = shape.shape
        power = float(self.statistics.power_spectrum(height, width)[0, 0])
        noise = r / channels  # contrasts share one mean
        first = (power * seen + noise * self.statistics.mean_intensity) / (power + noise)
        if self.statistics.rim is None:
            return first
        rim, spread = self.statistics.rim
        outer = torch.from_numpy(rim_of(height, width)).to(shape.device)
        second = rim - shape[..., outer].mean(dim=(1, 2)).reshape(first.shape)
        error = power * noise / (power + noise) / (height * width)
        weight = error / (2 * error + spread**2)
        return first + weight * (second - first)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(1, 2, 3), keepdim=True)
