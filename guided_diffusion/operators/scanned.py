"""What all scans have, of one coil or several, of lines of k-space or single points."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.base import Operator, Sigma
from guided_diffusion.operators.masks import on_kspace
from guided_diffusion.operators.solver import FrequencyPosterior, scaled
from guided_diffusion.operators.spread import Spread
from guided_diffusion.statistics import PriorStatistics

AXES = {"columns": -1, "rows": -2}  # along which axis of the image phase is encoded
LOWEST = 4  # half cycles: bands of frequencies below it are one, for they have few
LEAST_SIGMA = 1e-3  # conjugate gradients take less noise for this


class Scanned(Operator):
    """A scan of an object of magnitude x + 1.

    Attributes:
        mask: what of k-space is measured, (N,) bool, lines, or (H, W) bool, points.
        axis: along which phase is encoded, see `AXES`; of points both are.
        sight: the mean of AᵀA's diagonal.
    """

    mask: NDArray[np.bool_]
    axis: str
    sight: float

    @property
    def solves(self) -> bool:
        return not self.mask.all()

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """Aᵀ A x."""
        return self.transpose(self.forward(x))

    def widest_std(self, statistics: PriorStatistics, sigma: float) -> float:
        """√r_t to start from: the most that y leaves open in any half octave of frequencies.

        That is the root mean square of the error that the posterior mean makes under the prior's
        power spectrum, of one draw; every channel is measured alike.
        """
        if not self.solves:
            return math.inf
        power = statistics.power_spectrum(*self.in_shape[1:]).to(self.device, self.dtype)
        random = torch.Generator().manual_seed(0)
        error = self.spread(power, sigma).draw(
            torch.zeros(1, 1, *self.in_shape[1:], device=self.device, dtype=self.dtype),
            0.0,
            lambda x: torch.randn(x.shape, generator=random).to(x),
        )
        rows, cols = (dct_matrix(n).to(error) for n in error.shape[-2:])
        squares = (rows @ error @ cols.mT)[0, 0].square()
        f, g = (torch.arange(n).to(error) for n in squares.shape)
        bands = (2 * torch.hypot(f[:, None], g).clamp(min=LOWEST).log2()).long().flatten()
        sums = torch.bincount(bands, weights=squares.flatten())
        return math.sqrt(float((sums / torch.bincount(bands).clamp(min=1)).max()))

    def offset(self) -> torch.Tensor:
        """A 1, (1, *out_shape): what black at -1 instead of 0 takes from a scan."""
        return self.forward(torch.ones(1, *self.in_shape, device=self.device, dtype=self.dtype))

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """The mask as it lies on k-space: (1, N) along columns, (N, 1) along rows, or (H, W)."""
        return on_kspace(self.mask, self.axis)

    def picture(self, y: torch.Tensor) -> torch.Tensor:
        """The zero-filled image, (N, 1, H, W) with black at -1."""
        return self.transpose(y + self.offset()) - 1

    def frequency_posterior_mean(
        self, x_0: torch.Tensor, reduced: torch.Tensor, sigma: Sigma, variance: torch.Tensor
    ) -> torch.Tensor:
        """See `Operator.frequency_posterior_mean`; here by conjugate gradients, and in two passes.

        A covariance that is diagonal in the DCT is far from diagonal in the singular directions of
        a scan, for these are points along the readout, or waves of one frequency and its alias.
        """
        if not self.solves:
            return super().frequency_posterior_mean(x_0, reduced, sigma, variance)
        b = self.pull(x_0, reduced) / at_least(sigma) ** 2
        return x_0 + self.solver(variance, sigma).twice(b)

    def pull(self, x: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        """Aᵀ (y - A x)."""
        s = self.singular_values
        return self.V(s * (reduced - s * self.Vt(x)))

    def solver(self, variance: torch.Tensor, sigma: Sigma) -> FrequencyPosterior:
        """Of b = Aᵀ(y - A x_0)/σ² it makes what the posterior mean of N(x_0, C) adds to x_0."""
        square = at_least(sigma) ** 2
        return FrequencyPosterior(lambda x: self.normal(x) / square, variance, self.sight / square)

    def spread(self, variance: torch.Tensor, sigma: Sigma) -> Spread:
        if not self.solves:
            return super().spread(variance, sigma)
        return ScannedSpread(self, variance, sigma)


def at_least(sigma: Sigma) -> Sigma:
    """σ, for conjugate gradients, which cannot do without noise."""
    return sigma.clamp(min=LEAST_SIGMA) if torch.is_tensor(sigma) else max(sigma, LEAST_SIGMA)


def points_of(kspace: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Complex k-space (..., H, W) → what is measured at `points`, (H, W) bool: (..., 1, 2m)."""
    measured = kspace[..., points]
    return torch.cat([measured.real, measured.imag], dim=-1)[..., None, :]


def kspace_of(y: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The inverse of `points_of`; other points are 0."""
    real, imag = y[..., 0, :].chunk(2, dim=-1)
    kspace = torch.zeros(*real.shape[:-1], *points.shape, dtype=y.dtype.to_complex()).to(y.device)
    kspace[..., points] = torch.complex(real, imag)
    return kspace


class ScannedSpread(Spread):
    """The `Spread` of a scan.

    What y tells of a direction is not counted when noise is shaped: it takes the covariance C that
    x has without y. Few steps are better by that than with P, and it needs no singular directions.
    Samples have P itself, drawn exactly: the error that the posterior mean makes of an x ~ N(0, C)
    and its own measurement has that covariance (perturb and maximise, Papandreou & Yuille 2010).

    Args: see `Spread`.
    """

    def __init__(self, operator: Scanned, variance: torch.Tensor, sigma: Sigma):
        self.scan, self.sigma = operator, sigma
        self.of_frequencies = variance
        self.dct = [dct_matrix(n).to(variance) for n in variance.shape]

    def _weighted(
        self, x: torch.Tensor, weight: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return scaled(x, weight(self.of_frequencies), self.dct)

    def draw(
        self, x: torch.Tensor, r: float, randn_like: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        sigma = at_least(self.sigma)
        noise = math.sqrt(r) * randn_like(x)
        truth = self._weighted(randn_like(x), torch.sqrt)
        y = self.scan.forward(truth)
        b = self.scan.transpose(y + sigma * like(y, x, randn_like)) / sigma**2
        return noise + truth - self.scan.solver(self.of_frequencies, sigma).solve(b)


def like(
    y: torch.Tensor, x: torch.Tensor, randn_like: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Standard normal noise of y's shape, taken from draws that all have x's.

    Of a volume, whose channels are its slices, each slice's is its own.
    """
    each = y[0].numel() // x.shape[1]
    draws = [randn_like(x).flatten(2) for _ in range(-(-each // x[0, 0].numel()))]
    return torch.cat(draws, dim=2)[:, :, :each].reshape(y.shape)
