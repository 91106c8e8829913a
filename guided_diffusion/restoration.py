"""Restoring images: the one path that the command line, the notebook and benchmarks share."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from guided_diffusion.config import (
    Measurement,
    ModelConfig,
    NoiseConfig,
    Schedule,
    read_schedule,
)
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.measuring import (
    check_volume,
    estimate_noise,
    figures_of_images,
    fit,
    for_each_sample,
    measured,
    noise_of,
    operator_of,
    residuals_of,
    restored_depth,
    restored_hw,
    restored_spacing,
)
from guided_diffusion.methods import (
    METHODS,
    VANILLA,
    check_conditioning,
    check_svd,
    get_conditioning_method,
)
from guided_diffusion.methods.start import start_state, useful_levels
from guided_diffusion.noise_maps import by_levels, figures_of
from guided_diffusion.operators import operator_class
from guided_diffusion.operators.base import Operator, Sigma
from guided_diffusion.operators.scanned import Scanned
from guided_diffusion.prior import Prior
from guided_diffusion.sampling import Kept, Watch, Watched, identity_of, part_of, sample
from guided_diffusion.scan import Scan
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from guided_diffusion.unconditional import PriorStep
from guided_diffusion.volume_denoising import is_denoising, network_at, refined
from guided_diffusion.volumes import AsVolume, SliceRandom
from util.errors import UserError
from util.random import ImageRandom, Place, sample_random

FAST = "configs/diffusion_config_fast.yaml"


@dataclass(frozen=True)
class Restored:
    """N images of K samples each, on the CPU, in [-1, 1]; of a scan also above, as k-space says.

    An image in whose sampling the network left the finite numbers is NaN throughout.

    Attributes:
        samples: (N, K, C, H, W).
        mean: (N, C, H, W), of the samples as they were before they were cut to [-1, 1].
        measurements: (C, h, w) for each image, as they were restored; None for samples of the
            prior.
        figures: for each image what is known of it without its truth: "residual",
            ‖y - A x̂‖/(σ√m), and "sigma", where it was estimated.
        residuals: (c, h, w) for each image, (y - A x̂)/σ; None where σ is 0, for samples of the
            prior, and where y is no image.
        sampled: what of k-space was measured, (1, N) or (N, 1), columns or rows, or (H, W), points;
            None for other operators than mri.
    """

    samples: NDArray[np.float32]
    mean: NDArray[np.float32]
    measurements: list[NDArray[np.float32] | None]
    figures: list[dict[str, float]]
    residuals: list[NDArray[np.float32] | None]
    sampled: NDArray[np.bool_] | None = None

    @property
    def std(self) -> NDArray[np.float32] | None:
        """(N, C, H, W), the samples' standard deviation; None of one sample."""
        return self.samples.std(axis=1, ddof=1) if self.samples.shape[1] > 1 else None

    @property
    def finite(self) -> NDArray[np.bool_]:
        """(N,), whether there is an image at all."""
        return np.array([np.isfinite(image).all() for image in self.mean])


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
            known, see `guided_diffusion.noise_maps`.
        watch: see `Watch`.
        scan: raw k-space, see `guided_diffusion.scan.prepare`, in place of what would be made of
            the one image; what is restored is its magnitude.
        volume: the images, (N, D, H, W), are volumes, see `AsVolume`; with `names` of the volumes,
            and no `places`. None: they are images.
        padding: of each measured image, (H, W) or for volumes (D, H, W), True where it is no data
            and does not count in the residual.
        state_file: where to keep the state between steps, see `guided_diffusion.sampling`; one
            that is there of the same restoration is taken up. Of a batch with one schedule.

    Raises:
        UserError: images, measurement, method and schedule that do not fit each other; or noise
            that cannot be estimated.
    """
    batch = _as_batch(images)
    names = [str(i) for i in range(len(batch))] if names is None else list(names)
    places = [None] * len(batch) if places is None else list(places)
    schedule = read_schedule(schedule) if isinstance(schedule, str) else schedule
    method = method_of(measurement, method, schedule)
    params = check_restoration(prior.config, measurement, method, params or {}, schedule)
    check_volume(measurement, prior, volume)
    if measurement is not None and scan is None:
        batch = fit(batch, measurement, prior, volume is not None)
        if measurement.noise.sigma == "auto" and sigma is None:
            sigma = estimate_noise(batch, measurement, prior, whole=volume is not None)
        if sigma is not None and sigma.ndim > 1:
            return _restore_by_levels(
                batch, measurement, prior, method, schedule, params,
                names, places, num_samples, seed, sigma, watch, volume, padding, state_file,
            )  # fmt: skip
        if own_schedules(measurement, schedule) and len(batch) > 1:
            assert sigma is not None
            each = zip(batch, names, places, sigma.reshape(len(batch), -1), strict=True)
            return _joined(
                [
                    _restore(x[None], measurement, prior, method, schedule, params,
                             [name], [place], num_samples, seed, s, watch, volume)
                    for x, name, place, s in each
                ]
            )  # fmt: skip
    return _restore(
        batch, measurement, prior, method, schedule, params,
        names, places, num_samples, seed, sigma, watch, volume, scan, padding, state_file,
    )  # fmt: skip


def method_of(measurement: Measurement | None, method: str | None, schedule: Schedule) -> str:
    """The name of the method that restores."""
    return VANILLA if measurement is None else method or schedule.method or "dmps"


def own_schedules(measurement: Measurement | None, schedule: Schedule) -> bool:
    """Whether an image's own, estimated, noise level decides where it starts."""
    estimated = measurement is not None and measurement.noise.sigma == "auto"
    return estimated and schedule.start == "auto"


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
    noise_of(measurement)
    # A task's own noise level matters to "auto" alone.
    create_sampler(**schedule.sampler_arguments(), levels=(1, 1))
    return check_conditioning(method, params, measurement.operator.name)


