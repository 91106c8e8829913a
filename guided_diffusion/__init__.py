"""Restoration of MR slices with a diffusion prior: ``load_prior`` and ``restore``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guided_diffusion.config import (
        Measurement,
        NoiseConfig,
        OperatorConfig,
        Schedule,
        read_schedule,
    )
    from guided_diffusion.prior import Prior, load_prior
    from guided_diffusion.restoration import Restored, restore

__version__ = "0.2.0"
__all__ = [
    "Measurement",
    "NoiseConfig",
    "OperatorConfig",
    "Prior",
    "Restored",
    "Schedule",
    "load_prior",
    "read_schedule",
    "restore",
]
_MODULES = {"Prior": "prior", "load_prior": "prior", "Restored": "restoration"}
_MODULES["restore"] = "restoration"


def __getattr__(name: str) -> Any:
    """Import on demand: ``python -m guided_diffusion.train`` runs a module of this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'config')}")
    return getattr(module, name)
