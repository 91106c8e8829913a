"""Several coils: y = [M F (S_c x)]_c, of lines of k-space, of single points, or complete.

Gaussian posteriors come from conjugate gradients on the normal equations, which need AᵀA alone:

    (AᵀA/σ² + C⁻¹) (x - x_0) = Aᵀ(y - A x_0)/σ²,    AᵀA = Re Σ_c conj(S_c) Fᴴ M F S_c

Where lines are measured, A has an SVD line by line besides, for the methods that look into it.
Where single points are, A mixes all pixels, and no SVD of HW × HW numbers is in reach.
"""

import math
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.base import Sigma
from guided_diffusion.operators.fourier import fft1c, fft2c, ifft1c, ifft2c
from guided_diffusion.operators.masks import on_kspace
from guided_diffusion.operators.scanned import (
    AXES,
    Scanned,
    at_least,
    kspace_of,
    points_of,
)

THRESHOLD = 1e-3


class SeveralCoils(Scanned):
    """What scans of several coils have.

    Args:
        mask: see `Scanned`.
        maps: (C, H, W) complex sensitivities, the object's phase in them.
        axis: see `Scanned`.
    """

    def __init__(
        self,
        mask: NDArray[np.bool_],
        maps: torch.Tensor,
        axis: str,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.mask, self.axis = np.asarray(mask), axis
        self.maps = maps.to(device, dtype.to_complex())
        self.in_shape = (1, maps.shape[1], maps.shape[2])
        squares = maps.abs().square().sum(dim=0)
        self.sight = float(squares.mean() * self.mask.mean())
        self._bound = math.sqrt(float(squares.max()))

    def gathered(self, hybrid: torch.Tensor) -> torch.Tensor:
        """What is measured, of complex hybrid space (N, C, H, W): (N, *out_shape).

        Hybrid space is k-space, transformed back along the axes of which nothing is left out.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.maps.device

    @property
    def dtype(self) -> torch.dtype:
        return self.maps.real.dtype

    @property
    def norm(self) -> float:
        """An upper bound, which is reached where the centre of k-space is measured."""
        return self._bound

    @property
    def sees_all(self) -> bool:
        return bool(self.mask.all())

    def reduced(self, y: torch.Tensor) -> torch.Tensor:
        """Aᵀ y, an image."""
        return self.transpose(y)

    def pull(self, x: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        return reduced - self.normal(x)

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """Aᵀ A x, at a third of the price of `transpose` of `forward`."""
        image = self._shifted_maps * torch.fft.ifftshift(x, self._encoded)
        kspace = self._shifted_mask * torch.fft.fftn(image, dim=self._encoded)
        image = (self._shifted_maps.conj() * torch.fft.ifftn(kspace, dim=self._encoded)).real
        return torch.fft.fftshift(image.sum(dim=1, keepdim=True), self._encoded)

    @property
    def _encoded(self) -> tuple[int, ...]:
        """The axes of k-space along which something is left out."""
        return (-2, -1) if self.mask.ndim == 2 else (AXES[self.axis],)

    @cached_property
    def _shifted_maps(self) -> torch.Tensor:
        """The maps in the order of frequencies that FFTs have."""
        return torch.fft.ifftshift(self.maps, self._encoded)

    @cached_property
    def _shifted_mask(self) -> torch.Tensor:
        mask = torch.as_tensor(on_kspace(self.mask, self.axis).copy(), device=self.device)
        return torch.fft.ifftshift(mask, self._encoded)


class Points(SeveralCoils):
    """Single points of k-space, (H, W): all by conjugate gradients.

    Attributes:
        out_shape: (C, 1, 2m) for m points.
    """

    has_svd = False

    def __init__(
        self,
        mask: NDArray[np.bool_],
        maps: torch.Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(mask, maps, "", device, dtype)
        self.points = torch.as_tensor(mask.copy(), device=device)
        self.out_shape = (len(maps), 1, 2 * int(mask.sum()))

    def gathered(self, kspace: torch.Tensor) -> torch.Tensor:
        return points_of(kspace, self.points)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gathered(fft2c(self.maps * x))

    def transpose(self, y: torch.Tensor) -> torch.Tensor:
        images = self.maps.conj() * ifft2c(kspace_of(y, self.points))
        return images.real.sum(dim=1, keepdim=True)

    def score(
        self, x: torch.Tensor, reduced: torch.Tensor, sigma: Sigma, variance: float
    ) -> torch.Tensor:
        flat = torch.full_like(x[0, 0], variance)
        square = at_least(sigma) ** 2
        return self.solver(flat, sigma).solve(self.pull(x, reduced) / square) / variance


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


class Lines(SeveralCoils):
    """Lines of k-space, in hybrid space: transformed back along the readout.

    Attributes:
        out_shape: (C, H, 2m) for m lines with columns phase-encoded, or (C, 2m, W).
    """

    def __init__(
        self,
        mask: NDArray[np.bool_],
        maps: torch.Tensor,
        axis: str = "columns",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(mask, maps, axis, device, dtype)
        self.dim = AXES[axis]
        self.kept = torch.as_tensor(mask, device=device).nonzero()[:, 0]
        out = list(maps.shape)
        out[self.dim] = 2 * len(self.kept)
        self.out_shape = (out[0], out[1], out[2])

    def gathered(self, hybrid: torch.Tensor) -> torch.Tensor:
        lines = hybrid.index_select(self.dim, self.kept)
        return torch.cat([lines.real, lines.imag], dim=self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gathered(fft1c(self.maps * x, self.dim))

    def transpose(self, y: torch.Tensor) -> torch.Tensor:
        real, imag = y.chunk(2, dim=self.dim)
        kspace = torch.zeros(len(y), *self.maps.shape, dtype=self.maps.dtype, device=y.device)
        kspace.index_copy_(self.dim, self.kept, torch.complex(real, imag))
        images = self.maps.conj() * ifft1c(kspace, self.dim)
        return images.real.sum(dim=1, keepdim=True)


class CompleteCoils(Lines):
    """All lines: AᵀA is the sum of the coils' squares, and each pixel is a singular direction."""

    @cached_property
    def singular_values(self) -> torch.Tensor:  # type: ignore[override]
        return self.maps.abs().square().sum(dim=0, keepdim=True).sqrt()

    def V(self, spectrum: torch.Tensor) -> torch.Tensor:
        return spectrum

    def Vt(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reduced(self, y: torch.Tensor) -> torch.Tensor:
        return self.Ut(y)

    def frequency_variance(self, variance: torch.Tensor) -> torch.Tensor:
        rows, cols = (dct_matrix(n).to(variance).square() for n in variance.shape)
        return (rows.mT @ variance @ cols)[None]


class Coils(Lines):
    """Some of the lines: each line of the image along the phase encoding has its own SVD.

    Line j is measured by A_j = [M F diag(S_c[j])]_c. V_j and s_j² are the eigenvectors and
    eigenvalues of its N×N Gram matrix, whose entry (p, q) is

        G_j = Re( (Fᴴ M F)[p, q] · Σ_c conj(S_c[j, p]) S_c[j, q] )

    and Uᵀy = s⁻¹ Vᵀ Aᵀ y needs no U. It is made when a method first asks for it.

    Args:
        mask, axis, maps: see `SeveralCoils`.
        threshold: singular values below it are taken for 0; `forward`, `transpose`, `normal` and
            posteriors of a spectrum are exact in any case.

    Attributes:
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
        super().__init__(mask, maps, axis, device, dtype)
        self.threshold = threshold

    @cached_property
    def _svd(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(V (lines, N, k), s (1, lines, k))."""
        S = self._lines(self.maps.to(torch.complex128))  # (C, lines, N)
        count = len(self.mask)
        F = fft1c(torch.eye(count, dtype=S.dtype, device=self.device), 0)[self.kept]
        between = torch.einsum("clp,clq->lpq", S.conj(), S)
        squares, V = _eigh(((F.mH @ F) * between).real)
        k = min(count, 2 * len(S) * len(self.kept))
        s = squares.flip(-1)[:, :k].clamp(min=0).sqrt()
        s = torch.where(s < self.threshold, 0.0, s)
        return V.flip(-1)[:, :, :k].to(self.dtype).contiguous(), s.to(self.dtype)[None]

    @property
    def singular_values(self) -> torch.Tensor:  # type: ignore[override]
        return self._svd[1]

    def _lines(self, x: torch.Tensor) -> torch.Tensor:
        """The phase encoding as last axis, the readout as the one before."""
        return x if self.dim == -1 else x.mT

    def V(self, spectrum: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("lpk,nlk->nlp", self._svd[0], spectrum[:, 0])
        return self._lines(x[:, None])

    def Vt(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("lpk,nlp->nlk", self._svd[0], self._lines(x)[:, 0])[:, None]

    def score(
        self, x: torch.Tensor, reduced: torch.Tensor, sigma: Sigma, variance: float
    ) -> torch.Tensor:
        s = self.singular_values
        residual = self.Vt(self.pull(x, reduced))  # Σ Uᵀ(y - A x)
        return self.V(torch.where(s > 0, residual / (sigma**2 + variance * s**2), 0.0))


def several_coils(
    mask: NDArray[np.bool_],
    maps: torch.Tensor,
    axis: str,
    threshold: float = THRESHOLD,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SeveralCoils:
    """The operator that suits the mask.

    Args: see `SeveralCoils` and `Coils`.
    """
    if mask.ndim == 2:
        return Points(mask, maps, device, dtype)
    if mask.all():
        return CompleteCoils(mask, maps, axis, device, dtype)
    return Coils(mask, maps, axis, threshold, device, dtype)
