"""Posterior samplers: how the measurement y = A x_0 + σ n steers the reverse process.

A method is ``step(diffusion, model, x_t, t, randn_like) -> (x_{t-1}, x̂_0)``, with the symbols of
its paper. All of them see A through its singular value decomposition A = U Σ Vᵀ.
"""

import inspect
import math

import torch

from guided_diffusion.linear_gaussian import gain, gaussian_posterior_mean
from guided_diffusion.spectral import Spectral, SpectralSample
from util.errors import UserError


def _spectral_score(operator, x, Uty, sigma, alpha_bar):
    """`pseudo_likelihood_score` with Uᵀy at hand, which never changes during a run."""
    r_t = (1 - alpha_bar) / alpha_bar
    residual = Uty - operator.singular_values * operator.Vt(x) / math.sqrt(alpha_bar)
    return operator.V(gain(operator, sigma, r_t) * residual) / math.sqrt(alpha_bar)


def pseudo_likelihood_score(operator, x, y, sigma, alpha_bar):
    """∇_x log p̃(y | x_t), Meng & Kabashima (arXiv 2211.12343), through A = U Σ Vᵀ.

        (1/√ᾱ_t) Aᵀ (σ² I + r_t A Aᵀ)⁻¹ (y - A x_t/√ᾱ_t),   r_t = (1-ᾱ_t)/ᾱ_t

    Args:
        operator: see `guided_diffusion.measurements`.
        x: (N, C, H, W), x_t.
        y: (N, *operator.out_shape), the measurement.
        sigma: standard deviation of its noise, in units of the [-1, 1] image; a number, or
            (N, 1, 1, 1) where each image has its own.
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
    """Meng & Kabashima 2022, "Diffusion model based posterior sampling", Algorithm 1.

    As in the published implementation, the score is taken at the new sample, with ᾱ_t and α_t
    of step t, and weighted by λ = `scale`.
    """

    def __init__(self, operator, y, sigma, scale=1.75):
        self.operator = operator
        self.Uty = operator.Ut(y)
        self.sigma = sigma
        self.scale = scale

    def step(self, diffusion, model, x, t, randn_like):
        sample, pred_xstart = diffusion.p_sample(model, x, t, randn_like)
        alpha, alpha_bar = diffusion.alphas[t], diffusion.alphas_cumprod[t]
        score = _spectral_score(self.operator, sample, self.Uty, self.sigma, alpha_bar)
        return sample + self.scale * (1 - alpha) / math.sqrt(alpha) * score, pred_xstart


class DPS:
    """Chung et al. 2023, "Diffusion posterior sampling", Algorithm 1.

    The ancestral step, then a step of length `scale` down the gradient of ‖y - A x̂_0(x_t)‖,
    through the network. The norm is each image's own, so a batch changes nothing.
    """

    def __init__(self, operator, y, sigma, scale=0.3):
        self.operator = operator
        self.y = y
        self.scale = scale

    def step(self, diffusion, model, x, t, randn_like):
        def norms(x_0):
            return (self.y - self.operator.forward(x_0)).flatten(1).norm(dim=1).sum()

        out, gradient = _through_the_network(diffusion, model, x, t, norms)
        sample = diffusion.sample_from(out, x, t, randn_like)
        return sample - self.scale * gradient, out["pred_xstart"]


def _through_the_network(diffusion, model, x, t, objective):
    """The prediction at x_t, and ∇_{x_t} of a scalar function of its x̂_0."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        out = diffusion.predict(model, x, t)
        (gradient,) = torch.autograd.grad(objective(out["pred_xstart"]), x)
    return {k: v.detach() for k, v in out.items()}, gradient


class PiGDM:
    """Song et al. 2023, "Pseudoinverse-guided diffusion models", noisy form, as its programs run it.

    p(x_0 | x_t) is taken as N(x̂_0, r_t² I) with r_t² = 1-ᾱ_t, exact for x_0 ~ N(0, I), so that
    ∇ log p(y | x_t) = g/r_t² with g = r_t² (∂x̂_0/∂x_t)ᵀ Aᵀ (r_t² A Aᵀ + σ² I)⁻¹ (y - A x̂_0).

    Tweedie's formula moves x̂_0 by (1-ᾱ_t)/√ᾱ_t ∇ log p(y | x_t), and DDIM's step (with `eta`, its
    ε as predicted) takes √ᾱ_s of that into the next state x_s. Under a flat prior, where
    r_t² = (1-ᾱ_t)/ᾱ_t, the move is √ᾱ_t g and the weight of g in x_s is √(ᾱ_s ᾱ_t). Both public
    programs take it so, and so does this. (With r_t² = 1-ᾱ_t to the letter it is larger, √(ᾱ_s/ᾱ_t).)
    Algorithm 1 of the paper prints √ᾱ_t, without DDIM's √ᾱ_s; networks that are not linear can
    diverge under it.
    """

    def __init__(self, operator, y, sigma, eta=1.0):
        self.operator = operator
        self.Uty = operator.Ut(y)
        self.sigma = sigma
        self.eta = eta

    def step(self, diffusion, model, x, t, randn_like):
        a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        variance = 1 - a

        def inner(x_0):  # its gradient is vᵀ ∂x̂_0/∂x_t with v held fixed
            mean = gaussian_posterior_mean(
                self.operator, x_0.detach(), self.Uty, self.sigma, variance
            )
            return ((mean - x_0).detach() * x_0).sum()

        out, guidance = _through_the_network(diffusion, model, x, t, inner)
        c_1 = self.eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        sample = diffusion.ddim_step(x, out["pred_xstart"], t, c_1, randn_like)
        return sample + math.sqrt(a * a_prev) * guidance, out["pred_xstart"]


