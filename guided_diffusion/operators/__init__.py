"""Degradations y = A x, by the name that task files give them. `base.py` says how to add one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from guided_diffusion.operators.base import WHERE, Operator
from guided_diffusion.operators.blur import Deblur
from guided_diffusion.operators.color import Color
from guided_diffusion.operators.identity import Denoise
from guided_diffusion.operators.mri import MRI
from guided_diffusion.operators.resample import SuperResolution
from guided_diffusion.operators.thick_slices import ThickSlices
from util.errors import UserError

OPERATORS: dict[str, type[Operator]] = {
    operator.name: operator
    for operator in (Denoise, SuperResolution, Deblur, Color, MRI, ThickSlices)
}


def operator_class(name: str) -> type[Operator]:
    """The class of `OPERATORS`; raises UserError for a name that is not among them."""
    if name not in OPERATORS:
        raise UserError(f"{WHERE}.name: expected one of {', '.join(OPERATORS)}, found {name!r}")
    return OPERATORS[name]


def get_operator(
    name: str,
    in_shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **parameters: Any,
) -> Operator:
    """Build a degradation operator.

    Args:
        name: one of `OPERATORS`.
        in_shape: (C, H, W), or (N, C, H, W) as published task files have it.
        parameters: the operator's own, see its class.

    Raises:
        UserError: an unknown name or parameter, or a value that does not fit.
    """
    channels, height, width = tuple(in_shape)[-3:]
    operator = operator_class(name)
    complete = operator.check(parameters)
    built = operator.build((channels, height, width), device, dtype, **complete)
    if not built.norm > 0:
        raise UserError(
            f"measurement.operator.singular_value_threshold: {complete['singular_value_threshold']}"
            f" leaves nothing of {name}, expected a smaller one"
        )
    return built


def restored_size(size: tuple[int, int], name: str, **parameters: Any) -> tuple[int, int]:
    """(H, W) of the image whose measurement has the given (H, W); see `get_operator`."""
    operator = operator_class(name)
    return operator.restored_size(size, operator.check(parameters))


def variant(degradation: Mapping[str, Any]) -> str:
    """The operator's part of the results path, "" if it has one kind; see `Operator.variant`.

    Args:
        degradation: `name` and parameters, as under measurement.operator of a task file.
    """
    operator = operator_class(degradation["name"])
    return operator.variant(operator.check({k: v for k, v in degradation.items() if k != "name"}))
