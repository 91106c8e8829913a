"""Means of what was measured of images, over a run's."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from util.columns import columns

Finite = dict[str, tuple[list[float], int]]  # column → its finite numbers, how many are not


def finite(rows: Sequence[Mapping[str, object]], keys: Iterable[str]) -> Finite:
    """Of columns of numbers those that are finite; columns without a number are left out.

    The PSNR of equal images is infinite, and the NMSE of a black truth NaN.
    """
    found: Finite = {}
    for key in keys:
        numbers = [v for row in rows if isinstance(v := row.get(key), float)]
        if numbers:
            kept = [v for v in numbers if math.isfinite(v)]
            found[key] = kept, len(numbers) - len(kept)
    return found


def means(found: Finite) -> dict[str, float | None]:
    """Mean of each column where it is finite; None where it never is."""
    return {k: float(np.mean(v)) if v else None for k, (v, _) in found.items()}


def lines(found: Finite) -> list[str]:
    """Means and standard deviations, a line for each column."""
    known, table = columns(), []
    for key, (values, others) in found.items():
        heading = known[key].heading if key in known else key
        shown = f"{np.mean(values):9.4f} ± {np.std(values):.4f}" if values else f"{'none':>9}"
        left_out = f" ({others} left out, not finite)" if others else ""
        table.append(f"  {heading:<24} {shown}{left_out}")
    return table
