"""Few-step restoration: a Gaussian posterior with the power spectrum of the images as prior.

An own method of this program, built from published parts: the noise levels of DDRM (Kawar et al.
2022), in whose singular directions a state may carry the measurement itself, the x̂_0-based
correction of DiffPIR (Zhu et al. 2023), log-spaced noise levels (Karras et al. 2022) and
antithetic variates (Hammersley & Morton 1956).
"""

import math
from typing import Any

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import Method, Network, RandnLike, Step
from guided_diffusion.methods.start import is_the_state
from guided_diffusion.operators.base import Operator, Sigma
from guided_diffusion.operators.spread import Spread
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from util.parameters import Parameter

KAPPA = "κ, how far x̂_0 is from the truth: 1, a Wiener filter's error"
KAPPA_NOISE = "κ', the same of the noise that is drawn"
ONE_KAPPA = {"mri": 2.0, "thick_slices": 2.0}  # where κ' = κ was measured to be better


class Spectral(Method):
    """Alternate the network's x̂_0, its Gaussian correction by y, and noise for the next level.

    x̂_0's error is taken as Gaussian with variance v = κ r_t S/(κ r_t + S) at the frequency of prior
    power S: with κ = 1, that of a Wiener filter. In each singular direction of A the posterior
    then has mean m_t = x̂_0 + v s/(σ² + v s²) (ȳ - s x̂_0) and variance P = v σ²/(σ² + v s²), P = v
    where A is blind. Noise of variance r_{t-1} - P makes the next state as noisy as the network is
    told. In P, v has a κ' of its own: of a state that errs by its noise alone, the network's x̂_0 is
    nearer to the truth than a linear filter's, while y is weighed by more, for whatever else is
    wrong in a state stays in x̂_0. With κ' = κ hardly any noise is drawn at low levels, and each
    step more hardens what is wrong.

    What the network makes of that noise is an error, too, and one that the next draw does not
    repeat. So it is averaged away, in three ways that cost no evaluation:

    - The mean goes on as m̄_t = m_t + φ r_t/r_{t+1} (m̄_{t+1} - m_t), where φ = 1 - P/r_t is the
      share of the state's noise that was drawn. Without φ each estimate counts as the precision
      that its level adds, m̄_t/r_t = Σ_i (1/r_i - 1/r_{i+1}) m_i, which is also the mean of DDPM's
      reverse steps. Where no noise is drawn, φ = 0, there is nothing to average, and the newest
      estimate is the best.
    - Every second draw is the one before it with the other sign. What is linear in it cancels.
    - At every second evaluation the network sees the state's mirror image. A schedule of one level
      has two evaluations, one of the state and one of its mirror image.

    In the formulas v is the diagonal of Vᵀ C V, C the covariance that is diagonal in the DCT. That
    is all of it where the singular directions are cosines (denoising, color, symmetric blurs of
    mirrored images), or where S is the same at all frequencies. Elsewhere correlations between
    directions are left out, for a blur mixes frequencies at the image's edges, unless the operator
    knows better (`Operator.frequency_posterior_mean`): the mean is exact in super-resolution, too.
    In accelerated MRI it is solved for by conjugate gradients, and P = C
    (`operators.scanned.ScannedSpread`).
    """

    name = "spectral"
    label = "spectral, few steps"
    parameters = {
        "kappa": Parameter(2.0, KAPPA, above=0),
        "kappa_noise": Parameter(0.35, KAPPA_NOISE, above=0, defaults_for=ONE_KAPPA),
    }
    honest_spread = False
    uses_statistics = True
    unclipped_from = 1
    schedule = "diffusion_config_fast.yaml"
    kappa: float
    kappa_noise: float

    def __init__(
        self,
        operator: Operator,
        y: torch.Tensor,
        sigma: Sigma,
        statistics: PriorStatistics = NATURAL_IMAGES,
        slices: bool = False,
        **parameters: Any,
    ):
        super().__init__(operator.in_frequencies(), y, sigma, statistics, slices, **parameters)
        S = self.statistics.power_spectrum(*operator.in_shape[1:])
        self.S = S.to(operator.device, operator.dtype)
        self._begin()

    def _begin(self) -> None:
        """Forget the steps done."""
        self._mean: torch.Tensor | None = None  # m̄_{t+1}
        self._drawn: torch.Tensor | None = None  # noise that the next step mirrors

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        if t == diffusion.num_timesteps - 1:
            self._begin()
        mean = self.posterior_mean(diffusion, self._predict(diffusion, model, x, t), t)
        r = noise_variance(diffusion, t)
        if self._mean is not None:  # m̄_{t+1} counts φ r_t/r_{t+1}
            drawn = self.spread(diffusion, t + 1).remainder(self._mean - mean, r)
            mean = mean + drawn / noise_variance(diffusion, t + 1)
        if t == 0:
            return mean, mean
        self._mean = mean
        if self._drawn is None:
            noise = self._drawn = randn_like(x)
        else:
            noise, self._drawn = -self._drawn, None
        noise = self.spread(diffusion, t).fill(noise, noise_variance(diffusion, t - 1))
        return math.sqrt(diffusion.alphas_cumprod_prev[t]) * (mean + noise), mean

    def _predict(
        self, diffusion: GaussianDiffusion, model: Network, x: torch.Tensor, t: int
    ) -> torch.Tensor:
        """x̂_0 of the state or of its mirror image; if there is one step only, of both."""

        def mirrored(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return model(x.flip(-1), timesteps).flip(-1)

        networks = [model, mirrored] if diffusion.num_timesteps == 1 else [(model, mirrored)[t % 2]]
        found = [diffusion.predict(network, x, t)["pred_xstart"] for network in networks]
        return sum(found[1:], start=found[0]) / len(found)

    def posterior_mean(
        self, diffusion: GaussianDiffusion, x_0: torch.Tensor, t: int
    ) -> torch.Tensor:
        """m_t, from the network's x̂_0 of step t."""
        first = t == diffusion.num_timesteps - 1 and not self.operator.solves
        sigma = self._news(diffusion) if first else self.sigma
        v = self.error_variance(diffusion, t, self.kappa)
        return self.operator.frequency_posterior_mean(x_0, self.reduced, sigma, v)

    def spread(self, diffusion: GaussianDiffusion, t: int) -> Spread:
        """What the posterior of step t leaves open."""
        v = self.error_variance(diffusion, t, self.kappa_noise)
        return self.operator.spread(v, self.sigma)

    def error_variance(self, diffusion: GaussianDiffusion, t: int, kappa: float) -> torch.Tensor:
        """v of x̂_0 of step t, (H, W), for each DCT coefficient."""
        r = kappa * noise_variance(diffusion, t)
        return r * self.S / (r + self.S)

    def _news(self, diffusion: GaussianDiffusion) -> torch.Tensor:
        """σ of what y still adds to a first state that holds it: 1/σ² = 1/(s² r) + 1/news²."""
        r = noise_variance(diffusion, -1)
        _, std = self.operator.inverted(self.reduced, self.sigma)
        variance = std**2
        left = (r - variance).clamp(min=1e-6 * r)
        news = torch.where(variance <= r, self.sigma**2 * r / left, self.sigma**2).sqrt()
        return torch.where(is_the_state(variance, diffusion), torch.inf, news)


def noise_variance(diffusion: GaussianDiffusion, t: int) -> float:
    """r_t = (1 - ᾱ_t)/ᾱ_t."""
    a = diffusion.alphas_cumprod[t]
    return (1 - a) / a
