"""ΠGDM: a Gaussian posterior score through the network's Jacobian."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import (
    Method,
    Network,
    RandnLike,
    Step,
    share,
    through_the_network,
)


class PiGDM(Method):
    """Song et al. 2023, "Pseudoinverse-guided diffusion models", its noisy form.

    p(x_0 | x_t) is taken as N(x̂_0, r_t² I) with r_t² = 1-ᾱ_t, exact for x_0 ~ N(0, I), so that
    ∇ log p(y | x_t) = g/r_t² with g = r_t² (∂x̂_0/∂x_t)ᵀ Aᵀ (r_t² A Aᵀ + σ² I)⁻¹ (y - A x̂_0).

    Tweedie's formula moves x̂_0 by (1-ᾱ_t)/√ᾱ_t ∇ log p(y | x_t), and DDIM's step (with `eta`, its
    ε as predicted) takes √ᾱ_s of that into the next state x_s. Under a flat prior, where
    r_t² = (1-ᾱ_t)/ᾱ_t, the move is √ᾱ_t g and the weight of g in x_s is √(ᾱ_s ᾱ_t). Both public
    programs take it so, and so does this. (With r_t² = 1-ᾱ_t to the letter the weight would be
    √(ᾱ_s/ᾱ_t).) Algorithm 1 of the paper prints √ᾱ_t, without DDIM's √ᾱ_s.
    """

    name = "pigdm"
    label = "ΠGDM (Song et al. 2023)"
    parameters = {"eta": share(1.0, "η of DDIM's step: the share of noise that is fresh")}
    needs_gradient = True
    eta: float

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        variance = 1 - a

        def inner(x_0: torch.Tensor) -> torch.Tensor:
            # its gradient is vᵀ ∂x̂_0/∂x_t with v held fixed
            mean = self.operator.posterior_mean(x_0.detach(), self.reduced, self.sigma, variance)
            return ((mean - x_0).detach() * x_0).sum()

        out, guidance = through_the_network(diffusion, model, x, t, inner)
        c_1 = self.eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        sample = diffusion.ddim_step(x, out["pred_xstart"], t, c_1, randn_like)
        return sample + math.sqrt(a_prev * a) * guidance, out["pred_xstart"]
