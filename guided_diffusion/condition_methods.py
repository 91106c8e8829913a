"""Posterior samplers: how the measurement y = A x_0 + σ n steers the reverse process.

A method is ``step(diffusion, model, x_t, t, randn_like) -> (x_{t-1}, x̂_0)``.
"""

import math

import torch

from util.errors import UserError


def _spectral_score(operator, x, Uty, sigma, alpha_bar):
    """`pseudo_likelihood_score` with Uᵀy at hand, which never changes during a run."""
    s = operator.singular_values
    r_t = (1 - alpha_bar) / alpha_bar
    residual = Uty - s * operator.Vt(x) / math.sqrt(alpha_bar)
    # Directions that A does not see (s = 0) carry no information, also when σ = 0.
    gain = torch.where(s > 0, s / (sigma**2 + r_t * s**2), 0.0)
    return operator.V(gain * residual) / math.sqrt(alpha_bar)


def pseudo_likelihood_score(operator, x, y, sigma, alpha_bar):
    """∇_x log p̃(y | x_t), Meng & Kabashima (arXiv 2211.12343), through A = U Σ Vᵀ.

        (1/√ᾱ_t) Aᵀ (σ² I + r_t A Aᵀ)⁻¹ (y - A x_t/√ᾱ_t),   r_t = (1-ᾱ_t)/ᾱ_t

    Args:
        operator: see `guided_diffusion.measurements`.
        x: (N, C, H, W), x_t.
        y: (N, *operator.out_shape), the measurement.
        sigma: standard deviation of its noise, in units of the [-1, 1] image.
        alpha_bar: ᾱ_t in (0, 1).

    Returns:
        (N, C, H, W).
    """
    return _spectral_score(operator, x, operator.Ut(y), sigma, alpha_bar)


class Vanilla:
    """The unconditional prior: a measurement changes nothing."""

    def step(self, diffusion, model, x, t, randn_like):
        return diffusion.p_sample(model, x, t, randn_like)


class DMPS:
    """Diffusion model based posterior sampling (Meng & Kabashima 2022, Algorithm 1).

    As in the published implementation, the score is taken at the new sample, with ᾱ_t and α_t
    of step t, and weighted by λ = `scale`.
    """

    def __init__(self, operator, y, sigma, scale):
        self.operator = operator
        self.Uty = operator.Ut(y)
        self.sigma = sigma
        self.scale = scale

    def step(self, diffusion, model, x, t, randn_like):
        sample, pred_xstart = diffusion.p_sample(model, x, t, randn_like)
        alpha, alpha_bar = diffusion.alphas[t], diffusion.alphas_cumprod[t]
        score = _spectral_score(self.operator, sample, self.Uty, self.sigma, alpha_bar)
        return sample + self.scale * (1 - alpha) / math.sqrt(alpha) * score, pred_xstart


# name → the parameters (with defaults) it takes under conditioning.params
METHODS = {"dmps": {"scale": 1.75}, "vanilla": {}}


def check_conditioning(name, params):
    """Complete a method's parameters with their defaults.

    Raises:
        UserError: an unknown method or parameter, or a value that is no finite number.
    """
    if name not in METHODS:
        raise UserError(
            f"conditioning.method: expected one of {', '.join(METHODS)}, found {name!r}"
        )
    known = METHODS[name]
    for key, value in params.items():
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise UserError(f"conditioning.params: unknown key {key!r} ({name} {takes})")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"conditioning.params.{key}: expected a number, found {value!r}")
        if not math.isfinite(value):
            raise UserError(f"conditioning.params.{key}: expected a finite number, found {value}")
    return {**known, **params}


def get_conditioning_method(name, operator=None, y=None, sigma=None, **params):
    """Build the method `name` for one batch of measurements.

    Args:
        operator, y, sigma: see `pseudo_likelihood_score`; "vanilla" needs none of them.
        params: the method's own: dmps takes `scale`, its λ (default 1.75).
    """
    params = check_conditioning(name, params)
    if name == "vanilla":
        return Vanilla()
    return DMPS(operator, y, sigma, **params)
