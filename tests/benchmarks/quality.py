"""Quality of DMPS beside classical methods: ``python tests/benchmarks/quality.py``.

Restores a folder of grey slices with chosen tasks and methods, run from the repository's root.
--out receives quality.md and quality.csv (PSNR, SSIM, NMSE and the ratio of high-frequency energy
to the truth's as mean ± standard deviation over the images, seconds an image) and
quality_images.csv (a row an image). All methods see the same measurements, the ones that main.py draws. A classical method's parameters are those of its grid
that give the best mean PSNR on these very images, which favours it.

dmps is one sample, main.py's own for the same seed; dmps_mean is the mean of --num_samples of
them; denoiser is a single evaluation of the network, at the t whose noise is the measurement's.
"""

import argparse
import csv
import functools
import importlib.util
import itertools
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.dataloader import Picture, check_names, list_images
from guided_diffusion.condition_methods import check_conditioning, get_conditioning_method
from guided_diffusion.dist_util import pick_device, pick_dtype
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.measurements import OPERATORS, GaussianNoise, get_noise, get_operator
from guided_diffusion.unet import create_model
from main import positive
from tests.benchmarks.classical import CLASSICAL
from util.config import read_diffusion_config, read_model_config, read_task_config
from util.errors import ArgumentParser, UserError
from util.files import replacing_text
from util.metrics import high_frequency_ratio, image_metrics
from util.random import ImageRandom, image_generator

CONFIGS = os.path.join(sys.path[0], "configs")
# task → its file in configs/, and a σ that replaces the file's
TASKS = {
    "sr4": ("SR_config_mri.yaml", None),
    "denoise": ("denoise_config_mri.yaml", None),
    "denoise_0.75": ("denoise_config_mri.yaml", 0.75),
    "gauss": ("mri_deblur_gauss_config.yaml", None),
    "uniform": ("mri_deblur_uniform_config.yaml", None),
}
# method of the prior → the operators it is for
LEARNED = {"denoiser": ("denoise",), "dmps": OPERATORS, "dmps_mean": OPERATORS}
METHODS = {**{name: method.operators for name, method in CLASSICAL.items()}, **LEARNED}
HOW_TO_INSTALL = "pip install -r tests/requirements.txt, or leave it out of --methods"
METRICS = ("psnr", "ssim", "nmse", "hf_ratio", "seconds")


def parse_args(argv=None):
    parser = ArgumentParser(
        description="Compare DMPS with classical methods on a folder of grey slices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--root", default="data/mri_256_orig", help="folder of images")
    add("--every", type=positive, default=1, help="take every EVERYth image in natural order")
    add("--limit", type=positive, default=None, help="take the first LIMIT of these only")
    add(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=["sr4", "denoise", "gauss", "uniform"],
        help="the tasks of configs/; denoise_0.75 is denoise with that sigma",
    )
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="each is run on the tasks it is for",
    )
    add("--model_config", default="configs/model_config_mri.yaml", help="YAML of the prior")
    add(
        "--diffusion_config",
        default="configs/diffusion_config_100.yaml",
        help="YAML of the schedule, of dmps and dmps_mean",
    )
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--gpu", type=int, default=0, help="index of the GPU, -1 for the CPU")
    add("--seed", type=int, default=0, help="decides all random numbers, with the image's name")
    add("--batch_size", type=positive, default=1, help="images the prior restores at once")
    add("--num_samples", type=positive, default=8, help="samples that dmps_mean averages")
    add("--out", default="results/quality", help="folder for the tables")
    return parser.parse_args(argv)


@dataclass(frozen=True, eq=False)
class Task:
    """A degradation, its noise, and the λ of DMPS for it."""

    name: str
    operator: dict
    noise: GaussianNoise
    scale: float


