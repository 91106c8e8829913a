"""Raw k-space made ready to be restored: scale, noise, coil maps, phase.

The prior knows real images, and a scanned object has a phase. Most of it is smooth and is in the
maps (`operators.coils.estimate_maps`); what is left would be an error if it were taken for 0. So a
first reconstruction, of few network evaluations, has a complex image: its real part is the prior's
image, its imaginary part has a Gaussian prior alone, as has what folds over from outside of the
field of view. Between noise levels the smooth part of its phase goes into the maps, and the prior's
variances become local: vessels and scalp hold nearly all that is imaginary or folds over. What it
finds besides the real part is then taken out of the measurement, and any method restores the rest.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data.kspace import Acquisition
from guided_diffusion.dct import dct_matrix
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.measuring import LEAST_SIDE
from guided_diffusion.methods.start import FINISH
from guided_diffusion.operators.coils import estimate_maps, noise_of_coils
from guided_diffusion.operators.fourier import ifft1c, low_pass
from guided_diffusion.operators.masks import measured_centre, on_kspace, sampling_mask
from guided_diffusion.operators.scanned import AXES, at_least
from guided_diffusion.operators.several_coils import SeveralCoils, several_coils
from guided_diffusion.operators.solver import (
    EVERYWHERE,
    LOCAL,
    FrequencyPosterior,
    local_std,
    scaled,
)
from guided_diffusion.prior import Prior
from guided_diffusion.statistics import PriorStatistics
from util.errors import UserError

STEPS = 10  # network evaluations of the first reconstruction
KAPPA = 2.0  # of the real part's prior, see `methods.spectral.Spectral`
# Prior variances of the imaginary part and of what folds over, as shares of the images' power, and
# `local_std`'s arguments for them: vessels and scalp are nearly all of them.
IMAGINARY, FOLDED = 0.1, 0.3
SPARSE = (1.5, 0.05)
SMOOTH = (8.0, 4.0)  # pixels: how far the phase is averaged at the first level, and at the last
NEAR = (7, 21)  # along an encoded axis and along another: where x̂'s misfit is averaged


@dataclass(frozen=True)
class Scan:
    """A slice of raw k-space that any method restores: y = A x + n, see `operators.mri`.

    Attributes:
        operator: A, with the estimated phase in its maps.
        y: (1, *operator.out_shape).
        sigma: standard deviation of n.
        first: the maps, and the scan itself.
        beside: (2, 1, H, W) complex, what x does not hold: the object's imaginary part, and what
            folds over.
        zero_filled: (1, 1, H, W) in [-1, 1].
        keep_measured: see `FirstLook.coil_images`.
    """

    operator: SeveralCoils
    y: torch.Tensor
    sigma: float
    first: "FirstLook"
    beside: torch.Tensor
    zero_filled: torch.Tensor
    keep_measured: bool = False

    def magnitude(self, x: torch.Tensor) -> torch.Tensor:
        """The root of the sum of squares over the coils, black at -1.

        Args:
            x: images (..., H, W) of the prior.
        """
        rows = x.reshape(-1, 1, 1, *x.shape[-2:]).to(self.beside.real)
        return torch.cat([self._shown(row) for row in rows]).reshape(x.shape).to(x) - 1

    def _shown(self, x: torch.Tensor) -> torch.Tensor:
        z = self.beside + torch.cat([x + 1, torch.zeros_like(x)])
        return self.first.magnitude(z, self.keep_measured)


def mask_of(acquisition: Acquisition, parameters: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The mask, lines or points: the file's own or, of a complete file, that of the task.

    Raises:
        UserError: no such mask, see `sampling_mask`.
    """
    if not acquisition.complete:
        return acquisition.mask
    height, width = acquisition.kspace.shape[-2:]
    mask = sampling_mask(height, width, acquisition.axis, parameters)
    measured = acquisition.mask
    if mask.ndim == measured.ndim:
        return mask & measured
    return on_kspace(mask, acquisition.axis) & on_kspace(measured, acquisition.axis)


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
    first = look(acquisition, parameters, sigma, prior.statistics, prior.device)
    mask, axis, sigma = mask_of(acquisition, parameters), acquisition.axis, first.sigma
    arguments = {**schedule, "clip_denoised": False, "start": "", "eta": 0.0}
    arguments |= {"timestep_respacing": f"logsnr{STEPS}", "start": "auto"}
    widest = first_amplitude(mask, prior.statistics)
    diffusion = create_sampler(**arguments, levels=(max(widest, 2 * sigma), FINISH * sigma))
    z = first.run(diffusion, prior.network, randn_like)

    beside = torch.cat([1j * z[:1].imag, z[1:]])
    left = first.hybrid - first.forward(beside)
    maps, threshold = first.maps[0] * first.turn[0, 0], parameters["singular_value_threshold"]
    operator = several_coils(mask, maps, axis, threshold, prior.device)
    y = operator.gathered(left) - operator.offset()
    zero_filled = first.adjoint(first.hybrid).abs().square().sum(dim=0, keepdim=True).sqrt() - 1
    return Scan(operator, y, sigma, first, beside, zero_filled, parameters["keep_measured"])


