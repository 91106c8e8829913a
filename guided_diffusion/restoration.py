"""Restoring images: the one path that the command line, the notebook and benchmarks share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from guided_diffusion.batches import Batch, Restored, restored
from guided_diffusion.config import Measurement, ModelConfig, Schedule, read_schedule
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.measuring import (
    check_sigma,
    check_volume,
    estimate_noise,
    fit,
    noise_of,
    operator_of,
)
from guided_diffusion.methods import VANILLA, check_conditioning, check_svd
from guided_diffusion.noise import NOISES
from guided_diffusion.operators import operator_class
from guided_diffusion.prior import Prior
from guided_diffusion.sampling import Watch
from guided_diffusion.scan import Scan
from guided_diffusion.volumes import AsVolume
from util.errors import UserError
from util.random import Place

FAST = "configs/diffusion_config_fast.yaml"


def restore(
    images: ArrayLike | torch.Tensor,
    measurement: Measurement | None,
    prior: Prior,
    method: str | None = None,
    schedule: Schedule | str = FAST,
    params: Mapping[str, Any] | None = None,
    *,
    names: Sequence[str] | None = None,
    places: Sequence[Place | None] | None = None,
    num_samples: int = 1,
    seed: int = 0,
    sigma: torch.Tensor | None = None,
    watch: Watch | None = None,
    scan: Scan | None = None,
    volume: AsVolume | None = None,
    padding: Sequence[NDArray[np.bool_] | None] | None = None,
    state_file: str | None = None,
) -> Restored:
    """Restore a batch of images of one size, or of volumes as a whole.

    Args:
        images: (H, W), (N, H, W) or (N, C, H, W) floats in [-1, 1], beyond it by noise only: the
            measurements, or if `measurement.simulated` the images to make them of. A colour image
            under a prior of one channel is restored channel by channel.
        measurement: what was done to the images; None draws N samples of the prior, and of the
            images only their number and size count.
        prior: see `load_prior`.
        method: a name of `METHODS`; None is the schedule's own, or else dmps.
        schedule: the steps to take, or the path of a diffusion YAML.
        params: the method's own parameters.
        names: decide the random numbers, with the seed; by default "0", "1", ...
        places: of images that are slices of a volume: they decide the numbers that a sampler
            draws, so that neighbours agree; None for an image that is none.
        num_samples: posterior samples for each image.
        sigma: (rows,), the noise of each channel of each image, where it is "auto" and not to be
            estimated from the images here; or a map of it like the images, 0 where it is not
            known, see `guided_diffusion.noise_maps`; an image whose map is 0 stays as it is.
        watch: see `Watch`.
        scan: raw k-space, see `guided_diffusion.scan.prepare`, in place of what would be made of
            the one image; what is restored is its magnitude.
        volume: the images, (N, D, H, W), are volumes, see `AsVolume`; with `names` of the volumes,
            and no `places`. None: they are images.
        padding: of each measured image, (H, W) or for volumes (D, H, W), True where it is no data
            and counts neither in the residual nor in an estimate of the noise.
        state_file: where to keep the state between steps, see `guided_diffusion.sampling`; one
            that is there of the same restoration is taken up.

    Raises:
        UserError: images, measurement, method and schedule that do not fit each other; or noise
            that cannot be estimated.
    """
    batch = _as_batch(images)
    for key, given in (("names", names), ("places", places), ("padding", padding)):
        if given is not None and len(given) != len(batch):
            raise UserError(
                f"{key}: expected one for each of {len(batch)} images, found {len(given)}"
            )
    if not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
        raise UserError(f"num_samples: expected an integer of at least 1, found {num_samples}")
    names = [str(i) for i in range(len(batch))] if names is None else list(names)
    places = [None] * len(batch) if places is None else list(places)
    schedule = read_schedule(schedule) if isinstance(schedule, str) else schedule
    method = method_of(measurement, method, schedule)
    params = check_restoration(prior.config, measurement, method, params or {}, schedule)
    check_volume(measurement, prior, volume)
    ignored: list[NDArray[np.bool_] | None] = [None] * len(batch)
    if padding is not None:
        ignored = list(padding)
        shape = tuple(batch.shape[2:] if volume is None else batch.shape[1:])
        for mask in ignored:
            if mask is not None and scan is None and mask.shape != shape:
                raise UserError(f"padding: expected the shape {shape}, found {mask.shape}")
    if measurement is not None and scan is None:
        batch = fit(batch, measurement, prior, volume is not None)
        if measurement.noise.sigma == "auto" and sigma is None:
            each = zip(batch, ignored, strict=True)
            how = measurement, prior, schedule
            sigma = torch.cat([estimate_noise(x, *how, p, volume is not None) for x, p in each])
        if sigma is not None and not measurement.simulated:
            sigma = check_sigma(sigma, batch, measurement, prior, volume is not None)
    return restored(
        Batch(
            images=batch,
            measurement=measurement,
            prior=prior,
            method=method,
            params=params,
            schedule=schedule,
            names=names,
            places=places,
            num_samples=num_samples,
            seed=seed,
            sigma=sigma,
            watch=watch,
            scan=scan,
            volume=volume,
            padding=ignored,
            state_file=state_file,
        )
    )


def method_of(measurement: Measurement | None, method: str | None, schedule: Schedule) -> str:
    """The name of the method that restores."""
    return VANILLA if measurement is None else method or schedule.method or "dmps"


def check_restoration(
    config: ModelConfig,
    measurement: Measurement | None,
    method: str,
    params: Mapping[str, Any],
    schedule: Schedule,
) -> dict[str, Any]:
    """Complete a method's parameters, and find out before the work whether all fits together.

    Raises:
        UserError: an unknown name, an impossible number, or parts that do not fit.
    """
    if schedule.model_var_type.startswith("learned") and not config.learn_sigma:
        raise UserError(
            f"diffusion config: model_var_type: {schedule.model_var_type} needs a network with "
            "learn_sigma: true, found false in the model config; take fixed_small"
        )
    if measurement is None:
        if schedule.start != "":
            raise UserError(
                f"diffusion config: start: {schedule.start} needs a measurement to start from"
            )
        create_sampler(**schedule.sampler_arguments())
        return check_conditioning(VANILLA, params)
    size, name = config.image_size, measurement.operator.name
    parameters = operator_class(name).check(measurement.operator.params)
    if not operator_class(name).of_volumes:  # which each volume completes
        sides = operator_class(name).expected_size((size, size), parameters)
        in_shape = (config.in_channels, *sides)
        check_svd(method, operator_of(measurement, in_shape, torch.device("cpu")))
    noise = noise_of(measurement)
    if operator_class(name).of_kspace and not noise.of_kspace:
        known = " or ".join(model.name for model in NOISES.values() if model.of_kspace)
        raise UserError(
            f"measurement.noise.name: k-space, which operator {name} measures, has {known} noise, "
            f"found {noise.name}"
        )
    # A task's own noise level matters to "auto" alone.
    create_sampler(**schedule.sampler_arguments(), levels=(1, 1))
    return check_conditioning(method, params, measurement.operator.name)


def _as_batch(images: ArrayLike | torch.Tensor) -> torch.Tensor:
    batch = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(images))
    if not batch.is_floating_point():
        raise UserError(f"images: expected floats in [-1, 1], found {batch.dtype}")
    shape = tuple(batch.shape)
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise UserError(f"images: expected (H, W), (N, H, W) or (N, C, H, W), found shape {shape}")
    batch = batch.detach().float().cpu()
    return batch.reshape(1 if len(shape) == 2 else shape[0], -1, *shape[-2:])
