"""Accelerated MRI: part of k-space, lines or points, of one coil or several.

`F` is the centred orthonormal DFT, fastMRI's. A measurement has real and imaginary parts one after
the other, because x is real:

    y = A x + n,   A x = [Re(M F (S_c x)); Im(M F (S_c x))]_c,   M what of k-space is measured

S_c are the coils' sensitivities times e^{iφ}, φ the phase of the scanned object. An object of
magnitude u = s (x + 1)/2 is measured as (s/2) A (x + 1): what is added to A x is `offset`.

Where whole lines are measured, the readout direction is complete and its DFT is unitary, so a
measurement is kept in hybrid space: transformed back along the readout, still k-space along the
phase encoding. There every line of the image along the phase encoding is measured on its own.

| measured | operator | SVD |
|---|---|---|
| one coil, lines | `one_coil.OneCoil` | separable, exact |
| one coil, points | `one_coil.OneCoilPoints` | exact, V the Hartley transform |
| several coils, lines | `several_coils.Coils` | exact, line by line |
| several coils, points | `several_coils.Points` | none: conjugate gradients |
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.operators.base import WHERE, Operator, Shape
from guided_diffusion.operators.coils import simulated_maps
from guided_diffusion.operators.fourier import fft1c, ifft1c
from guided_diffusion.operators.masks import KINDS, read_mask, sampling_mask
from guided_diffusion.operators.one_coil import OneCoil, OneCoilPoints
from guided_diffusion.operators.scanned import AXES, Scanned
from guided_diffusion.operators.several_coils import THRESHOLD, several_coils
from util.errors import UserError
from util.parameters import Parameter


def to_hybrid(
    kspace: torch.Tensor, mask: NDArray[np.bool_] | torch.Tensor, axis: str = "columns"
) -> torch.Tensor:
    """Complex k-space (..., H, W) → measurement, real, (..., H, 2m) for m lines along columns."""
    dim = AXES[axis]
    hybrid = ifft1c(kspace, -3 - dim)  # the readout is the other one of -1 and -2
    lines = torch.as_tensor(mask, device=kspace.device).nonzero()[:, 0]
    hybrid = hybrid.index_select(dim, lines)
    return torch.cat([hybrid.real, hybrid.imag], dim=dim)


def from_hybrid(
    y: torch.Tensor, mask: NDArray[np.bool_] | torch.Tensor, axis: str = "columns"
) -> torch.Tensor:
    """The inverse of `to_hybrid`; lines that are not measured are 0."""
    dim = AXES[axis]
    real, imag = y.chunk(2, dim=dim)
    lines = torch.as_tensor(mask, device=y.device).nonzero()[:, 0]
    shape = list(real.shape)
    shape[dim] = len(mask)
    hybrid = torch.zeros(shape, dtype=y.dtype.to_complex(), device=y.device)
    hybrid.index_copy_(dim, lines, torch.complex(real, imag))
    return fft1c(hybrid, -3 - dim)


class MRI(Scanned):
    """Accelerated MRI of one coil, or of several that are simulated."""

    name = "mri"
    of_kspace = True
    from_all_sides = False  # no gain where it was measured, R = 4
    parameters = {
        "mask": Parameter("equispaced_fraction", f"{', '.join(KINDS)}, or a .npy file", (str,)),
        "acceleration": Parameter(4.0, "R, all of k-space over what is measured", low=1),
        "center_fraction": Parameter(0.08, "share of each axis about the centre, all of it", low=0),
        "mask_seed": Parameter(
            0, "seed of the mask, or a text: fastMRI's file name", (int, str), low=0, high=2**32 - 1
        ),
        "axis": Parameter(
            None,
            "along which phase is encoded: columns or rows; None: the file's, or columns",
            (str,),
            choices=tuple(AXES),
        ),
        "coils": Parameter(1, "1, or the number of simulated coils", (int,), low=1, high=64),
        "keep_measured": Parameter(
            False, "raw k-space: show measured lines as they are, noise included", (bool,)
        ),
        "singular_value_threshold": Parameter(
            THRESHOLD, "several coils: below it singular values count as 0", low=0, high=1
        ),
    }

    @classmethod
    def build(
        cls, in_shape: Shape, device: torch.device | str, dtype: torch.dtype, **parameters: Any
    ) -> Operator:
        coils, axis = parameters["coils"], parameters["axis"] or "columns"
        mask = sampling_mask(in_shape[1], in_shape[2], axis, parameters)
        if coils == 1 and mask.ndim == 2:
            return OneCoilPoints(in_shape, mask, device, dtype)
        if coils == 1:
            return OneCoil.of_lines(in_shape, mask, axis, device, dtype)
        if in_shape[0] != 1:
            raise UserError(
                f"{WHERE}.coils: {coils} coils need a prior of one channel, and this one has "
                f"{in_shape[0]}"
            )
        maps = simulated_maps(coils, in_shape[1], in_shape[2])
        threshold = parameters["singular_value_threshold"]
        return several_coils(mask, maps, axis, threshold, device, dtype)

    @classmethod
    def expected_size(cls, size: tuple[int, int], parameters: Mapping[str, Any]) -> tuple[int, int]:
        if parameters["mask"] in KINDS:
            return size
        mask = read_mask(parameters["mask"])
        if mask.ndim == 2:
            return mask.shape[0], mask.shape[1]
        return (size[0], len(mask)) if parameters["axis"] != "rows" else (len(mask), size[1])

    @classmethod
    def takes_volumes(cls, parameters: Mapping[str, Any]) -> bool:
        return parameters["coils"] == 1

    @classmethod
    def variant(cls, parameters: Mapping[str, Any]) -> str:
        mask = parameters["mask"]
        kind = mask if mask in KINDS else os.path.splitext(os.path.basename(mask))[0]
        rate = f"_R{parameters['acceleration']:g}" if mask in KINDS else ""
        return f"{kind}{rate}" + (f"_{parameters['coils']}coils" if parameters["coils"] > 1 else "")