def first_amplitude(mask: NDArray[np.bool_], statistics: PriorStatistics) -> float:
    """Standard deviation of the images at the first frequency that is not measured.

    While the phase is unknown, the first reconstruction starts there: on tuning slices it was more
    often better than the lower level at which an operator starts, `Scanned.widest_std`.

    Args:
        mask: (N,) or (H, W); of points, the axis counts whose measured centre is shorter.
    """
    amplitudes = []
    for (first, end), size in zip(measured_centre(mask), mask.shape, strict=True):
        cycles = max(min(size // 2 - first, end - size // 2), 1)
        spectrum = statistics.power_spectrum(1, size)[0]
        amplitudes.append(math.sqrt(float(spectrum[min(2 * cycles, size - 1)])))  # half cycles
    return max(amplitudes)


def look(
    acquisition: Acquisition,
    parameters: Mapping[str, Any],
    sigma: float | None,
    statistics: PriorStatistics,
    device: torch.device,
) -> "FirstLook":
    """A slice's k-space with its coils' maps; see `prepare`."""
    height, width = acquisition.kspace.shape[-2:]
    if min(height, width) < LEAST_SIDE:
        raise UserError(f"{width}×{height} samples of k-space, and the least side is {LEAST_SIDE}")
    mask, axis = mask_of(acquisition, parameters), acquisition.axis
    if parameters["axis"] not in (None, axis):
        raise UserError(f"measurement.operator.axis: {parameters['axis']}, and the file has {axis}")
    dims = (-2, -1) if mask.ndim == 2 else (AXES[axis],)
    kept = torch.from_numpy(on_kspace(mask, axis).copy())
    kspace = torch.from_numpy(acquisition.kspace) * (2 / acquisition.white) * kept
    if sigma is None:
        sigma = float(noise_of_coils(kspace, mask, axis).square().mean().sqrt())
    maps = estimate_maps(kspace, mask, axis).to(device)
    hybrid = to_hybrid_image(kspace, dims).to(device)
    return FirstLook(maps, hybrid, kept.to(device), dims, sigma, statistics)


def to_hybrid_image(kspace: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """(C, H, W) k-space → (1, C, H, W), transformed back along the axes that are not in `dims`."""
    for dim in {-2, -1} - set(dims):
        kspace = ifft1c(kspace, dim)
    return kspace[None]


class FirstLook:
    """The first reconstruction: a complex image, and a second one that folds over.

    Args:
        maps: (2, C, H, W), see `estimate_maps`; hybrid: (1, C, H, W) complex, 0 where nothing is
            measured; kept: bool, broadcasts to (H, W); dims: the axes of phase encoding.

    Attributes:
        turn: (1, 1, H, W), e^{iφ}, φ the phase found so far that is not in `maps`.
        local: (1, 4, H, W), of the two images' real and imaginary parts, see `local_std`.
    """

    def __init__(
        self,
        maps: torch.Tensor,
        hybrid: torch.Tensor,
        kept: torch.Tensor,
        dims: tuple[int, ...],
        sigma: float,
        statistics: PriorStatistics,
    ):
        self.maps, self.hybrid, self.dims, self.sigma = maps, hybrid, dims, sigma
        # In the order of frequencies that FFTs have, so that maps need not be copied each time.
        self._kept = torch.fft.ifftshift(kept, dims)
        self._maps = torch.fft.ifftshift(maps, dims)
        self.power = statistics.power_spectrum(*maps.shape[-2:]).to(hybrid.real)
        self.mean_intensity = statistics.mean_intensity
        self.dct = [dct_matrix(n).to(self.power) for n in self.power.shape]
        self.turn = torch.ones_like(hybrid[:, :1])
        self.local = torch.ones_like(self.power).expand(1, 4, *self.power.shape)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(2, 1, H, W), the two images, their phase turned by `turn` → (1, C, H, W)."""
        image = torch.fft.ifftshift(self.turn * z, self.dims)
        kspace = torch.fft.fftn((self._maps * image).sum(dim=0), dim=self.dims, norm="ortho")
        return torch.fft.fftshift(self._kept * kspace, self.dims)[None]

    def adjoint(self, hybrid: torch.Tensor) -> torch.Tensor:
        kspace = self._kept * torch.fft.ifftshift(hybrid[0], self.dims)
        image = torch.fft.ifftn(kspace, dim=self.dims, norm="ortho")
        image = (self._maps.conj() * image).sum(dim=1, keepdim=True)
        return self.turn.conj() * torch.fft.fftshift(image, self.dims)

    def normal(self, z: torch.Tensor) -> torch.Tensor:
        """`adjoint` of `forward`."""
        image = torch.fft.ifftshift(self.turn * z, self.dims)
        kspace = torch.fft.fftn((self._maps * image).sum(dim=0), dim=self.dims)
        image = torch.fft.ifftn(self._kept * kspace, dim=self.dims)
        image = (self._maps.conj() * image).sum(dim=1, keepdim=True)
        return self.turn.conj() * torch.fft.fftshift(image, self.dims)

    def solve(self, x_0: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """The posterior mean of both images, x_0 + 1 the first one's mean before.

        Renews `local` by how far they are from their means before.

        Args:
            x_0: (1, 1, H, W); variance: (H, W), of the real part's DCT coefficients.

        Returns:
            (2, 1, H, W) complex.
        """
        mean = torch.cat([x_0 + 1, torch.zeros_like(x_0)]) + 0j
        square = at_least(self.sigma) ** 2
        b = self.adjoint(self.hybrid - self.forward(mean)) / square
        # Four real images as channels of one: real and imaginary parts of either.
        shares = [IMAGINARY * self.power] + 2 * [FOLDED * self.power]
        information = float(self._kept.float().mean()) / square

        def weigh(x: torch.Tensor) -> torch.Tensor:
            return _as_real(self.normal(_as_complex(x))) / square

        solver = FrequencyPosterior(weigh, torch.stack([variance, *shares]), information, True)
        z = mean + _as_complex(solver.solve(_as_real(b), self.local))
        squares = _as_real(z - mean).square()
        real = local_std(squares[:, :1], LOCAL, EVERYWHERE)
        imaginary = local_std(squares[:, 1:2], *SPARSE)
        folded = local_std(squares[:, 2:].sum(dim=1, keepdim=True), *SPARSE)
        self.local = torch.cat([real, imaginary, folded, folded], dim=1)
        return z

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

    def coil_images(self, z: torch.Tensor, keep_measured: bool = False) -> torch.Tensor:
        """The coils' images (1, C, H, W) of z, and of what was measured beside it.

        A measured value differs from z's by its noise and by what z misses. Of the difference the
        share 1 - 2σ²/m is added to z's, m being its mean square over the coils and `NEAR`: nothing
        where z fits, for it would be noise alone, and nearly all where maps or prior fail.

        Args:
            keep_measured: take measured values as they are, noise included.
        """
        image = torch.fft.ifftshift(self.turn * z, self.dims)
        kspace = torch.fft.fftn((self._maps * image).sum(dim=0), dim=self.dims, norm="ortho")
        kspace = torch.fft.fftshift(kspace, self.dims)
        missed = torch.fft.fftshift(self._kept, self.dims) * (self.hybrid[0] - kspace)
        kspace = kspace + (missed if keep_measured else self._beyond_noise(missed))
        kspace = torch.fft.ifftshift(kspace, self.dims)
        images = torch.fft.ifftn(kspace, dim=self.dims, norm="ortho")
        return torch.fft.fftshift(images, self.dims)[None]

    def magnitude(self, z: torch.Tensor, keep_measured: bool = False) -> torch.Tensor:
        """The root of the sum of squares of `coil_images`, (1, H, W), black at 0."""
        return self.coil_images(z, keep_measured).abs().square().sum(dim=1).sqrt()

    def _beyond_noise(self, missed: torch.Tensor) -> torch.Tensor:
        """The share of (C, H, W) differences that noise does not explain."""
        height, width = missed.shape[-2:]
        kept = torch.fft.fftshift(self._kept, self.dims).expand(height, width)
        squares = missed.abs().square().mean(dim=0)
        sides = [NEAR[0] if dim in self.dims else NEAR[1] for dim in (-2, -1)]
        near = torch.stack([squares, kept.to(squares)])[:, None]
        near = F.avg_pool2d(near, sides, 1, [side // 2 for side in sides])
        mean_square = near[0, 0] / near[1, 0].clamp(min=1e-6)
        share = (1 - 2 * self.sigma**2 / mean_square.clamp(min=1e-20)).clamp(min=0)
        return share * missed

    def _turned(self, z: torch.Tensor, width: float) -> torch.Tensor:
        """z with its first image's phase, averaged over `width` pixels, moved into `turn`."""
        phase = low_pass(z[:1], width).angle()
        turn = torch.polar(torch.ones_like(phase), phase)
        self.turn = self.turn * turn
        return z * turn.conj()


def _as_real(z: torch.Tensor) -> torch.Tensor:
    """(2, 1, H, W) complex → (1, 4, H, W)."""
    return torch.stack([z[0, 0].real, z[0, 0].imag, z[1, 0].real, z[1, 0].imag])[None]


def _as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x[0, 0::2], x[0, 1::2])[:, None]
