"""Accelerated MRI: lines of k-space, one coil or several, through an exact SVD.

`F` is the centred orthonormal DFT, fastMRI's. The readout direction is fully sampled and its DFT is
unitary, so a measurement is kept in hybrid space: transformed back along the readout, still k-space
along the phase encoding. There every line of the image along the phase encoding is measured on its
own. Real and imaginary parts stand one after the other, because x is real:

    y = A x + n,   A x = [Re(M F (S_c x)); Im(M F (S_c x))]_c,   M the measured lines of k-space

S_c are the coils' sensitivities times e^{iφ}, φ the phase of the scanned object. An object of
magnitude u = s (x + 1)/2 is measured as (s/2) A (x + 1): what is added to A x is `offset`.
"""

import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.base import WHERE, Operator, Shape, Sigma
from guided_diffusion.operators.coils import simulated_maps
from guided_diffusion.operators.fourier import fft1c, ifft1c
from guided_diffusion.operators.masks import MASKS, calibration_lines, cartesian_mask
from guided_diffusion.operators.separable import (
    SeparableOperator,
    identity_factor,
    matrix_factor,
)
from guided_diffusion.operators.solver import FrequencyPosterior, local_std
from guided_diffusion.statistics import PriorStatistics
from util.errors import UserError
from util.parameters import Parameter

AXES = {"columns": -1, "rows": -2}  # along which axis of the image phase is encoded
UNSEEN = (
    1e-6  # singular values below it are those of lines that are not measured, 0 but for rounding
)
THRESHOLD = 1e-3
# Of the second pass, see `local_std`; chosen on one measured head that does not ship.
LOCAL, EVERYWHERE = 2.0, 0.2


def to_hybrid(
    kspace: torch.Tensor, mask: NDArray[np.bool_] | torch.Tensor, axis: str = "columns"
) -> torch.Tensor:
    """Complex k-space (..., H, W) → measurement, real, (..., H, 2m) for m lines along columns."""
    dim = AXES[axis]
    hybrid = ifft1c(kspace, -3 - dim)  # the readout is the other one of -1 and -2
    lines = torch.as_tensor(mask, device=kspace.device).nonzero()[:, 0]
    hybrid = hybrid.index_select(dim, lines)
    return torch.cat([hybrid.real, hybrid.imag], dim=dim)


def from_hybrid(
    y: torch.Tensor, mask: NDArray[np.bool_] | torch.Tensor, axis: str = "columns"
) -> torch.Tensor:
    """The inverse of `to_hybrid`; lines that are not measured are 0."""
    dim = AXES[axis]
    real, imag = y.chunk(2, dim=dim)
    lines = torch.as_tensor(mask, device=y.device).nonzero()[:, 0]
    shape = list(real.shape)
    shape[dim] = len(mask)
    hybrid = torch.zeros(shape, dtype=y.dtype.to_complex(), device=y.device)
    hybrid.index_copy_(dim, lines, torch.complex(real, imag))
    return fft1c(hybrid, -3 - dim)


def phase_encoding_matrix(mask: NDArray[np.bool_] | torch.Tensor) -> torch.Tensor:
    """(2m, N) float64: [Re(M F); Im(M F)] of the centred orthonormal DFT of N points."""
    mask = torch.as_tensor(mask)
    rows = fft1c(torch.eye(len(mask), dtype=torch.complex128), 0)[mask]
    return torch.cat([rows.real, rows.imag])


def first_amplitude(mask: NDArray[np.bool_], statistics: PriorStatistics) -> float:
    """Standard deviation of the images at the first frequency that is not measured."""
    first, end = calibration_lines(np.asarray(mask))
    centre = len(mask) // 2
    cycles = max(min(centre - first, end - centre), 1)
    spectrum = statistics.power_spectrum(1, len(mask))[0]
    return math.sqrt(float(spectrum[min(2 * cycles, len(mask) - 1)]))  # 2: half cycles


class Scanned(Operator):
    """What both kinds of scans have.

    Attributes:
        mask: (N,) bool, the lines of k-space that are measured.
        axis: along which phase is encoded, see `AXES`.
    """

    mask: NDArray[np.bool_]
    axis: str

    def widest_std(self, statistics: PriorStatistics) -> float:
        """√r_t to start from: the images' own amplitude at the first line that is not measured."""
        return first_amplitude(self.mask, statistics)

    def offset(self) -> torch.Tensor:
        """A 1, (1, *out_shape): what black at -1 instead of 0 takes from a scan."""
        return self.forward(torch.ones(1, *self.in_shape).to(self.singular_values))

    @property
    def lines(self) -> NDArray[np.bool_]:
        """The mask as it lies on k-space: (1, N) along columns, (N, 1) along rows."""
        return np.asarray(self.mask).reshape((1, -1) if self.axis == "columns" else (-1, 1))

    def picture(self, y: torch.Tensor) -> torch.Tensor:
        """The zero-filled image, (N, 1, H, W) with black at -1."""
        return self.transpose(y + self.offset()) - 1


