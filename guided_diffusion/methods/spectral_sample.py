"""Samples of the posterior in few steps, with the Gaussian of `spectral`."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import Network, RandnLike, Step
from guided_diffusion.methods.spectral import KAPPA, Spectral, noise_variance
from guided_diffusion.operators.spread import Spread
from util.parameters import Parameter

NEARLY = 0.8  # of the first state's variance: what y's noise must have for y to be that state


class SpectralSample(Spectral):
    """Draw x_0 from the Gaussian posterior of `Spectral`, then noise of r_{t-1} for the next level.

    The decoupled noise annealing of Zhang et al. 2025 (DAPS, Algorithm 1), with that Gaussian,
    which knows the spectrum of images and needs no Langevin steps, for p(x_0 | x_t, y). As x_0's
    own variance P is drawn, too, the states have noise r_{t-1} + P around its mean, and the result
    is a sample of the posterior. For Gaussian images of this spectrum, with κ = 1, it is exactly
    that where directions are not correlated (denoising, color, symmetric blurs of mirrored images),
    if it starts from pure noise. (``start: auto`` starts lower than the prior's power at the lowest
    frequencies, which matters in what A does not see.) Elsewhere it is near: in
    super-resolution and Gaussian blur the samples' variance is a tenth too small at most.

    In denoising y itself is a state of the process, p(x_0 | y) that of the prior from there on, and
    the plain reverse steps draw from it without any Gaussian.
    """

    name = "spectral_sample"
    label = "spectral, samples"
    parameters = {"kappa": Parameter(1.0, KAPPA, above=0)}
    draws_samples = True
    honest_spread = True
    schedule = "diffusion_config_samples.yaml"

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        plain = self._y_is_the_first_state(diffusion)
        if plain.all():
            return diffusion.p_sample(model, x, t, randn_like)
        if not plain.any():
            return self._guided(diffusion, model, x, t, randn_like)
        # Images of different noise: each as it would be alone, from the same draw.
        noise = randn_like(x) if t > 0 else x
        free = diffusion.p_sample(model, x, t, lambda _: noise)
        guided = self._guided(diffusion, model, x, t, lambda _: noise)
        return torch.where(plain, free[0], guided[0]), torch.where(plain, free[1], guided[1])

    def _guided(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        """A draw from the Gaussian, with the noise of the next level in one draw."""
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        mean = self.posterior_mean(diffusion, x_0, t)
        if t == 0:
            return mean, mean
        noise = self.spread(diffusion, t).draw(x, noise_variance(diffusion, t - 1), randn_like)
        return math.sqrt(diffusion.alphas_cumprod_prev[t]) * (mean + noise), mean

    def spread(self, diffusion: GaussianDiffusion, t: int) -> Spread:
        """That of the Gaussian whose mean is taken: a draw from it is what is wanted."""
        return self.operator.spread(self.error_variance(diffusion, t, self.kappa), self.sigma)

    def _y_is_the_first_state(self, diffusion: GaussianDiffusion) -> torch.Tensor:
        """Whether y's noise is nearly all of the first state's, (N, 1, 1, 1) or (1, 1, 1, 1)."""
        if not self.operator.sees_all:
            return torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        r = noise_variance(diffusion, -1)
        _, std = self.operator.inverted(self.reduced, self.sigma)
        variance = std**2
        near = (variance > NEARLY * r) & (variance <= r)
        all_near = near.reshape(-1, self.operator.singular_values.numel()).all(dim=1)
        return all_near[:, None, None, None]
