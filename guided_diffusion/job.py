"""What a run is to do: its configs and images, read and checked; nothing of it is done here."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.bids import check_bids
from data.dataloader import list_items
from data.items import Broken
from data.kspace import KSpaceSlice
from data.masks import Mask, limit_volumes, open_masks
from data.nifti_header import files_of
from data.output import check_output
from data.volumes import Slice, Whole
from guided_diffusion.config import (
    LOCAL,
    Measurement,
    ModelConfig,
    Schedule,
    TaskConfig,
    is_map,
    read_model_config,
    read_schedule,
    read_task_config,
    schedule_of_task,
)
from guided_diffusion.item_noise import map_of
from guided_diffusion.measuring import enlargement, noise_of
from guided_diffusion.methods import METHODS
from guided_diffusion.operators import operator_class, variant
from guided_diffusion.options import Options
from guided_diffusion.prior import Prior
from guided_diffusion.restoration import check_restoration
from guided_diffusion.volume_denoising import is_denoising
from guided_diffusion.volume_items import whole_volumes, with_defaults
from util.config import as_dict
from util.errors import UserError
from util.files import files_digest
from util.image_files import check_mp4
from util.remote import base_name, is_remote

VANILLA_SAMPLES = 10


@dataclass(frozen=True)
class PriorSample:
    """An image of which nothing is known, an item like those of `data.dataloader.list_items`."""

    name: str
    shape: tuple[int, int, int]
    floats = None
    note = None
    digest = ""

    @property
    def label(self) -> str:
        return self.name

    def read(self) -> NDArray[np.float32]:
        return np.zeros(self.shape, np.float32)

    def padding(self) -> None:
        return None

    def check_writable(self, factor: int = 1) -> None:
        """A sample is an 8-bit picture alone."""

    def to_floats(self, x: NDArray) -> NDArray:
        return x

    def picture(self, x: NDArray) -> NDArray:
        return x


@dataclass(frozen=True)
class Job:
    """What a run is to do, read and checked; nothing of it is done."""

    options: Options
    model: ModelConfig
    schedule: Schedule
    task: TaskConfig
    params: dict[str, Any]
    items: list[Any]
    mask: Callable[[Any, NDArray], Mask | None]
    sigma_map: Callable[[Any], NDArray[np.float32]] | None = None  # σ of each voxel of an item

    @property
    def method(self) -> str:
        return self.task.conditioning.method

    @property
    def in_turn(self) -> bool:
        """Whether volumes are seen along another of their axes at each step, where they can be."""
        return self.task.data is not None and bool(self.task.data.planes_in_turn)

    @property
    def uses_statistics(self) -> bool:
        """Whether the result depends on the prior's statistics."""
        unconditional = self.task.measurement is None
        return unconditional or METHODS[self.method].uses_statistics or self.schedule.start != ""


def read_job(options: Options) -> Job:
    """Read the configs and list the images.

    Raises:
        UserError: a file or flag that is not as it should be.
    """
    if options.video:
        check_mp4()
    model = read_model_config(options.model_config)
    schedule = read_schedule(options.diffusion_config or schedule_of_task(options.task_config))
    task = read_task_config(
        options.task_config,
        options.method,
        options.measured,
        options.input,
        options.sigma,
        schedule.method,
        options.set,
    )
    conditioning, measurement = task.conditioning, task.measurement
    params = check_restoration(
        model, measurement, conditioning.method, conditioning.params, schedule
    )
    if measurement is None or task.data is None:
        if options.num_samples > 1:
            raise UserError(
                "--num_samples: vanilla restores nothing that could be sampled more than once; "
                "--limit says how many samples of the prior to draw"
            )
        if model.in_channels not in (1, 3):
            raise UserError(
                f"model config: in_channels: samples of the prior are pictures of 1 or 3 channels, "
                f"found {model.in_channels}"
            )
        check_output(options.output, [])
        if options.bids:
            raise UserError("--bids: vanilla restores no volume that could be named")
        shape = (model.in_channels, model.image_size, model.image_size)
        count = options.limit or VANILLA_SAMPLES
        samples = [PriorSample(f"sample_{i:03d}", shape) for i in range(count)]
        return Job(options, model, schedule, task, params, samples, lambda item, truth: None)
    alone = schedule.start == "auto" and not METHODS[conditioning.method].draws_samples
    if options.num_samples > 1 and alone and is_denoising(measurement):
        raise UserError(
            f"--num_samples: denoising by {conditioning.method} from start: auto draws nothing, so "
            "its samples are all the same; --diffusion_config "
            "configs/diffusion_config_samples.yaml draws them"
        )
    data = as_dict(task.data)
    items = list_items(data, magnitude=noise_of(measurement).is_magnitude, exact=True)
    items = fitting(items, measurement)
    mask = open_masks(task.data.mask, data, items)
    limit_volumes(items, task.data.mask, mask)
    asked = task.data.volume_mode == "volume"
    task = with_defaults(task, items, model.in_channels)
    if task.data is not None and task.data.volume_mode == "volume":
        items = whole_volumes(items, measurement, asked)
    items = items[: options.limit]
    read = [path for paths in _read_besides(task).values() for path in paths]
    check_output(options.output, items, options.overwrite, read)
    if options.bids:
        check_bids(items, enlargement(measurement))
    sigma = measurement.noise.sigma
    sigma_map = map_of(str(sigma), noise_of(measurement), data) if is_map(sigma) else None
    return Job(options, model, schedule, task, params, items, mask, sigma_map)