class OneCoil(Scanned, SeparableOperator):
    """One coil of constant sensitivity, and no phase: A = I ⊗ [Re(M F); Im(M F)].

    For a real image line -k of k-space says what line k says: where one is measured its singular
    value is √½, where both are it is 1.
    """

    @classmethod
    def of_lines(
        cls,
        in_shape: Shape,
        mask: NDArray[np.bool_],
        axis: str = "columns",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "OneCoil":
        """Args: see `Scanned`."""
        factors = [identity_factor(n) for n in in_shape]
        factors[AXES[axis]] = matrix_factor(phase_encoding_matrix(mask), UNSEEN)
        operator = cls(factors[0], factors[1], factors[2], device=device, dtype=dtype)
        operator.mask, operator.axis = mask, axis
        return operator


def _eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Batched `torch.linalg.eigh` in one thread.

    So small matrices gain nothing by more, and on cores that do other work, too, threads that wait
    for one another take a hundred times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigh(gram)
    finally:
        torch.set_num_threads(threads)


class Coils(Scanned):
    """Several coils: each line of the image along the phase encoding has its own SVD.

    Line j is measured by A_j = [M F diag(S_c[j])]_c. V_j and s_j² are the eigenvectors and
    eigenvalues of its N×N Gram matrix, whose entry (p, q) is

        G_j = Re( (Fᴴ M F)[p, q] · Σ_c conj(S_c[j, p]) S_c[j, q] )

    and Uᵀy = s⁻¹ Vᵀ Aᵀ y needs no U.

    Args:
        mask, axis: see `Scanned`.
        maps: (C, H, W) complex sensitivities, the object's phase in them.
        threshold: singular values below it are taken for 0 by spectra; `forward` and `transpose`
            are exact in any case.

    Attributes:
        in_shape, out_shape: (1, H, W), and (C, H, 2m) with columns phase-encoded or (C, 2m, W).
        singular_values: (1, lines, k), k = min(N, 2Cm), largest first; spectra are
            (n, 1, lines, k).
    """

    def __init__(
        self,
        mask: NDArray[np.bool_],
        maps: torch.Tensor,
        axis: str = "columns",
        threshold: float = THRESHOLD,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.mask, self.axis, self.dim = mask, axis, AXES[axis]
        self.maps = maps.to(device, dtype.to_complex())
        self.kept = torch.as_tensor(mask, device=device).nonzero()[:, 0]
        coils, height, width = maps.shape
        out = [coils, height, width]
        out[self.dim] = 2 * len(self.kept)
        self.in_shape, self.out_shape = (1, height, width), (out[0], out[1], out[2])

        S = self._lines(maps.to(device, torch.complex128))  # (C, lines, N)
        F = fft1c(torch.eye(len(mask), dtype=S.dtype, device=device), 0)[self.kept]
        between = torch.einsum("clp,clq->lpq", S.conj(), S)
        squares, V = _eigh(((F.mH @ F) * between).real)
        k = min(len(mask), 2 * coils * len(self.kept))
        s = squares.flip(-1)[:, :k].clamp(min=0).sqrt()
        self.singular_values = torch.where(s < threshold, 0.0, s).to(dtype)[None]
        self._V = V.flip(-1)[:, :, :k].to(dtype).contiguous()  # (lines, N, k)

    def _lines(self, x: torch.Tensor) -> torch.Tensor:
        """The phase encoding as last axis, the readout as the one before."""
        return x if self.dim == -1 else x.mT

    def V(self, spectrum: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("lpk,nlk->nlp", self._V, spectrum[:, 0])
        return self._lines(x[:, None])

    def Vt(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("lpk,nlp->nlk", self._V, self._lines(x)[:, 0])[:, None]

    def U(self, spectrum: torch.Tensor) -> torch.Tensor:
        return self.forward(self.V(self._over_s(spectrum)))

    def Ut(self, y: torch.Tensor) -> torch.Tensor:
        return self._over_s(self.Vt(self.transpose(y)))

    def _over_s(self, spectrum: torch.Tensor) -> torch.Tensor:
        s = self.singular_values
        return torch.where(s > 0, spectrum / torch.where(s > 0, s, 1.0), 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kspace = fft1c(self.maps * x, self.dim).index_select(self.dim, self.kept)
        return torch.cat([kspace.real, kspace.imag], dim=self.dim)

    def transpose(self, y: torch.Tensor) -> torch.Tensor:
        real, imag = y.chunk(2, dim=self.dim)
        kspace = torch.zeros(len(y), *self.maps.shape, dtype=self.maps.dtype, device=y.device)
        kspace.index_copy_(self.dim, self.kept, torch.complex(real, imag))
        images = self.maps.conj() * ifft1c(kspace, self.dim)
        return images.real.sum(dim=1, keepdim=True)

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """Aᵀ A x, at a third of the price of `transpose` of `forward`."""
        image = self._shifted_maps * torch.fft.ifftshift(x, self.dim)
        kspace = self._shifted_lines * torch.fft.fft(image, dim=self.dim)
        image = (self._shifted_maps.conj() * torch.fft.ifft(kspace, dim=self.dim)).real
        return torch.fft.fftshift(image.sum(dim=1, keepdim=True), self.dim)

    @cached_property
    def _shifted_maps(self) -> torch.Tensor:
        """The maps in the order of frequencies that FFTs have."""
        return torch.fft.ifftshift(self.maps, self.dim)

    @cached_property
    def _shifted_lines(self) -> torch.Tensor:
        return torch.fft.ifftshift(torch.as_tensor(self.lines, device=self.maps.device), self.dim)

    @cached_property
    def _shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of each frequency is in each point of the readout, and, line by line, in each
        direction along the phase encoding: (f, lines), (lines, f, k)."""
        readout, phase = (dct_matrix(n).to(self._V) for n in self._V.shape[:2])
        return readout.square(), torch.einsum("fp,lpk->lfk", phase, self._V).square()

    def frequency_variance(self, variance: torch.Tensor) -> torch.Tensor:
        readout, phase = self._shares
        along = readout.mT @ self._lines(variance)  # (lines, f)
        return torch.einsum("lf,lfk->lk", along, phase)[None]

    def frequency_posterior_mean(
        self, x_0: torch.Tensor, Uty: torch.Tensor, sigma: Sigma, variance: torch.Tensor
    ) -> torch.Tensor:
        """See `Operator.frequency_posterior_mean`; here by conjugate gradients, and in two passes.

        The directions of a line are points along the readout, and a covariance that is diagonal in
        the DCT is far from diagonal there. Where the first pass moves x_0 most, at edges and at
        what the prior does not know, the second takes x_0 to be least certain, see `local_std`.
        """
        s = self.singular_values
        information = torch.where(s > 0, (s / sigma) ** 2, 0.0)
        b = self.V(torch.where(s > 0, s / sigma**2, 0.0) * (Uty - s * self.Vt(x_0)))
        solver = FrequencyPosterior(variance, float(information.mean()))

        def weigh(x: torch.Tensor) -> torch.Tensor:
            if torch.is_tensor(sigma) and sigma.shape[1:] != (1, 1, 1):  # of each direction
                return self.V(information * self.Vt(x))
            return self.normal(x) / sigma**2

        local = local_std(solver.solve(weigh, b).square(), LOCAL, EVERYWHERE)
        return x_0 + solver.solve(weigh, b, local)


class MRI(Scanned):
    """Accelerated MRI of one coil, or of several that are simulated."""

    name = "mri"
    from_all_sides = False  # no gain where it was measured, R = 4
    parameters = {
        "mask": Parameter("equispaced_fraction", f"{', '.join(MASKS)}, or a .npy file", (str,)),
        "acceleration": Parameter(4.0, "R, lines of k-space over lines measured", low=1),
        "center_fraction": Parameter(0.08, "share of lines about the centre, all measured", low=0),
        "mask_seed": Parameter(0, "seed of the mask, or a text: fastMRI's file name", (int, str)),
        "axis": Parameter("columns", "along which phase is encoded", (str,), choices=tuple(AXES)),
        "coils": Parameter(1, "1, or the number of simulated coils", (int,), low=1, high=64),
    }

    @classmethod
    def build(
        cls, in_shape: Shape, device: torch.device | str, dtype: torch.dtype, **parameters: Any
    ) -> Operator:
        lines = in_shape[AXES[parameters["axis"]]]
        mask = cartesian_mask(
            parameters["mask"],
            lines,
            parameters["acceleration"],
            parameters["center_fraction"],
            parameters["mask_seed"],
        )
        coils, axis = parameters["coils"], parameters["axis"]
        if coils == 1:
            return OneCoil.of_lines(in_shape, mask, axis, device, dtype)
        if in_shape[0] != 1:
            raise UserError(
                f"{WHERE}.coils: {coils} coils need a prior of one channel, and this one has "
                f"{in_shape[0]}"
            )
        maps = simulated_maps(coils, in_shape[1], in_shape[2])
        return Coils(mask, maps, axis, device=device, dtype=dtype)

    @classmethod
    def takes_volumes(cls, parameters: Mapping[str, Any]) -> bool:
        return parameters["coils"] == 1

    @classmethod
    def variant(cls, parameters: Mapping[str, Any]) -> str:
        mask = parameters["mask"]
        kind = mask if mask in MASKS else os.path.splitext(os.path.basename(mask))[0]
        rate = f"_R{parameters['acceleration']:g}" if mask in MASKS else ""
        return f"{kind}{rate}" + (f"_{parameters['coils']}coils" if parameters["coils"] > 1 else "")
