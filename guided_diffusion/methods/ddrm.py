"""DDRM: an update in the spectrum of A."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import Method, Network, RandnLike, Step, share


class DDRM(Method):
    """Kawar et al. 2022, "Denoising diffusion restoration models", eq. 7-8.

    In each singular direction of A, with ȳ = Uᵀy/s of noise σ/s, and σ_t = √r_t for x_t/√ᾱ_t:
    where ȳ is less noisy than the next state, the state is drawn around η_b ȳ + (1-η_b) x̂_0;
    elsewhere around x̂_0, its old noise replaced by the share η.

    A noiseless ȳ is enforced at the last step, too. (The published program has no case for σ = 0
    there and returns x̂_0.)
    """

    name = "ddrm"
    label = "DDRM (Kawar et al. 2022)"
    parameters = {
        "eta": share(0.85, "η, the share of noise that is fresh"),
        "eta_b": share(1.0, "η_b, the weight of a measurement that is cleaner than the state"),
    }
    unclipped_from = 20
    needs_svd = True
    eta: float
    eta_b: float

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        operator, eta, eta_b = self.operator, self.eta, self.eta_b
        a_next = diffusion.alphas_cumprod_prev[t]
        sigma_next = math.sqrt((1 - a_next) / a_next)
        kept = math.sqrt(1 - eta**2)
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        noise = randn_like(x) if t > 0 else torch.zeros_like(x)

        unseen = x_0 + sigma_next * (kept * diffusion.eps_from_xstart(x, x_0, t) + eta * noise)
        y_bar, y_std = operator.inverted(self.reduced, self.sigma)
        x_0_bar, noise_bar = operator.Vt(x_0), operator.Vt(noise)
        # What ȳ's error tells of the state takes the place of the old noise.
        error = torch.where(y_std > 0, (y_bar - x_0_bar) / y_std.clamp(min=1e-12), 0.0)
        noisier = x_0_bar + sigma_next * (kept * error + eta * noise_bar)
        left = (sigma_next**2 - (eta_b * y_std) ** 2).clamp(min=0).sqrt()
        cleaner = (1 - eta_b) * x_0_bar + eta_b * y_bar + left * noise_bar
        target = torch.where(sigma_next < y_std, noisier, cleaner)
        x_next = unseen + operator.correction(unseen, target)
        return math.sqrt(a_next) * x_next, x_0
