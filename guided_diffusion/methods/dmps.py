"""DMPS, the method that this program is named after."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import Method, Network, RandnLike, Step
from guided_diffusion.operators.base import Operator, Sigma
from util.parameters import Parameter


def _score(
    operator: Operator, x: torch.Tensor, reduced: torch.Tensor, sigma: Sigma, alpha_bar: float
) -> torch.Tensor:
    """`pseudo_likelihood_score` with `Operator.reduced` of y at hand."""
    r_t, signal = (1 - alpha_bar) / alpha_bar, math.sqrt(alpha_bar)
    return operator.score(x / signal, reduced, sigma, r_t) / signal


def pseudo_likelihood_score(
    operator: Operator, x: torch.Tensor, y: torch.Tensor, sigma: Sigma, alpha_bar: float
) -> torch.Tensor:
    """∇_x log p̃(y | x_t), Meng & Kabashima (arXiv 2211.12343), through A = U Σ Vᵀ.

        (1/√ᾱ_t) Aᵀ (σ² I + r_t A Aᵀ)⁻¹ (y - A x_t/√ᾱ_t),   r_t = (1-ᾱ_t)/ᾱ_t

    Args:
        operator: A.
        x: (N, C, H, W), x_t.
        y: (N, *operator.out_shape), the measurement.
        sigma: standard deviation of its noise, in units of the [-1, 1] image; a number, or
            (N, 1, 1, 1) where each image has its own.
        alpha_bar: ᾱ_t in (0, 1).

    Returns:
        (N, C, H, W).
    """
    return _score(operator, x, operator.reduced(y), sigma, alpha_bar)


class DMPS(Method):
    """Meng & Kabashima 2022, "Diffusion model based posterior sampling", Algorithm 1.

    As in the published implementation, the score is taken at the new sample, with ᾱ_t and α_t
    of step t, and weighted by λ = `scale`.
    """

    name = "dmps"
    label = "DMPS (Meng & Kabashima 2022)"
    parameters = {"scale": Parameter(1.75, "λ, the weight of the measurement's score")}
    honest_spread = False  # with 50 steps, its 90 % intervals hold about half of the truth
    unclipped_from = 20
    scale: float

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        sample, pred_xstart = diffusion.p_sample(model, x, t, randn_like)
        alpha, alpha_bar = diffusion.alphas[t], diffusion.alphas_cumprod[t]
        score = _score(self.operator, sample, self.reduced, self.sigma, alpha_bar)
        return sample + self.scale * (1 - alpha) / math.sqrt(alpha) * score, pred_xstart
