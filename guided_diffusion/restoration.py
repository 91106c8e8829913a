"""What happens to a batch of images: it is measured, unless it is a measurement, and restored."""

from typing import NamedTuple

import numpy as np
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.methods import METHODS, VANILLA, get_conditioning_method
from guided_diffusion.methods.start import start_state, useful_levels
from guided_diffusion.noise import get_noise
from guided_diffusion.operators import get_operator, restored_size
from guided_diffusion.statistics import NATURAL_IMAGES
from util.errors import UserError
from util.random import ImageRandom, image_generator, sample_random


class Restored(NamedTuple):
    """N images of K samples each, on the CPU, in [-1, 1]."""

    samples: np.ndarray  # (N, K, C, H, W)
    means: np.ndarray  # (N, C, H, W), of the samples as they were before they were cut to [-1, 1]
    measurements: list  # (C, h, w) an image; None for samples of the prior
    figures: list  # a dict an image: what is known of it without its truth


def begin(method, params, schedule, known, x_T, statistics=NATURAL_IMAGES):
    """What a restoration starts with.

    Args:
        method, params: a name of `METHODS` and its parameters; unused without a measurement.
        schedule: a checked diffusion config, without `method`.
        known: (operator, y, σ), see `pseudo_likelihood_score`; None for samples of the prior.
        x_T: (N, C, H, W) standard normal.
        statistics: of the prior's images.

    Returns:
        (diffusion, first state (N, C, H, W), step), see `GaussianDiffusion.p_sample_loop`.

    Raises:
        UserError: an impossible schedule.
    """
    if known is None:
        return create_sampler(**schedule), x_T, GaussianDiffusion.p_sample
    operator, _, sigma = known
    levels = useful_levels(operator, sigma, sample=METHODS[method].draws_samples)
    unclipped_from = METHODS[method].unclipped_from
    diffusion = create_sampler(**schedule, levels=levels, unclipped_from=unclipped_from)
    if schedule["start"] != "":
        x_T = start_state(*known, diffusion, x_T, statistics.mean_intensity)
    built = get_conditioning_method(method, *known, statistics=statistics, **params)
    return diffusion, x_T, built.step


