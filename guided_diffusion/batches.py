"""Batches of images that fit a measurement, and how one is restored."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.config import Measurement, NoiseConfig, Schedule
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.measuring import (
    figures_of_images,
    for_each_sample,
    measured,
    noise_of,
    operator_of,
    residuals_of,
    restored_depth,
    restored_hw,
    restored_spacing,
)
from guided_diffusion.methods import METHODS, get_conditioning_method
from guided_diffusion.methods.start import start_state, useful_levels
from guided_diffusion.noise_maps import by_levels, figures_of, levels_of
from guided_diffusion.operators.base import Operator, Sigma
from guided_diffusion.operators.scanned import Scanned
from guided_diffusion.prior import Prior
from guided_diffusion.sampling import Kept, Watch, Watched, identity_of, part_of, sample
from guided_diffusion.scan import Scan
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from guided_diffusion.unconditional import PriorStep
from guided_diffusion.volume_denoising import STAGES, is_denoising, network_at, refined
from guided_diffusion.volumes import AsVolume, SliceRandom
from util.random import ImageRandom, Place, sample_random


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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """N images of one size, and all that decides how they are restored.

    Attributes:
        images: (N, C, H, W) that `fit`; the others are `restore`'s arguments, complete, with an
            entry of names, places and padding for each image.
        sigma: (rows,) of estimated noise, or a map like the images; None where the measurement
            says it.
    """

    images: torch.Tensor
    measurement: Measurement | None
    prior: Prior
    method: str
    params: Mapping[str, Any]
    schedule: Schedule
    names: list[str]
    places: list[Place | None]
    num_samples: int
    seed: int
    sigma: torch.Tensor | None
    watch: Watch | None
    scan: Scan | None
    volume: AsVolume | None
    padding: list[NDArray[np.bool_] | None]
    state_file: str | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is restored."""
        depth = self.prior.channels
        if self.volume is not None:
            depth = restored_depth(self.images.shape[1], self.measurement)
        return (depth, *restored_hw(self.images, self.measurement))

    @property
    def has_map(self) -> bool:
        return self.sigma is not None and self.sigma.ndim > 1

    @property
    def one_by_one(self) -> bool:
        """Whether each image has a schedule, or levels of noise, of its own."""
        return self.has_map or own_schedules(self.measurement, self.schedule)

    def each(self) -> list["Batch"]:
        """Its images, each a batch of one."""
        if len(self.images) == 1:
            return [self]
        sigmas: Sequence[torch.Tensor | None] = [None] * len(self.images)
        if self.sigma is not None:
            sigmas = self.sigma.chunk(len(self.images))
        return [
            replace(
                self,
                images=self.images[i : i + 1],
                names=self.names[i : i + 1],
                places=self.places[i : i + 1],
                sigma=sigmas[i],
                padding=self.padding[i : i + 1],
                state_file=_numbered(self.state_file, i),
            )
            for i in range(len(self.images))
        ]

    def at_level(self, i: int, level: float, y: torch.Tensor) -> "Batch":
        """Images y, like its own, whose noise is Gaussian of one σ, the i-th of a map's levels."""
        assert self.measurement is not None
        measurement = replace(self.measurement, noise=NoiseConfig("gaussian", level))
        state_file = _numbered(self.state_file, i)
        return replace(self, images=y, measurement=measurement, sigma=None, state_file=state_file)

    def steps(self) -> int:
        """How many its sampling has, those of all levels and samples one after the other."""
        if self.has_map:
            assert self.sigma is not None
            levels = enumerate(levels_of(self.sigma))
            each = [self.at_level(i, level, self.images).steps() for i, level in levels]
            return sum(each) or 1
        operator: Operator | None = None
        sigma: Sigma = 0.0
        if self.measurement is not None:
            operator = operator_of(self.measurement, self.shape, self.prior.device)
            sigma = noise_of(self.measurement).std if self.sigma is None else self.sigma
        how = self.method, self.schedule, operator, sigma, self.prior.statistics
        steps = _diffusion(*how, self.volume is not None).num_timesteps
        if self.refines(steps, sigma):
            steps += STAGES * len(self.images)
        return steps * (1 if self.volume is None else self.num_samples)

    def refines(self, steps: int, sigma: Sigma) -> bool:
        """Whether the volume that so many steps restore is filtered in three dimensions, too."""
        at_once = self.volume is not None and self.volume.in_turn and steps == 1
        return at_once and is_denoising(self.measurement) and bool(torch.as_tensor(sigma).min() > 0)


