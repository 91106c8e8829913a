"""Few-step restoration: a Gaussian posterior with the power spectrum of the images as prior.

An own method of this program, built from published parts: the noise levels of DDRM (Kawar et al.
2022), in whose singular directions a state may carry the measurement itself, the x̂_0-based
correction of DiffPIR (Zhu et al. 2023), and log-spaced noise levels (Karras et al. 2022).
"""

import math

import numpy as np
import scipy.fft
import torch

from guided_diffusion.linear_gaussian import gaussian_posterior_mean
from guided_diffusion.measurements import Factor, SeparableOperator

# Mean power of a brain slice in [-1, 1] at spatial frequency f, in half cycles a 256 pixels
# (orthonormal DCT-II), measured on the prior's training images.
FREQUENCIES = (1, 3, 6, 12, 24, 48, 96, 192)
POWERS = (425, 147, 20, 4.2, 1.0, 0.187, 0.021, 0.0009)
MEAN_INTENSITY = -0.8
WIDEST_STD = 3.0  # √r_t above which an image is lost in noise, and steps would be wasted
FINISH = 0.2  # of the best direction's noise: how far below it the prior goes on cleaning up
SAMPLE_FINISH = 0.1  # the same, where what the measurement leaves open is to be drawn


def dct_matrix(size):
    """The orthonormal DCT-II of `size` points as a (frequency, point) float64 matrix."""
    return torch.from_numpy(scipy.fft.dct(np.eye(size), norm="ortho", axis=0))


def power_spectrum(height, width):
    """Prior variance of each DCT coefficient of an image, (height, width) float64."""
    rows, cols = 256 / height * np.arange(height), 256 / width * np.arange(width)
    radius = np.hypot(rows[:, None], cols)
    log_power = np.interp(
        np.log(np.maximum(radius, 1)),
        np.log(FREQUENCIES + (400,)),
        np.log(POWERS + (POWERS[-1] / 10,)),
    )
    return torch.from_numpy(np.exp(log_power))


def useful_levels(operator, sigma, sample=False):
    """The noise levels √r_t between which a measurement is worth sampling at, (high, low).

    Where A sees a direction with singular value s, its measurement is an image with noise σ/s.
    Above the largest of these (or WIDEST_STD, if A is blind to some direction) the measurement
    knows more than a state can; some way below the smallest it adds nothing to what a state holds.
    For denoising all are σ, and one evaluation of the network is the posterior mean; a `sample` of
    the posterior goes on from there, like everywhere else.
    """
    s = operator.singular_values
    widest, narrowest = (
        (float(sigma.max()), float(sigma.min())) if torch.is_tensor(sigma) else (sigma, sigma)
    )
    low = narrowest / float(s.max())
    complete = s.numel() == math.prod(operator.in_shape) and bool((s > 0).all())
    high = min(WIDEST_STD, widest / float(s.min())) if complete else WIDEST_STD
    if sample:
        return high, SAMPLE_FINISH * low
    return (high, FINISH * low) if high > low else (low, low)


def start_state(operator, y, sigma, diffusion, noise):
    """x_t at the diffusion's first step t, from the measurement instead of pure noise.

    A direction whose measurement has less noise than the state starts there, noise filled up;
    the others at the mean intensity.

    Args:
        y: (N, *operator.out_shape); sigma: its noise, a number or (N, 1, 1, 1).
        noise: (N, C, H, W) standard normal.

    Returns:
        (N, C, H, W).
    """
    alpha_bar = diffusion.alphas_cumprod[-1]
    r = (1 - alpha_bar) / alpha_bar
    s = operator.singular_values
    measured, variance = _inverted(s, operator.Ut(y), sigma)
    used = variance <= r
    state = MEAN_INTENSITY + math.sqrt(r) * noise
    fill = (r - torch.where(used, variance, 0.0)).clamp(min=0).sqrt()
    target = torch.where(used, measured + fill * operator.Vt(noise), operator.Vt(state))
    return math.sqrt(alpha_bar) * (state + operator.V(target - operator.Vt(state)))


def _inverted(s, Uty, sigma):
    """Uᵀy/s and its noise variance σ²/s², infinite where A is blind."""
    seen = s > 0
    safe = torch.where(seen, s, 1.0)
    return Uty / safe, torch.where(seen, (sigma / safe) ** 2, torch.inf)


def in_frequencies(operator):
    """The same A, with the DCT for the singular directions of the axes that it leaves alone.

    These have any orthonormal basis; in this one the prior's power spectrum is diagonal.
    """
    channel, *axes = operator.factors
    for i, f in enumerate(axes):
        if f.V is None:
            basis = dct_matrix(len(f.s)).mT
            axes[i] = Factor(basis, f.s, basis)
    s = operator.singular_values
    return SeparableOperator(channel, *axes, device=s.device, dtype=s.dtype)


