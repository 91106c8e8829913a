"""What a task's measurement means for the images at hand: sizes, channels, operator and noise."""

import contextlib
import functools
import json
import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.config import WITH_A_MAP, Measurement, Schedule, can_have_map, is_map
from guided_diffusion.denoiser import Denoiser
from guided_diffusion.noise import Noise, get_noise
from guided_diffusion.noise_by_prior import sigma_by_prior
from guided_diffusion.operators import get_operator, operator_class, restored_size
from guided_diffusion.operators.base import Grid
from guided_diffusion.prior import Prior
from guided_diffusion.volumes import AsVolume
from util.errors import UserError
from util.files import digests_of
from util.random import ImageRandom, image_generator

LEAST_SIDE = 16  # pixels of a restored image; SSIM's window takes 11 of them
NO_NOISE = float(np.finfo(np.float32).eps)  # σ below it is lost in the pixels' own rounding


def fit(
    images: torch.Tensor, measurement: Measurement, prior: Prior, whole: bool = False
) -> torch.Tensor:
    """The images (..., C, H, W) with the channels that the prior, or if measured A, takes.

    Args:
        whole: whether the channels are the slices of a volume.

    Raises:
        UserError: they are too small, or have channels that A cannot have made.
    """
    height, width = restored_hw(images, measurement)
    least = max(LEAST_SIDE, prior.network.least_side)
    if min(height, width) < least:
        raise UserError(f"{width}×{height} pixels to restore, and the least side is {least}")
    operator = operator_for(images, measurement, prior, whole)
    if whole:
        return images
    channels = (operator.in_shape if measurement.simulated else operator.out_shape)[0]
    found = images.shape[-3]
    if found > channels and channels < operator.in_shape[0]:
        name = measurement.operator.name
        raise UserError(f"{found} channels, and {name} restores measurements of {channels}")
    if channels == 3 and found == 1:
        return images.repeat(*[1] * (images.ndim - 3), 3, 1, 1)
    if found % channels:
        known = f"1 or {channels}" if channels == 3 else channels
        raise UserError(f"{found} channels, and this prior restores images of {known}")
    return images


def check_sigma(
    sigma: torch.Tensor, images: torch.Tensor, measurement: Measurement, prior: Prior, whole: bool
) -> torch.Tensor:
    """σ of images (N, C, H, W) that `fit`: of each row that is restored by itself, or like them.

    Raises:
        UserError: there are other numbers of σ, ones that are no standard deviation, or a map of
            what cannot have one.
    """
    if not (torch.isfinite(sigma) & (sigma >= 0)).all():
        raise UserError("sigma: expected finite numbers >= 0")
    if sigma.ndim > 1:
        if not can_have_map(measurement):
            raise UserError(
                "sigma: a map is for measured images, operator denoise, noise "
                f"{' or '.join(WITH_A_MAP)}, found {measurement.operator.name}, "
                f"{measurement.noise.name}"
            )
        with contextlib.suppress(RuntimeError):
            return sigma.expand_as(images)
        expected = f"a map of shape {tuple(images.shape)}"
    else:
        operator = operator_for(images, measurement, prior, whole)
        rows = images.numel() // math.prod(operator.out_shape)
        if sigma.numel() == rows:
            return sigma.reshape(rows)
        expected = f"{rows} noise levels"
    raise UserError(f"sigma: expected {expected}, found shape {tuple(sigma.shape)}")


def estimate_noise(
    images: torch.Tensor,
    measurement: Measurement,
    prior: Prior,
    schedule: Schedule,
    padding: NDArray[np.bool_] | None = None,
    whole: bool = False,
) -> torch.Tensor:
    """σ of each channel that is restored by itself, (rows,), of measured images that `fit`.

    Args:
        schedule: of the prior's training.
        padding: (H, W), of volumes (D, H, W), True where the images are no data.

    Raises:
        UserError: see `guided_diffusion.noise.estimate_sigma`.
    """
    rows = images.reshape(-1, *operator_for(images, measurement, prior, whole).out_shape).numpy()
    known = measurement, prior, schedule, padding
    return torch.tensor([sigma_of(row[:, None] if whole else row[None], *known) for row in rows])


def sigma_of(
    y: NDArray[np.float32],
    measurement: Measurement,
    prior: Prior,
    schedule: Schedule,
    padding: NDArray[np.bool_] | None = None,
) -> float:
    """The one σ of measured images (N, C, H, W); the others as `estimate_noise` takes them."""
    sigma = noise_of(measurement).estimate(y.reshape(-1, *y.shape[-2:]), padding)
    return confirmed(sigma, y, measurement, prior, schedule, padding)


def confirmed(
    sigma: float,
    y: NDArray[np.float32],
    measurement: Measurement,
    prior: Prior,
    schedule: Schedule,
    padding: NDArray[np.bool_] | None = None,
) -> float:
    """What the prior leaves of an estimate of `sigma_of`, if y is of the kind of its images."""
    if y.shape[1] != prior.channels or not operator_class(measurement.operator.name).keeps_sharp:
        return sigma
    return sigma_by_prior(y, sigma, Denoiser(prior, schedule), noise_of(measurement), padding)


def restored_hw(images: torch.Tensor, measurement: Measurement | None) -> tuple[int, int]:
    """(H, W) of what these images, (..., h, w), are restored to."""
    size = (images.shape[-2], images.shape[-1])
    if measurement is None or measurement.simulated:
        return size
    return restored_size(size, measurement.operator.name, **measurement.operator.params)


def restored_depth(slices: int, measurement: Measurement | None) -> int:
    """How many slices a volume of so many is restored to."""
    if measurement is None or measurement.simulated:
        return slices
    operator = operator_class(measurement.operator.name)
    return operator.restored_depth(slices, operator.check(measurement.operator.params))