class Restoration:
    """One task, with the method and the schedule that restore its images.

    Of N images of C channels and K samples each, the network sees N·K·contrasts rows: a colour
    image under a one-channel prior is restored contrast by contrast.

    Args:
        task: a checked task config; `conditioning.method: vanilla` draws from the prior alone.
        schedule: a checked diffusion config, without `method`.
        channels, image_size: the network's.
        num_samples: K.
        statistics: of the prior's images.

    Raises:
        UserError: a task that fits no image, or an impossible schedule.
    """

    def __init__(
        self,
        task,
        schedule,
        channels,
        image_size,
        device,
        seed,
        num_samples,
        statistics=NATURAL_IMAGES,
    ):
        self.method, self.params = task["conditioning"]["method"], task["conditioning"]["params"]
        self.schedule, self.channels, self.device = schedule, channels, device
        self.seed, self.num_samples, self.statistics = seed, num_samples, statistics
        self.vanilla = self.method == VANILLA
        self.measured = not self.vanilla and task["data"]["measured"]
        self.operators = {}
        if not self.vanilla:
            self.degradation = task["measurement"]["operator"]
            self.noise = get_noise(**task["measurement"]["noise"])
            self.operator((channels, image_size, image_size))
        if self.vanilla and schedule["start"] != "":
            raise UserError(
                f"diffusion config: start: {schedule['start']} needs a measurement to start from"
            )
        # A task's own noise level matters to "auto" alone.
        create_sampler(**schedule, levels=None if self.vanilla else (1, 1))

    @property
    def estimates_sigma(self):
        return not self.vanilla and self.noise.sigma == "auto"

    @property
    def own_schedules(self):
        """Whether an image's own, estimated, noise level decides where it starts."""
        return self.estimates_sigma and self.schedule["start"] == "auto"

    def operator(self, in_shape):
        """The task's operator for images of this shape; images of one shape share it."""
        if in_shape not in self.operators:
            self.operators = {
                in_shape: get_operator(in_shape=in_shape, device=self.device, **self.degradation)
            }
        return self.operators[in_shape]

    def restored_size(self, images):
        """(H, W) of what these images, (..., h, w), are restored to."""
        size = tuple(images.shape[-2:])
        return restored_size(size, **self.degradation) if self.measured else size

    def restore(self, model, names, images, sigma, on_start, after_step):
        """Restore one batch.

        Args:
            model: the network.
            names: of the N images, which decide their random numbers.
            images: (N, C, h, w) in [-1, 1], all of one shape: the truths, or the measurements.
            sigma: where it is estimated, (rows,), otherwise None.
            on_start: called as ``on_start(steps, x_T)``.
            after_step: called as ``after_step(t, x_t)``.

        Returns:
            `Restored`.
        """
        count, shape = self.num_samples, (self.channels, *self.restored_size(images))
        rows, known = len(names), None
        if not self.vanilla:
            operator = self.operator(shape)
            y, sigma = self._measure(operator, names, images, sigma)
            unbiased = self.noise.to_gaussian(y, sigma)
            known = self._once_a_sample(operator, unbiased, sigma, len(names))
            rows = len(y)
        random = sample_random(names, range(count), self.seed)
        x_T = random.randn_like(torch.empty(rows * count, *shape, device=self.device))
        diffusion, x_T, step = begin(
            self.method, self.params, self.schedule, known, x_T, self.statistics
        )
        on_start(diffusion.num_timesteps, x_T)
        x_hat = diffusion.p_sample_loop(
            model, x_T, step, random.randn_like, lambda t, x_t, _: after_step(t, x_t)
        )
        x_hat = x_hat.float().cpu().reshape(len(names), count, -1, *shape[1:])
        # Cut before, the noise that samples have about black would brighten their mean.
        means = x_hat.mean(dim=1).clamp(-1, 1)
        found = x_hat.clamp(-1, 1).numpy(), means.numpy()
        if self.vanilla:
            return Restored(*found, [None] * len(names), [{} for _ in names])
        figures = self._figures(operator, unbiased, sigma, means)
        measurements = y.cpu().reshape(len(names), -1, *y.shape[2:]).numpy()
        return Restored(*found, list(measurements), figures)

    def _measure(self, operator, names, images, sigma):
        """y (rows, *out_shape), as it is or A x + n, n drawn once an image; and its σ.

        σ is one number, or (rows, 1, 1, 1) where it was estimated.
        """
        if not self.measured:
            x = images.reshape(-1, *operator.in_shape).to(self.device)
            random = ImageRandom([image_generator(n, "measurement", self.seed) for n in names])
            return self.noise(operator.forward(x), random), self.noise.sigma
        y = images.reshape(-1, *operator.out_shape).to(self.device)
        if sigma is None:
            return y, self.noise.sigma
        return y, sigma.to(self.device).reshape(-1, 1, 1, 1)

    def _once_a_sample(self, operator, y, sigma, images):
        """(operator, y, sigma) with every image's rows once a sample."""

        def repeat(rows):
            per_image = rows.reshape(images, -1, *rows.shape[1:])
            per_sample = per_image.repeat_interleave(self.num_samples, dim=0)
            return per_sample.reshape(-1, *rows.shape[1:])

        return operator, repeat(y), repeat(sigma) if torch.is_tensor(sigma) else sigma

    def _figures(self, operator, y, sigma, means):
        """What is known of each image without its truth: ‖y - A x̂‖/(σ√m), and an estimated σ."""
        figures = [{} for _ in means]
        if torch.is_tensor(sigma) or sigma > 0:
            x_hat = means.reshape(-1, *operator.in_shape).to(self.device)
            residual = (y - operator.forward(x_hat)) / sigma
            for found, image in zip(figures, residual.chunk(len(figures)), strict=True):
                found["residual"] = image.square().mean().sqrt().item()
        if torch.is_tensor(sigma):
            for found, image in zip(figures, sigma.chunk(len(figures)), strict=True):
                found["sigma"] = image.square().mean().sqrt().item()
        return figures