def _numbered(path: str | None, i: int) -> str | None:
    return None if path is None else f"{path}.{i}"


def own_schedules(measurement: Measurement | None, schedule: Schedule) -> bool:
    """Whether an image's own, estimated, noise level decides where it starts."""
    estimated = measurement is not None and measurement.noise.sigma == "auto"
    return estimated and schedule.start == "auto"


def restored(batch: Batch) -> Restored:
    """Restore a batch; raises UserError, see `begin`."""
    if len(batch.images) > 1 and batch.one_by_one:
        return _joined(list(_in_turn(batch.each())))
    return _by_levels(batch) if batch.has_map else _sampled(batch)


def _in_turn(parts: Sequence[Batch]) -> Iterator[Restored]:
    """Restore batches one after the other, watched as one sampling."""
    watch = parts[0].watch
    steps = [0 if watch is None else part.steps() for part in parts]
    for i, part in enumerate(parts):
        seen = None if watch is None else part_of(watch, sum(steps[:i]), sum(steps))
        yield restored(replace(part, watch=seen))


def _joined(parts: list[Restored]) -> Restored:
    return Restored(
        np.concatenate([p.samples for p in parts]),
        np.concatenate([p.mean for p in parts]),
        [m for p in parts for m in p.measurements],
        [f for p in parts for f in p.figures],
        [r for p in parts for r in p.residuals],
    )


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
        method, params: a name of `METHODS` and its parameters; without a measurement those of
            `PriorStep`.
        known: (operator, y, σ), see `pseudo_likelihood_score`; None for samples of the prior.
        x_T: (N, C, H, W) standard normal.
        statistics: of the prior's images.
        slices: whether the channels are the slices of volumes.

    Returns:
        (diffusion, first state (N, C, H, W), step), see `GaussianDiffusion.p_sample_loop`.

    Raises:
        UserError: an impossible schedule.
    """
    if known is None:
        step = PriorStep(statistics, **params).step
        return _diffusion(method, schedule, None, 0.0, statistics, slices), x_T, step
    operator, _, sigma = known
    diffusion = _diffusion(method, schedule, operator, sigma, statistics, slices)
    if schedule.start != "":
        x_T = start_state(*known, diffusion, x_T, statistics)
    built = get_conditioning_method(method, *known, statistics, slices, **params)
    return diffusion, x_T, built.step


def _diffusion(
    method: str,
    schedule: Schedule,
    operator: Operator | None,
    sigma: Sigma,
    statistics: PriorStatistics,
    slices: bool,
) -> GaussianDiffusion:
    """The steps that suit a measurement; without an operator those of samples of the prior."""
    arguments = schedule.sampler_arguments()
    if operator is None:
        unclipped_from = PriorStep(statistics).unclipped_from
        return create_sampler(**arguments, unclipped_from=unclipped_from, slices=slices)
    levels = useful_levels(operator, sigma, METHODS[method].draws_samples, statistics)
    unclipped_from = METHODS[method].unclipped_from
    return create_sampler(**arguments, levels=levels, unclipped_from=unclipped_from, slices=slices)


def _sampled(batch: Batch) -> Restored:
    """Restore N images that share a schedule.

    The network sees N·K·contrasts rows, K samples of each image: a colour image under a prior of
    one channel is restored contrast by contrast. Of a volume a row is all its slices, and samples
    are drawn one after the other, so that only one's is in memory.
    """
    images, measurement, prior, scan = batch.images, batch.measurement, batch.prior, batch.scan
    names, seed, volume, shape = batch.names, batch.seed, batch.volume, batch.shape
    rows, y = len(images), None
    sigma: Sigma | None = batch.sigma
    if measurement is not None:
        if scan is None:
            operator = operator_of(measurement, shape, prior.device)
            y, sigma = measured(measurement, operator, images, names, seed, sigma, volume)
            unbiased = noise_of(measurement).to_gaussian(y, sigma)
        else:
            operator, sigma, unbiased = scan.operator, scan.sigma, scan.y
            y = unbiased
        rows = len(y)
    how = batch.method, batch.params, batch.schedule
    all_of_it = measurement, *how, names, batch.places, seed, volume, prior.dtype, prior.digest
    identity = None if batch.state_file is None else identity_of(y, sigma, *all_of_it)

    def drawn(samples: range, part: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A part of the samples, (N, samples, C, H, W), and which images are finite in it, (N,)."""
        count, known = len(samples), None
        if measurement is not None:
            known = for_each_sample(operator, unbiased, sigma, len(images), count)
        random: ImageRandom | SliceRandom
        if volume is None:
            random = sample_random(names, samples, seed, batch.places)
        else:
            spacing = restored_spacing(measurement)
            random = volume.random(names, shape[0], samples, seed, spacing)
        x_T = random.randn_like(torch.empty(rows * count, *shape, device=prior.device))
        shared = prior.statistics, volume is not None
        diffusion, x_T, step = begin(*how, known, x_T, *shared)
        seen: Any = prior.network
        if volume is not None:
            seen = volume.network(prior.network, diffusion.num_timesteps)
        network = Watched(seen, len(x_T), prior.device)
        kept: Kept | None = None
        if batch.state_file is not None:
            changing = [(network, "finite"), *([] if volume is None else [(seen, "calls")])]
            file = batch.state_file if of == 1 else f"{batch.state_file}.{part}"
            kept = Kept(file, f"{identity} {samples}", step, random.randn_like, changing)
        watch, steps = batch.watch, diffusion.num_timesteps
        refines = sigma is not None and batch.refines(steps, sigma)
        whole = steps + (STAGES * len(names) if refines else 0)
        seen_by = None if watch is None else part_of(watch, part * whole, of * whole)
        x_hat = sample(diffusion, network, x_T, step, random.randn_like, seen_by, kept)
        if refines:
            assert measurement is not None  # as it is denoising
            _, noisy, level = for_each_sample(operator, y, sigma, len(images), count)
            look = functools.partial(network_at, batch.schedule, batch.method, network)

            def done(stage: int, pilot: torch.Tensor) -> None:
                if seen_by is not None:
                    seen_by(-stage, steps, pilot)  # after the last step, of which 0 were left

            x_hat = refined(x_hat, noisy, level, noise_of(measurement), look, done)
        finite = (network.finite & torch.isfinite(x_hat).flatten(1).all(dim=1)).cpu()
        x_hat = x_hat.float().cpu().reshape(len(names), count, -1, *shape[1:])
        return x_hat, finite.reshape(len(names), -1).all(dim=1)

    parts = [range(batch.num_samples)]
    if volume is not None:
        parts = [range(k, k + 1) for k in range(batch.num_samples)]
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
    figures = figures_of_images(residuals, sigma, batch.padding)
    if scan is not None and measurement is not None and measurement.noise.sigma == "auto":
        figures = [{**found, "sigma": scan.sigma} for found in figures]
    shown = (operator.picture(y) if scan is None else scan.zero_filled).cpu()
    measurements = shown.reshape(len(names), -1, *shown.shape[2:]).numpy()
    sampled = operator.sampled if isinstance(operator, Scanned) else None
    seen_of = [None if sampled is not None or r is None else r.cpu().numpy() for r in residuals]
    return Restored(samples, mean.numpy(), list(measurements), figures, seen_of, sampled)


def _by_levels(batch: Batch) -> Restored:
    """Restore an image with a map of σ, see `noise_maps`."""
    sigma, images = batch.sigma, batch.images
    assert sigma is not None and batch.measurement is not None
    levels = levels_of(sigma)
    if not levels:
        return _as_measured(batch)
    y = noise_of(batch.measurement).to_gaussian(images, sigma)
    parts = _in_turn([batch.at_level(i, level, y) for i, level in enumerate(levels)])
    samples, mean = by_levels(sigma, levels, parts)
    figures = figures_of(y, sigma, mean, batch.padding)
    residuals = torch.where(sigma > 0, (y - torch.from_numpy(mean)) / sigma, 0).numpy()
    return Restored(samples, mean, list(images.numpy()), figures, list(residuals))


def _as_measured(batch: Batch) -> Restored:
    """An image of whose noise nothing is known, as it is; watched as one step."""
    if batch.watch is not None:
        for left in (1, 0):
            batch.watch(left, 1, batch.images)
    mean = batch.images.clamp(-1, 1).numpy()
    samples = np.repeat(mean[:, None], batch.num_samples, axis=1)
    return Restored(samples, mean, list(batch.images.numpy()), [{}], [None])
