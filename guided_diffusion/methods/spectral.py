"""Few-step restoration: a Gaussian posterior with the power spectrum of the images as prior.

An own method of this program, built from published parts: the noise levels of DDRM (Kawar et al.
2022), in whose singular directions a state may carry the measurement itself, the x̂_0-based
correction of DiffPIR (Zhu et al. 2023), and log-spaced noise levels (Karras et al. 2022).
"""

import math
from typing import Any, ClassVar

import torch

from guided_diffusion.dct import dct_matrix
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import Method, Network, RandnLike, Step
from guided_diffusion.operators.base import Operator, Sigma
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from util.parameters import Parameter

KAPPA = "κ, how far x̂_0 is from the truth: 1, a Wiener filter's error"


class Spectral(Method):
    """Alternate the network's x̂_0, its Gaussian correction by y, and noise for the next level.

    x̂_0's error is taken as Gaussian with variance v = κ r_t S/(κ r_t + S) at the frequency of prior
    power S: with κ = 1, that of a Wiener filter. In each singular direction of A the posterior
    then has mean x̂_0 + v s/(σ² + v s²) (ȳ - s x̂_0) and variance P = v σ²/(σ² + v s²), and noise of
    variance r_{t-1} - P makes the next state as noisy as the network is told.

    In the formulas v is the diagonal of Vᵀ C V, C the covariance that is diagonal in the DCT. That
    is all of it where the singular directions are cosines (denoising, color), or where S is the
    same at all frequencies. Elsewhere correlations between directions are left out:
    super-resolution folds frequencies onto one another, and a blur mixes them at the image's edges.
    Accelerated MRI of several coils has the mean of the whole C, see
    `Coils.frequency_posterior_mean`.
    """

    name = "spectral"
    label = "spectral, few steps"
    parameters = {"kappa": Parameter(2.0, KAPPA, above=0)}
    honest_spread = False
    uses_statistics = True
    unclipped_from = 1
    schedule = "diffusion_config_fast.yaml"
    kappa: float

    spread: ClassVar[int] = -1  # what of P and v goes into the next state's noise

    def __init__(
        self,
        operator: Operator,
        y: torch.Tensor,
        sigma: Sigma,
        statistics: PriorStatistics = NATURAL_IMAGES,
        **parameters: Any,
    ):
        super().__init__(operator.in_frequencies(), y, sigma, statistics, **parameters)
        s = self.operator.singular_values
        sides = operator.in_shape[1:]
        self.S = self.statistics.power_spectrum(*sides).to(s)
        self.dct = [dct_matrix(n).to(s) for n in sides]

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        operator, s = self.operator, self.operator.singular_values
        a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        r, r_prev = (1 - a) / a, (1 - a_prev) / a_prev
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        v_dct = self.kappa * r * self.S / (self.kappa * r + self.S)
        v = operator.frequency_variance(v_dct)
        sigma = self._news(r) if t == diffusion.num_timesteps - 1 else self.sigma
        x_0 = operator.frequency_posterior_mean(x_0, self.Uty, sigma, v_dct)
        if t == 0:
            return x_0, x_0
        v = operator.frequency_variance(v_dct)
        P = v * self.sigma**2 / (self.sigma**2 + v * s**2)
        noise = randn_like(x)
        fresh = self._coloured(noise, (r_prev + self.spread * v_dct).clamp(min=0).sqrt())
        seen = (r_prev + self.spread * P).clamp(min=0).sqrt() * operator.Vt(noise)
        return math.sqrt(a_prev) * (x_0 + fresh + operator.correction(fresh, seen)), x_0

    def _coloured(self, noise: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """White noise with the given standard deviation at each DCT frequency, (H, W)."""
        rows, cols = self.dct
        return rows.mT @ (std * (rows @ noise @ cols.mT)) @ cols

    def _news(self, r: float) -> torch.Tensor:
        """σ of what y still adds to a first state that holds it: 1/σ² = 1/(s² r) + 1/news²."""
        _, std = self.operator.inverted(self.Uty, self.sigma)
        variance = std**2
        left = (r - variance).clamp(min=1e-6 * r)
        return torch.where(variance <= r, self.sigma**2 * r / left, self.sigma**2).sqrt()
