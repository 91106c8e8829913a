"""How the comparisons measure an image and restore it: as main.py does, with the job's setting."""

import contextlib
import functools
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from data.dataloader import Picture, check_names, list_images
from guided_diffusion import prior as library
from guided_diffusion.config import (
    Schedule,
    read_model_config,
    read_schedule,
    read_task_config,
)
from guided_diffusion.devices import pick_device, pick_memory_format
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.methods import METHODS, start
from guided_diffusion.noise import Noise, get_noise
from guided_diffusion.operators import get_operator
from guided_diffusion.operators.base import Operator
from guided_diffusion.restoration import begin
from guided_diffusion.statistics import PriorStatistics
from guided_diffusion.unet import UNetModel
from tests.benchmarks import deepinv_methods, settings
from tests.benchmarks.classical import CLASSICAL
from util.config import as_dict
from util.errors import UserError
from util.metrics import calibration, high_frequency_ratio, image_metrics
from util.random import ImageRandom, image_generator, sample_random

CONFIGS = os.path.join(settings.REPOSITORY, "configs")
# task → its file in configs/, and a σ that replaces the file's
TASK_FILES: dict[str, tuple[str, float | None]] = {
    "sr4": ("SR_config_mri.yaml", None),
    "denoise": ("denoise_config_mri.yaml", None),
    "denoise_0.75": ("denoise_config_mri.yaml", 0.75),
    "gauss": ("mri_deblur_gauss_config.yaml", None),
    "uniform": ("mri_deblur_uniform_config.yaml", None),
}
SEED = 0


class Task(NamedTuple):
    """A degradation, its noise, and the parameters of DMPS that ship for it."""

    name: str
    operator: dict[str, Any]
    noise: Noise
    params: dict[str, float]


@functools.cache
def read_task(name: str) -> Task:
    file, sigma = TASK_FILES[name]
    config = read_task_config(os.path.join(CONFIGS, file))
    assert config.measurement is not None
    noise = config.measurement.noise
    noise = noise if sigma is None else replace(noise, sigma=sigma)
    operator = as_dict(config.measurement.operator)
    return Task(name, operator, get_noise(**as_dict(noise)), config.conditioning.params)


@functools.cache
def operator_of(
    task: str, in_shape: tuple[int, ...], device: str | torch.device = "cpu"
) -> Operator:
    return get_operator(in_shape=in_shape, device=device, **read_task(task).operator)


class Slice(NamedTuple):
    """One image, the truth (1, 1, H, W) in [-1, 1], and its measurement y (1, 1, h, w)."""

    name: str
    truth: torch.Tensor
    y: torch.Tensor


def read_images(root: str, flag: str, first: int, every: int) -> list[tuple[str, torch.Tensor]]:
    """(name, truth) of every EVERYth image of a folder, in natural order."""
    pictures = [Picture(path) for path in list_images(root, flag)[first::every]]
    check_names(pictures)
    images = []
    for picture in pictures:
        image = torch.from_numpy(picture.read())
        if len(image) != 1:
            raise UserError(f"{picture.path}: expected a grey image, found {len(image)} channels")
        images.append((picture.name, image[None]))
    return images


def measure(task: Task, name: str, truth: torch.Tensor) -> Slice:
    """Draw y = A x + n, as main.py does."""
    random = ImageRandom([image_generator(name, "measurement", SEED)])
    operator = operator_of(task.name, tuple(truth.shape[1:]))
    return Slice(name, truth, task.noise(operator.forward(truth), random))


class Prior(NamedTuple):
    model: UNetModel
    statistics: PriorStatistics  # of its images
    every_t: GaussianDiffusion  # the schedule the network was trained on
    device: torch.device
    digest: str  # the first characters of the checkpoint's SHA-256
    machine: str


