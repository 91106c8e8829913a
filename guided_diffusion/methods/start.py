"""Where a restoration starts, if the schedule says ``start: auto`` or a timestep."""

import math

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.operators.base import Operator, Sigma
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics

WIDEST_STD = 1.5  # √r_t above which an image is lost in noise, and steps would be wasted
SAMPLE_WIDEST_STD = 3.0  # the same, where what is lost is to be drawn
FINISH = 0.1  # of the best direction's noise: how far below it the prior goes on cleaning up
SAMPLE_FINISH = 0.1  # the same, where what the measurement leaves open is to be drawn
ROUNDED = 1.001  # ratio of levels that rounding alone may make of equal ones
SAME = 1.5  # ratio of variances that timesteps next to each other have at most


def useful_levels(
    operator: Operator,
    sigma: Sigma,
    sample: bool = False,
    statistics: PriorStatistics = NATURAL_IMAGES,
) -> tuple[float, float]:
    """The noise levels √r_t between which a measurement is worth sampling at, (high, low).

    Where A sees a direction with singular value s, its measurement is an image with noise σ/s.
    Above the largest of these (or WIDEST_STD, for a sample SAMPLE_WIDEST_STD, or the operator's
    own, if A is blind to some direction) the measurement knows more than a state can; some way
    below the smallest it adds nothing to what a state holds.
    For denoising all are σ, and one evaluation of the network is the posterior mean; a `sample` of
    the posterior goes on from there, like everywhere else.
    """
    widest, narrowest = (
        (float(sigma.max()), float(sigma.min())) if torch.is_tensor(sigma) else (sigma, sigma)
    )
    low = narrowest / operator.norm
    high = SAMPLE_WIDEST_STD if sample else WIDEST_STD
    high = min(high, operator.widest_std(statistics, widest))
    if operator.sees_all:
        high = min(high, widest / float(operator.singular_values.min()))
    if sample:
        return high, SAMPLE_FINISH * low
    return (high, FINISH * low) if high > ROUNDED * low else (low, low)


def start_state(
    operator: Operator,
    y: torch.Tensor,
    sigma: Sigma,
    diffusion: GaussianDiffusion,
    noise: torch.Tensor,
    statistics: PriorStatistics,
) -> torch.Tensor:
    """x_t at the diffusion's first step t, from the measurement instead of pure noise.

    A direction whose measurement has less noise than the state starts there, noise filled up, or
    if it `is_the_state`, as it is; the others at the prior's mean intensity. An operator that
    `solves` starts from the posterior's mean under the prior's power spectrum, and noise about it.

    Args:
        y: (N, *operator.out_shape); sigma: its noise, a number or (N, 1, 1, 1).
        noise: (N, C, H, W) standard normal.
        statistics: of the prior's images.

    Returns:
        (N, C, H, W).
    """
    alpha_bar = diffusion.alphas_cumprod[-1]
    r = (1 - alpha_bar) / alpha_bar
    if operator.solves:
        power = statistics.power_spectrum(*operator.in_shape[1:]).to(noise)
        mean = torch.full_like(noise, statistics.mean_intensity)
        mean = operator.frequency_posterior_mean(mean, operator.reduced(y), sigma, power)
        return math.sqrt(alpha_bar) * (mean + operator.spread(power, sigma).fill(noise, r))
    measured, std = operator.inverted(operator.Ut(y), sigma)
    variance = std**2
    same = is_the_state(variance, diffusion)
    used = (variance <= r) | same
    state = statistics.mean_intensity + math.sqrt(r) * noise
    fill = torch.where(same, 0.0, r - torch.where(used, variance, 0.0)).clamp(min=0).sqrt()
    target = measured + fill * operator.Vt(noise)
    return math.sqrt(alpha_bar) * (state + operator.correction(state, target, where=used))


def is_the_state(variance: torch.Tensor, diffusion: GaussianDiffusion) -> torch.Tensor:
    """Where a measurement with noise of this variance is the only state of a schedule.

    Its noise is the state's, but timesteps have gaps. Filled up, it would be in the result.
    """
    a = diffusion.alphas_cumprod[-1]
    ratio = variance * a / (1 - a)
    return (ratio > 1 / SAME) & (ratio < SAME) & (diffusion.num_timesteps == 1)
