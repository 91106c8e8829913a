"""Do neighbours agree, do intervals hold? ``python tests/benchmarks/volume_samples.py``.

The middle --slices of the sample volume, --crop rows and columns of each, are denoised and enlarged
by samples whose noise agrees between neighbouring slices, and by samples whose slices have noise of
their own. delta is the difference of mean |x_{i+1} - x_i| between a sample and the truth, in
percent of the displayed range; PSNR is that of the head, of one sample and of the mean; in_50,
in_90 and rescale are `util.metrics.calibration`'s. Writes a row for each method, task and noise to
saved_results/benchmarks/volume_samples.csv, measures only what is missing there, and with --factors
writes rescale of the agreeing samples for the intervals of `guided_diffusion.intervals`.
"""

import argparse
import os
import sys
import time
from functools import partial

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.masks import head_mask
from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig
from guided_diffusion.intervals import factors_path, save_factors
from guided_diffusion.methods import METHODS
from guided_diffusion.prior import SHIPPED, Prior, load_prior
from guided_diffusion.restoration import Restored, restore
from guided_diffusion.volumes import AsVolume
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.thick_slices import load
from tests.benchmarks.volume_rows import Rows
from util.errors import ArgumentParser
from util.flags import positive
from util.metrics import calibration, psnr

COLUMNS = ("method", "task", "noise", "samples", "delta", "psnr_sample", "psnr_mean")
COLUMNS += ("in_50", "in_90", "rescale", "seconds", "prior")
TASKS = {"denoise": ({}, 0.2), "super_resolution": ({"scale_factor": 4}, 0.05)}
SPACING = {"agreeing": 1.0, "independent": None}  # mm, of the sample volume
DEFAULT_STEPS = "configs/diffusion_config_samples.yaml"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure samples of volumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--volume", default="data/colin27/colin27_t1.nii.gz", help="of voxels of 1 mm")
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add("--methods", nargs="+", default=["spectral_sample", "spectral", "ddrm"], choices=METHODS)
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    add("--slices", type=positive, default=16, help="of the volume, about its middle")
    add("--crop", type=positive, default=128, help="rows and columns, about the middle")
    add("--num_samples", type=positive, default=4)
    add("--out", default=os.path.join(FOLDER, "volume_samples.csv"), help="the CSV")
    add("--factors", action="store_true", help="write the factors beside the weights")
    return parser.parse_args(argv)


def flicker(x: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """The difference of mean |x_{i+1} - x_i| along the slices, in percent of the range."""
    rough, of_truth = (np.abs(np.diff(v, axis=0)).mean() / 2 for v in (x, truth))
    return 100 * abs(float(rough - of_truth))


def figures(found: Restored, truth: NDArray[np.float32], mask: NDArray[np.bool_]):
    """The measures of samples (1, K, D, H, W)."""
    first, mean = found.samples[0, 0], found.mean[0]
    u, v, t = ((x.astype(np.float64) + 1) / 2 for x in (first, mean, truth))
    ratings: dict[str, float | str] = {"delta": flicker(first, truth)}
    ratings |= {"psnr_sample": psnr(u, t, mask), "psnr_mean": psnr(v, t, mask)}
    return ratings | calibration(found.samples[0], truth)


def sampled(
    prior: Prior, truth: NDArray[np.float32], task: str, method: str, noise: str, count: int
) -> Restored:
    params, sigma = TASKS[task]
    schedule = f"configs/{METHODS[method].schedule}" if METHODS[method].schedule else DEFAULT_STEPS
    measurement = Measurement(OperatorConfig(task, params), NoiseConfig(sigma=sigma), True)
    way = AsVolume(chunk=1, spacing=SPACING[noise])
    how = {"names": ["v"], "num_samples": count, "volume": way}
    return restore(truth[None], measurement, prior, method, schedule, **how)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    truth = load(args)
    mask = np.stack([head_mask(s[None]) for s in truth])
    prior = load_prior(args.model_config, "cpu")
    rows = Rows(args.out, COLUMNS, COLUMNS[:4], prior.digest[:12], own=lambda row: True)
    factors: dict[str, dict[str, float]] = {}

    def measure(task: str, method: str, noise: str) -> dict[str, float | str]:
        start = time.process_time()
        found = sampled(prior, truth, task, method, noise, args.num_samples)
        seconds = time.process_time() - start
        return figures(found, truth, mask) | {"seconds": seconds}

    for method in args.methods:
        for task in args.tasks:
            for noise in SPACING:
                key = {"method": method, "task": task, "noise": noise}
                key |= {"samples": str(args.num_samples)}
                row = rows.measure(key, partial(measure, task, method, noise))
                if noise == "agreeing":
                    factors.setdefault(method, {})[task] = float(row["rescale"])
    if args.factors:
        source = f"{len(truth)} slices of {args.volume}, {args.num_samples} samples each"
        save_factors(prior, factors, source, factors_path(prior.config.model_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
