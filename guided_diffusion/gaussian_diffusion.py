"""The reverse process of a Gaussian diffusion.

Symbols follow Ho et al. (2020, "DDPM"), Nichol & Dhariwal (2021, "IDDPM") and Song et al.
(2021, "DDIM"): x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guided_diffusion.schedules import Respacing, chosen_timesteps, noise_schedule_betas
from util.errors import UserError

SAMPLERS = ("ddpm", "ddim")
MEAN_TYPES = ("epsilon", "start_x", "previous_x")
VAR_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")
MOST_STEPS = 100_000  # published schedules have 1000 or 4000
DYNAMIC_THRESHOLD_QUANTILE = 0.995  # Saharia et al. 2022 (Imagen), section 2.3

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, timesteps) → prediction
RandnLike = Callable[[Tensor], Tensor]
Prediction = dict[str, Tensor]  # what `GaussianDiffusion.p_mean_variance` returns
Step = tuple[Tensor, Tensor]  # (x_{t-1}, x̂_0), each (N, C, H, W)


class GaussianDiffusion:
    """The reverse process over a (respaced) schedule.

    `num_timesteps` steps; `timestep_map` gives each step's timestep in the original schedule,
    which is what the network is told; `rescale_timesteps` tells it thousandths of
    `original_num_steps`, the length of that schedule, or of this one where it is None. `betas` and
    `alphas_cumprod` are float64 arrays. With `slices` the channels are the slices of volumes, each
    an image.
    """

    def __init__(
        self,
        betas: NDArray,
        timestep_map: Sequence[int],
        sampler: str = "ddpm",
        model_mean_type: str = "epsilon",
        model_var_type: str = "learned_range",
        dynamic_threshold: bool = False,
        clip_denoised: bool = True,
        rescale_timesteps: bool = False,
        original_num_steps: int | None = None,
        eta: float = 0.0,
        slices: bool = False,
    ):
        self.sampler = sampler
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.dynamic_threshold = dynamic_threshold
        self.clip_denoised = clip_denoised
        self.eta = eta
        self.slices = slices
        self.timestep_map = list(timestep_map)
        original = original_num_steps or len(betas)
        self.time_scale = 1000.0 / original if rescale_timesteps else None

        self.betas = betas
        self.num_timesteps = len(betas)
        self.alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(self.alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        alpha_bar, alpha_bar_prev = self.alphas_cumprod, self.alphas_cumprod_prev
        # q(x_{t-1} | x_t, x_0), DDPM eq. 6-7
        posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # The variance is 0 at t = 0; its logarithm takes the next one's place there.
        first = posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self._tables = {
            "sqrt_alpha_bar": np.sqrt(alpha_bar),
            "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
            "sqrt_recip_alpha_bar": np.sqrt(1 / alpha_bar),
            "sqrt_r": np.sqrt(1 / alpha_bar - 1),
            "posterior_coef_x0": betas * np.sqrt(alpha_bar_prev) / (1 - alpha_bar),
            "posterior_coef_xt": (1 - alpha_bar_prev) * np.sqrt(self.alphas) / (1 - alpha_bar),
            "posterior_log_variance": np.log(np.append(first, posterior_variance[1:])),
            "fixed_large_log_variance": np.log(np.append(first, betas[1:])),
            "log_betas": np.log(betas),
            "timestep_map": np.array(self.timestep_map),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def _table(self, name: str, device: torch.device) -> Tensor:
        if device not in self._on_device:
            with torch.inference_mode(False):  # usable under autograd, too
                self._on_device[device] = {
                    k: torch.from_numpy(v).to(device) for k, v in self._tables.items()
                }
        return self._on_device[device][name]

    def at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """The coefficient `name` at steps t (N,), shaped to multiply x, (N, 1, 1, 1)."""
        values = self._table(name, x.device)[t].to(x.dtype)
        return values.reshape(-1, *[1] * (x.ndim - 1))

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps of the original schedule to tell the network, (N,)."""
        mapped = self._table("timestep_map", t.device)[t]
        return mapped if self.time_scale is None else mapped.float() * self.time_scale

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) with the given standard normal noise."""
        signal = self.at("sqrt_alpha_bar", t, x_0) * x_0
        return signal + self.at("sqrt_one_minus_alpha_bar", t, x_0) * noise

    def q_posterior_mean(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        towards_x0 = self.at("posterior_coef_x0", t, x_t) * x_0
        return towards_x0 + self.at("posterior_coef_xt", t, x_t) * x_t

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t."""
        return self.at("sqrt_recip_alpha_bar", t, x_t) * x_t - self.at("sqrt_r", t, x_t) * eps

    def _log_variance(self, values: Tensor | None, x: Tensor, t: Tensor) -> Tensor:
        if self.model_var_type == "fixed_small":
            return self.at("posterior_log_variance", t, x).expand_as(x)
        if self.model_var_type == "fixed_large":
            return self.at("fixed_large_log_variance", t, x).expand_as(x)
        assert values is not None
        if self.model_var_type == "learned":
            return values
        # learned_range: interpolate the two bounds in the log domain, IDDPM eq. 15
        low = self.at("posterior_log_variance", t, x)
        return torch.lerp(low, self.at("log_betas", t, x), (values + 1) / 2)

    def bound(self, x_0: Tensor) -> Tensor:
        """x̂_0 clipped or thresholded as configured."""
        if self.dynamic_threshold:
            magnitude = x_0.abs().flatten(2 if self.slices else 1)  # of each image
            bound = torch.quantile(magnitude, DYNAMIC_THRESHOLD_QUANTILE, dim=-1)
            bound = bound.clamp(min=1).reshape(*bound.shape, *[1] * (x_0.ndim - bound.ndim))
            x_0 = torch.maximum(torch.minimum(x_0, bound), -bound) / bound
        return x_0.clamp(-1, 1) if self.clip_denoised else x_0

    def p_mean_variance(
        self, model: Network, x: Tensor, t: Tensor, bounded: bool = True
    ) -> Prediction:
        """The network's p(x_{t-1} | x_t).

        Args:
            model: maps (x, timesteps) to (N, C, H, W) or, with learned variance,
                (N, 2C, H, W).
            x: (N, C, H, W), x_t.
            t: (N,) int64 steps of this process.
            bounded: whether x̂_0 is clipped or thresholded as configured; otherwise it is as the
                network has it.

        Returns:
            dict of (N, C, H, W) tensors: "mean", "variance", "log_variance", "pred_xstart".
        """
        output = model(x, self.model_timesteps(t))
        channels = x.shape[1]
        if output.shape[1] == 2 * channels:
            output, values = output.split(channels, dim=1)
        elif self.model_var_type.startswith("learned"):
            raise UserError(
                f"diffusion config: model_var_type {self.model_var_type} needs a model with "
                "learn_sigma: true"
            )
        else:
            values = None

        if self.model_mean_type == "previous_x":
            without_xt = output - self.at("posterior_coef_xt", t, x) * x
            pred_xstart = without_xt / self.at("posterior_coef_x0", t, x)
            pred_xstart = self.bound(pred_xstart) if bounded else pred_xstart
            mean = output
        else:
            if self.model_mean_type == "epsilon":
                output = self.predict_xstart_from_eps(x, t, output)
            pred_xstart = self.bound(output) if bounded else output
            mean = self.q_posterior_mean(pred_xstart, x, t)
        log_variance = self._log_variance(values, x, t)
        return {
            "mean": mean,
            "variance": log_variance.exp(),
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def predict(self, model: Network, x: Tensor, t: int) -> Prediction:
        """`p_mean_variance` of a batch that is all at step t, an int."""
        steps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        return self.p_mean_variance(model, x, steps)

    def p_sample(self, model: Network, x: Tensor, t: int, randn_like: RandnLike) -> Step:
        """One reverse step, x_t → x_{t-1}, by the configured sampler.

        Args:
            t: int, the step; noise is drawn for t > 0 only.
            randn_like: maps a tensor to standard normal noise of its shape.

        Returns:
            (x_{t-1}, x̂_0), each (N, C, H, W).
        """
        out = self.predict(model, x, t)
        return self.sample_from(out, x, t, randn_like), out["pred_xstart"]

    def sample_from(self, out: Prediction, x: Tensor, t: int, randn_like: RandnLike) -> Tensor:
        """x_{t-1} by the configured sampler, from the prediction `out` at x_t."""
        if self.sampler == "ddim":
            a, a_prev = self.alphas_cumprod[t], self.alphas_cumprod_prev[t]
            sigma = self.eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))  # eq. 16
            return self.ddim_step(x, out["pred_xstart"], t, sigma, randn_like)
        if t == 0:
            return out["mean"]
        return torch.addcmul(out["mean"], (0.5 * out["log_variance"]).exp(), randn_like(x))

    def ddim_step(
        self, x: Tensor, x_0: Tensor, t: int, sigma: float, randn_like: RandnLike
    ) -> Tensor:
        """DDIM eq. 12: x_{t-1} from x_t and an estimate of x_0, with fresh noise of std sigma."""
        a_prev = self.alphas_cumprod_prev[t]
        eps = self.eps_from_xstart(x, x_0, t)
        sample = math.sqrt(a_prev) * x_0 + math.sqrt(max(0.0, 1 - a_prev - sigma**2)) * eps
        return sample + sigma * randn_like(x) if t > 0 and sigma > 0 else sample

    def eps_from_xstart(self, x: Tensor, x_0: Tensor, t: int) -> Tensor:
        """ε with x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, for a batch that is all at step t."""
        a = self.alphas_cumprod[t]
        return (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)

    def p_sample_loop(
        self,
        model: Network,
        x_T: Tensor,
        step: Callable[["GaussianDiffusion", Network, Tensor, int, RandnLike], Step],
        randn_like: RandnLike,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        left: int | None = None,
    ) -> Tensor:
        """Run the whole reverse process, without building an autograd graph.

        Args:
            model: the network, see `p_mean_variance`.
            x_T: (N, C, H, W) standard normal noise.
            step: a method's ``step(diffusion, model, x, t, randn_like)``, which returns
                (x_{t-1}, x̂_0); `GaussianDiffusion.p_sample` draws from the prior alone.
            randn_like: see `p_sample`.
            callback: called as ``callback(t, x_{t-1}, x̂_0)`` after each step.
            left: steps to take, of a process that was stopped at x_T; None: all.

        Returns:
            (N, C, H, W), x_0; not clipped.
        """
        x = x_T
        with torch.inference_mode():
            for t in reversed(range(self.num_timesteps if left is None else left)):
                x, pred_xstart = step(self, model, x, t, randn_like)
                if callback is not None:
                    callback(t, x, pred_xstart)
        return x


