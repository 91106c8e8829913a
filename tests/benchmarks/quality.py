"""Quality of DMPS beside classical methods: ``python tests/benchmarks/quality.py``.

Restores a folder of grey slices with chosen tasks and methods, run from the repository's root.
--out receives quality.md and quality.csv (PSNR, SSIM, NMSE and the ratio of high-frequency energy
to the truth's as mean ± standard deviation over the images, seconds an image) and
quality_images.csv (a row an image). All methods see the same measurements, the ones that main.py
draws. A classical method's parameters are those of its grid that give the best mean PSNR on these
very images, which favours it.

dmps, spectral and spectral_sample are one sample, main.py's own for the same seed, on the schedules
of --diffusion_config, configs/diffusion_config_fast.yaml and configs/diffusion_config_samples.yaml;
with _mean, they are the means of --num_samples of them, with their calibration; denoiser is a single
evaluation of the network, at the t whose noise is the measurement's.
"""

import argparse
import importlib.util
import itertools
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.measurements import OPERATORS
from tests.benchmarks import comparison
from tests.benchmarks.classical import CLASSICAL
from util.errors import ArgumentParser, UserError
from util.flags import positive
from util.metrics import calibration

SAMPLED = ("dmps", *comparison.OWN_SCHEDULES)
# method of the prior → the operators it is for
LEARNED = {
    "denoiser": ("denoise",),
    **{name + mean: OPERATORS for name in SAMPLED for mean in ("", "_mean")},
}
METHODS = {**{name: method.operators for name, method in CLASSICAL.items()}, **LEARNED}
HOW_TO_INSTALL = "pip install -r tests/requirements.txt, or leave it out of --methods"


def parse_args(argv=None):
    parser = ArgumentParser(
        description="Compare DMPS with classical methods on a folder of grey slices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    comparison.add_common(add, out="results/quality")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="each is run on the tasks it is for",
    )
    add("--batch_size", type=positive, default=1, help="images the prior restores at once")
    add("--num_samples", type=positive, default=8, help="samples that a _mean averages")
    return parser.parse_args(argv)


def classical_rows(task, name, slices):
    """Rows of the parameters that give this method its best mean PSNR."""
    method = CLASSICAL[name]
    candidates = []
    with comparison.progress(task, name, len(method.grid) * len(slices), "image") as bar:
        for parameters in method.grid:
            rows = []
            for image in slices:
                start = time.perf_counter()
                operator = comparison.operator_of(task, tuple(image.truth.shape[1:]))
                x_hat = method.restore(operator, image.y, task.noise.sigma, **parameters)
                seconds = time.perf_counter() - start
                rows.append(comparison.row(task, name, parameters, image, x_hat, seconds))
                bar.update()
            candidates.append(rows)
    return max(candidates, key=lambda rows: comparison.mean(rows, "psnr"))


def batches(slices, size):
    """Lists of up to `size` neighbours of one shape."""
    for _, group in itertools.groupby(slices, key=lambda image: image.truth.shape):
        group = list(group)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def learned_rows(task, methods, slices, prior, args):
    """Rows of the prior's methods; `dmps` is the first of the samples that `dmps_mean` averages."""
    restored = {method: [] for method in methods}
    with comparison.progress(task, " ".join(methods), len(slices), "image") as bar:
        for batch in batches(slices, args.batch_size):
            estimates = [denoiser(task, batch, prior)] if "denoiser" in methods else []
            for name in SAMPLED:
                if not {name, f"{name}_mean"}.isdisjoint(methods):
                    estimates += sampled(name, task, methods, batch, prior, args)
            for method, parameters, x_hat, seconds, figures in estimates:
                restored[method] += [
                    comparison.row(
                        task, method, parameters, image, x_hat[i : i + 1], seconds / len(batch)
                    )
                    | {key: values[i] for key, values in figures.items()}
                    for i, image in enumerate(batch)
                ]
            bar.update(len(batch))
    return [r for rows in restored.values() for r in rows]