def load_prior(model_config: str, gpu: int, precision: str) -> Prior:
    config = read_model_config(model_config)
    if config.in_channels != 1:
        raise UserError(f"{model_config}: the benchmark takes priors of one channel")
    prior = library.load_prior(config, pick_device(gpu), precision)
    schedule = replace(schedule_of("dmps"), timestep_respacing="", start="")
    every_t = create_sampler(**schedule.sampler_arguments())
    digest, where = prior.digest[:8] or "untrained", machine(prior.device, prior.dtype)
    return Prior(prior.network, prior.statistics, every_t, prior.device, digest, where)


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """What the seconds of a row were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()} x{torch.get_num_threads()}"
    return f"{name} {str(dtype).removeprefix('torch.')}"


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def schedule_of(method: str) -> Schedule:
    """The shipped schedule of a method, without `method`."""
    path = os.path.join(CONFIGS, METHODS[method].schedule or "diffusion_config_100.yaml")
    return read_schedule(path)


def resolve(job: settings.Job) -> tuple[dict[str, Any], Schedule]:
    """(the method's own parameters, the schedule) of a job."""
    setting = job.setting
    spacing = setting.get("spacing", "logsnr" if METHODS[job.method].schedule else "even")
    changed: dict[str, Any] = {
        name: setting[key] for key, name in settings.SCHEDULE_KEYS.items() if key in setting
    }
    changed["timestep_respacing"] = f"{settings.SPACINGS[spacing]}{job.steps}"
    schedule = replace(schedule_of(job.method), **changed)
    params = {k: v for k, v in setting.items() if k not in settings.NO_PARAMETERS}
    return params, schedule


@contextlib.contextmanager
def levels(setting: settings.Setting) -> Iterator[None]:
    """Few-step sampling between the setting's noise levels; no flag of main.py sets them."""
    changed = {settings.LEVEL_KEYS[k]: v for k, v in setting.items() if k in settings.LEVEL_KEYS}
    before = {name: getattr(start, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(start, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(start, name, value)


class Estimate(NamedTuple):
    x_hat: torch.Tensor  # (1, 1, H, W), not yet cut to [-1, 1]
    evaluations: int  # of the network, for one sample
    figures: dict[str, float]  # what else is known of it


def restore(job: settings.Job, image: Slice, prior: Prior | None) -> Estimate:
    """Restore one image; the prior is None for classical methods."""
    task = read_task(job.task)
    if job.method in CLASSICAL:
        operator = operator_of(job.task, tuple(image.truth.shape[1:]))
        method = CLASSICAL[job.method].restore
        return Estimate(method(operator, image.y, task.noise.sigma, **job.setting), 0, {})
    assert prior is not None
    operator = operator_of(job.task, tuple(image.truth.shape[1:]), prior.device)
    known = operator, image.y.to(prior.device), task.noise.sigma
    if job.method in deepinv_methods.DEEPINV:
        x_hat = deepinv_methods.restore(job.method, *known, image, prior, job.steps, SEED)
        return Estimate(x_hat, job.steps, {})
    count = job.setting.get(settings.SAMPLES, 1)
    with levels(job.setting):
        found = [sample(job, known, image, k, prior) for k in range(count)]
    samples = torch.stack([x_hat for x_hat, _ in found])
    figures = {}
    if count > 1:
        figures = calibration(samples[:, 0].numpy(), image.truth[0].numpy())
    return Estimate(samples.mean(dim=0), found[0][1], figures)


def sample(
    job: settings.Job, known: tuple, image: Slice, k: int, prior: Prior
) -> tuple[torch.Tensor, int]:
    """Sample k as main.py draws it, (1, 1, H, W), and the network evaluations."""
    params, schedule = resolve(job)
    layout = pick_memory_format(prior.device, METHODS[job.method].needs_gradient)
    prior.model.to(memory_format=layout)
    random = sample_random([image.name], [k], SEED)
    x_T = random.randn_like(image.truth.to(prior.device))
    diffusion, x_T, step = begin(job.method, params, schedule, known, x_T, prior.statistics)
    x_hat = diffusion.p_sample_loop(prior.model, x_T, step, random.randn_like)
    return x_hat.float().cpu(), diffusion.num_timesteps


def figures_of(image: Slice, x_hat: torch.Tensor) -> dict[str, float]:
    """Quality of x̂ (1, 1, H, W), cut to [-1, 1]."""
    x, truth = np.clip(x_hat[0].numpy(), -1, 1), image.truth[0].numpy()
    return image_metrics(x, truth) | {"hf_ratio": high_frequency_ratio(x, truth)}
