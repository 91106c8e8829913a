"""The prior as a denoiser, for PyTorch code and for deepinv."""

from dataclasses import replace
from typing import Any

import torch

from guided_diffusion.config import Schedule, read_schedule
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.prior import Prior
from util.errors import UserError

SCHEDULE = "configs/diffusion_config_100.yaml"  # of the shipped prior's training, if all its steps


class Denoiser:
    """What a prior takes images with Gaussian noise for, by one evaluation.

    The network's estimate at the timestep t whose noise level s_t = √((1-ᾱ_t)/ᾱ_t) is nearest to
    σ, of which the share σ/s_t is taken: with no noise an image stays as it is.
    """

    def __init__(self, prior: Prior, diffusion_config: str | Schedule = SCHEDULE) -> None:
        """Args:
        diffusion_config: the diffusion file of the prior's training, or what it holds; all its
            steps are taken.

        Raises:
            UserError: the file cannot be read.
        """
        if isinstance(diffusion_config, str):
            diffusion_config = read_schedule(diffusion_config)
        schedule = replace(diffusion_config, timestep_respacing="", start="", clip_denoised=False)
        self.network, self.device = prior.network, prior.device
        self.diffusion = create_sampler(**schedule.sampler_arguments())
        levels = torch.from_numpy(self.diffusion.alphas_cumprod)
        self.levels = torch.sqrt((1 - levels) / levels)

    def __call__(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_0 + σ n = x].

        Args:
            x: (N, C, H, W), x_0 in [-1, 1]; sides as the network takes them, of the shipped one
                multiples of 16.
            sigma: in units of the [-1, 1] image, a number or (N,).
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu().expand(len(x))
        distance = self.levels.log() - sigma.clamp(min=1e-6).log()[:, None]
        t = distance.abs().argmin(dim=1)
        share = (sigma / self.levels[t]).to(x).reshape(-1, 1, 1, 1)
        t = t.to(x.device)
        x_t = self.diffusion.at("sqrt_alpha_bar", t, x) * x
        x_0 = self.diffusion.p_mean_variance(self.network, x_t, t)["pred_xstart"]
        return x + share * (x_0 - x)


def import_deepinv() -> Any:
    """The module deepinv, which is not among the requirements.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import deepinv
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
        raise UserError(
            f"deepinv cannot be imported ({error}); pip install deepinv, with the torchvision that "
            "fits your torch"
        ) from None
    return deepinv


def deepinv_denoiser(prior: Prior, diffusion_config: str = SCHEDULE) -> Any:
    """A prior as deepinv (https://deepinv.github.io) has denoisers: images and σ in [0, 1].

    Args:
        diffusion_config: see `Denoiser`.

    Returns:
        A `deepinv.models.Denoiser`, called as ``denoiser(u, sigma)``.

    Raises:
        UserError: see `import_deepinv` and `Denoiser`.
    """
    denoise = Denoiser(prior, diffusion_config)

    base: Any = import_deepinv().models.Denoiser

    class PriorDenoiser(base):
        def forward(self, u, sigma, **kwargs):
            sigma = self._handle_sigma(sigma, batch_size=len(u), device=u.device)
            return (denoise(2 * u - 1, 2 * sigma) + 1) / 2

    return PriorDenoiser(device=prior.device)