def denoiser(task, batch, prior):
    """x̂_0 from x_t = √ᾱ_t y, at the t whose r_t = (1-ᾱ_t)/ᾱ_t is nearest to σ².

    Returns:
        (method, parameters, x_hat (N, 1, H, W), seconds of the batch, further figures as lists
        of N), like `sampled`'s items.
    """
    start = time.perf_counter()
    alpha_bar = prior.every_t.alphas_cumprod
    t = int(np.argmin(np.abs((1 - alpha_bar) / alpha_bar - task.noise.sigma**2)))
    x_t = (np.sqrt(alpha_bar[t]) * torch.cat([image.y for image in batch])).to(prior.device)
    steps = torch.full((len(batch),), t, dtype=torch.int64, device=prior.device)
    with torch.inference_mode():
        x_hat = prior.every_t.p_mean_variance(prior.model, x_t, steps)["pred_xstart"]
    return "denoiser", {"t": t}, x_hat.float().cpu(), time.perf_counter() - start, {}


def sampled(name, task, methods, batch, prior, args):
    """One sample, and the mean of --num_samples of them, as far as they are asked for."""
    start = time.perf_counter()
    params = {"scale": task.scale} if name == "dmps" else {}
    count = args.num_samples if f"{name}_mean" in methods else 1
    schedule, samples, found = prior.schedules[name], [], []
    for k in range(count):
        x_hat, steps = comparison.sample(name, params, schedule, task, batch, k, prior, args.seed)
        samples.append(x_hat)
        if k == 0 and name in methods:
            found.append((name, {"steps": steps}, x_hat, time.perf_counter() - start, {}))
    if f"{name}_mean" in methods:
        seconds, samples = time.perf_counter() - start, torch.stack(samples)
        reports = [
            calibration(samples[:, i].numpy(), image.truth[0].numpy())
            for i, image in enumerate(batch)
            if count > 1
        ]
        figures = {key: [r[key] for r in reports] for key in (reports[0] if reports else ())}
        parameters = {"steps": steps, "samples": count}
        found.append((f"{name}_mean", parameters, samples.mean(dim=0), seconds, figures))
    return found


def describe(args, images, prior):
    """The head of quality.md."""
    text = comparison.describe_setting(args, images, prior, f"batch {args.batch_size}")
    grids = [
        f"{name}: " + ", ".join(f"{k} {list(v)}" for k, v in CLASSICAL[name].parameters.items())
        for name in args.methods
        if name in CLASSICAL and CLASSICAL[name].parameters
    ]
    if grids:
        text += f"Parameters, best mean PSNR on these images, from {'; '.join(grids)}.\n"
    return text


def plan(args):
    """(task, classical methods, methods of the prior) for every task, in a fixed order."""
    chosen = [name for name in METHODS if name in args.methods]
    parts = []
    for task in map(comparison.read_task, dict.fromkeys(args.tasks)):
        methods = [name for name in chosen if task.operator["name"] in METHODS[name]]
        if not methods:
            raise UserError(f"--methods: none of {', '.join(chosen)} is for {task.name}")
        if "bm3d" in methods and importlib.util.find_spec("bm3d") is None:
            raise UserError(f"--methods: bm3d is not installed ({HOW_TO_INSTALL})")
        classical = [name for name in methods if name in CLASSICAL]
        parts.append((task, classical, [name for name in methods if name in LEARNED]))
    return parts


def compare(args):
    """Run everything, rewriting the tables after each part; returns the summary's lines."""
    parts, images = plan(args), comparison.read_images(args)
    prior = comparison.load_prior(args) if any(learned for *_, learned in parts) else None
    comparison.make_folder(args.out)
    description = describe(args, images, prior)
    rows = []
    for task, classical, learned in parts:
        slices = comparison.measure(task, images, args.seed)
        for name in classical:
            rows += classical_rows(task, name, slices)
            comparison.write_tables(args.out, description, rows, stem="quality")
        if learned:
            rows += learned_rows(task, learned, slices, prior, args)
            comparison.write_tables(args.out, description, rows, stem="quality")
    return comparison.summarise(rows)


def main(argv=None):
    return comparison.report(parse_args(argv), compare)


if __name__ == "__main__":
    sys.exit(main())