def read_task(name):
    file, sigma = TASKS[name]
    config = read_task_config(os.path.join(CONFIGS, file))
    noise = config["measurement"]["noise"]
    if sigma is not None:
        noise["sigma"] = sigma
    params = check_conditioning("dmps", config["conditioning"]["params"])
    return Task(name, config["measurement"]["operator"], get_noise(**noise), params["scale"])


@functools.cache
def operator_of(task, in_shape, device="cpu"):
    return get_operator(in_shape=in_shape, device=device, **task.operator)


class Slice(NamedTuple):
    """One image, the truth (1, 1, H, W) in [-1, 1], and its measurement y (1, 1, h, w)."""

    name: str
    truth: torch.Tensor
    y: torch.Tensor


def read_images(args):
    """(name, truth) of the chosen images."""
    paths = list_images(args.root, "--root")[:: args.every][: args.limit]
    pictures = [Picture(path) for path in paths]
    check_names(pictures)
    images = []
    for picture in pictures:
        image = torch.from_numpy(picture.read())
        if len(image) != 1:
            raise UserError(f"{picture.path}: expected a grey image, found {len(image)} channels")
        images.append((picture.name, image[None]))
    return images


def measure(task, images, seed):
    """Draw y = A x + n for every image, as main.py does."""
    slices = []
    for name, truth in images:
        random = ImageRandom([image_generator(name, "measurement", seed)])
        y = task.noise(operator_of(task, tuple(truth.shape[1:])).forward(truth), random)
        slices.append(Slice(name, truth, y))
    return slices


def row(task, method, parameters, image, x_hat, seconds):
    """One image's line of quality_images.csv; x_hat is (1, 1, H, W)."""
    x, truth = x_hat[0].numpy(), image.truth[0].numpy()
    return {
        "task": task.name,
        "method": method,
        "parameters": ", ".join(f"{k} {v:g}" for k, v in parameters.items()),
        "image": image.name,
        **image_metrics(x, truth),
        "hf_ratio": high_frequency_ratio(x, truth),
        "seconds": seconds,
    }


def mean(rows, key):
    return float(np.mean([r[key] for r in rows]))


def classical_rows(task, name, slices):
    """Rows of the parameters that give this method its best mean PSNR."""
    method = CLASSICAL[name]
    candidates = []
    with progress(task, name, len(method.grid) * len(slices), "image") as bar:
        for parameters in method.grid:
            rows = []
            for image in slices:
                start = time.perf_counter()
                operator = operator_of(task, tuple(image.truth.shape[1:]))
                x_hat = method.restore(operator, image.y, task.noise.sigma, **parameters)
                seconds = time.perf_counter() - start
                rows.append(row(task, name, parameters, image, x_hat, seconds))
                bar.update()
            candidates.append(rows)
    return max(candidates, key=lambda rows: mean(rows, "psnr"))


def progress(task, name, total, unit):
    return tqdm(desc=f"{task.name} {name}", total=total, unit=unit, dynamic_ncols=True)


class Prior(NamedTuple):
    model: torch.nn.Module
    diffusion: GaussianDiffusion  # the steps of --diffusion_config
    every_t: GaussianDiffusion  # the schedule the network was trained on
    device: torch.device
    description: str


def load_prior(args):
    """Load the network."""
    model_config = read_model_config(args.model_config)
    diffusion_config = read_diffusion_config(args.diffusion_config)
    if model_config["in_channels"] != 1 or model_config["class_cond"]:
        raise UserError(
            f"{args.model_config}: this benchmark takes priors of one channel, without classes"
        )
    device = pick_device(args.gpu)
    dtype = pick_dtype(args.precision, device, model_config["use_fp16"])
    diffusion = create_sampler(**diffusion_config)
    model = create_model(**{**model_config, "use_fp16": False})
    model.to(device, memory_format=torch.channels_last).set_torso_dtype(dtype)
    model.requires_grad_(False)
    every_t = create_sampler(**{**diffusion_config, "timestep_respacing": ""})
    checkpoint = model_config["model_path"] or "an untrained network"
    precision = str(dtype).removeprefix("torch.")
    description = f"{checkpoint}, {precision}"
    return Prior(model, diffusion, every_t, device, description)


