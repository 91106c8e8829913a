"""Samples of the prior alone."""

import math
from typing import ClassVar

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics, rim_of
from util.parameters import Parameter, Parameters


class PriorStep:
    """`GaussianDiffusion.p_sample`, without two errors that a measurement would set right.

    The states of a sampling are not those of the training, for each has the errors of all estimates
    before it (exposure bias). The network takes out a little too much of each, and samples end
    smooth and low in contrast. So x̂_0 is what the noise ε/λ leaves of x_t, λ being `epsilon_scale`
    (ε-scaling, with the same λ at all steps, Ning et al., ICLR 2024).

    Group normalisation takes the mean out of what an ADM network sees, so x̂_0 has that of x_t with
    all its noise, up to ±0.4 of the [-1, 1] range, and the steps that follow keep it: heads in grey
    air. What the prior's statistics say of it is put in its place, see `mean`.

    Args:
        statistics: of the prior's images; without its own, means are left as they are.
        epsilon_scale: λ; 1 is DDPM.
    """

    parameters: ClassVar[Parameters] = {
        "epsilon_scale": Parameter(
            1.0, "λ, what the predicted noise is divided by; 1 is DDPM", above=0
        )
    }

    def __init__(self, statistics: PriorStatistics, epsilon_scale: float = 1.0):
        self.statistics, self.epsilon_scale = statistics, epsilon_scale
        self.known = statistics is not NATURAL_IMAGES
        self.unclipped_from = 20 if self.known else math.inf  # else x̂_0 has to be held in its range

    def step(self, diffusion: GaussianDiffusion, model, x: torch.Tensor, t: int, randn_like):
        """x_t, (N, C, H, W) → (x_{t-1}, x̂_0), of the same shape."""
        if not self.known and self.epsilon_scale == 1:
            return diffusion.p_sample(model, x, t, randn_like)
        steps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        out = diffusion.p_mean_variance(model, x, steps, bounded=False)
        noisy = x / math.sqrt(diffusion.alphas_cumprod[t])
        x_0 = out["pred_xstart"]
        x_0 = diffusion.bound(x_0 + (1 - 1 / self.epsilon_scale) * (noisy - x_0))
        if self.known:
            r = 1 / float(diffusion.alphas_cumprod[t]) - 1
            shape = x_0 - _mean(x_0)
            x_0 = shape + self.mean(_mean(noisy), shape, r)
        out |= {"pred_xstart": x_0, "mean": diffusion.q_posterior_mean(x_0, x, steps)}
        return diffusion.sample_from(out, x, t, randn_like), x_0

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
        power = self.statistics.mean_power
        if power is None:
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
