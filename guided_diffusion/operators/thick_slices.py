"""Thick slices: along its slice axis, a volume seen through the profile of its slices."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from guided_diffusion.operators.base import Grid, Shape, expect
from guided_diffusion.operators.separable import (
    Factors,
    SeparableOperator,
    identity_factor,
    matrix_factor,
)
from util.parameters import Parameter

FWHM = 2 * math.sqrt(2 * math.log(2))  # of a Gaussian, in its standard deviations
SAME = 1e-3  # share of a length, by which headers round it
MOST = 4096  # restored slices
ROUNDING = 0.05  # of a slice, by which the positions in headers are off


def box_edge(z: torch.Tensor, thickness: float) -> torch.Tensor:
    """The share of a box profile that lies below z mm from its centre."""
    return (z / thickness + 0.5).clamp(0, 1)


def gaussian_edge(z: torch.Tensor, thickness: float) -> torch.Tensor:
    """The share of a Gaussian profile of that full width at half maximum below z mm."""
    return torch.special.ndtr(z * (FWHM / thickness))


EDGES = {"gaussian": gaussian_edge, "box": box_edge}


def slice_count(depth: int, thickness: float, spacing: float, fine: float) -> int:
    """How many slices lie, centred, wholly within `depth` of `fine` mm."""
    return math.floor((depth * fine - thickness) / spacing + ROUNDING) + 1


def restored_count(slices: int, thickness: float, spacing: float, fine: float) -> int:
    """How many slices of `fine` mm cover what these many, from the first's edge, have seen."""
    return math.ceil(((slices - 1) * spacing + thickness) / fine - ROUNDING)


def profile_matrix(
    depth: int, thickness: float, spacing: float, fine: float, profile: str
) -> torch.Tensor:
    """(slices, depth) float64: the mean that each slice sees of the voxels along the slice axis.

    Both stacks have the same centre. A voxel's weight is the profile's share between its edges;
    a row sums to 1, also where the tails of a Gaussian leave the volume.
    """
    slices = slice_count(depth, thickness, spacing, fine)
    centres = (torch.arange(slices, dtype=torch.float64) - (slices - 1) / 2) * spacing
    edges = (torch.arange(depth + 1, dtype=torch.float64) - depth / 2) * fine
    below = EDGES[profile](edges - centres[:, None], thickness)
    weights = below.diff(dim=1)
    return weights / weights.sum(dim=1, keepdim=True)


class ThickSlices(SeparableOperator):
    """A volume (its slices are the channels) whose slices are thick, spaced, or overlapping.

    Lengths that are left out come from the volume's header, see `on_grid`.
    """

    name = "thick_slices"
    keeps_sharp = True
    of_volumes = True
    parameters = {
        "thickness": Parameter(None, "mm, of a slice; the header's, or the spacing", above=0),
        "spacing": Parameter(
            None, "mm from slice to slice; the header's, or if simulated the thickness", above=0
        ),
        "target_spacing": Parameter(
            None, "mm between the restored slices; the side of a pixel", above=0
        ),
        "profile": Parameter(
            "gaussian",
            "of a slice: gaussian, whose width at half maximum is the thickness, or box",
            (str,),
            choices=tuple(EDGES),
        ),
        **SeparableOperator.parameters,
    }

    @classmethod
    def on_grid(cls, parameters: Mapping[str, Any], grid: Grid, simulated: bool) -> dict[str, Any]:
        found = dict(parameters)
        if simulated:
            target = found["target_spacing"]
            expect(
                target is None or math.isclose(target, grid.spacing, rel_tol=SAME),
                "target_spacing",
                f"none, as the simulated volume's slices are {grid.spacing:g} mm apart (--measured "
                "restores slices that are thick already)",
                found["target_spacing"],
            )
            found["target_spacing"] = grid.spacing
            expect(
                found["thickness"] is not None,
                "thickness",
                "a number of mm to simulate, or --measured for slices that are thick already",
                None,
            )
            found["spacing"] = found["spacing"] or found["thickness"]
            return found
        found["spacing"] = found["spacing"] or grid.spacing
        found["thickness"] = found["thickness"] or grid.thickness or found["spacing"]
        found["target_spacing"] = found["target_spacing"] or grid.pixel
        return found

    @classmethod
    def factors_of(cls, in_shape: Shape, **parameters: Any) -> Factors:
        lengths = cls._lengths(parameters)
        depth, (thickness, spacing, fine) = in_shape[0], lengths
        expect(fine <= spacing, "target_spacing", f"at most the spacing, {spacing:g} mm", fine)
        expect(
            slice_count(depth, *lengths) > 0,
            "thickness",
            f"less than the volume's {depth * fine:g} mm",
            thickness,
        )
        matrix = profile_matrix(depth, *lengths, parameters["profile"])
        channel = matrix_factor(matrix, parameters["singular_value_threshold"])
        return channel, identity_factor(in_shape[1]), identity_factor(in_shape[2])

    @classmethod
    def restored_depth(cls, slices: int, parameters: Mapping[str, Any]) -> int:
        thickness, spacing, fine = cls._lengths(parameters)
        extent = (slices - 1) * spacing + thickness
        expect(
            extent / fine <= MOST,
            "target_spacing",
            f"at least {extent / MOST:.3g} mm, for the slices see {extent:.3g} mm and at most "
            f"{MOST} are restored",
            fine,
        )
        return restored_count(slices, thickness, spacing, fine)

    @classmethod
    def restored_spacing(cls, parameters: Mapping[str, Any]) -> float | None:
        return cls._lengths(parameters)[2]

    @classmethod
    def interpolated(
        cls, y: NDArray[np.float32], depth: int, parameters: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """By a cubic spline; beyond the centres of the outer slices these are repeated."""
        _, spacing, fine = cls._lengths(parameters)
        centres = (np.arange(len(y)) - (len(y) - 1) / 2) * spacing
        wanted = (np.arange(depth) - (depth - 1) / 2) * fine
        if len(y) == 1:
            return np.repeat(y, depth, axis=0)
        spline = CubicSpline(centres, y, axis=0, bc_type="natural")
        return spline(wanted.clip(centres[0], centres[-1])).astype(np.float32)

    @staticmethod
    def _lengths(parameters: Mapping[str, Any]) -> tuple[float, float, float]:
        keys = ("thickness", "spacing", "target_spacing")
        for key in keys:
            expect(parameters[key] is not None, key, "a number of mm, as there is no header", None)
        thickness, spacing, fine = (float(parameters[key]) for key in keys)
        return thickness, spacing, fine

    @classmethod
    def variant(cls, parameters: Mapping[str, Any]) -> str:
        thickness, spacing = parameters["thickness"], parameters["spacing"]
        if thickness is None and spacing is None:
            return "header"
        thickness, spacing = thickness or spacing, spacing or thickness
        same = thickness == spacing
        return f"{thickness:g}mm" + ("" if same else f"_every_{spacing:g}mm")