class Spectral:
    """Alternate the network's x̂_0, its Gaussian correction by y, and noise for the next level.

    x̂_0's error is taken as Gaussian with variance v = κ r_t S/(κ r_t + S) at the frequency of prior
    power S: with κ = 1, that of a Wiener filter. In each singular direction of A the posterior
    then has mean x̂_0 + v s/(σ² + v s²) (ȳ - s x̂_0) and variance P = v σ²/(σ² + v s²), and noise of
    variance r_{t-1} - P makes the next state as noisy as the network is told.
    """

    spread = -1  # what of P and v goes into the next state's noise

    def __init__(self, operator, y, sigma, kappa=2.0):
        self.operator = in_frequencies(operator)
        self.Uty = self.operator.Ut(y)
        self.sigma = sigma
        self.kappa = kappa
        s = operator.singular_values
        self.S = power_spectrum(*operator.in_shape[1:]).to(s)
        self.dct = [dct_matrix(n).to(s) for n in operator.in_shape[1:]]
        # How much of each frequency (first axis) is in each singular direction (second).
        factors = self.operator.factors[1:]
        self.share = [(D @ f.V).square() for D, f in zip(self.dct, factors, strict=True)]

    def step(self, diffusion, model, x, t, randn_like):
        s = self.operator.singular_values
        a, a_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        r, r_prev = (1 - a) / a, (1 - a_prev) / a_prev
        x_0 = diffusion.predict(model, x, t)["pred_xstart"]
        v_dct = self.kappa * r * self.S / (self.kappa * r + self.S)
        rows, cols = self.share
        v = rows.mT @ v_dct @ cols  # (i, j), of the singular directions
        sigma = self._news(r) if t == diffusion.num_timesteps - 1 else self.sigma
        x_0 = gaussian_posterior_mean(self.operator, x_0, self.Uty, sigma, v)
        if t == 0:
            return x_0, x_0
        P = v * self.sigma**2 / (self.sigma**2 + v * s**2)
        noise = randn_like(x)
        fresh = self._coloured(noise, (r_prev + self.spread * v_dct).clamp(min=0).sqrt())
        seen = (r_prev + self.spread * P).clamp(min=0).sqrt() * self.operator.Vt(noise)
        change = torch.where(s > 0, seen - self.operator.Vt(fresh), 0.0)
        return math.sqrt(a_prev) * (x_0 + fresh + self.operator.V(change)), x_0

    def _coloured(self, noise, std):
        """White noise with the given standard deviation at each DCT frequency, (H, W)."""
        rows, cols = self.dct
        return rows.mT @ (std * (rows @ noise @ cols.mT)) @ cols

    def _news(self, r):
        """σ of what y still adds to a first state that holds it: 1/σ² = s²/r + 1/news²."""
        _, variance = _inverted(self.operator.singular_values, self.Uty, self.sigma)
        left = (r - variance).clamp(min=1e-6 * r)
        return torch.where(variance <= r, self.sigma**2 * r / left, self.sigma**2).sqrt()


class SpectralSample(Spectral):
    """Draw x_0 from the Gaussian posterior of `Spectral`, then noise of r_{t-1} for the next level.

    The decoupled noise annealing of Zhang et al. 2025 (DAPS, Algorithm 1), with that Gaussian, which
    knows the spectrum of images and needs no Langevin steps, for p(x_0 | x_t, y). As x_0's own
    variance P is drawn, too, the states have noise r_{t-1} + P around its mean, and the result is a
    sample of the posterior: exactly so for Gaussian images of this spectrum, with κ = 1.

    In denoising y itself is a state of the process, p(x_0 | y) that of the prior from there on, and
    the plain reverse steps draw from it without any Gaussian.
    """

    spread = 1

    def __init__(self, operator, y, sigma, kappa=1.0):
        super().__init__(operator, y, sigma, kappa)

    def step(self, diffusion, model, x, t, randn_like):
        plain = self._y_is_the_first_state(diffusion)
        if plain.all():
            return diffusion.p_sample(model, x, t, randn_like)
        if not plain.any():
            return super().step(diffusion, model, x, t, randn_like)
        # Images of different noise: each as it would be alone, from the same draw.
        noise = randn_like(x) if t > 0 else x
        free = diffusion.p_sample(model, x, t, lambda _: noise)
        guided = super().step(diffusion, model, x, t, lambda _: noise)
        return tuple(torch.where(plain, a, b) for a, b in zip(free, guided, strict=True))

    def _y_is_the_first_state(self, diffusion):
        """Whether y's noise is nearly all that the first state has, (N, 1, 1, 1) or (1, 1, 1, 1)."""
        a = diffusion.alphas_cumprod[-1]
        r = (1 - a) / a
        s = self.operator.singular_values
        _, variance = _inverted(s, self.Uty, self.sigma)
        near = (variance > 0.8 * r) & (variance <= r)
        complete = s.numel() == math.prod(self.operator.in_shape)
        return (near.reshape(-1, s.numel()).all(dim=1) & complete)[:, None, None, None]
