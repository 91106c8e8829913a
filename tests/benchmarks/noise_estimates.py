"""How near an estimated σ comes: ``python tests/benchmarks/noise_estimates.py``.

--each slices of every folder of --slices, evenly spaced, get Rice noise of a few σ, as they are and
with pixels twice as coarse, with noise in the air and with the air painted black, as brain
extraction and some scanners leave it. They are denoised by `spectral` with σ estimated from the
high frequencies alone, with what the prior makes of that (`sigma: auto`), and with the σ that the
noise was drawn with. The error of σ is the mean of |σ̂/σ - 1|; PSNR, SSIM and HaarPSI are means, of
whole images. Writes saved_results/benchmarks/noise_estimates.csv, and measures only what is missing
there.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.dataloader import list_items
from data.masks import head_mask
from guided_diffusion.config import read_schedule
from guided_diffusion.measuring import noise_of, sigma_of
from guided_diffusion.prior import SHIPPED, Prior, load_prior
from guided_diffusion.restoration import FAST, restore
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.volume_denoising import MEASURED
from tests.benchmarks.volume_rows import Rows
from util.errors import ArgumentParser, status_of
from util.flags import positive
from util.metrics import image_metrics

SIGMAS = (0.02, 0.05, 0.1)
COARSER = {"as they are": 1, "twice as coarse": 2}
AIRS = ("has noise", "is black")
COLUMNS = (
    "air", "pixels", "sigma", "method", "images", "sigma_error", "psnr", "ssim", "haarpsi",
    "seconds", "prior",
)  # fmt: skip
PATH = os.path.join(FOLDER, "noise_estimates.csv")
Image = NDArray[np.float32]  # (1, H, W) in [-1, 1]
Estimate = Callable[[Image, float], float]


def estimates(prior: Prior) -> dict[str, Estimate]:
    """How each row of the table comes to its σ, from the image and the σ of its noise."""
    schedule = read_schedule(FAST)
    return {
        "ours, without the prior": lambda y, sigma: noise_of(MEASURED).estimate(y),
        "ours, with it": lambda y, sigma: sigma_of(y[None], MEASURED, prior, schedule),
        "ours, σ known": lambda y, sigma: sigma,
    }


def chosen(folders: list[str], each: int) -> list[Image]:
    """The first channels of so many slices of each folder, evenly spaced."""
    found = []
    for folder in folders:
        items = list_items({"root": folder, "measured": False})
        places = ((np.arange(each) + 1 / 3) * len(items) / each).astype(int)
        found += [items[i].read()[:1] for i in places]
    return found


def measured(truth: Image, sigma: float, coarser: int, air: str, seed: int) -> tuple[Image, Image]:
    """The image that was, and as it was measured."""
    height, width = (n // coarser for n in truth.shape[-2:])
    x = truth[:, : height * coarser, : width * coarser]
    x = x.reshape(1, height, coarser, width, coarser).mean(axis=(2, 4))
    real, imaginary = sigma * np.random.default_rng(seed).standard_normal((2, *x.shape))
    y = np.hypot(x + 1 + real, imaginary) - 1
    if air == "is black":
        outside = ~head_mask(x)[None]
        x, y = (np.where(outside, -1, image) for image in (x, y))
    return x.astype(np.float32), y.astype(np.float32)


def figures(
    prior: Prior, images: list[Image], sigma: float, coarser: int, air: str, estimate: Estimate
) -> dict[str, float | str]:
    """A row of the table."""
    start, errors, found = time.process_time(), [], []
    for i, truth in enumerate(images):
        x, y = measured(truth, sigma, coarser, air, i)
        taken = estimate(y, sigma)
        errors.append(abs(taken / sigma - 1))
        known = torch.tensor([taken])
        restored = restore(y[None], MEASURED, prior, "spectral", FAST, names=[str(i)], sigma=known)
        found.append(image_metrics(restored.mean[0], x))
    means = {k: float(np.mean([row[k] for row in found])) for k in ("psnr", "ssim", "haarpsi")}
    seconds = (time.process_time() - start) / len(images)
    return {
        "images": str(len(images)), "sigma_error": float(np.mean(errors)), **means,
        "seconds": seconds,
    }  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure how near an estimated σ comes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--slices", nargs="+", default=["data/mri_256_orig"], help="folders of slices")
    add("--each", type=positive, default=2, help="slices of each folder")
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add("--out", default=PATH, help="the CSV")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    images = chosen(args.slices, args.each)
    prior = load_prior(args.model_config, "cpu")
    rows = Rows(args.out, COLUMNS, COLUMNS[:4], prior.digest[:12])
    for air in AIRS:
        for pixels, coarser in COARSER.items():
            for sigma in SIGMAS:
                key = {"air": air, "pixels": pixels, "sigma": str(sigma)}
                for method, estimate in estimates(prior).items():
                    make = partial(figures, prior, images, sigma, coarser, air, estimate)
                    rows.measure(key | {"method": method}, make)
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
