"""Do neighbours agree, do intervals hold? ``python tests/benchmarks/volume_samples.py``.

The middle --slices of the sample volume, --crop rows and columns of each, are denoised and enlarged
by samples whose slices have noise of their own (independent), by samples whose noise agrees between
neighbours (agreeing), and with planes in turn, as main.py restores nearly cubic voxels. For each

delta       difference of mean |x_{i+1} - x_i| along the slices between a sample and the truth, in
            percent of the displayed range; delta_mean: the same of the samples' mean
drawn       share, of the mean squared error of x_{i+1} - x_i, that differs from sample to sample:
            what other noise could change; the rest is the same in all of them
psnr        of the head, of one sample and of the mean; in_50, in_90, rescale: see
            `util.metrics.calibration`

A row for each method, task and way goes to saved_results/benchmarks/volume_samples.csv; only what
is missing there is measured. The first sample of the first method is drawn from the side, as
saved_results/volume_samples.png. --factors writes rescale of the two last ways for the intervals of
`guided_diffusion.intervals`.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from functools import partial

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.masks import head_mask
from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig
from guided_diffusion.intervals import case_of, factors_path, save_factors
from guided_diffusion.methods import METHODS
from guided_diffusion.prior import SHIPPED, Prior, load_prior
from guided_diffusion.restoration import Restored, restore
from guided_diffusion.volumes import AsVolume
from tests.benchmarks.rows import FOLDER
from tests.benchmarks.settings import REPOSITORY
from tests.benchmarks.thick_slices import load
from tests.benchmarks.volume_rows import Rows
from util.errors import ArgumentParser, status_of
from util.files import replacing
from util.flags import positive
from util.metrics import calibration, psnr

Volume = NDArray[np.float32]  # (D, H, W) in [-1, 1]
COLUMNS = ("method", "task", "way", "shape", "samples", "delta", "delta_mean", "drawn")
COLUMNS += ("psnr_sample", "psnr_mean", "in_50", "in_90", "rescale", "seconds", "prior")
KEY = COLUMNS[:5]
TASKS = {"super_resolution": ({"scale_factor": 4}, 0.05), "denoise": ({}, 0.2)}
ALWAYS_ALIKE = {("spectral", "denoise")}  # it draws nothing, so that its samples are one
WAYS = {  # of voxels of 1 mm
    "independent": AsVolume(chunk=1, spacing=None),
    "agreeing": AsVolume(chunk=1, spacing=1.0),
    "planes in turn": AsVolume(chunk=1, spacing=None, in_turn=True),
}
DEFAULT_STEPS = "configs/diffusion_config_samples.yaml"
FIGURE = os.path.join(REPOSITORY, "saved_results", "volume_samples.png")
SHOWN = "super_resolution"  # the task of the figure


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure samples of volumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--volume", default="data/colin27/colin27_t1.nii.gz", help="of voxels of 1 mm")
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add("--methods", nargs="+", default=["spectral_sample", "spectral"], choices=METHODS)
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    add("--slices", type=positive, default=28, help="of the volume, about its middle")
    add("--crop", type=positive, default=96, help="rows and columns, about the middle")
    add("--num_samples", type=positive, default=4)
    add("--out", default=os.path.join(FOLDER, "volume_samples.csv"), help="the CSV")
    add("--figure", default=FIGURE, help="the picture")
    add("--factors", action="store_true", help="write the factors beside the weights")
    return parser.parse_args(argv)


def steps(x: NDArray) -> NDArray:
    """What changes from slice to slice of (..., D, H, W), in percent of the displayed range."""
    return 50 * np.diff(x.astype(np.float64), axis=-3)


def figures(found: Restored, truth: Volume, mask: NDArray[np.bool_]) -> dict[str, float | str]:
    """The measures of samples (1, K, D, H, W)."""
    first, mean = found.samples[0, 0], found.mean[0]
    of_truth = np.abs(steps(truth)).mean()
    deltas = [abs(float(np.abs(steps(x)).mean() - of_truth)) for x in (first, mean)]
    # An odd sample mirrors the one before it, so that their mean is no estimate but the centre.
    drawn = steps(found.samples[0]).var(axis=0).mean()
    error = np.square(steps(found.samples[0]) - steps(truth)).mean()
    u, v, t = ((x.astype(np.float64) + 1) / 2 for x in (first, mean, truth))
    ratings: dict[str, float | str] = {"delta": deltas[0], "delta_mean": deltas[1]}
    ratings |= {"drawn": float(drawn / error)}
    ratings |= {"psnr_sample": psnr(u, t, mask), "psnr_mean": psnr(v, t, mask)}
    return ratings | calibration(found.samples[0], truth)


def sampled(prior: Prior, truth: Volume, task: str, method: str, way: str, count: int) -> Restored:
    params, sigma = TASKS[task]
    schedule = f"configs/{METHODS[method].schedule}" if METHODS[method].schedule else DEFAULT_STEPS
    measurement = Measurement(OperatorConfig(task, params), NoiseConfig(sigma=sigma), True)
    how = {"names": ["v"], "num_samples": count, "volume": WAYS[way]}
    return restore(truth[None], measurement, prior, method, schedule, **how)


def draw(path: str, volumes: Mapping[str, Volume]) -> None:
    """Coronal and sagittal planes through the middle of each volume, one column a volume."""
    sides = next(iter(volumes.values())).shape
    size = 2.6 * len(volumes), 2 * 2.6 * sides[0] / sides[2] + 0.5
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(volumes), squeeze=False)
    for column, (name, x) in zip(axes.T, volumes.items(), strict=True):
        planes = {"coronal": x[::-1, sides[1] // 2], "sagittal": x[::-1, :, sides[2] // 2]}
        for axis, (plane, image) in zip(column, planes.items(), strict=True):
            axis.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if name == "truth":
                axis.set_ylabel(plane, fontsize=9)
        column[0].set_title(name, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    truth = load(args)
    mask = np.stack([head_mask(s[None]) for s in truth])
    prior = load_prior(args.model_config, "cpu")
    rows = Rows(args.out, COLUMNS, KEY, prior.digest[:12], own=lambda row: True)
    factors: dict[str, dict[str, float]] = {}
    shown: dict[str, Volume] = {}  # first samples for the figure, by their way

    def measure(task: str, method: str, way: str) -> dict[str, float | str]:
        start = time.process_time()
        found = sampled(prior, truth, task, method, way, args.num_samples)
        seconds = time.process_time() - start
        if (method, task) == (args.methods[0], SHOWN):
            shown[way] = found.samples[0, 0]
        return figures(found, truth, mask) | {"seconds": seconds}

    for method in args.methods:
        for task in args.tasks:
            if (method, task) in ALWAYS_ALIKE:
                continue
            for way in WAYS:
                key = {"method": method, "task": task, "way": way}
                key |= {"shape": "×".join(map(str, truth.shape)), "samples": str(args.num_samples)}
                row = rows.measure(key, partial(measure, task, method, way))
                if way != "independent":
                    case = case_of(task, WAYS[way].in_turn)
                    factors.setdefault(method, {})[case] = float(row["rescale"])
    if SHOWN in args.tasks and (shown or not os.path.exists(args.figure)):
        for way in WAYS:
            if way not in shown:  # its row was there
                shown[way] = sampled(prior, truth, SHOWN, args.methods[0], way, 1).samples[0, 0]
        draw(args.figure, {"truth": truth, **{way: shown[way] for way in WAYS}})
    if args.factors:
        source = f"{len(truth)} slices of {args.volume}, {args.num_samples} samples each"
        save_factors(prior, factors, source, factors_path(prior.config.model_path))
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