def batches(slices, size):
    """Lists of up to `size` neighbours of one shape."""
    for _, group in itertools.groupby(slices, key=lambda image: image.truth.shape):
        group = list(group)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def learned_rows(task, methods, slices, prior, args):
    """Rows of the prior's methods; `dmps` is the first of the samples that `dmps_mean` averages."""
    restored = {method: [] for method in methods}
    total = len(list(batches(slices, args.batch_size))) * evaluations(methods, prior, args)
    with progress(task, " ".join(methods), total, "step") as bar:
        for batch in batches(slices, args.batch_size):
            estimates = []
            if "denoiser" in methods:
                estimates.append(denoiser(task, batch, prior, bar))
            if "dmps" in methods or "dmps_mean" in methods:
                estimates.extend(dmps(task, methods, batch, prior, args, bar))
            for method, parameters, x_hat, seconds in estimates:
                restored[method] += [
                    row(task, method, parameters, image, x_hat[i : i + 1], seconds / len(batch))
                    for i, image in enumerate(batch)
                ]
    return [r for rows in restored.values() for r in rows]


def samples_of(methods, args):
    return args.num_samples if "dmps_mean" in methods else int("dmps" in methods)


def evaluations(methods, prior, args):
    """How often the network is evaluated for one batch."""
    return samples_of(methods, args) * prior.diffusion.num_timesteps + ("denoiser" in methods)


def denoiser(task, batch, prior, bar):
    """x̂_0 from x_t = √ᾱ_t y, at the t whose r_t = (1-ᾱ_t)/ᾱ_t is nearest to σ².

    Returns:
        (method, parameters, x_hat (N, 1, H, W), seconds of the batch), like `dmps`'s items.
    """
    start = time.perf_counter()
    alpha_bar = prior.every_t.alphas_cumprod
    t = int(np.argmin(np.abs((1 - alpha_bar) / alpha_bar - task.noise.sigma**2)))
    x_t = (np.sqrt(alpha_bar[t]) * torch.cat([image.y for image in batch])).to(prior.device)
    steps = torch.full((len(batch),), t, dtype=torch.int64, device=prior.device)
    with torch.inference_mode():
        x_hat = prior.every_t.p_mean_variance(prior.model, x_t, steps)["pred_xstart"]
    x_hat = x_hat.float().cpu()
    bar.update()
    return "denoiser", {"t": t}, x_hat, time.perf_counter() - start


def dmps(task, methods, batch, prior, args, bar):
    """One sample, and the mean of --num_samples of them, as far as they are asked for."""
    start = time.perf_counter()
    operator = operator_of(task, tuple(batch[0].truth.shape[1:]), prior.device)
    y = torch.cat([image.y for image in batch]).to(prior.device)
    method = get_conditioning_method("dmps", operator, y, task.noise.sigma, scale=task.scale)
    count, total, found = samples_of(methods, args), 0, []
    for k in range(count):
        x_hat = sample(batch, method, k, prior, args.seed, bar)
        total = total + x_hat
        if k == 0 and "dmps" in methods:
            found.append(("dmps", {}, x_hat, time.perf_counter() - start))
    if "dmps_mean" in methods:
        seconds = time.perf_counter() - start
        found.append(("dmps_mean", {"samples": count}, total / count, seconds))
    return found


def sample(batch, method, k, prior, seed, bar):
    """Sample k of a batch, (N, 1, H, W) in [-1, 1]."""
    random = ImageRandom([image_generator(image.name, k, seed) for image in batch])
    like = torch.cat([image.truth for image in batch]).to(prior.device)
    x_hat = prior.diffusion.p_sample_loop(
        prior.model,
        random.randn_like(like),
        method.step,
        random.randn_like,
        lambda *_: bar.update(),
    )
    return x_hat.clamp(-1, 1).float().cpu()