def begin(
    method: str,
    params: Mapping[str, Any],
    schedule: Schedule,
    known: tuple[Operator, torch.Tensor, Sigma] | None,
    x_T: torch.Tensor,
    statistics: PriorStatistics = NATURAL_IMAGES,
    slices: bool = False,
) -> tuple[GaussianDiffusion, torch.Tensor, Callable]:
    """What a restoration starts with.

    Args:
        method, params: a name of `METHODS` and its parameters; unused without a measurement.
        known: (operator, y, σ), see `pseudo_likelihood_score`; None for samples of the prior.
        x_T: (N, C, H, W) standard normal.
        statistics: of the prior's images.
        slices: whether the channels are the slices of volumes.

    Returns:
        (diffusion, first state (N, C, H, W), step), see `GaussianDiffusion.p_sample_loop`.

    Raises:
        UserError: an impossible schedule.
    """
    arguments = schedule.sampler_arguments()
    if known is None:
        prior = PriorStep(statistics)
        return create_sampler(**arguments, unclipped_from=prior.unclipped_from), x_T, prior.step
    operator, _, sigma = known
    sample = METHODS[method].draws_samples
    levels = useful_levels(operator, sigma, sample, statistics)
    unclipped_from = METHODS[method].unclipped_from
    diffusion = create_sampler(**arguments, levels=levels, unclipped_from=unclipped_from)
    if schedule.start != "":
        x_T = start_state(*known, diffusion, x_T, statistics)
    built = get_conditioning_method(method, *known, statistics, slices, **params)
    return diffusion, x_T, built.step


def _as_batch(images: ArrayLike | torch.Tensor) -> torch.Tensor:
    batch = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(images))
    if not batch.is_floating_point():
        raise UserError(f"images: expected floats in [-1, 1], found {batch.dtype}")
    shape = tuple(batch.shape)
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise UserError(f"images: expected (H, W), (N, H, W) or (N, C, H, W), found shape {shape}")
    batch = batch.detach().float().cpu()
    return batch.reshape(1 if len(shape) == 2 else shape[0], -1, *shape[-2:])


def _joined(parts: list[Restored]) -> Restored:
    return Restored(
        np.concatenate([p.samples for p in parts]),
        np.concatenate([p.mean for p in parts]),
        [m for p in parts for m in p.measurements],
        [f for p in parts for f in p.figures],
        [r for p in parts for r in p.residuals],
    )


