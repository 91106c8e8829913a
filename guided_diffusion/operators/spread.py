"""What a Gaussian posterior leaves open: the noise of a few-step state about its mean."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.solver import scaled

if TYPE_CHECKING:
    from guided_diffusion.operators.base import Operator, Sigma


class Spread:
    """P, the covariance of x given y = A x + σ n, x ~ N(., C) with C = Dᵀ v D, D the DCT.

    In each singular direction of A it is v σ²/(σ² + v s²), v the diagonal of Vᵀ C V; of what A does
    not see it is C.

    Args:
        variance: v, (H, W), of each DCT coefficient; sigma: see `Operator.gain`.
    """

    def __init__(self, operator: "Operator", variance: torch.Tensor, sigma: "Sigma"):
        v, s = operator.frequency_variance(variance), operator.singular_values
        self.operator = operator
        self.of_frequencies, self.of_directions = variance, v * sigma**2 / (sigma**2 + v * s**2)
        self.dct = [dct_matrix(n).to(variance) for n in variance.shape]

    def remainder(self, x: torch.Tensor, r: float) -> torch.Tensor:
        """(r I - P)₊ x, for (N, C, H, W)."""
        return self._weighted(x, lambda variance: (r - variance).clamp(min=0))

    def fill(self, noise: torch.Tensor, r: float) -> torch.Tensor:
        """Standard normal noise (N, C, H, W) given the covariance (r I - P)₊."""
        return self._weighted(noise, lambda variance: (r - variance).clamp(min=0).sqrt())

    def draw(
        self, x: torch.Tensor, r: float, randn_like: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Noise like x, (N, C, H, W), of covariance P + r I."""
        return self._weighted(randn_like(x), lambda variance: (r + variance).sqrt())

    def _weighted(
        self, x: torch.Tensor, weight: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """x times the direction's weight in what A sees, and times the frequency's in the rest."""
        by_frequency = scaled(x, weight(self.of_frequencies), self.dct)
        seen = weight(self.of_directions) * self.operator.Vt(x)
        return by_frequency + self.operator.correction(by_frequency, seen)
