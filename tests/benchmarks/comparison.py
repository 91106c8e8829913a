"""What the comparisons of restorations share: images, tasks, the prior, a sample, tables.

Every comparison restores the same measurements of the same images with the same network, and
writes its figures image by image and as means.
"""

import csv
import functools
import itertools
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.dataloader import Picture, check_names, list_images
from guided_diffusion.condition_methods import METHODS, check_conditioning
from guided_diffusion.dist_util import pick_device, pick_dtype, pick_memory_format
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.measurements import GaussianNoise, get_noise, get_operator
from guided_diffusion.restoration import begin
from guided_diffusion.unet import create_model
from util.config import read_diffusion_config, read_model_config, read_task_config
from util.errors import UserError
from util.files import replacing_text
from util.flags import positive
from util.metrics import high_frequency_ratio, image_metrics
from util.random import ImageRandom, image_generator, sample_random

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "configs")
# task → its file in configs/, and a σ that replaces the file's
TASKS = {
    "sr4": ("SR_config_mri.yaml", None),
    "denoise": ("denoise_config_mri.yaml", None),
    "denoise_0.75": ("denoise_config_mri.yaml", 0.75),
    "gauss": ("mri_deblur_gauss_config.yaml", None),
    "uniform": ("mri_deblur_uniform_config.yaml", None),
}
# method → the schedule of configs/ that is its own
OWN_SCHEDULES = {
    "spectral": "diffusion_config_fast.yaml",
    "spectral_sample": "diffusion_config_samples.yaml",
}
METRICS = ("psnr", "ssim", "nmse", "hf_ratio", "seconds")
CALIBRATION = ("in_50", "in_90", "rescale")  # of the means, see util.metrics.calibration


def add_common(add, out):
    """The flags that every comparison of restorations has."""
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
    add("--model_config", default="configs/model_config_mri.yaml", help="YAML of the prior")
    add(
        "--diffusion_config",
        default="configs/diffusion_config_100.yaml",
        help="YAML of the schedule, but for those of the spectral methods",
    )
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--gpu", type=int, default=0, help="index of the GPU, -1 for the CPU")
    add("--seed", type=int, default=0, help="decides all random numbers, with the image's name")
    add("--out", default=out, help="folder for the tables and plots")


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


class Prior(NamedTuple):
    model: torch.nn.Module
    schedules: dict  # of each method of the prior: the diffusion config
    every_t: GaussianDiffusion  # the schedule the network was trained on
    device: torch.device
    description: str


def load_prior(args):
    """Load the network."""
    model_config = read_model_config(args.model_config)
    schedules = {"dmps": read_diffusion_config(args.diffusion_config)}
    for name, file in OWN_SCHEDULES.items():
        schedules[name] = read_diffusion_config(os.path.join(CONFIGS, file))
    for schedule in schedules.values():
        schedule.pop("method", None)
    if model_config["in_channels"] != 1 or model_config["class_cond"]:
        raise UserError(
            f"{args.model_config}: this benchmark takes priors of one channel, without classes"
        )
    device = pick_device(args.gpu)
    dtype = pick_dtype(args.precision, device, model_config["use_fp16"])
    every_t = create_sampler(**{**schedules["dmps"], "timestep_respacing": "", "start": ""})
    model = create_model(**{**model_config, "use_fp16": False})
    model.to(device, memory_format=torch.channels_last).set_torso_dtype(dtype)
    model.requires_grad_(False)
    checkpoint = model_config["model_path"] or "an untrained network"
    precision = str(dtype).removeprefix("torch.")
    return Prior(model, schedules, every_t, device, f"{checkpoint}, {precision}")


def sample(name, params, schedule, task, batch, k, prior, seed):
    """Sample k of a batch by a method of main.py, as main.py draws it.

    Returns:
        (x_hat (N, 1, H, W), not yet cut to [-1, 1], network evaluations).
    """
    layout = pick_memory_format(prior.device, METHODS[name].needs_gradient)
    prior.model.to(memory_format=layout)
    operator = operator_of(task, tuple(batch[0].truth.shape[1:]), prior.device)
    y = torch.cat([image.y for image in batch]).to(prior.device)
    random = sample_random([image.name for image in batch], [k], seed)
    x_T = random.randn_like(torch.cat([image.truth for image in batch]).to(prior.device))
    known = (operator, y, task.noise.sigma)
    diffusion, x_T, step = begin(name, params, schedule, known, x_T)
    x_hat = diffusion.p_sample_loop(prior.model, x_T, step, random.randn_like)
    return x_hat.float().cpu(), diffusion.num_timesteps


def row(task, method, parameters, image, x_hat, seconds):
    """One image's line of quality_images.csv; x_hat, (1, 1, H, W), is cut to [-1, 1]."""
    x, truth = x_hat[0].clamp(-1, 1).numpy(), image.truth[0].numpy()
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


def summarise(rows):
    """A line for each task, method and parameters: means and deviations over the images."""
    lines, keys = [], ("task", "method", "parameters")
    for key, group in itertools.groupby(rows, key=lambda r: [r[k] for k in keys]):
        group = list(group)
        line = dict(zip(keys, key, strict=True)) | {"images": len(group)}
        for metric in METRICS:
            values = [r[metric] for r in group]
            line |= {metric: float(np.mean(values)), f"{metric}_std": float(np.std(values))}
        line |= {key: mean(group, key) for key in CALIBRATION if key in group[0]}
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
    calibrated = [line for line in lines if CALIBRATION[0] in line]
    if calibrated:
        table += [
            "",
            "| task | method | parameters | truth in 50 % interval | in 90 % interval | rescale |",
            "|---|---|---|---|---|---|",
        ]
        for line in calibrated:
            cells = [line["task"], line["method"], line["parameters"]]
            cells += [f"{100 * line[key]:.0f} %" for key in CALIBRATION[:2]]
            table.append(f"| {' | '.join(cells)} | {line[CALIBRATION[2]]:.2f} |")
    return "\n".join(table) + "\n"


def describe_setting(args, images, prior, how):
    """What numbers were measured on; `how` the prior was run."""
    text = f"Images: {len(images)} of {args.root} (every {args.every}), seed {args.seed}.\n"
    if prior is not None:
        processor = platform.processor() or platform.machine()
        machine = torch.cuda.get_device_name() if prior.device.type == "cuda" else processor
        text += f"Prior: {prior.description}, {how}, {machine}.\n"
    return text


def write_csv(path, rows):
    with replacing_text(path) as file:
        columns = dict.fromkeys(key for r in rows for key in r)
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for r in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()})


def write_tables(folder, description, rows, stem):
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


def progress(task, name, total, unit):
    return tqdm(desc=f"{task.name} {name}", total=total, unit=unit, dynamic_ncols=True)


def report(args, compare):
    """Print the table of compare(args)'s lines; returns the exit status."""
    try:
        print(markdown(compare(args)), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; what is finished is in {args.out}", file=sys.stderr)
        return 130
    return 0
