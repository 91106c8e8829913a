"""The training objective of ADM: a weighted simple loss and the variational bound.

IDDPM is Nichol & Dhariwal 2021, DDPM Ho et al. 2020.
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Network

LossWeighting = Literal["uniform", "min_snr", "p2"]
TimestepSampling = Literal["uniform", "lognormal"]


def loss_weights(
    name: LossWeighting, alpha_bar: NDArray, gamma: float = 5.0, high_noise: float = 0.0
) -> Tensor:
    """Weight of the simple loss at each noise level, a function of SNR = ᾱ / (1-ᾱ).

    min_snr: min(SNR, γ) / SNR (Hang et al. 2023, γ = 5 there, for noise prediction);
    p2: 1 / (1 + SNR) (Choi et al. 2022, k = γ = 1). Both are scaled to mean 1.

    Where noise is large it is easily told, and the loss falls to a hundredth of what it is at
    SNR 10. (1 + 1/SNR)^high_noise gives these levels their say back; near 0.6 all contribute
    alike, as the learned weights of Karras et al. 2024 (section 2.3) would have it.

    Returns:
        (steps,) float32.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if name == "min_snr":
        weights = np.minimum(snr, gamma) / snr
    elif name == "p2":
        weights = 1 / (1 + snr)
    else:
        weights = np.ones_like(snr)
    weights = weights / weights.mean() * (1 + 1 / snr) ** high_noise
    return torch.from_numpy(weights).float()


def timestep_probabilities(name: TimestepSampling, alpha_bar: NDArray) -> NDArray:
    """How often each timestep is trained, (steps,), of sum 1.

    lognormal: √r_t = √((1-ᾱ_t)/ᾱ_t), the noise level on a [-1, 1] image, is log-normal about 0.3
    (Karras et al. 2022, table 1: ln √r ~ N(-1.2, 1.2²)), where restorations are decided; one draw
    in ten is uniform, so that no level is forgotten.
    """
    uniform = np.full(len(alpha_bar), 1 / len(alpha_bar))
    if name == "uniform":
        return uniform
    level = np.log((1 - alpha_bar) / alpha_bar) / 2
    density = np.exp(-(((level + 1.2) / 1.2) ** 2) / 2) * np.gradient(level)
    return 0.9 * density / density.sum() + 0.1 * uniform


def standard_normal_cdf(x: Tensor) -> Tensor:
    """Φ(x)."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log p of 8-bit values scaled to [-1, 1] under a Gaussian, in nats (DDPM eq. 13)."""
    inv_std = torch.exp(-log_scale)
    upper = standard_normal_cdf((x - mean + 1 / 255) * inv_std)
    lower = standard_normal_cdf((x - mean - 1 / 255) * inv_std)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return -(upper - lower).clamp(min=1e-12).log()


def variational_term(
    diffusion: GaussianDiffusion, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """One term of the variational bound, in bits per dimension (IDDPM eq. 4-6), (N,).

    The mean is detached: this term trains the variance alone (IDDPM section 3.1). x̂_0 is not
    clipped, as in guided-diffusion: the variance is learnt of the mean that the network gives.
    """
    frozen = torch.cat([output.chunk(2, dim=1)[0].detach(), output.chunk(2, dim=1)[1]], dim=1)
    model = diffusion.p_mean_variance(lambda *_: frozen, x_t, t, bounded=False)
    mean, log_var = diffusion.q_posterior_mean(x_0, x_t, t), model["log_variance"]
    true_log_var = diffusion.at("posterior_log_variance", t, x_t)
    kl = 0.5 * (
        log_var
        - true_log_var
        - 1
        + torch.exp(true_log_var - log_var)
        + (mean - model["mean"]) ** 2 * torch.exp(-log_var)
    )
    nll = discretized_gaussian_nll(x_0, model["mean"], 0.5 * log_var)
    first = (t == 0).reshape(-1, 1, 1, 1)
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def training_loss(
    diffusion: GaussianDiffusion,
    model: Network,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ADM objective: weighted L_simple + L_vlb (IDDPM eq. 16, λ folded into the mean over t).

    Returns:
        scalar loss, and the unweighted simple loss (N,) for the log.
    """
    x_t = diffusion.q_sample(x_0, t, noise)
    output = model(x_t, diffusion.model_timesteps(t))
    eps = output[:, : x_0.shape[1]]
    simple = F.mse_loss(eps, noise, reduction="none").flatten(1).mean(1)
    loss = weights[t] * simple
    if output.shape[1] == 2 * x_0.shape[1]:
        scale = diffusion.num_timesteps / 1000
        loss = loss + scale * variational_term(diffusion, output, x_0, x_t, t)
    return loss.mean(), simple.detach()
