"""Thick slices made thin, against interpolation: ``python tests/benchmarks/thick_slices.py``.

The sample volume (1 mm; --slices of it, --crop rows and columns of each) is seen through slices of
--thickness mm with and without --gaps between them, with noise, and restored to 1 mm. PSNR and SSIM
are those of the head; SSIM in the planes of the slices and across their rows and columns; delta is
the difference of mean |x_{i+1} - x_i| between the result and the truth, in percent of the displayed
range; seconds are those of one thread of the CPU. Writes a row for each case and method to
saved_results/benchmarks/thick_slices.csv, and measures only what is missing there.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.restoration import denoise_tv_chambolle

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.dataloader import list_items
from data.masks import head_mask
from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig
from guided_diffusion.operators import get_operator
from guided_diffusion.operators.base import Operator
from guided_diffusion.operators.thick_slices import (
    ThickSlices,
    restored_count,
    slice_count,
)
from guided_diffusion.prior import SHIPPED, Prior, load_prior
from guided_diffusion.restoration import FAST, restore
from guided_diffusion.volumes import AsVolume
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.volume_rows import OURS, Rows
from util.errors import ArgumentParser, status_of
from util.flags import positive
from util.metrics import psnr, ssim

Volume = NDArray[np.float32]
COLUMNS = ("thickness", "spacing", "method", "shape", "psnr", "ssim", "ssim_rows", "ssim_columns")
COLUMNS += ("delta", "seconds", "prior")
LANCZOS = 3  # lobes
TV_STEPS = 60  # of the accelerated proximal gradient, from the cubic interpolation
TV_WEIGHTS = (0.001, 0.003, 0.01, 0.03)  # the best of which counts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure thick slices made thin.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--volume", default="data/colin27/colin27_t1.nii.gz", help="of voxels of 1 mm")
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add("--thickness", type=float, nargs="+", default=[3.0, 4.0, 5.0], help="mm")
    add("--gaps", type=float, nargs="+", default=[0.0, 1.0], help="mm between slices")
    add("--sigma", type=float, default=0.02, help="noise, of the [-1, 1] image")
    add("--slices", type=positive, default=60, help="of the volume, about its middle")
    add("--crop", type=positive, default=128, help="rows and columns, about the middle")
    add("--out", default=os.path.join(FOLDER, "thick_slices.csv"), help="the CSV")
    add("--classical", action="store_true", help="interpolation and TV alone")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> Volume:
    """(slices, H, W) in [-1, 1], about args.middle where there is one."""
    items = list_items({"root": args.volume, "measured": False})
    return cut(items[0].volume.read_all(), args.slices, args.crop, getattr(args, "middle", None))


def cut(volume: NDArray, slices: int, crop: int, middle: int | None = None) -> NDArray:
    """So many slices of (slices, H, W) about the middle or another one, and of each the middle."""
    where = []
    for n, wanted in zip(volume.shape, (slices, crop, crop), strict=True):
        start = max(0, (n - wanted) // 2)
        if middle is not None and not where:
            start = min(max(0, middle - wanted // 2), max(0, n - wanted))
        where.append(slice(start, start + min(n, wanted)))
    return np.ascontiguousarray(volume[tuple(where)])


def lanczos(y: Volume, depth: int, spacing: float) -> Volume:
    """Windowed sinc along the slices, whose ends are repeated; weights sum to 1."""
    where = (len(y) - 1) / 2 + (np.arange(depth) - (depth - 1) / 2) / spacing
    taps = np.floor(where)[:, None] + np.arange(1 - LANCZOS, LANCZOS + 1)
    distance = where[:, None] - taps
    weights = np.sinc(distance) * np.sinc(distance / LANCZOS)
    weights /= weights.sum(axis=1, keepdims=True)
    chosen = taps.clip(0, len(y) - 1).astype(int)
    return np.einsum("dt,dthw->dhw", weights, y[chosen]).astype(np.float32)


def total_variation(operator: Operator, y: Volume, start: Volume, weight: float) -> Volume:
    """argmin ½‖Ax - y‖² + weight·TV(x) over three axes, by FISTA (Beck & Teboulle 2009)."""
    length = 1 / float(operator.singular_values.max()) ** 2
    x = z = start
    t = 1.0
    for _ in range(TV_STEPS):
        residual = operator.forward(torch.from_numpy(z)[None]) - torch.from_numpy(y)[None]
        z = z - length * operator.transpose(residual)[0].numpy()
        before, x = x, denoise_tv_chambolle(z, weight=weight * length, eps=0, max_num_iter=20)
        before_t, t = t, (1 + math.sqrt(1 + 4 * t**2)) / 2
        z = x + (before_t - 1) / t * (x - before)
    return x


def restored(prior: Prior, y: Volume, measurement: Measurement, in_turn: bool) -> Volume:
    way = AsVolume(chunk=1, spacing=None if in_turn else 1.0, in_turn=in_turn)  # as main.py does
    return restore(y[None], measurement, prior, "spectral", FAST, names=["v"], volume=way).mean[0]


def figures(
    make: Callable[[], Volume], truth: Volume, mask: NDArray[np.bool_]
) -> dict[str, float | str]:
    """The measures of what is made, and the CPU's seconds."""
    start = time.process_time()
    x = make()
    seconds = time.process_time() - start
    u, t = ((np.clip(v, -1, 1).astype(np.float64) + 1) / 2 for v in (x, truth))
    planes = [ssim(*(np.moveaxis(v, i, 0) for v in (u, t, mask))) for i in range(3)]
    rough = np.abs(np.diff(u, axis=0)).mean() - np.abs(np.diff(t, axis=0)).mean()
    found: dict[str, float | str] = dict(zip(COLUMNS[5:8], planes, strict=True))
    return {"psnr": psnr(u, t, mask), **found, "delta": 100 * abs(rough), "seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    truth = load(args)
    mask = np.stack([head_mask(s[None]) for s in truth])
    prior = load_prior(args.model_config, "cpu")
    rows = Rows(args.out, COLUMNS, COLUMNS[:4], prior.digest[:12])
    for gap in args.gaps:
        for thickness in args.thickness:
            lengths = (thickness, thickness + gap)
            for name, make, covered in methods(args, truth, prior, *lengths):
                key = {"thickness": f"{thickness:g}", "spacing": f"{thickness + gap:g}"}
                key |= {"method": name, "shape": "×".join(map(str, truth.shape))}
                rows.measure(key, partial(figures, make, truth[:covered], mask[:covered]))


def methods(
    args: argparse.Namespace, truth: Volume, prior: Prior, thickness: float, spacing: float
) -> Iterator[tuple[str, Callable[[], Volume], int]]:
    """What restores one case: name, what makes it, how many of the slices it covers."""
    lengths = {"thickness": thickness, "spacing": spacing, "target_spacing": 1.0}
    params = ThickSlices.check(lengths)
    depth = restored_count(slice_count(len(truth), *lengths.values()), *lengths.values())
    operator = get_operator("thick_slices", (depth, *truth.shape[1:]), **params)
    noise = torch.randn(operator.out_shape, generator=torch.Generator().manual_seed(0))
    y = (operator.forward(torch.from_numpy(truth[:depth])[None])[0] + args.sigma * noise).numpy()
    cubic = ThickSlices.interpolated(y, depth, params)
    yield "cubic", partial(ThickSlices.interpolated, y, depth, params), depth
    yield "Lanczos", partial(lanczos, y, depth, spacing), depth
    for weight in TV_WEIGHTS:
        yield f"TV, {weight:g}", partial(total_variation, operator, y, cubic, weight), depth
    measurement = Measurement(
        OperatorConfig("thick_slices", params), NoiseConfig(sigma=args.sigma), simulated=False
    )
    if not args.classical:
        for name, in_turn in ((f"{OURS}, slices", False), (f"{OURS}, planes in turn", True)):
            yield name, partial(restored, prior, y, measurement, in_turn), depth


if __name__ == "__main__":
    sys.exit(status_of(main))