def _restore(
    images, measurement, prior, method, schedule, params,
    names, places, num_samples, seed, sigma, watch, volume, scan=None, padding=None,
    state_file=None,
) -> Restored:  # fmt: skip
    """`restore`, for N images that fit and share a schedule.

    The network sees N·K·contrasts rows, K samples of each image: a colour image under a prior of
    one channel is restored contrast by contrast. Of a volume a row is all its slices, and samples
    are drawn one after the other, so that only one's is in memory.
    """
    depth = prior.channels if volume is None else restored_depth(images.shape[1], measurement)
    shape = (depth, *restored_hw(images, measurement))
    rows, y = len(images), None
    if measurement is not None:
        if scan is None:
            operator = operator_of(measurement, shape, prior.device)
            y, sigma = measured(measurement, operator, images, names, seed, sigma, volume)
            unbiased = noise_of(measurement).to_gaussian(y, sigma)
        else:
            operator, sigma, unbiased = scan.operator, scan.sigma, scan.y
            y = unbiased
        rows = len(y)
    all_of_it = measurement, method, params, schedule, names, places, seed, volume, prior.dtype
    identity = None if state_file is None else identity_of(y, sigma, *all_of_it, prior.digest)

    def drawn(samples: range, part: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A part of the samples, (N, samples, C, H, W), and which images are finite in it, (N,)."""
        count, known = len(samples), None
        if measurement is not None:
            known = for_each_sample(operator, unbiased, sigma, len(images), count)
        random: ImageRandom | SliceRandom
        if volume is None:
            random = sample_random(names, samples, seed, places)
        else:
            spacing = restored_spacing(measurement)
            random = volume.random(names, depth, samples, seed, spacing)
        x_T = random.randn_like(torch.empty(rows * count, *shape, device=prior.device))
        shared = prior.statistics, volume is not None
        diffusion, x_T, step = begin(method, params, schedule, known, x_T, *shared)
        seen: Any = prior.network
        if volume is not None:
            seen = volume.network(prior.network, diffusion.num_timesteps)
        network = Watched(seen, len(x_T), prior.device)
        kept: Kept | None = None
        if state_file is not None:
            changing = [(network, "finite"), *([] if volume is None else [(seen, "calls")])]
            file = state_file if of == 1 else f"{state_file}.{part}"
            kept = Kept(file, f"{identity} {samples}", step, random.randn_like, changing)
        seen_by = None if watch is None else part_of(watch, part, of)
        x_hat = sample(diffusion, network, x_T, step, random.randn_like, seen_by, kept)
        at_once = volume is not None and volume.in_turn and diffusion.num_timesteps == 1
        if at_once and is_denoising(measurement) and bool(torch.as_tensor(sigma).min() > 0):
            _, noisy, level = for_each_sample(operator, y, sigma, len(images), count)
            look = functools.partial(network_at, schedule, method, network)
            x_hat = refined(x_hat, noisy, level, noise_of(measurement), look)
        finite = (network.finite & torch.isfinite(x_hat).flatten(1).all(dim=1)).cpu()
        x_hat = x_hat.float().cpu().reshape(len(names), count, -1, *shape[1:])
        return x_hat, finite.reshape(len(names), -1).all(dim=1)

    parts = [range(num_samples)]
    if volume is not None:
        parts = [range(k, k + 1) for k in range(num_samples)]
    several = [drawn(part, i, len(parts)) for i, part in enumerate(parts)]
    x_hat = torch.cat([x for x, _ in several], dim=1)
    finite = torch.stack([found for _, found in several]).all(dim=0)
    x_hat = torch.where(finite.reshape(-1, 1, 1, 1, 1), x_hat, torch.nan)
    # Cut before, the noise that samples have about black would brighten their mean.
    real = x_hat.mean(dim=1)
    if scan is None:
        mean = real = real.clamp(-1, 1)
        x_hat = x_hat.clamp(-1, 1)
    else:  # not cut: k-space itself says how bright the brightest tissue is
        x_hat, mean = scan.magnitude(x_hat), scan.magnitude(real)
    samples = x_hat.numpy()
    if y is None:
        none = [None] * len(names)
        return Restored(samples, mean.numpy(), [*none], [{} for _ in names], [*none])
    residuals = residuals_of(operator, unbiased, sigma, real.to(prior.device))
    figures = figures_of_images(residuals, sigma, padding)
    shown = (operator.picture(y) if scan is None else scan.zero_filled).cpu()
    measurements = shown.reshape(len(names), -1, *shown.shape[2:]).numpy()
    sampled = operator.sampled if isinstance(operator, Scanned) else None
    seen_of = [None if sampled is not None or r is None else r.cpu().numpy() for r in residuals]
    return Restored(samples, mean.numpy(), list(measurements), figures, seen_of, sampled)


def _restore_by_levels(
    images, measurement, prior, method, schedule, params,
    names, places, num_samples, seed, sigma, watch, volume, padding, state_file,
) -> Restored:  # fmt: skip
    """`restore` with a map of σ, (N, C, H, W) like the images: see `noise_maps`."""
    y = noise_of(measurement).to_gaussian(images, sigma)

    def at(i: int, count: int, level: float) -> Restored:
        return _restore(
            y, replace(measurement, noise=NoiseConfig("gaussian", level)), prior, method, schedule,
            params, names, places, num_samples, seed, None,
            None if watch is None else part_of(watch, i, count), volume, None, padding,
            None if state_file is None else f"{state_file}.{i}",
        )  # fmt: skip

    samples, mean = by_levels(sigma, at)
    figures = figures_of(y, sigma, mean, padding)
    residuals = torch.where(sigma > 0, (y - torch.from_numpy(mean)) / sigma, 0).numpy()
    return Restored(samples, mean, list(images.numpy()), figures, list(residuals))
