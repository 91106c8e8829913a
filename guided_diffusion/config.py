"""What the YAML files of configs/ hold: a model, a schedule, a task."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from guided_diffusion.methods import VANILLA, check_method
from guided_diffusion.noise import NOISES
from guided_diffusion.operators import operator_class
from guided_diffusion.unet import check_counts
from util.config import (
    as_dict,
    build,
    changed,
    check_type,
    internal,
    locate,
    portable,
    read_yaml,
    replaced,
    rest,
)
from util.errors import UserError
from util.remote import is_remote

HUNDRED = "configs/diffusion_config_100.yaml"
AUTO, LOCAL = "auto", "local"  # σ that is estimated, one number of an image or a map
WITH_A_MAP = ("gaussian", "rician")  # noise whose σ may differ from voxel to voxel


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network and its weights; the keys are the arguments of `create_model`."""

    image_size: int
    num_channels: int
    num_res_blocks: int
    in_channels: int = 3
    channel_mult: str | list = ""
    learn_sigma: bool = False
    class_cond: bool = False
    use_checkpoint: bool = False
    attention_resolutions: str | int | list = "16"
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    dropout: float = 0.0
    resblock_updown: bool = False
    use_fp16: bool = False
    use_new_attention_order: bool = False
    model_path: str

    def settings(self) -> dict[str, Any]:
        """For the record: paths do not depend on the folder that a run was started in."""
        return as_dict(replace(self, model_path=portable(self.model_path)))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A noise schedule and the steps taken of it; see `create_sampler`.

    method: the method that the schedule is made for, which replaces a task's, but not vanilla.
    """

    sampler: str = "ddpm"
    steps: int
    noise_schedule: str = "linear"
    model_mean_type: str = "epsilon"
    model_var_type: str = "learned_range"
    dynamic_threshold: bool = False
    clip_denoised: bool | Literal["auto"] = True
    rescale_timesteps: bool = False
    timestep_respacing: int | str | list = ""
    start: int | str = ""
    eta: float = 0.0
    method: str | None = None

    def sampler_arguments(self) -> dict[str, Any]:
        """What `create_sampler` takes of it."""
        return {k: v for k, v in vars(self).items() if k != "method"}


@dataclass(frozen=True)
class Conditioning:
    """How a measurement steers the sampling: a name of `METHODS`, and its parameters."""

    method: str
    params: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is restored.

    Attributes:
        root: a file or a folder, local or remote.
        measured: the images are measurements, to be restored as they are.
        order: of the axes of an array of k-space, see `data.kspace_files`.
        axis, volume, series: what to take of a volume, see `data.dataloader.list_items`.
        mask: "auto", or a file or folder of masks, to which metrics are limited.
        volume_mode: whether a volume is restored as a whole, or slice by slice; None: as a whole
            where it can be, see `volume_items.can_be_whole`.
        correlated_noise: whether the noise that samplers draw for a slice agrees with that of its
            neighbours in the volume; None: it does unless planes are taken in turn.
        planes_in_turn: whether the network sees a whole volume along another axis at each step,
            where voxels are nearly isotropic; None: it does.
    """

    name: str = ""
    root: str
    measured: bool = False
    order: str | None = None
    axis: int | None = None
    volume: int | None = None
    series: int | str | None = None
    mask: str | None = None
    volume_mode: Literal["volume", "slices"] | None = None
    correlated_noise: bool | None = None
    planes_in_turn: bool | None = None

    def settings(self) -> dict[str, Any]:
        mask = self.mask if self.mask is None else portable(self.mask)
        return as_dict(replace(self, root=portable(self.root), mask=mask))


@dataclass(frozen=True)
class OperatorConfig:
    """A: a name of `OPERATORS`, and its parameters."""

    name: str
    params: dict[str, Any] = rest()


@dataclass(frozen=True)
class NoiseConfig:
    """n: a name of `NOISES`, and its σ in units of the [-1, 1] image.

    sigma: "auto" estimates it, "local" a map of it; another text is a map's path, see
        `guided_diffusion.item_noise`.
    """

    name: str = "gaussian"
    sigma: float | str | None = None


