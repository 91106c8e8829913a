"""DDNM+: the measurement in the range of A, the prior in its null space."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import Method, Network, RandnLike, Step, share


class DDNM(Method):
    """Wang et al. 2023, "Denoising diffusion null-space model": DDNM+ if σ > 0, DDNM if σ = 0.

    In the range of A, x̂_0 is replaced by the measurement, as far (λ_t ≤ 1) as the next state's
    noise σ_t = √(1-ᾱ_{t-1}) can hide the measurement's, and fresh noise makes up the rest. With
    σ > 0 that is, step for step, DDRM with η_b = 1. Without noise there is nothing to hide: σ_t is
    split between predicted and fresh noise by η in all directions, and y is met exactly.
    """

    name = "ddnm"
    label = "DDNM+ (Wang et al. 2023)"
    parameters = {"eta": share(0.85, "η, the share of noise that is fresh")}
    unclipped_from = 20
    needs_svd = True
    eta: float

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        operator, eta = self.operator, self.eta
        a_prev = diffusion.alphas_cumprod_prev[t]
        signal, sigma_t = math.sqrt(a_prev), math.sqrt(1 - a_prev)
        kept = math.sqrt(1 - eta**2)
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        eps = diffusion.eps_from_xstart(x, x_0, t)
        noise = randn_like(x) if t > 0 else torch.zeros_like(x)

        unseen = signal * x_0 + sigma_t * (kept * eps + eta * noise)
        y_bar, y_std = operator.inverted(self.reduced, self.sigma)
        y_std = signal * y_std  # in the next state
        clean, hidden = y_std == 0, sigma_t >= y_std
        lambda_t = torch.where(hidden, 1.0, sigma_t * kept / y_std.clamp(min=1e-12))
        left = (sigma_t**2 - y_std**2).clamp(min=0).sqrt()
        from_eps = torch.where(clean, sigma_t * kept, 0.0)
        from_noise = torch.where(hidden & ~clean, left, sigma_t * eta)
        x_0_bar = operator.Vt(x_0)
        x_0_bar = x_0_bar + lambda_t * (y_bar - x_0_bar)
        target = signal * x_0_bar + from_eps * operator.Vt(eps) + from_noise * operator.Vt(noise)
        return unseen + operator.correction(unseen, target), x_0