class DiffPIR:
    """Zhu et al. 2023, "Denoising diffusion models for plug-and-play image restoration", Alg. 1.

    x̂_0 is replaced by the minimiser of ‖y - A x‖² + ρ_t ‖x - x̂_0‖², the mean of a Gaussian
    posterior with prior variance σ²/ρ_t; the noise is renewed by the share ζ. λ is in the published
    units, where the noise σ is that of the [0, 1] image: ρ_t = λ (σ/2)²/r_t, r_t = (1-ᾱ_t)/ᾱ_t.

    The published program leaves out both at its last network evaluation; here they are done. It
    takes σ = 0 for 0.002; here a noiseless measurement is met exactly.
    """

    def __init__(self, operator, y, sigma, lambda_=7.0, zeta=0.3):
        self.operator = operator
        self.Uty = operator.Ut(y)
        self.sigma = sigma
        self.lambda_ = lambda_
        self.zeta = zeta

    def step(self, diffusion, model, x, t, randn_like):
        a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        variance = 4 / self.lambda_ * (1 - a) / a  # σ²/ρ_t
        x_0 = gaussian_posterior_mean(self.operator, x_0, self.Uty, self.sigma, variance)
        fresh = math.sqrt(self.zeta * (1 - a_prev))
        return diffusion.ddim_step(x, x_0, t, fresh, randn_like), x_0


class DDRM:
    """Kawar et al. 2022, "Denoising diffusion restoration models", eq. 7-8.

    In each singular direction of A, with ȳ = Uᵀy/s of noise σ/s, and σ_t = √r_t for x_t/√ᾱ_t:
    where ȳ is less noisy than the next state, the state is drawn around η_b ȳ + (1-η_b) x̂_0;
    elsewhere around x̂_0, its old noise replaced by the share η.

    A noiseless ȳ is enforced at the last step, too. (The published program has no case for σ = 0
    there and returns x̂_0.)
    """

    def __init__(self, operator, y, sigma, eta=0.85, eta_b=1.0):
        self.operator = operator
        self.Uty = operator.Ut(y)
        self.sigma = sigma
        self.eta = eta
        self.eta_b = eta_b

    def step(self, diffusion, model, x, t, randn_like):
        V, Vt, s = self.operator.V, self.operator.Vt, self.operator.singular_values
        a_next = diffusion.alphas_cumprod_prev[t]
        sigma_next = math.sqrt((1 - a_next) / a_next)
        kept, eta, eta_b = math.sqrt(1 - self.eta**2), self.eta, self.eta_b
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        noise = randn_like(x) if t > 0 else torch.zeros_like(x)

        unseen = x_0 + sigma_next * (kept * diffusion.eps_from_xstart(x, x_0, t) + eta * noise)
        seen = s > 0
        safe_s = torch.where(seen, s, 1.0)
        y_bar, y_std = self.Uty / safe_s, self.sigma / safe_s
        x_0_bar, noise_bar = Vt(x_0), Vt(noise)
        # What ȳ's error tells of the state takes the place of the old noise.
        error = torch.where(y_std > 0, (y_bar - x_0_bar) / y_std.clamp(min=1e-12), 0.0)
        noisier = x_0_bar + sigma_next * (kept * error + eta * noise_bar)
        left = (sigma_next**2 - (eta_b * y_std) ** 2).clamp(min=0).sqrt()
        cleaner = (1 - eta_b) * x_0_bar + eta_b * y_bar + left * noise_bar
        target = torch.where(sigma_next < y_std, noisier, cleaner)
        x_next = unseen + V(torch.where(seen, target - Vt(unseen), 0.0))
        return math.sqrt(a_next) * x_next, x_0