@dataclass(frozen=True)
class Measurement:
    """How images became measurements, y = A x + n.

    simulated: what is given are the images x, and y is made of them; otherwise y is given.
    """

    operator: OperatorConfig
    noise: NoiseConfig
    simulated: bool = internal(False)


@dataclass(frozen=True)
class TaskConfig:
    """What is restored, how it was measured, and by which method.

    data, measurement: None for method vanilla, which draws from the prior alone.
    diffusion_config: the schedule that suits the task, where --diffusion_config gives none.
    """

    conditioning: Conditioning
    data: DataConfig | None = None
    measurement: Measurement | None = None
    diffusion_config: str | None = None

    def settings(self) -> dict[str, Any]:
        found = as_dict(replace(self, diffusion_config=None))  # the schedule is on record itself
        if self.measurement is not None:
            sigma = self.measurement.noise.sigma
            if isinstance(sigma, str) and sigma not in (AUTO, LOCAL):
                found["measurement"]["noise"]["sigma"] = portable(sigma)
            found["measurement"]["operator"] |= _lines_at(self.measurement.operator, portable)
        return found if self.data is None else found | {"data": self.data.settings()}


def read_model_config(path: str) -> ModelConfig:
    """Raises UserError, see `build` and `check_counts`."""
    path = locate(path)
    config = build(ModelConfig, read_yaml(path), path)
    check_counts(
        path,
        image_size=config.image_size,
        num_channels=config.num_channels,
        num_res_blocks=config.num_res_blocks,
        in_channels=config.in_channels,
    )
    return replace(config, model_path=locate(config.model_path, path))


def read_schedule(path: str) -> Schedule:
    """Raises UserError, see `build`; or for a method that there is none of."""
    path = locate(path)
    schedule = build(Schedule, read_yaml(path), path)
    if schedule.method is not None:
        check_method(schedule.method, f"{path}: method")
    return schedule


def schedule_of_task(path: str) -> str:
    """The diffusion YAML that a task file names as its own, else `HUNDRED`; raises UserError."""
    path = locate(path)
    named = read_yaml(path).get("diffusion_config") or HUNDRED
    return locate(check_type(named, str, f"{path}: diffusion_config"), path)


def read_task_config(
    path: str,
    method: str | None = None,
    measured: bool = False,
    root: str | None = None,
    sigma: float | str | None = None,
    schedules_method: str | None = None,
    changes: Sequence[str] = (),
) -> TaskConfig:
    """A task file; where the method is "vanilla" it needs `conditioning` alone.

    Args:
        method: replaces the file's conditioning.method, and, if it is another, drops the
            parameters that belong to the file's.
        measured: the images are measurements, as if the file had data.measured: true.
        root: replaces data.root.
        sigma: replaces measurement.noise.sigma.
        schedules_method: stands for `method` where there is none, see `Schedule`; it does not
            replace vanilla, which is no method.
        changes: "KEY=VALUE", each replaces a key of the file, dotted.

    Raises:
        UserError: see `build`; a method that there is none of, even if it is replaced; or a noise
            level that cannot be had.
    """
    path = locate(path)
    if any(change.partition("=")[0] == "diffusion_config" for change in changes):
        raise UserError("--set diffusion_config: expected --diffusion_config, a flag of its own")
    config = changed(read_yaml(path), changes)
    conditioning = config.get("conditioning")
    named = None
    if isinstance(conditioning, dict) and "method" in conditioning:
        named = conditioning["method"]
        check_method(named, f"{path}: conditioning.method")
    if named != VANILLA:
        method = method or schedules_method
    if method and isinstance(conditioning, dict) and conditioning.get("method") != method:
        conditioning = {"method": method}
        config["conditioning"] = conditioning
    if isinstance(conditioning, dict) and conditioning.get("method") == VANILLA:
        for given, flag in ((measured, "measured"), (root, "input"), (sigma, "sigma")):
            if given:
                raise UserError(f"{path}: method vanilla takes no images, and so no --{flag}")
        return build(TaskConfig, {"conditioning": conditioning}, path)
    if root is not None:
        config = replaced(config, "data.root", os.path.expanduser(root))
    if sigma is not None:
        config = replaced(config, "measurement.noise.sigma", sigma)
    for key in ("data", "measurement"):
        if key not in config:
            raise UserError(f"{path}: missing key {key!r}")
        if config[key] is None:  # which vanilla alone may have
            raise UserError(f"{path}: {key}: expected keys and values, found nothing")
    task = build(TaskConfig, config, path)
    assert task.data is not None and task.measurement is not None
    data = task.data
    data = replace(
        data,
        measured=data.measured or measured,
        root=data.root if root is not None else locate(data.root, path),
        mask=_mask_at(data.mask, path),
    )
    # Published files have in_shape; every image's own size counts.
    operator = task.measurement.operator
    params = {k: v for k, v in operator.params.items() if k != "in_shape" and v is not None}
    operator = replace(operator, params=params)
    measurement = Measurement(
        replace(operator, params=params | _lines_at(operator, lambda mask: locate(mask, path))),
        _checked_noise(task.measurement.noise, data.measured, operator.name, path),
        simulated=not data.measured,
    )
    return replace(task, data=data, measurement=measurement)