def summarise(rows):
    """A line for each task, method and parameters: means and deviations over the images."""
    lines, keys = [], ("task", "method", "parameters")
    for key, group in itertools.groupby(rows, key=lambda r: [r[k] for k in keys]):
        group = list(group)
        line = dict(zip(keys, key, strict=True)) | {"images": len(group)}
        for metric in METRICS:
            values = [r[metric] for r in group]
            line |= {metric: float(np.mean(values)), f"{metric}_std": float(np.std(values))}
        lines.append(line)
    return lines


def markdown(lines):
    table = [
        "| task | method | parameters | PSNR (dB) | SSIM | NMSE | HF ratio | seconds an image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        cells = [line["task"], line["method"], line["parameters"]]
        for metric, digits in (("psnr", 2), ("ssim", 3), ("nmse", 4), ("hf_ratio", 2)):
            cells.append(f"{line[metric]:.{digits}f} ± {line[metric + '_std']:.{digits}f}")
        table.append(f"| {' | '.join(cells)} | {line['seconds']:.3g} |")
    return "\n".join(table) + "\n"


def describe_setting(args, images, prior, how):
    """What numbers were measured on; `how` the prior was run."""
    text = f"Images: {len(images)} of {args.root} (every {args.every}), seed {args.seed}.\n"
    if prior is not None:
        processor = platform.processor() or platform.machine()
        machine = torch.cuda.get_device_name() if prior.device.type == "cuda" else processor
        text += f"Prior: {prior.description}, {how}, {machine}.\n"
    return text


def describe(args, images, prior):
    """The head of quality.md."""
    how = prior and f"{prior.diffusion.num_timesteps} steps, batch {args.batch_size}"
    text = describe_setting(args, images, prior, how)
    grids = [
        f"{name}: " + ", ".join(f"{k} {list(v)}" for k, v in CLASSICAL[name].parameters.items())
        for name in args.methods
        if name in CLASSICAL and CLASSICAL[name].parameters
    ]
    if grids:
        text += f"Parameters, best mean PSNR on these images, from {'; '.join(grids)}.\n"
    return text


def write_csv(path, rows):
    with replacing_text(path) as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for r in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()})


def write_tables(folder, description, rows, stem="quality"):
    """Write {stem}_images.csv, {stem}.csv and {stem}.md; raises UserError where it cannot."""
    lines = summarise(rows)
    path = os.path.join(folder, stem)
    try:
        write_csv(f"{path}_images.csv", rows)
        write_csv(f"{path}.csv", lines)
        with replacing_text(f"{path}.md") as file:
            file.write(f"{description}\n{markdown(lines)}")
    except OSError as error:
        raise UserError(f"--out: cannot write {path}.* ({error.strerror})") from None


def make_folder(path):
    """Make the folder of --out; raises UserError, before anything is computed, if it is no use."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--out: cannot write to {path} ({error.strerror})") from None


def plan(args):
    """(task, classical methods, methods of the prior) for every task, in a fixed order."""
    chosen = [name for name in METHODS if name in args.methods]
    parts = []
    for task in map(read_task, dict.fromkeys(args.tasks)):
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
    parts, images = plan(args), read_images(args)
    prior = load_prior(args) if any(learned for *_, learned in parts) else None
    make_folder(args.out)
    description = describe(args, images, prior)
    rows = []
    for task, classical, learned in parts:
        slices = measure(task, images, args.seed)
        for name in classical:
            rows += classical_rows(task, name, slices)
            write_tables(args.out, description, rows)
        if learned:
            rows += learned_rows(task, learned, slices, prior, args)
            write_tables(args.out, description, rows)
    return summarise(rows)


def main(argv=None):
    args = parse_args(argv)
    try:
        print(markdown(compare(args)), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; what is finished is in {args.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
