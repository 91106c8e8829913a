"""Denoising: y = x + n."""

from typing import Any

from guided_diffusion.operators.base import Shape
from guided_diffusion.operators.separable import Factors, SeparableOperator, identity_factor


class Denoise(SeparableOperator):
    """A = I."""

    name = "denoise"
    is_identity = True
    keeps_sharp = True

    @classmethod
    def factors_of(cls, in_shape: Shape, **parameters: Any) -> Factors:
        channel, rows, cols = (identity_factor(n) for n in in_shape)
        return channel, rows, cols