def _lines_at(operator: OperatorConfig, place: Callable[[str], str]) -> dict[str, str]:
    """The parameter `mask` of an operator where that is a file of lines or points of k-space."""
    mask = operator.params.get("mask")
    return {"mask": place(mask)} if isinstance(mask, str) and mask.endswith(".npy") else {}


def _mask_at(mask: str | None, path: str) -> str | None:
    if mask in (None, AUTO):
        return mask
    found = locate(mask or "", path)
    if not (is_remote(found) or os.path.exists(found)):
        raise UserError(
            f"{path}: data.mask: expected auto, or a file or folder of masks, found {mask!r}"
        )
    return found


def _map_at(sigma: str, path: str) -> str:
    found = locate(sigma, path)
    if not (is_remote(found) or os.path.exists(found)):
        raise UserError(
            f"{path}: measurement.noise.sigma: expected a number, {AUTO}, {LOCAL}, or the file of "
            f"a map, found {sigma!r}"
        )
    return found


def is_map(sigma: float | str | None) -> bool:
    """Whether a task's sigma is a map, the path of one or one that is estimated."""
    return isinstance(sigma, str) and sigma != AUTO


def can_have_map(measurement: Measurement) -> bool:
    """Whether σ may differ from voxel to voxel of what is measured."""
    denoised = operator_class(measurement.operator.name).is_identity
    return denoised and not measurement.simulated and measurement.noise.name in WITH_A_MAP


def _checked_noise(noise: NoiseConfig, measured: bool, operator: str, path: str) -> NoiseConfig:
    where = f"{path}: measurement: noise"
    if noise.sigma is None:
        if noise.name != "clean":
            raise UserError(f"{where}: missing key 'sigma'")
        return replace(noise, sigma=0.0)
    if isinstance(noise.sigma, str) and noise.sigma != AUTO:
        with contextlib.suppress(ValueError):
            return replace(noise, sigma=float(noise.sigma))  # 1e-2 is text to YAML
        if not can_have_map(Measurement(OperatorConfig(operator), noise, not measured)):
            raise UserError(
                f"{where}: sigma: expected a number or auto, found {noise.sigma!r}; a map, given "
                f"or {LOCAL}, is for measured images, operator denoise, noise "
                f"{' or '.join(WITH_A_MAP)}"
            )
        return noise if noise.sigma == LOCAL else replace(noise, sigma=_map_at(noise.sigma, path))
    if noise.sigma == AUTO:
        if not (measured or operator_class(operator).of_kspace):
            raise UserError(
                f"{where}: sigma: auto estimates the noise of measured images (data.measured: true "
                "or --measured); noise that is simulated needs a number"
            )
        can = [name for name, model in NOISES.items() if model.can_be_estimated]
        if noise.name not in can:
            raise UserError(
                f"{where}: sigma: auto estimates {' or '.join(can)} noise, found {noise.name}"
            )
    return noise
