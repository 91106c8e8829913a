"""The names of the methods under the module that the published program has them in."""

from guided_diffusion.methods import METHODS, check_conditioning, get_conditioning_method
from guided_diffusion.methods.dmps import DMPS, pseudo_likelihood_score

__all__ = [
    "DMPS",
    "METHODS",
    "check_conditioning",
    "get_conditioning_method",
    "pseudo_likelihood_score",
]
