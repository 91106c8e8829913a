"""Colorization: the mean of three channels."""

from collections.abc import Mapping
from typing import Any

import torch

from guided_diffusion.operators.base import Shape
from guided_diffusion.operators.separable import (
    Factors,
    SeparableOperator,
    identity_factor,
    matrix_factor,
)
from util.errors import UserError

WEIGHTS = (0.3333, 0.3334, 0.3333)  # as published


class Color(SeparableOperator):
    """One grey channel of three."""

    name = "color"

    @classmethod
    def takes_volumes(cls, parameters: Mapping[str, Any]) -> bool:
        return False

    @classmethod
    def factors_of(cls, in_shape: Shape, **parameters: Any) -> Factors:
        channels, height, width = in_shape
        if channels != 3:
            raise UserError(
                "measurement.operator.name: color needs images and a prior of 3 channels"
            )
        luma = torch.tensor([WEIGHTS], dtype=torch.float64)
        channel = matrix_factor(luma, parameters["singular_value_threshold"])
        return channel, identity_factor(height), identity_factor(width)
