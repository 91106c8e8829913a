"""Super-resolution: an image with fewer pixels."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.base import Shape
from guided_diffusion.operators.separable import (
    Factor,
    Factors,
    SeparableOperator,
    identity_factor,
    matrix_factor,
)
from util.parameters import Parameter


def bicubic_kernel(factor: int) -> torch.Tensor:
    """The 4·factor taps of the bicubic (a = -0.5) downsampling kernel, normalised to sum 1."""
    a = -0.5
    taps = []
    for i in range(4 * factor):
        x = abs((i - 2 * factor + 0.5) / factor)
        if x <= 1:
            taps.append((a + 2) * x**3 - (a + 3) * x**2 + 1)
        else:
            taps.append(a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a)
    kernel = torch.tensor(taps, dtype=torch.float64)
    return kernel / kernel.sum()


def bicubic_matrix(size: int, factor: int) -> torch.Tensor:
    """(⌈size/factor⌉, size): the kernel at stride `factor`, edges reflected symmetrically."""
    kernel = bicubic_kernel(factor)
    rows = math.ceil(size / factor)
    matrix = torch.zeros(rows, size, dtype=torch.float64)
    for row in range(rows):
        centre = factor // 2 + row * factor
        for tap, weight in enumerate(kernel):
            column = (centre - 2 * factor + tap) % (2 * size)
            matrix[row, min(column, 2 * size - 1 - column)] += weight
    return matrix


def average_matrix(size: int, factor: int) -> torch.Tensor:
    """(⌈size/factor⌉, size): means over blocks of `factor`; the last may hold fewer pixels."""
    blocks = torch.eye(math.ceil(size / factor), dtype=torch.float64)
    blocks = blocks.repeat_interleave(factor, dim=1)[:, :size]
    return blocks / blocks.sum(dim=1, keepdim=True)


def bicubic_factor(size: int, factor: int, threshold: float) -> Factor:
    return matrix_factor(bicubic_matrix(size, factor), threshold)


def average_factor(size: int, factor: int, threshold: float) -> Factor:
    """Where all blocks are whole, all singular values are equal, and cosines of the blocks' means
    are singular directions: each frequency of x folds onto one of them."""
    if size % factor:
        return matrix_factor(average_matrix(size, factor), threshold)
    cosines = dct_matrix(size // factor).mT
    s = torch.full((len(cosines),), factor**-0.5, dtype=torch.float64)
    V = cosines.repeat_interleave(factor, dim=0) * factor**-0.5
    return Factor(cosines, torch.where(s < threshold, 0.0, s), V)


FACTORS = {"bicubic": bicubic_factor, "standard": average_factor}


class SuperResolution(SeparableOperator):
    """Rows and columns resampled to 1/scale_factor of their length."""

    name = "super_resolution"
    keeps_sharp = True
    parameters = {
        "scale_factor": Parameter(4, "pixels of x for one of y", (int,), choices=(2, 4, 8)),
        "type": Parameter(
            "bicubic", "bicubic, or standard: means of blocks", (str,), choices=tuple(FACTORS)
        ),
        **SeparableOperator.parameters,
    }

    @classmethod
    def factors_of(cls, in_shape: Shape, **parameters: Any) -> Factors:
        factor_of, factor = FACTORS[parameters["type"]], parameters["scale_factor"]
        threshold = parameters["singular_value_threshold"]
        rows, cols = (factor_of(n, factor, threshold) for n in in_shape[1:])
        return identity_factor(in_shape[0]), rows, cols

    @classmethod
    def variant(cls, parameters: Mapping[str, Any]) -> str:
        return f"x{parameters['scale_factor']}"

    @classmethod
    def restored_size(cls, size: tuple[int, int], parameters: Mapping[str, Any]) -> tuple[int, int]:
        factor = parameters["scale_factor"]
        return size[0] * factor, size[1] * factor
