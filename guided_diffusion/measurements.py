"""The names of operators and noise under the module that the published program has them in."""

from guided_diffusion.noise import GaussianNoise, get_noise
from guided_diffusion.operators import OPERATORS, get_operator, restored_size
from guided_diffusion.operators.separable import (
    Factor,
    SeparableOperator,
    identity_factor,
    matrix_factor,
)

__all__ = [
    "OPERATORS",
    "Factor",
    "GaussianNoise",
    "SeparableOperator",
    "get_noise",
    "get_operator",
    "identity_factor",
    "matrix_factor",
    "restored_size",
]