class DDNM:
    """Wang et al. 2023, "Denoising diffusion null-space model": DDNM+ if σ > 0, DDNM if σ = 0.

    In the range of A, x̂_0 is replaced by the measurement, as far (λ_t ≤ 1) as the next state's
    noise σ_t = √(1-ᾱ_{t-1}) can hide the measurement's, and fresh noise makes up the rest (eq. 17-19).
    With σ > 0 that is, step for step, DDRM with η_b = 1. Without noise there is nothing to hide: σ_t
    is split between predicted and fresh noise by η in all directions, and y is met exactly.
    """

    def __init__(self, operator, y, sigma, eta=0.85):
        self.operator = operator
        self.Uty = operator.Ut(y)
        self.sigma = sigma
        self.eta = eta

    def step(self, diffusion, model, x, t, randn_like):
        V, Vt, s = self.operator.V, self.operator.Vt, self.operator.singular_values
        a_prev = diffusion.alphas_cumprod_prev[t]
        signal, sigma_t = math.sqrt(a_prev), math.sqrt(1 - a_prev)
        kept = math.sqrt(1 - self.eta**2)
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        eps = diffusion.eps_from_xstart(x, x_0, t)
        noise = randn_like(x) if t > 0 else torch.zeros_like(x)

        unseen = signal * x_0 + sigma_t * (kept * eps + self.eta * noise)
        seen = s > 0
        safe_s = torch.where(seen, s, 1.0)
        y_std = signal * self.sigma / safe_s  # of the measurement's noise, in the next state
        clean, hidden = y_std == 0, sigma_t >= y_std
        lambda_t = torch.where(hidden, 1.0, sigma_t * kept / y_std.clamp(min=1e-12))
        left = (sigma_t**2 - y_std**2).clamp(min=0).sqrt()
        from_eps = torch.where(clean, sigma_t * kept, 0.0)
        from_noise = torch.where(hidden & ~clean, left, sigma_t * self.eta)
        x_0_bar = Vt(x_0)
        x_0_bar = x_0_bar + lambda_t * (self.Uty / safe_s - x_0_bar)
        target = signal * x_0_bar + from_eps * Vt(eps) + from_noise * Vt(noise)
        x_next = unseen + V(torch.where(seen, target - Vt(unseen), 0.0))
        return x_next, x_0


METHODS = {
    "dmps": DMPS,
    "dps": DPS,
    "ddrm": DDRM,
    "pigdm": PiGDM,
    "ddnm": DDNM,
    "diffpir": DiffPIR,
    "spectral": Spectral,
    "spectral_sample": SpectralSample,
    "vanilla": Vanilla,
}
DIFFERENTIATING = ("dps", "pigdm")  # need the gradient through the network
# Steps from which a method does without clipping of x̂_0, for `clip_denoised: auto`. In longer ones, and
# the others in any, it diverges or is worse.
UNCLIPPED_FROM = {"dmps": 20, "ddrm": 20, "ddnm": 20, "spectral": 1, "spectral_sample": 1}
SAMPLING = ("spectral_sample",)  # of the spectral ones: draw, where one evaluation is the mean
# name → the parameters that conditioning.params may set, with their defaults
PARAMETERS = {
    name: {
        p.name: p.default
        for p in inspect.signature(method).parameters.values()
        if p.default is not inspect.Parameter.empty
    }
    for name, method in METHODS.items()
}
SHARES = ("eta", "eta_b", "zeta")  # parameters that lie in [0, 1]
POSITIVE = ("lambda_", "kappa")


def check_conditioning(name, params):
    """Complete a method's parameters with their defaults.

    Raises:
        UserError: an unknown method or parameter, or a value out of its range.
    """
    if name not in METHODS:
        raise UserError(
            f"conditioning.method: expected one of {', '.join(METHODS)}, found {name!r}"
        )
    known = PARAMETERS[name]
    for key, value in params.items():
        where = f"conditioning.params.{key}"
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise UserError(f"conditioning.params: unknown key {key!r} ({name} {takes})")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{where}: expected a number, found {value!r}")
        if not math.isfinite(value):
            raise UserError(f"{where}: expected a finite number, found {value}")
        if key in SHARES and not 0 <= value <= 1:
            raise UserError(f"{where}: expected a number in [0, 1], found {value}")
        if key in POSITIVE and value <= 0:
            raise UserError(f"{where}: expected a positive number, found {value}")
    return {**known, **params}


def get_conditioning_method(name, operator=None, y=None, sigma=None, **params):
    """Build the method `name` for one batch of measurements.

    Args:
        operator, y, sigma: see `pseudo_likelihood_score`; "vanilla" needs none of them.
        params: the method's own, see `PARAMETERS`.

    Raises:
        UserError: see `check_conditioning`.
    """
    params = check_conditioning(name, params)
    if name == "vanilla":
        return Vanilla()
    return METHODS[name](operator, y, sigma, **params)
