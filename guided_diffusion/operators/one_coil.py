"""One coil of constant sensitivity: an exact SVD, of lines of k-space and of single points.

A real image has a symmetric spectrum: what is measured at -k is the conjugate of what is at k. So
AᵀA multiplies the spectrum by w(k) = (M(k) + M(-k))/2, and the singular values are √w: 1 where k
and -k are measured, √½ where one of them is, 0 where none.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.base import Shape
from guided_diffusion.operators.fourier import fft1c, fft2c, ifft2c
from guided_diffusion.operators.scanned import AXES, Scanned, kspace_of, points_of
from guided_diffusion.operators.separable import SeparableOperator, identity_factor, matrix_factor

# Singular values below it are those of lines that are not measured, 0 but for rounding.
UNSEEN = 1e-6


def phase_encoding_matrix(mask: NDArray[np.bool_] | torch.Tensor) -> torch.Tensor:
    """(2m, N) float64: [Re(M F); Im(M F)] of the centred orthonormal DFT of N points."""
    mask = torch.as_tensor(mask)
    rows = fft1c(torch.eye(len(mask), dtype=torch.complex128), 0)[mask]
    return torch.cat([rows.real, rows.imag])


class OneCoil(Scanned, SeparableOperator):
    """Lines of k-space: A = I ⊗ [Re(M F); Im(M F)], separable."""

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
        return operator._of(mask, axis)

    def _of(self, mask: NDArray[np.bool_], axis: str) -> "OneCoil":
        self.mask, self.axis = np.asarray(mask), axis
        self.sight = float(self.mask.mean())
        return self

    def in_frequencies(self) -> "OneCoil":
        operator = super().in_frequencies()
        assert isinstance(operator, OneCoil)
        return operator._of(self.mask, self.axis)


class OneCoilPoints(Scanned):
    """Single points of k-space: A = [Re(M F); Im(M F)], F the DFT of both axes.

    V is the Hartley transform, H x = Re(F x) - Im(F x), which is real, orthogonal and its own
    inverse: it turns a product with a symmetric w in the spectrum into the same product with its
    own coefficients, AᵀA = H diag(w) H. Each channel of an image is measured alike.

    Args:
        mask: (H, W) bool.

    Attributes:
        out_shape: (C, 1, 2m) for m points.
        singular_values: (C, H, W), √w; spectra are (N, C, H, W).
    """

    def __init__(
        self,
        in_shape: Shape,
        mask: NDArray[np.bool_],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.mask, self.axis, self.sight = mask, "", float(mask.mean())
        self.points = torch.as_tensor(mask.copy(), device=device)
        self.in_shape, self.out_shape = in_shape, (in_shape[0], 1, 2 * int(mask.sum()))
        mirrored = self.points.flip(0, 1)  # k → -k: about N // 2, which for even N leaves index 0
        mirrored = mirrored.roll([1 - n % 2 for n in mask.shape], (0, 1))
        w = (self.points.to(dtype) + mirrored.to(dtype)) / 2
        self.singular_values = w.sqrt().expand(in_shape)

    def V(self, spectrum: torch.Tensor) -> torch.Tensor:
        z = fft2c(spectrum)
        return z.real - z.imag

    def Vt(self, x: torch.Tensor) -> torch.Tensor:
        return self.V(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return points_of(fft2c(x), self.points)

    def transpose(self, y: torch.Tensor) -> torch.Tensor:
        return ifft2c(kspace_of(y, self.points)).real

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        return self.V(self.singular_values**2 * self.V(x))

    def frequency_variance(self, variance: torch.Tensor) -> torch.Tensor:
        """With c and s the cosines and sines of either axis, a row of H is c(c' + s') + s(c' - s');
        the variance sums the squares of its DCT."""
        rows, cols = ([m.to(variance) for m in _waves(n)] for n in variance.shape)
        (c, s), (c_, s_) = rows, cols
        plus, minus = c_ + s_, c_ - s_
        return (
            (c.square()).mT @ variance @ plus.square()
            + (s.square()).mT @ variance @ minus.square()
            + 2 * (c * s).mT @ variance @ (plus * minus)
        )[None]


def _waves(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The DCTs of the cosine and of the sine of each frequency, columns of (frequency, k)."""
    waves = fft1c(torch.eye(size, dtype=torch.complex128), 0)  # (k, point)
    basis = dct_matrix(size)
    return basis @ waves.real.mT, basis @ -waves.imag.mT