def fitting(items: Sequence[Any], measurement: Measurement) -> list[Any]:
    """The items; where k-space meets another operator, or a scan is no k-space, a `Broken` one.

    Raises:
        UserError: that is so of all.
    """
    found: list[Any] = []
    refused: UserError | None = None
    for item in items:
        try:
            _check_kspace(item, measurement)
            found.append(item)
        except UserError as error:
            refused = refused or error
            found.append(Broken(item.name, item.label, error))
    if refused is not None and all(isinstance(item, Broken) for item in found):
        raise refused
    return found


def _check_kspace(item: Any, measurement: Measurement) -> None:
    mri = operator_class(measurement.operator.name).of_kspace
    raw = isinstance(item, KSpaceSlice)
    if raw and not mri:
        raise UserError(
            f"{item.label}: holds k-space, which measurement.operator.name: mri restores, "
            f"found {measurement.operator.name}"
        )
    if raw and measurement.noise.name != "gaussian":
        raise UserError(
            f"{item.label}: the noise of k-space is gaussian, found measurement.noise.name: "
            f"{measurement.noise.name}"
        )
    if mri and not raw and not isinstance(item, Broken):
        if not measurement.simulated:
            raise UserError(f"{item.label}: an image, and operator mri restores k-space")
        if measurement.noise.sigma == "auto":
            raise UserError(
                f"{item.label}: measurement.noise.sigma: auto measures the noise of k-space; "
                "of an image it is simulated and needs a number"
            )


def results_folder(job: Job) -> str:
    """{save_dir}/{model}/{task}/{variant}/{sigma}, or {save_dir}/{model}/vanilla.

    The variant of measured k-space is "measured": its mask is the scan's own.
    """
    model = os.path.splitext(base_name(job.model.model_path))[0] or "untrained"
    measurement = job.task.measurement
    if measurement is None:
        return os.path.join(job.options.save_dir, model, "vanilla")
    operator, noise = measurement.operator, measurement.noise
    kind = variant(as_dict(operator)) or noise.name
    if operator_class(operator.name).of_kspace and not measurement.simulated:
        kind = "measured"
    sigma = noise.sigma if isinstance(noise.sigma, str) else f"{noise.sigma:g}"
    sigma = "map" if is_map(noise.sigma) and noise.sigma != LOCAL else sigma
    return os.path.join(job.options.save_dir, model, operator.name, kind, sigma)


def settings_of(job: Job, prior: Prior) -> dict[str, Any]:
    """All that decides the contents of a run's files."""
    task = job.task.settings()
    task["conditioning"] = {"method": job.method, "params": job.params}
    found = {
        "model_config": job.model.settings(),
        "checkpoint_sha256": prior.digest,
        "diffusion_config": as_dict(job.schedule),
        "task_config": task,
        "seed": job.options.seed,
        "num_samples": job.options.num_samples,
        "precision": str(prior.dtype).removeprefix("torch."),
    }
    if files := _named_files(job.task):
        found["files_sha256"] = files
    statistics = {k: v for k, v in asdict(prior.statistics).items() if v is not None}
    if job.task.measurement is not None:
        for key in ("rim", "mean_power"):  # of which only samples of the prior know
            statistics.pop(key, None)
    return found | ({"statistics": statistics} if job.uses_statistics else {})


def _named_files(task: TaskConfig) -> dict[str, str]:
    """Key → SHA-256 of the files of `_read_besides`.

    Raises:
        UserError: one cannot be read.
    """
    try:
        return {key: files_digest(paths) for key, paths in _read_besides(task).items()}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _read_besides(task: TaskConfig) -> dict[str, list[str]]:
    """Key → the local files that it names beside the images: map of σ, masks, lines of k-space."""
    if task.measurement is None:
        return {}
    found = {
        f"operator.{key}": [value]
        for key, value in task.measurement.operator.params.items()
        if isinstance(value, str) and os.path.isfile(value)
    }
    sigma, mask = task.measurement.noise.sigma, task.data.mask if task.data is not None else None
    if isinstance(sigma, str) and is_map(sigma) and sigma != LOCAL:
        found["noise.sigma"] = _files_at(sigma)
    if mask is not None and mask != "auto":
        found["data.mask"] = _files_at(mask)
    return {key: paths for key, paths in found.items() if paths}


def files_read(job: Job) -> list[str]:
    """The local files and folders that images, masks and maps are read from."""
    if job.task.data is None:
        return []
    volumes = (i.volume if isinstance(i, (Slice, Whole)) else i for i in job.items)
    pieces = [p for source in dict.fromkeys(volumes) for p in getattr(source, "frames", [source])]
    own = [f for p in pieces if hasattr(p, "path") for f in files_of(p.path)]
    besides = [path for paths in _read_besides(job.task).values() for path in paths]
    return [p for p in (job.task.data.root, *own, *besides) if not is_remote(p)]


def _files_at(path: str) -> list[str]:
    """The files of a local volume, picture or folder of these; none at another place."""
    if not os.path.isdir(path):
        return files_of(path)
    paths = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name[:1] != "."]
    return [p for p in paths if os.path.isfile(p)]