def restored_spacing(measurement: Measurement | None) -> float | None:
    """mm between restored slices; None where they are those of the volume given."""
    if measurement is None:
        return None
    operator = operator_class(measurement.operator.name)
    return operator.restored_spacing(operator.check(measurement.operator.params))


def interpolated(y: NDArray[np.float32], depth: int, measurement: Measurement):
    """See `Operator.interpolated`."""
    operator = operator_class(measurement.operator.name)
    return operator.interpolated(y, depth, operator.check(measurement.operator.params))


def for_volume(measurement: Measurement, grid: Grid) -> Measurement:
    """The measurement of one volume, with what its header tells; raises UserError."""
    config = measurement.operator
    operator = operator_class(config.name)
    params = operator.on_grid(operator.check(config.params), grid, measurement.simulated)
    return replace(measurement, operator=replace(config, params=params))


def takes_volumes(measurement: Measurement) -> bool:
    """See `Operator.takes_volumes`."""
    operator = operator_class(measurement.operator.name)
    return operator.takes_volumes(operator.check(measurement.operator.params))


def enlargement(measurement: Measurement | None) -> int:
    """How many times more rows the restored images have than those given."""
    return restored_hw(torch.empty(64, 64), measurement)[0] // 64


def noise_of(measurement: Measurement) -> Noise:
    """The measurement's noise model; raises UserError for an unknown name."""
    sigma = measurement.noise.sigma
    sigma = "auto" if is_map(sigma) else sigma  # neither is a number
    return get_noise(measurement.noise.name, 0.0 if sigma is None else sigma)


def check_volume(measurement: Measurement | None, prior: Prior, volume: AsVolume | None) -> None:
    """Raises UserError where a task or a prior cannot do with volumes, or cannot do without."""
    if volume is not None and prior.channels != 1:
        raise UserError(
            f"data.volume_mode: volume needs a prior of one channel, found {prior.channels}"
        )
    if measurement is None:
        return
    name = measurement.operator.name
    if volume is not None:
        if not takes_volumes(measurement):
            raise UserError(
                f"data.volume_mode: volume: {name} with these parameters restores one slice at a "
                "time, data.volume_mode: slices"
            )
        return
    if operator_class(name).of_volumes:
        raise UserError(
            f"measurement.operator.name: {name} restores volumes (NIfTI, DICOM) as a whole, "
            "data.volume_mode: volume; found an image"
        )


def operator_of(measurement: Measurement, in_shape: tuple[int, ...], device: torch.device):
    config = measurement.operator
    files = json.dumps(digests_of(config.params))
    return _built(config.name, json.dumps(config.params), files, in_shape, device)


@functools.lru_cache(maxsize=1)  # images of one shape, which come one after the other, share it
def _built(name: str, params: str, files: str, in_shape: tuple[int, ...], device: torch.device):
    """The operator; of other `files`, SHA-256 of those that `params` name, another one."""
    return get_operator(name, in_shape, device=device, **json.loads(params))


def operator_for(images, measurement: Measurement, prior: Prior, whole: bool):
    """The operator, of which these images are the domain, or if measured the range."""
    channels = restored_depth(images.shape[-3], measurement) if whole else prior.channels
    return operator_of(measurement, (channels, *restored_hw(images, measurement)), prior.device)


def measured(measurement, operator, images, names, seed, sigma, volume):
    """y (rows, *out_shape), as it is or A x + n, n drawn once for each image; and its σ.

    σ is one number, or (rows, 1, 1, 1) where it was estimated.
    """
    device = operator.device
    if measurement.simulated:
        x = images.reshape(-1, *operator.in_shape).to(device)
        noise = noise_of(measurement)
        if volume is None:
            random = ImageRandom([image_generator(n, "measurement", seed) for n in names])
        else:
            random = volume.measurement_random(names, operator.out_shape[0], seed)
        return noise(operator.forward(x), random), noise.sigma
    y = images.reshape(-1, *operator.out_shape).to(device)
    if sigma is None:
        return y, noise_of(measurement).sigma
    return y, sigma.to(device).reshape(-1, 1, 1, 1)


def for_each_sample(operator, y, sigma, images, num_samples):
    """(operator, y, sigma) with every image's rows once for each sample."""

    def repeat(rows):
        per_image = rows.reshape(images, -1, *rows.shape[1:])
        per_sample = per_image.repeat_interleave(num_samples, dim=0)
        return per_sample.reshape(-1, *rows.shape[1:])

    return operator, repeat(y), repeat(sigma) if torch.is_tensor(sigma) else sigma


def residuals_of(operator, y, sigma, mean) -> list[torch.Tensor | None]:
    """(y - A x̂)/σ of each image, (rows·c, h, w); None where σ is next to 0, see `NO_NOISE`."""
    if not torch.is_tensor(sigma) and sigma < NO_NOISE:
        return [None] * len(mean)
    residual = (y - operator.forward(mean.reshape(-1, *operator.in_shape))) / sigma
    return [rows.flatten(0, 1) for rows in residual.chunk(len(mean))]


def figures_of_images(residuals, sigma, padding) -> list[dict[str, float]]:
    """What is known of each image without its truth: ‖y - A x̂‖/(σ√m), and an estimated σ."""
    figures: list[dict[str, float]] = [{} for _ in residuals]
    for found, residual, ignored in zip(figures, residuals, padding, strict=True):
        if residual is not None:
            if ignored is not None:
                residual = residual[..., ~torch.from_numpy(ignored).to(residual.device)]
            found["residual"] = residual.square().mean().sqrt().item()
    if torch.is_tensor(sigma):
        for found, image in zip(figures, sigma.chunk(len(residuals)), strict=True):
            found["sigma"] = image.square().mean().sqrt().item()
    return figures
