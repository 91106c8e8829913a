"""Restoration of MR slices with a diffusion prior: ``load_prior`` and ``restore``."""

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
