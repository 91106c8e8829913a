"""Separable operators, A = A_channel ⊗ A_rows ⊗ A_cols, by the SVD of three small matrices."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.base import Operator, Shape, Sigma
from guided_diffusion.operators.solver import scaled
from util.parameters import Parameter, Parameters

THRESHOLD = Parameter(
    3e-2,  # the published value
    "below it the singular values of a factor are zero; 0: the exact operator",
    low=0,
    high=1,
)


@dataclass
class Factor:
    """The thin SVD of one axis' matrix: U (m, k), s (k,), V (n, k); U = V = None is identity."""

    U: torch.Tensor | None
    s: torch.Tensor
    V: torch.Tensor | None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Factor":
        U, V = (None if p is None else p.to(device, dtype) for p in (self.U, self.V))
        return Factor(U, self.s.to(device, dtype), V)


APART = 1e-6  # of a frequency's power, what rounding leaves of it in other directions

Factors = tuple[Factor, Factor, Factor]  # of the channels, of the rows' axis, of the columns' axis


def identity_factor(size: int) -> Factor:
    return Factor(None, torch.ones(size, dtype=torch.float64), None)


def matrix_factor(matrix: torch.Tensor, threshold: float) -> Factor:
    """SVD of a float64 matrix; singular values below `threshold` are set to zero."""
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Factor(U, torch.where(s < threshold, 0.0, s), Vh.mT.contiguous())


def _along(x: torch.Tensor, axis: int, matrix: torch.Tensor | None) -> torch.Tensor:
    """Multiply every vector of x along `axis` (1 channels, 2 rows, 3 columns) by `matrix`."""
    if matrix is None:
        return x
    if axis == 3:
        return x @ matrix.mT
    if axis == 2:
        return matrix @ x
    return torch.einsum("dc,nchw->ndhw", matrix, x)


class SeparableOperator(Operator):
    """A = A_channel ⊗ A_rows ⊗ A_cols on images (N, C, H, W).

    `singular_values` are (c, i, j), the outer product of the three factors' singular values;
    spectra are (N, c, i, j). A subclass says its `factors_of` an image's shape.
    """

    parameters: ClassVar[Parameters] = {"singular_value_threshold": THRESHOLD}

    def __init__(
        self,
        channel: Factor,
        rows: Factor,
        cols: Factor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.factors = [f.to(device, dtype) for f in (channel, rows, cols)]
        s_c, s_h, s_w = (f.s for f in self.factors)
        self.singular_values = s_c[:, None, None] * s_h[:, None] * s_w
        self.in_shape = self._shape(f.V for f in self.factors)
        self.out_shape = self._shape(f.U for f in self.factors)

    def _shape(self, matrices: Iterable[torch.Tensor | None]) -> Shape:
        sides = [
            len(f.s) if matrix is None else matrix.shape[0]
            for f, matrix in zip(self.factors, matrices, strict=True)
        ]
        return sides[0], sides[1], sides[2]

    @classmethod
    def factors_of(cls, in_shape: Shape, **parameters: Any) -> Factors:
        """The SVD of each axis' matrix, in float64; raises UserError, see `Operator.build`."""
        raise NotImplementedError

    @classmethod
    def build(
        cls, in_shape: Shape, device: torch.device | str, dtype: torch.dtype, **parameters: Any
    ) -> "SeparableOperator":
        return cls(*cls.factors_of(in_shape, **parameters), device=device, dtype=dtype)

    def _apply(self, x: torch.Tensor, matrices: Iterable[torch.Tensor | None]) -> torch.Tensor:
        for axis, matrix in enumerate(matrices, start=1):
            x = _along(x, axis, matrix)
        return x

    def V(self, spectrum: torch.Tensor) -> torch.Tensor:
        return self._apply(spectrum, (f.V for f in self.factors))

    def Vt(self, x: torch.Tensor) -> torch.Tensor:
        return self._apply(x, (None if f.V is None else f.V.mT for f in self.factors))

    def U(self, spectrum: torch.Tensor) -> torch.Tensor:
        return self._apply(spectrum, (f.U for f in self.factors))

    def Ut(self, y: torch.Tensor) -> torch.Tensor:
        return self._apply(y, (None if f.U is None else f.U.mT for f in self.factors))

    def in_frequencies(self) -> "SeparableOperator":
        """The same A, with the DCT for the singular directions of the axes that it leaves alone."""
        channel, *axes = self.factors
        for i, f in enumerate(axes):
            if f.V is None:
                basis = dct_matrix(len(f.s)).mT
                axes[i] = Factor(basis, f.s, basis)
        s = self.singular_values
        return type(self)(channel, axes[0], axes[1], device=s.device, dtype=s.dtype)

    @cached_property
    def _shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of each frequency (first axis) is in each singular direction (second)."""
        rows, cols = (_share(f) for f in self.factors[1:])
        return rows, cols

    def frequency_variance(self, variance: torch.Tensor) -> torch.Tensor:
        rows, cols = self._shares
        return rows.mT @ variance @ cols  # (i, j)

    def frequency_posterior_mean(
        self, x_0: torch.Tensor, reduced: torch.Tensor, sigma: Sigma, variance: torch.Tensor
    ) -> torch.Tensor:
        """See `Operator.frequency_posterior_mean`; exact where no two directions share a frequency.

        There Vᵀ C V is diagonal, though V is not made of frequencies, and the mean is
        x_0 + C V Σ (σ² I + Σ Vᵀ C V Σ)⁻¹ Uᵀ(y - A x_0).
        """
        if not self._frequencies_apart:
            return super().frequency_posterior_mean(x_0, reduced, sigma, variance)
        residual = reduced - self.singular_values * self.Vt(x_0)
        told = self.gain(sigma, self.frequency_variance(variance)) * residual
        dct = [dct_matrix(n).to(x_0) for n in self.in_shape[1:]]
        return x_0 + scaled(self.V(told), variance, dct)

    @cached_property
    def _frequencies_apart(self) -> bool:
        """Whether along both axes each frequency is in one singular direction at most."""
        return all(bool(((share > APART).sum(dim=1) <= 1).all()) for share in self._shares)


def _share(factor: Factor) -> torch.Tensor:
    basis = dct_matrix(len(factor.s) if factor.V is None else len(factor.V)).to(factor.s)
    return (basis if factor.V is None else basis @ factor.V).square()
