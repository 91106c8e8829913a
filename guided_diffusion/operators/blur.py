"""Deblurring: separable blurs."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.base import Shape, expect
from guided_diffusion.operators.separable import (
    Factor,
    Factors,
    SeparableOperator,
    identity_factor,
    matrix_factor,
)
from util.parameters import Parameter

TYPES = ("gaussian", "uniform", "aniso")
BOUNDARIES = ("zero", "reflect")
WIDEST = 4095  # pixels of a kernel


def blur_matrix(size: int, kernel: torch.Tensor, boundary: str = "zero") -> torch.Tensor:
    """(size, size) matrix that correlates with a 1-D kernel.

    Outside the image is zero, or with `boundary` "reflect" the image's mirror image, whose first
    pixel is the last one inside.
    """
    matrix = torch.zeros(size, size, dtype=torch.float64)
    rows = torch.arange(size)
    for tap, weight in enumerate(kernel):
        columns = rows + tap - len(kernel) // 2
        if boundary == "reflect":
            columns = columns % (2 * size)
            columns = torch.minimum(columns, 2 * size - 1 - columns)
        inside = (columns >= 0) & (columns < size)
        matrix[rows[inside], columns[inside]] += weight
    return matrix


def blur_factor(size: int, kernel: torch.Tensor, boundary: str, threshold: float) -> Factor:
    """The SVD of `blur_matrix`. Where a symmetric kernel meets its own reflection, cosines are
    singular directions (Strang 1999, the DCT-II), so that no two of them share a frequency."""
    matrix = blur_matrix(size, kernel, boundary)
    if boundary == "zero" or len(kernel) % 2 == 0 or not kernel.equal(kernel.flip(0)):
        return matrix_factor(matrix, threshold)
    cosines = dct_matrix(size).mT
    passed = (cosines * (matrix @ cosines)).sum(dim=0)
    s = torch.where(passed.abs() < threshold, 0.0, passed.abs())
    return Factor(cosines * torch.where(passed < 0, -1.0, 1.0), s, cosines)


def gaussian_kernel(kernel_size: int, intensity: float) -> torch.Tensor:
    """(kernel_size+1)//2 taps of a Gaussian of standard deviation `intensity`, summing to 1.

    The halving is the published program's: its "61" spans 31 pixels.
    """
    taps = (kernel_size + 1) // 2
    offsets = torch.arange(taps, dtype=torch.float64) - taps // 2
    kernel = torch.exp(-0.5 * (offsets / intensity) ** 2)
    return kernel / kernel.sum()


class Deblur(SeparableOperator):
    """Correlation with a Gaussian or a box along rows and columns."""

    name = "deblur"
    parameters = {
        "type": Parameter("gaussian", "gaussian, uniform, or aniso", (str,), choices=TYPES),
        "kernel_size": Parameter(
            None,
            "width; default 9 for uniform, else 61, which spans 31 pixels",
            (int,),
            low=1,
            high=WIDEST,
        ),
        "intensity": Parameter(
            3.0,
            "standard deviation in pixels; for aniso a pair, along rows and along columns; "
            "uniform, in published files, has no use for it",
            (float, list),
        ),
        "boundary": Parameter(
            "zero",
            "beyond the edges: zero, mid-grey, as published, or reflect, the mirror image",
            (str,),
            choices=BOUNDARIES,
        ),
        **SeparableOperator.parameters,
    }

    @classmethod
    def factors_of(cls, in_shape: Shape, **parameters: Any) -> Factors:
        kernels = cls._kernels(
            parameters["type"], parameters["kernel_size"], parameters["intensity"]
        )
        rows, cols = (
            blur_factor(n, kernel, parameters["boundary"], parameters["singular_value_threshold"])
            for n, kernel in zip(in_shape[1:], kernels, strict=True)
        )
        return identity_factor(in_shape[0]), rows, cols

    @staticmethod
    def _kernels(
        kind: str, size: int | None, intensity: float | list[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernels along the rows' axis and along the columns' axis."""
        if kind == "uniform":
            size = size or 9
            kernel = torch.full((size,), 1 / size, dtype=torch.float64)
            return kernel, kernel
        pair = intensity if kind == "aniso" else (intensity, intensity)
        try:
            vertical, horizontal = (float(v) for v in pair)  # type: ignore[union-attr, arg-type]
            valid = all(0 < v < math.inf for v in (vertical, horizontal))
            valid = valid and not any(isinstance(v, bool) for v in pair)  # type: ignore[union-attr]
        except (TypeError, ValueError, OverflowError):
            valid = False
        numbers = "two positive numbers" if kind == "aniso" else "a positive number"
        expect(valid, "intensity", f"{numbers} for {kind}", intensity)
        return gaussian_kernel(size or 61, vertical), gaussian_kernel(size or 61, horizontal)

    @classmethod
    def variant(cls, parameters: Mapping[str, Any]) -> str:
        return parameters["type"]
