"""Raw k-space made ready to be restored: scale, noise, coil maps, phase.

The prior knows real images, and a scanned object has a phase. Most of it is smooth and is in the
maps (`operators.coils.estimate_maps`); what is left costs 3 to 6 dB if it is taken for 0. So a
first reconstruction, of few network evaluations, has a complex image: its real part is the prior's
image, its imaginary part has a Gaussian prior alone, as has what folds over from outside of the
field of view. Between noise levels the smooth part of its phase goes into the maps. What it finds
besides the real part is then taken out of the measurement, and any method restores the rest.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.kspace import Acquisition
from guided_diffusion.dct import dct_matrix
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.methods.start import FINISH
from guided_diffusion.operators.coils import estimate_maps, noise_of_coils
from guided_diffusion.operators.fourier import fft1c, ifft1c
from guided_diffusion.operators.masks import cartesian_mask
from guided_diffusion.operators.mri import AXES, Coils
from guided_diffusion.operators.solver import FrequencyPosterior, scaled
from guided_diffusion.prior import Prior
from guided_diffusion.statistics import PriorStatistics
from util.errors import UserError

STEPS = 10  # network evaluations of the first reconstruction
WIDEST = 1.0  # √r_t of the first of them: the centre of k-space is measured, so little is open
KAPPA = 2.0  # of the real part's prior, see `methods.spectral.Spectral`
IMAGINARY = 0.3  # prior variance of the imaginary part, as a share of the images' power
SMOOTH = (8.0, 4.0)  # pixels: how far the phase is averaged at the first level, and at the last


@dataclass(frozen=True)
class Scan:
    """A slice of raw k-space that any method restores: y = A x + n, see `operators.mri`.

    Attributes:
        operator: A, with the estimated phase in its maps.
        y: (1, *operator.out_shape).
        sigma: standard deviation of n.
        beside: (1, 1, H, W), magnitude of what x does not hold: its imaginary part, and what
            folds over.
        zero_filled: (1, 1, H, W) in [-1, 1].
    """

    operator: Coils
    y: torch.Tensor
    sigma: float
    beside: torch.Tensor
    zero_filled: torch.Tensor

    def magnitude(self, x: torch.Tensor) -> torch.Tensor:
        """The whole object's magnitude, black at -1, for an image (..., H, W) of the prior."""
        return torch.hypot(x + 1, self.beside.to(x)) - 1


def lines_of(acquisition: Acquisition, parameters: Mapping[str, Any]) -> np.ndarray:
    """The mask: the file's own or, of a complete file, that of the task.

    Raises:
        UserError: no such mask, see `cartesian_mask`.
    """
    if not acquisition.complete:
        return acquisition.mask
    keys = ("acceleration", "center_fraction")
    mask = cartesian_mask(
        parameters["mask"],
        len(acquisition.mask),
        seed=parameters["mask_seed"],
        **{k: parameters[k] for k in keys},
    )
    return mask & acquisition.mask


def prepare(
    acquisition: Acquisition,
    parameters: Mapping[str, Any],
    sigma: float | None,
    prior: Prior,
    schedule: Mapping[str, Any],
    randn_like: Callable[[torch.Tensor], torch.Tensor],
) -> Scan:
    """Estimate what a method needs to know of a scan.

    Args:
        parameters: of the operator `mri`, complete.
        sigma: of the noise, in units of the [-1, 1] image; None estimates it.
        schedule: `create_sampler`'s arguments; of them the network's own count.
        randn_like: maps a tensor to standard normal noise of its shape.

    Raises:
        UserError: too few lines about the centre, or no noise to measure.
    """
    mask, axis, device = lines_of(acquisition, parameters), acquisition.axis, prior.device
    if axis != parameters["axis"] and parameters["axis"] != "columns":
        raise UserError(f"measurement.operator.axis: {parameters['axis']}, and the file has {axis}")
    dim = AXES[axis]
    kspace = torch.from_numpy(acquisition.kspace) * (2 / acquisition.white)
    kept = torch.from_numpy(mask)
    kspace = kspace * (kept if dim == -1 else kept[:, None])
    if sigma is None:
        sigma = float(noise_of_coils(kspace, mask, axis).square().mean().sqrt())
    maps = estimate_maps(kspace, mask, axis).to(device)
    first = FirstLook(
        maps, to_hybrid_image(kspace, dim).to(device), kept.to(device), dim, sigma, prior.statistics
    )
    arguments = {**schedule, "clip_denoised": False, "start": "", "eta": 0.0}
    arguments |= {"timestep_respacing": f"logsnr{STEPS}", "start": "auto"}
    diffusion = create_sampler(**arguments, levels=(max(WIDEST, 2 * sigma), FINISH * sigma))
    z = first.run(diffusion, prior.network, randn_like)

    beside = z.clone()
    beside[:1] = 1j * z[:1].imag
    left = first.hybrid - first.forward(beside)
    index = kept.to(device).nonzero()[:, 0]
    left = left.index_select(dim, index)
    operator = Coils(mask, maps[0] * first.turn[0, 0], axis, device=device)
    y = torch.cat([left.real, left.imag], dim=dim) - operator.offset()
    zero_filled = first.adjoint(first.hybrid).abs().square().sum(dim=0, keepdim=True).sqrt() - 1
    magnitude = beside.abs().square().sum(dim=0, keepdim=True).sqrt()
    return Scan(operator, y, sigma, magnitude, zero_filled)


