"""Noise schedules, and the steps of one that a shorter process keeps.

Symbols follow Ho et al. (2020, "DDPM") and Nichol & Dhariwal (2021, "IDDPM").
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from util.errors import UserError

SCHEDULES = ("linear", "cosine")
Respacing = int | str | Sequence[int] | None  # see `space_timesteps`


def noise_schedule_betas(name: str, steps: int) -> NDArray[np.float64]:
    """β_1..β_T as float64; "linear" (DDPM, scaled to any T) or "cosine" (IDDPM, eq. 17)."""
    if name == "linear":
        scale = 1000 / steps
        if 0.02 * scale >= 1:
            raise UserError(
                "diffusion config: steps: the linear schedule needs more than 20 (its last β would "
                f"be 1 or more), found {steps}; fewer steps of a longer one: timestep_respacing"
            )
        return np.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=np.float64)
    if name == "cosine":
        s = 0.008
        time = np.arange(steps + 1, dtype=np.float64) / steps
        alpha_bar = np.cos((time + s) / (1 + s) * math.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise UserError(
        f"diffusion config: noise_schedule: expected one of {SCHEDULES}, found {name!r}"
    )


def space_timesteps(steps: int, respacing: Respacing, at_most: bool = False) -> list[int]:
    """The timesteps of a `steps`-step process that a shorter process keeps.

    Args:
        steps: length T of the original process.
        respacing: an integer count; "a,b,c" (or a list), the counts kept of as many equal
            sections; "ddimN", N steps with a fixed integer stride; "quadN", up to N steps
            from T-1 to 0 that lie closer together the less noise there is (DiffPIR, Zhu et al.
            2023); "" or None, all of them.
        at_most: whether fewer steps do where there are not so many, or no stride makes them.

    Returns:
        Sorted list of distinct integers in [0, T).

    Raises:
        UserError: more steps than a section has, or a stride that does not exist.
    """
    where = "diffusion config: timestep_respacing"
    if respacing in ("", None):
        return list(range(steps))
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = _count(respacing[len("ddim") :], where, respacing)
        for stride in range(1, steps):
            kept = list(range(0, steps, stride))
            if len(kept) == count or (at_most and len(kept) < count):
                return kept
        if at_most:
            return [0]
        raise UserError(f"{where}: no integer stride makes {count} steps of {steps}")
    if isinstance(respacing, str) and respacing.startswith("quad"):
        count = _count(respacing[len("quad") :], where, respacing)
        if count > steps and not at_most:
            raise UserError(f"{where}: asks for {count} of {steps} steps")
        count = min(count, steps)
        done = np.sqrt(np.linspace(0, steps**2, count)).astype(int)  # of the way from T-1
        return sorted({int(steps - 1 - d) for d in np.minimum(done, steps - 1)})
    if isinstance(respacing, str):
        counts = [_count(part, where, respacing) for part in respacing.split(",")]
    elif isinstance(respacing, (list, tuple)) and respacing:
        counts = [_count(part, where, respacing) for part in respacing]
    else:
        counts = [_count(respacing, where, respacing)]

    base, extra = divmod(steps, len(counts))
    chosen: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        size = base + (section < extra)
        if count > size and not at_most:
            raise UserError(f"{where}: asks for {count} of {size} steps")
        count = min(count, size)
        gap = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # summed, not multiplied: the published rounding
            chosen.add(start + round(position))
            position += gap
        start += size
    return sorted(chosen)


def log_snr_timesteps(alphas_cumprod: NDArray, count: int, high: float, low: float) -> list[int]:
    """About `count` timesteps of evenly spaced log signal-to-noise ratio.

    Args:
        high, low: noise levels √r_t of the first and the last step. The first has no less than
            `high`; the schedule's own ends bound both.

    Returns:
        Sorted list of distinct timesteps; the nearest alone if high and low meet.
    """
    std = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    if low >= high:
        return [int(np.abs(np.log(std / max(high, std[0]))).argmin())]
    first = min(int(np.searchsorted(std, high)), len(std) - 1)
    low = min(max(low, std[0]), std[first])
    wanted = np.geomspace(std[first], low, count)[1:] if low < high else np.empty(0)
    return sorted({first, *(int(np.abs(np.log(std / level)).argmin()) for level in wanted)})


def _count(value: Any, where: str, found: Any) -> int:
    text = str(value).strip()
    if text.isdecimal() and len(text) < 10 and int(text) > 0:
        return int(text)
    raise UserError(
        f'{where}: expected an integer, "a,b,c", "ddimN", "quadN" or "logsnrN", found {found!r}'
    )


def chosen_timesteps(
    alphas_cumprod: NDArray,
    respacing: Respacing,
    start: int | str,
    levels: tuple[float, float] | None,
) -> list[int]:
    """The timesteps that `create_sampler` keeps, from `start` down.

    Below a start that is found ("auto") there may be fewer steps than `respacing` counts.
    """
    steps = len(alphas_cumprod)
    std = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    auto = start == "auto"
    if auto:
        if levels is None:
            raise UserError("diffusion config: start: auto needs a measurement to start from")
        high, low = levels
        start = min(int(np.searchsorted(std, high)), steps - 1)
    else:
        if start == "":
            start = steps - 1
        if not (isinstance(start, int) and 0 <= start < steps):
            raise UserError(
                f"diffusion config: start: expected auto or a timestep from 0 to {steps - 1}, "
                f"found {start!r}"
            )
        high, low = std[start], std[0]
    if isinstance(respacing, str) and respacing.startswith("logsnr"):
        count = _count(
            respacing[len("logsnr") :], "diffusion config: timestep_respacing", respacing
        )
        return log_snr_timesteps(alphas_cumprod[: start + 1], count, high, low)
    return space_timesteps(start + 1, respacing, at_most=auto)
