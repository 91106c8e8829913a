"""DiffPIR: x̂_0 replaced by a proximal solution."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import Method, Network, RandnLike, Step, share
from util.parameters import Parameter


class DiffPIR(Method):
    """Zhu et al. 2023, "Denoising diffusion models for plug-and-play image restoration", Alg. 1.

    x̂_0 is replaced by the minimiser of ‖y - A x‖² + ρ_t ‖x - x̂_0‖², the mean of a Gaussian
    posterior with prior variance σ²/ρ_t; the noise is renewed by the share ζ. λ is in the published
    units, where the noise σ is that of the [0, 1] image: ρ_t = λ (σ/2)²/r_t, r_t = (1-ᾱ_t)/ᾱ_t.

    Defaults are the published ones for deblurring and for super-resolution (×4); none is published
    for denoising. Of the timesteps, too, the published choice is at hand, ``quadN`` as
    timestep_respacing. The published program leaves out both steps at its last network evaluation;
    here they are done. It takes σ = 0 for 0.002; here a noiseless measurement is met exactly.
    """

    name = "diffpir"
    label = "DiffPIR (Zhu et al. 2023)"
    parameters = {
        "lambda_": Parameter(
            7.0,
            "λ, the weight of the prior, for σ on [0, 1]",
            above=0,
            defaults_for={"super_resolution": 15.0},
        ),
        "zeta": share(
            0.3, "ζ, the share of noise that is fresh", defaults_for={"super_resolution": 0.25}
        ),
    }
    lambda_: float
    zeta: float

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        variance = 4 / self.lambda_ * (1 - a) / a  # σ²/ρ_t
        x_0 = self.operator.posterior_mean(x_0, self.reduced, self.sigma, variance)
        fresh = math.sqrt(self.zeta * (1 - a_prev))
        return diffusion.ddim_step(x, x_0, t, fresh, randn_like), x_0
