"""DMPS over its weight λ, the `scale` of a task file: ``python tests/benchmarks/scales.py``.

Restores a folder of grey slices with every task and λ, one sample each. --out receives
scales.md, scales.csv and scales_images.csv, and lambda.png: PSNR and SSIM against λ.
"""

import argparse
import os
import sys
import time

from matplotlib.figure import Figure

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from tests.benchmarks import comparison
from util.errors import ArgumentParser
from util.files import replacing

PUBLISHED = 1.75


def parse_args(argv=None):
    parser = ArgumentParser(
        description="Compare values of the weight of DMPS's pseudo-likelihood score.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    comparison.add_common(add, out="results/scales")
    add("--scales", nargs="+", type=float, default=[0.5, 1.0, PUBLISHED, 3.0], help="values of λ")
    return parser.parse_args(argv)


def rows_of(task, scale, slices, prior, seed):
    rows, schedule = [], prior.schedules["dmps"]
    with comparison.progress(task, f"λ {scale:g}", len(slices), "image") as bar:
        for image in slices:
            start = time.perf_counter()
            x_hat, _ = comparison.sample(
                "dmps", {"scale": scale}, schedule, task, [image], 0, prior, seed
            )
            seconds = time.perf_counter() - start
            rows.append(comparison.row(task, "dmps", {"scale": scale}, image, x_hat, seconds))
            bar.update()
    return rows


def draw(path, lines):
    """PSNR and SSIM against λ, a line a task; the published λ is marked."""
    figure = Figure(figsize=(8, 3.2), layout="constrained", dpi=100)
    axes = figure.subplots(1, 2)
    for axis, metric, label in zip(axes, ("psnr", "ssim"), ("PSNR (dB)", "SSIM"), strict=True):
        for task in dict.fromkeys(line["task"] for line in lines):
            part = [line for line in lines if line["task"] == task]
            scales = [float(line["parameters"].split()[1]) for line in part]
            axis.plot(scales, [line[metric] for line in part], marker="o", label=task)
        axis.axvline(PUBLISHED, color="grey", linestyle=":")
        axis.set_xlabel("λ")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def compare(args):
    """Run everything, rewriting the tables after each part; returns the summary's lines."""
    images = comparison.read_images(args)
    prior = comparison.load_prior(args)
    comparison.make_folder(args.out)
    steps = prior.schedules["dmps"]["timestep_respacing"]
    description = comparison.describe_setting(args, images, prior, f"{steps} steps")
    rows = []
    for task in map(comparison.read_task, dict.fromkeys(args.tasks)):
        slices = comparison.measure(task, images, args.seed)
        for scale in sorted(set(args.scales)):
            rows += rows_of(task, scale, slices, prior, args.seed)
            comparison.write_tables(args.out, description, rows, stem="scales")
    lines = comparison.summarise(rows)
    draw(os.path.join(args.out, "lambda.png"), lines)
    return lines


def main(argv=None):
    return comparison.report(parse_args(argv), compare)


if __name__ == "__main__":
    sys.exit(main())