def to_hybrid_image(kspace: torch.Tensor, dim: int) -> torch.Tensor:
    """(C, H, W) k-space → (1, C, H, W), transformed back along the readout."""
    return ifft1c(kspace, -3 - dim)[None]


class FirstLook:
    """The first reconstruction: a complex image, and a second one that folds over.

    Args:
        maps: (2, C, H, W), see `estimate_maps`; hybrid: (1, C, H, W) complex, lines that are not
            measured 0; kept: (N,) bool; dim: the phase encoding's axis.

    Attributes:
        turn: (1, 1, H, W), e^{iφ}, φ the phase found so far that is not in `maps`.
    """

    def __init__(
        self,
        maps: torch.Tensor,
        hybrid: torch.Tensor,
        kept: torch.Tensor,
        dim: int,
        sigma: float,
        statistics: PriorStatistics,
    ):
        self.maps, self.hybrid, self.dim, self.sigma = maps, hybrid, dim, sigma
        self.kept = kept if dim == -1 else kept[:, None]
        self.power = statistics.power_spectrum(*maps.shape[-2:]).to(hybrid.real)
        self.mean_intensity = statistics.mean_intensity
        self.dct = [dct_matrix(n).to(self.power) for n in self.power.shape]
        self.turn = torch.ones_like(hybrid[:, :1])

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(2, 1, H, W), the two images, their phase turned by `turn` → (1, C, H, W)."""
        image = (self.maps * (self.turn * z)).sum(dim=0, keepdim=True)
        return self.kept * fft1c(image, self.dim)

    def adjoint(self, hybrid: torch.Tensor) -> torch.Tensor:
        images = self.maps.conj() * ifft1c(self.kept * hybrid, self.dim)
        return self.turn.conj() * images.sum(dim=1, keepdim=True)

    def solve(self, x_0: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """The posterior mean of both images, x_0 + 1 the first one's mean before.

        Args:
            x_0: (1, 1, H, W); variance: (H, W), of the real part's DCT coefficients.

        Returns:
            (2, 1, H, W) complex.
        """
        mean = torch.cat([x_0 + 1, torch.zeros_like(x_0)]) + 0j
        b = self.adjoint(self.hybrid - self.forward(mean)) / self.sigma**2
        # Four real images as channels of one: real and imaginary parts of either.
        variances = torch.stack([variance, IMAGINARY * self.power, self.power, self.power])
        information = float(self.kept.float().mean()) / self.sigma**2
        solver = FrequencyPosterior(variances, information)

        def weigh(x: torch.Tensor) -> torch.Tensor:
            return _as_real(self.adjoint(self.forward(_as_complex(x)))) / self.sigma**2

        return mean + _as_complex(solver.solve(weigh, _as_real(b)))

    def run(
        self,
        diffusion: GaussianDiffusion,
        network: Callable,
        randn_like: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Alternate the network and `solve`, turning the images' smooth phase into `turn`.

        Returns:
            (2, 1, H, W) complex, both images; 1 is white's half, black is 0.
        """
        steps = diffusion.num_timesteps
        x = torch.full_like(self.hybrid[:, :1].real, self.mean_intensity)
        z, v = self._turned(self.solve(x, self.power), SMOOTH[0]), torch.zeros_like(self.power)
        with torch.inference_mode():
            for t in reversed(range(steps)):
                a = diffusion.alphas_cumprod[t]
                r = (1 - a) / a
                # x's own error v, where it is not measured, is part of the state's noise.
                fresh = scaled(randn_like(x), (r - v).clamp(min=0).sqrt(), self.dct)
                state = math.sqrt(a) * (z[:1].real - 1 + fresh)
                x_0 = diffusion.predict(network, state, t)["pred_xstart"].float()
                v = KAPPA * r * self.power / (KAPPA * r + self.power)
                share = 1 - t / steps
                z = self._turned(self.solve(x_0, v), SMOOTH[0] + share * (SMOOTH[1] - SMOOTH[0]))
        return z

    def _turned(self, z: torch.Tensor, width: float) -> torch.Tensor:
        """z, its first image's phase, averaged over `width` pixels, moved into `turn`."""
        phase = low_pass(z[:1], width).angle()
        turn = torch.polar(torch.ones_like(phase), phase)
        self.turn = self.turn * turn
        return z * turn.conj()


def low_pass(z: torch.Tensor, width: float) -> torch.Tensor:
    """A complex image (..., H, W) under a Gaussian of standard deviation `width` pixels."""
    rows, cols = (torch.fft.fftfreq(n, device=z.device) for n in z.shape[-2:])
    window = torch.exp(-2 * (math.pi * width) ** 2 * (rows[:, None] ** 2 + cols**2))
    return torch.fft.ifft2(torch.fft.fft2(z) * window)


def _as_real(z: torch.Tensor) -> torch.Tensor:
    """(2, 1, H, W) complex → (1, 4, H, W)."""
    return torch.stack([z[0, 0].real, z[0, 0].imag, z[1, 0].real, z[1, 0].imag])[None]


def _as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x[0, 0::2], x[0, 1::2])[:, None]
