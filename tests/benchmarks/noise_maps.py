"""Denoising where σ varies from voxel to voxel: ``python tests/benchmarks/noise_maps.py``.

--slices of the sample volume about its middle, --crop rows and columns of each, get Rice noise that
is 2.5 times as strong in the middle of the head as far from it, as parallel imaging leaves it, and
are restored by `spectral` as a volume: with one σ, estimated (`sigma: auto`), with a map of it,
estimated (`sigma: local`), and with the map that the noise was drawn from. The error of σ is the
root mean square of its ratio to the true one, less 1, in the head; PSNR, SSIM and HaarPSI are those
of the head. Noise that is the same everywhere shows what an estimated map costs there. Writes
saved_results/benchmarks/noise_maps.csv, and measures only what is missing there.
"""

import argparse
import os
import sys
import time
from functools import partial

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.masks import head_mask
from guided_diffusion.config import read_schedule
from guided_diffusion.item_noise import heads, share_of_noise
from guided_diffusion.measuring import noise_of, sigma_of
from guided_diffusion.prior import SHIPPED, Prior, load_prior
from guided_diffusion.restoration import FAST
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.thick_slices import load
from tests.benchmarks.volume_denoising import CUBES, MEASURED, Seeded, Volume, ours
from tests.benchmarks.volume_rows import Rows
from util.errors import ArgumentParser, status_of
from util.flags import positive
from util.metrics import image_metrics

MIDDLE = 2.5  # σ there, of that far from it
WIDTH = 0.3  # standard deviation of the bump, of a side
PERCENT = (2, 4)  # σ at the rim, of the white level
KINDS = ("varies", "does not")
COLUMNS = (
    "part", "noise", "noise_percent", "method", "sigma_error", "psnr", "ssim", "haarpsi",
    "seconds", "prior",
)  # fmt: skip
PATH = os.path.join(FOLDER, "noise_maps.csv")


def map_of(shape: tuple[int, ...], percent: float, kind: str) -> Volume:
    """σ of each voxel, in units of the [-1, 1] image."""
    sides = np.meshgrid(*[np.arange(n) / n - 0.5 for n in shape[1:]], indexing="ij")
    bump = np.exp(-sum(side**2 for side in sides) / (2 * WIDTH**2))
    gain = 1 + (MIDDLE - 1) * bump if kind == "varies" else np.ones(shape[1:])
    return np.broadcast_to(2 * percent / 100 * gain, shape).astype(np.float32)


def estimates(prior: Prior, M: Volume, sigma: Volume) -> dict[str, Volume]:
    """σ as each row of the table takes it."""
    known, head = (MEASURED, prior, read_schedule(FAST)), heads(M)
    found = noise_of(MEASURED).estimate_map(M, (1.0, 1.0, 1.0))
    share = np.float32(share_of_noise(M[:, None], found, head, *known))
    return {
        "ours, one σ": np.full(M.shape, sigma_of(M[:, None], *known), np.float32),
        "ours, map estimated": np.where(head, share * found, found),
        "ours, map known": sigma,
    }


def figures(prior: Prior, M: Volume, taken: Volume, sigma: Volume, truth: Volume, mask):
    """The measures of what is restored with σ `taken`, and the CPU's seconds."""
    start = time.process_time()
    x = ours(prior, M, taken, CUBES)
    seconds = time.process_time() - start
    metrics = image_metrics(x, truth, mask)
    error = float(np.sqrt(np.mean((taken / sigma - 1)[mask] ** 2)))
    found = {k: metrics[k] for k in ("psnr", "ssim", "haarpsi")}
    return {"sigma_error": error, **found, "seconds": seconds}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure denoising where the noise varies.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--volume", default="data/colin27/colin27_t1.nii.gz", help="of cubic voxels of 1 mm")
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add("--slices", type=positive, default=16, help="of the volume")
    add("--crop", type=positive, default=112, help="rows and columns, about the middle")
    add("--out", default=PATH, help="the CSV")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    truth = load(args)
    mask = np.stack([head_mask(s[None]) for s in truth])
    prior = load_prior(args.model_config, "cpu")
    part = f"{os.path.basename(args.volume).split('.')[0]} {'×'.join(map(str, truth.shape))}"
    rows = Rows(args.out, COLUMNS, COLUMNS[:4], prior.digest[:12])
    for kind in KINDS:
        for percent in PERCENT:
            sigma = map_of(truth.shape, percent, kind)
            unit = Seeded(percent).randn_like(torch.empty(2, *truth.shape)).numpy()
            M = np.hypot(truth + 1 + sigma * unit[0], sigma * unit[1]) - 1
            for method, taken in estimates(prior, M, sigma).items():
                key = {"part": part, "noise": kind, "noise_percent": str(percent)}
                make = partial(figures, prior, M, taken, sigma, truth, mask)
                rows.measure(key | {"method": method}, make)
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