def create_sampler(
    sampler: str,
    steps: int,
    noise_schedule: str,
    model_mean_type: str,
    model_var_type: str,
    dynamic_threshold: bool,
    clip_denoised: bool | Literal["auto"],
    rescale_timesteps: bool,
    timestep_respacing: Respacing = "",
    eta: float = 0.0,
    start: int | str = "",
    levels: tuple[float, float] | None = None,
    unclipped_from: float = math.inf,
    slices: bool = False,
) -> GaussianDiffusion:
    """Build the (respaced) diffusion that a diffusion YAML describes.

    Args:
        sampler: "ddpm", or "ddim" with stochasticity `eta`.
        steps, noise_schedule: length and schedule of the process the network was trained on.
        timestep_respacing: see `space_timesteps`; or "logsnrN", see `log_snr_timesteps`.
        start: the timestep to start from; "" is the last one, pure noise; "auto" asks `levels`.
        levels: (high, low) noise levels √r_t that suit the measurement, for "auto".
        clip_denoised: whether x̂_0 is clipped to [-1, 1]; "auto" asks `unclipped_from`.
        unclipped_from: steps from which it is not, for "auto".
        slices: whether the channels are the slices of volumes, each thresholded by itself.

    Raises:
        UserError: an unknown name or an impossible number, naming the key.
    """
    for key, value, known in (
        ("sampler", sampler, SAMPLERS),
        ("model_mean_type", model_mean_type, MEAN_TYPES),
        ("model_var_type", model_var_type, VAR_TYPES),
    ):
        if value not in known:
            raise UserError(
                f"diffusion config: {key}: expected one of {', '.join(known)}, found {value!r}"
            )
    if steps < 1:
        raise UserError(f"diffusion config: steps: expected at least 1, found {steps}")
    if steps > MOST_STEPS:
        raise UserError(f"diffusion config: steps: expected at most {MOST_STEPS}, found {steps}")
    if not 0 <= eta <= 1:
        raise UserError(f"diffusion config: eta: expected a number in [0, 1], found {eta}")
    alphas_cumprod = np.cumprod(1.0 - noise_schedule_betas(noise_schedule, steps))
    timestep_map = chosen_timesteps(alphas_cumprod, timestep_respacing, start, levels)
    alphas_cumprod = alphas_cumprod[timestep_map]
    if clip_denoised == "auto":
        clip_denoised = len(timestep_map) < unclipped_from
    betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return GaussianDiffusion(
        betas,
        timestep_map,
        sampler=sampler,
        model_mean_type=model_mean_type,
        model_var_type=model_var_type,
        dynamic_threshold=dynamic_threshold,
        clip_denoised=clip_denoised,
        rescale_timesteps=rescale_timesteps,
        original_num_steps=steps,
        eta=eta,
        slices=slices,
    )
