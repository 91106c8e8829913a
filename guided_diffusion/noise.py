"""The noise n of y = A x + n: models of it, how strong it is, and what it does to magnitudes.

To add a model: a subclass of `Noise` here and a row of `NOISES`.
"""

from typing import ClassVar, Protocol, cast

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from scipy.special import ndtri
from scipy.stats import ncx2

from guided_diffusion.noise_estimation import LOCAL_MEAN, estimate_sigma, estimate_sigma_map
from guided_diffusion.operators.base import Sigma
from util.errors import UserError
from util.parameters import MOST

WIDER = (9, 15)  # sides of the means that are to show that a pixel is air
TINY = np.finfo(float).tiny  # a probability whose quantile is finite
FAR = 8  # σ above black: Rice noise is normal from here on, to 0.02 σ


def local_signal(M: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The signal A of a magnitude image (N, C, H, W) with black at 0, by E[M²] = A² + 2σ².

    The mean is of 5×5 pixels (Gudbjartsson & Patz 1995). Where its A² is below three standard
    errors of that of air, 2σ²/5, a wider mean counts if it is lower: from so few pixels chance
    alone would keep air bright, for below 0 it is cut off.
    """
    noise = 2 * sigma**2
    power = uniform_filter(M**2, (1, *LOCAL_MEAN)) - noise
    faint = 3 * noise / LOCAL_MEAN[-1]
    for side in WIDER:
        wider = uniform_filter(M**2, (1, 1, side, side)) - noise
        power = np.where(power < faint, np.minimum(power, wider), power)
    return np.sqrt(np.maximum(power, 0))


def rician_to_normal(magnitude: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """z ~ N(0, 1) for a magnitude that is Rice(signal, 1) distributed: the same quantile of it."""
    far = signal > FAR
    z = magnitude - signal - 1 / (2 * np.maximum(signal, FAR))  # the mean is off by this there
    near = magnitude[~far] ** 2, 2, np.maximum(signal[~far], 1e-6) ** 2
    below, above = (np.maximum(tail, TINY) for tail in (ncx2.cdf(*near), ncx2.sf(*near)))
    z[~far] = np.where(below < above, ndtri(below), -ndtri(above))
    return z


def rician_to_gaussian(
    y: torch.Tensor, sigma: Sigma, signal: torch.Tensor | None = None
) -> torch.Tensor:
    """Turn a magnitude image's Rice distributed noise into Gaussian noise of standard deviation σ.

    Rice noise is no zero-mean noise: it brightens what is dark, by 1.25 σ in air, and is weaker and
    skewed there. Every pixel is given the value that has, under N(A, σ²), the quantile which its
    own has under Rice(A, σ), with A the signal about it, `local_signal`: after it, a restoration
    that takes the noise for Gaussian is right wherever A is. (A transformation of the whole image
    to stable variance, Foi 2011, has the same aim, but bends the grey values, so that a blur would
    no longer be linear in them.)

    Args:
        y: (N, C, H, W) tensor, black at -1.
        sigma: a number, or (N, 1, 1, 1).
        signal: A where it is known better, like y; by default `local_signal`.

    Returns:
        Like y; noise about black is below -1, too. Pixels at exactly -1 remain there: no noise has
        that value, but air that was painted black.
    """
    M = y.cpu().double().numpy() + 1
    std = np.maximum(torch.as_tensor(sigma).cpu().double().numpy(), 1e-6)
    if signal is None:
        A = local_signal(M, std)
    else:
        A = np.maximum(signal.cpu().double().numpy() + 1, 0)
    gaussian = A + std * rician_to_normal(M / std, A / std)
    return torch.from_numpy(np.where(M > 0, gaussian, 0) - 1).to(y)


class Random(Protocol):
    """What draws a noise model's numbers: `util.random.ImageRandom`, or the module torch."""

    def randn_like(self, x: torch.Tensor) -> torch.Tensor: ...

    def poisson(self, rate: torch.Tensor) -> torch.Tensor: ...


GLOBAL = cast(Random, torch)  # torch's global generator


class Noise:
    """A noise model: ``noise(y, random)`` draws it.

    Attributes:
        sigma: its standard deviation, in units of the [-1, 1] image; "auto" where it is to be
            estimated from measured images and nothing is simulated.
        name: in task files (measurement.noise.name).
        can_be_estimated: whether `estimate` knows this noise.
        is_magnitude: whether it is that of a magnitude image.
        of_kspace: whether the real and imaginary parts of k-space, no intensities, can have it.
    """

    name: ClassVar[str]
    can_be_estimated: ClassVar[bool] = False
    is_magnitude: ClassVar[bool] = False
    of_kspace: ClassVar[bool] = False

    def __init__(self, sigma: float | str):
        self.sigma = sigma

    @property
    def std(self) -> float:
        """σ, where it is a number."""
        return float(self.sigma)

    def __call__(self, y: torch.Tensor, random: Random = GLOBAL) -> torch.Tensor:
        """Noisy y, (N, C, H, W) like y."""
        raise NotImplementedError

    def estimate(self, y: np.ndarray, padding: np.ndarray | None = None) -> float:
        """σ of a measured image y, (C, H, W) in [-1, 1]; see `estimate_sigma`."""
        return estimate_sigma(y, self.is_magnitude, padding)

    def estimate_map(
        self, y: np.ndarray, voxel: tuple[float, float, float], padding: np.ndarray | None = None
    ) -> np.ndarray:
        """σ of each voxel of y, like `estimate`; see `estimate_sigma_map`."""
        return estimate_sigma_map(y, voxel, self.is_magnitude, padding)

    def to_gaussian(
        self, y: torch.Tensor, sigma: Sigma, signal: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y with its noise made Gaussian, which is what every method takes it for.

        Args:
            signal: y without noise, as far as it is known.
        """
        return y


class GaussianNoise(Noise):
    """n ~ N(0, σ² I)."""

    name = "gaussian"
    can_be_estimated = True
    of_kspace = True

    def __call__(self, y: torch.Tensor, random: Random = GLOBAL) -> torch.Tensor:
        return y + self.std * random.randn_like(y)


class PoissonNoise(Noise):
    """Photon noise, whose variance follows the signal and is σ² on average over each image.
    A volume that is restored as a whole is one image.

    With u = (y+1)/2 the counts are Poisson(u·peak); the noise of y has variance 4u/peak, and
    peak = 4·mean(u)/σ².
    """

    name = "poisson"

    def __call__(self, y: torch.Tensor, random: Random = GLOBAL) -> torch.Tensor:
        if self.sigma == 0:
            return y
        u = ((y + 1) / 2).clamp(min=0)
        peak = 4 * u.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6) / self.std**2
        # What lies below black (a bicubic undershoot) emits no photons and keeps its value.
        below = (y + 1).clamp(max=0)
        return 2 * random.poisson(u * peak) / peak - 1 + below


class RicianNoise(Noise):
    """The noise of a magnitude image, M = |m + n₁ + i n₂| with n₁, n₂ ~ N(0, σ² I).

    Intensities m and M are counted from black: m = y + 1, so that σ is, where the signal is
    strong, that of Gaussian noise.
    """

    name = "rician"
    can_be_estimated = True
    is_magnitude = True

    def __call__(self, y: torch.Tensor, random: Random = GLOBAL) -> torch.Tensor:
        real = y + 1 + self.std * random.randn_like(y)
        return torch.hypot(real, self.std * random.randn_like(y)) - 1

    def to_gaussian(
        self, y: torch.Tensor, sigma: Sigma, signal: torch.Tensor | None = None
    ) -> torch.Tensor:
        return rician_to_gaussian(y, sigma, signal)


class CleanNoise(Noise):
    """No noise: y = A x, and σ = 0 for the sampler."""

    name = "clean"
    of_kspace = True

    def __init__(self, sigma: float | str = 0.0):
        super().__init__(0.0)

    def __call__(self, y: torch.Tensor, random: Random = GLOBAL) -> torch.Tensor:
        return y


NOISES: dict[str, type[Noise]] = {
    noise.name: noise for noise in (GaussianNoise, PoissonNoise, RicianNoise, CleanNoise)
}


def get_noise(name: str, sigma: float | str = 0.0) -> Noise:
    """Build a noise model of `NOISES`.

    Args:
        sigma: see `Noise`.

    Raises:
        UserError: an unknown name, or a sigma that is no standard deviation.
    """
    if name not in NOISES:
        raise UserError(
            f"measurement.noise.name: expected one of {', '.join(NOISES)}, found {name!r}"
        )
    if sigma != "auto" and not 0 <= float(sigma) <= MOST:
        raise UserError(f"measurement.noise.sigma: expected a finite number >= 0, found {sigma}")
    return NOISES[name](sigma)
