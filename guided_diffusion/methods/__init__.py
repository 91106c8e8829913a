"""Posterior samplers, by the name that task files give them. `base.py` says how to add one.

"vanilla" is the name of no method: the prior alone, which no measurement steers.
"""

from collections.abc import Mapping
from typing import Any

import torch

from guided_diffusion.methods.base import WHERE, Method
from guided_diffusion.methods.ddnm import DDNM
from guided_diffusion.methods.ddrm import DDRM
from guided_diffusion.methods.diffpir import DiffPIR
from guided_diffusion.methods.dmps import DMPS
from guided_diffusion.methods.dps import DPS
from guided_diffusion.methods.pigdm import PiGDM
from guided_diffusion.methods.spectral import Spectral
from guided_diffusion.methods.spectral_sample import SpectralSample
from guided_diffusion.operators.base import Operator, Sigma
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from guided_diffusion.unconditional import PriorStep
from util.errors import UserError
from util.parameters import check_parameters

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (DMPS, DPS, DDRM, PiGDM, DDNM, DiffPIR, Spectral, SpectralSample)
}
VANILLA = "vanilla"
KEY = "conditioning.method"


def method_names() -> tuple[str, ...]:
    """What conditioning.method and --method may be."""
    return (*METHODS, VANILLA)


def check_method(name: Any, where: str = KEY) -> None:
    """Raise UserError for what is none of `method_names`."""
    if name not in method_names():
        raise _unknown(name, where)


def _unknown(name: Any, where: str) -> UserError:
    return UserError(f"{where}: expected one of {', '.join(method_names())}, found {name!r}")


def method_class(name: str) -> type[Method]:
    """The class of `METHODS`; raises UserError for a name that is not among them."""
    if name not in METHODS:
        raise _unknown(name, KEY)
    return METHODS[name]


def check_conditioning(
    name: str, parameters: Mapping[str, Any], operator: str = ""
) -> dict[str, Any]:
    """Complete a method's parameters with their defaults.

    Args:
        operator: the name of the task's operator, on which some defaults depend.

    Raises:
        UserError: an unknown method or parameter, or a value out of its range.
    """
    if name == VANILLA:
        return check_parameters(PriorStep.parameters, parameters, WHERE, VANILLA)
    return method_class(name).check(parameters, operator)


def check_svd(name: str, operator: Operator) -> None:
    """Raise the UserError of a method that needs an SVD that the operator does not have."""
    if name == VANILLA or operator.has_svd or not METHODS[name].needs_svd:
        return
    others = ", ".join(other for other, method in METHODS.items() if not method.needs_svd)
    raise UserError(
        f"conditioning.method: {name} needs A's singular value decomposition, and several coils "
        f"that see single points of k-space have none; these methods do without: {others}"
    )


def get_conditioning_method(
    name: str,
    operator: Operator,
    y: torch.Tensor,
    sigma: Sigma,
    statistics: PriorStatistics = NATURAL_IMAGES,
    slices: bool = False,
    **parameters: Any,
) -> Method:
    """Build a method of `METHODS` for one batch of measurements.

    Args:
        operator, y, sigma, statistics, slices, parameters: see `Method`.

    Raises:
        UserError: an unknown method or parameter, a value out of its range, or see `check_svd`.
    """
    check_svd(name, operator)
    return method_class(name)(operator, y, sigma, statistics, slices, **parameters)
