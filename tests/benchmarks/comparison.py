"""How the comparisons measure an image and restore it: by `restore`, with the job's setting."""

import contextlib
import functools
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from data.dataloader import list_items
from guided_diffusion.config import Measurement, Schedule, read_schedule, read_task_config
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods import METHODS, start
from guided_diffusion.operators import get_operator
from guided_diffusion.operators.base import Operator
from guided_diffusion.prior import Prior, load_prior
from guided_diffusion.restoration import noise_of, restore
from tests.benchmarks import deepinv_methods, settings
from tests.benchmarks.classical import CLASSICAL
from util.errors import UserError
from util.metrics import calibration, high_frequency_ratio, image_metrics
from util.random import ImageRandom, image_generator

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


@functools.cache
def measurement_of(task: str) -> Measurement:
    file, sigma = TASK_FILES[task]
    measurement = read_task_config(os.path.join(CONFIGS, file), sigma=sigma).measurement
    if measurement is None:
        raise UserError(f"{file}: expected a task with a measurement")
    return measurement


def shipped_scale(task: str) -> float:
    """λ of DMPS in a task's file."""
    config = read_task_config(os.path.join(CONFIGS, TASK_FILES[task][0]))
    return float(config.conditioning.params["scale"])


@functools.cache
def operator_of(task: str, in_shape: tuple[int, ...]) -> Operator:
    config = measurement_of(task).operator
    return get_operator(config.name, in_shape, **config.params)


class Slice(NamedTuple):
    """One image, the truth (1, 1, H, W) in [-1, 1], and its measurement y (1, 1, h, w)."""

    name: str
    truth: torch.Tensor
    y: torch.Tensor


def read_images(root: str, flag: str, first: int, every: int) -> list[tuple[str, torch.Tensor]]:
    """(name, truth) of every EVERYth image of a folder, in natural order.

    Raises:
        UserError: there is none, or one that cannot be read or is not grey.
    """
    try:
        items = list_items({"root": root, "measured": False})[first::every]
    except UserError as error:
        raise UserError(str(error).replace("data.root", flag)) from None
    images = []
    for item in items:
        image = torch.from_numpy(item.read())
        if len(image) != 1:
            raise UserError(f"{item.label}: expected a grey image, found {len(image)} channels")
        images.append((item.name, image[None]))
    return images


def add_task(path: str) -> str:
    """Take a task file among those that are measured; returns its name, the file's."""
    name = os.path.splitext(os.path.basename(path))[0]
    TASK_FILES[name] = os.path.abspath(path), None
    measurement_of.cache_clear()
    operator_of.cache_clear()
    measurement_of(name)  # a mistake in it ends the program now
    return name


def measure(task: str, name: str, truth: torch.Tensor) -> Slice:
    """Draw y = A x + n, as `restore` does."""
    random = ImageRandom([image_generator(name, "measurement", SEED)])
    noise = noise_of(measurement_of(task))
    return Slice(
        name, truth, noise(operator_of(task, tuple(truth.shape[1:])).forward(truth), random)
    )


def load_grey_prior(model_config: str, device: torch.device, precision: str) -> Prior:
    prior = load_prior(model_config, device, precision)
    if prior.channels != 1:
        raise UserError(f"{model_config}: the benchmark takes priors of one channel")
    return prior


def digest_of(prior: Prior) -> str:
    """The first characters of the checkpoint's SHA-256."""
    return prior.digest[:8] or "untrained"


def machine(prior: Prior) -> str:
    """What the seconds of a row were measured on."""
    if prior.device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()} x{torch.get_num_threads()}"
    return f"{name} {str(prior.dtype).removeprefix('torch.')}"


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def schedule_of(method: str) -> Schedule:
    """The schedule that ships for a method."""
    file = METHODS[method].schedule or "diffusion_config_100.yaml"
    return read_schedule(os.path.join(CONFIGS, file))


def resolve(job: settings.Job) -> tuple[dict[str, Any], Schedule]:
    """(the method's own parameters, the schedule) of a job."""
    setting = job.setting
    spacing = setting.get("spacing", "logsnr" if METHODS[job.method].schedule else "even")
    changed: dict[str, Any] = {"timestep_respacing": f"{settings.SPACINGS[spacing]}{job.steps}"}
    for key, name in settings.SCHEDULE_KEYS.items():
        if key in setting:
            changed[name] = setting[key]
    params = {k: v for k, v in setting.items() if k not in settings.NO_PARAMETERS}
    return params, replace(schedule_of(job.method), **changed)


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


def steps_of(job: settings.Job, prior: Prior) -> int:
    """Network evaluations of a sample, at most: as many as are asked for, or fewer where a
    method's noise levels fall on the same timestep; of one level both reflections are seen.
    """
    if job.method not in METHODS or not METHODS[job.method].schedule:
        return job.steps
    schedule = resolve(job)[1]
    operator = operator_of(job.task, (prior.channels, prior.image_size, prior.image_size))
    sigma = noise_of(measurement_of(job.task)).sigma
    with levels(job.setting):
        draws = METHODS[job.method].draws_samples
        useful = start.useful_levels(operator, sigma, draws, prior.statistics)
    taken = create_sampler(**schedule.sampler_arguments(), levels=useful).num_timesteps
    return min(max(taken, 2), job.steps)


@contextlib.contextmanager
def counted(prior: Prior) -> Iterator[list[None]]:
    """A list that grows by one at each evaluation of the network."""
    taken: list[None] = []
    hook = prior.network.register_forward_pre_hook(lambda *_: taken.append(None))
    try:
        yield taken
    finally:
        hook.remove()


class Estimate(NamedTuple):
    x_hat: np.ndarray  # (1, H, W), of classical methods not yet cut to [-1, 1]
    evaluations: int  # of the network, for one sample
    figures: dict[str, float]  # what else is known of it


def estimate(job: settings.Job, image: Slice, prior: Prior) -> Estimate:
    """Restore one image."""
    if job.method not in METHODS:
        measurement = measurement_of(job.task)
        operator = operator_of(job.task, tuple(image.truth.shape[1:]))
        known = operator, image.y, noise_of(measurement).sigma
        if job.method in CLASSICAL:
            x_hat = CLASSICAL[job.method].restore(*known, **job.setting)
        else:
            x_hat = deepinv_methods.restore(job.method, *known, image, prior, job.steps, SEED)
        return Estimate(x_hat[0].numpy(), job.steps, {})
    params, schedule = resolve(job)
    with levels(job.setting), counted(prior) as taken:
        restored = restore(
            image.truth,
            measurement_of(job.task),
            prior,
            job.method,
            schedule,
            params,
            names=[image.name],
            num_samples=job.setting.get(settings.SAMPLES, 1),
            seed=SEED,
        )
    figures = {}
    if settings.SAMPLES in job.setting:
        figures = calibration(restored.samples[0], image.truth[0].numpy())
    return Estimate(restored.mean[0], len(taken), figures)


def figures_of(image: Slice, x_hat: np.ndarray) -> dict[str, float]:
    """Quality of x̂ (1, H, W), cut to [-1, 1]."""
    x, truth = np.clip(x_hat, -1, 1), image.truth[0].numpy()
    return {**image_metrics(x, truth), "hf_ratio": high_frequency_ratio(x, truth)}
