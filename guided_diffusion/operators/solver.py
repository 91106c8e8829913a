"""Gaussian posteriors by conjugate gradients, where A and the prior share no basis."""

from collections.abc import Callable, Sequence

import torch

from guided_diffusion.dct import dct_matrix
from guided_diffusion.operators.fourier import low_pass

ITERATIONS = 40
TOLERANCE = 1e-3  # of the residual, in the preconditioner's norm
# Of the second pass, see `local_std`; chosen on one measured head that does not ship.
LOCAL, EVERYWHERE = 2.0, 0.2


Linear = Callable[[torch.Tensor], torch.Tensor]


class FrequencyPosterior:
    """(W + Dᵀ v⁻¹ D)⁻¹ b, D the DCT of an image: the posterior of a prior that is diagonal in it.

    Args:
        weigh: x → W x, (N, C, H, W), W symmetric and not negative.
        variance: v, (H, W) or (C, H, W), of each DCT coefficient.
        information: the mean of W's diagonal, a number or (N, 1, 1, 1). The preconditioner has it
            in W's place.
        coupled: whether W mixes the channels of x; otherwise each is solved for by itself.
    """

    def __init__(
        self,
        weigh: Linear,
        variance: torch.Tensor,
        information: float | torch.Tensor,
        coupled: bool = False,
    ):
        self.weigh, self.variance, self.information = weigh, variance, information
        self.axes = (1, 2, 3) if coupled else (2, 3)
        self.dct = [dct_matrix(n).to(variance) for n in variance.shape[-2:]]

    def twice(self, b: torch.Tensor) -> torch.Tensor:
        """`solve`, and then again with the variances made local by what was found.

        Where the first pass moves the image most, at edges and at what the prior does not know, the
        second takes the prior to be least certain.
        """
        return self.solve(b, local_std(self.solve(b).square(), LOCAL, EVERYWHERE))

    def solve(self, b: torch.Tensor, local: torch.Tensor | None = None) -> torch.Tensor:
        """Preconditioned conjugate gradients, for each image of a batch as if it were alone.

        Args:
            b: (N, C, H, W).
            local: what each pixel's standard deviation is multiplied by, see `local_std`: the
                prior's covariance is then L Dᵀ v D L, L its diagonal matrix.
        """
        if local is None:
            return self._solve(self.weigh, b)
        return local * self._solve(lambda x: local * self.weigh(local * x), local * b)

    def _solve(self, weigh: Linear, b: torch.Tensor) -> torch.Tensor:
        precision = 1 / self.variance
        precondition = 1 / (precision + self.information)
        x = torch.zeros_like(b)
        left = b
        z = scaled(left, precondition, self.dct)
        direction, rz = z, self._dot(left, z)
        enough = TOLERANCE**2 * rz
        for _ in range(ITERATIONS):
            unfinished = rz > enough
            if not bool(unfinished.any()):
                break
            image = weigh(direction) + scaled(direction, precision, self.dct)
            step = rz / self._dot(direction, image).clamp(min=torch.finfo(b.dtype).tiny)
            step = torch.where(unfinished, step, 0.0)  # the others do not count for it
            x = x + step * direction
            left = left - step * image
            z = scaled(left, precondition, self.dct)
            new = self._dot(left, z)
            direction = z + new / rz.clamp(min=torch.finfo(b.dtype).tiny) * direction
            rz = new
        return x

    def _dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(dim=self.axes, keepdim=True)


def scaled(x: torch.Tensor, weights: torch.Tensor, dct: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each DCT coefficient of x, (N, C, H, W), times its weight; `dct` along rows and columns."""
    rows, cols = dct
    return rows.mT @ (weights * (rows @ x @ cols.mT)) @ cols


def local_std(square: torch.Tensor, width: float, everywhere: float) -> torch.Tensor:
    """Where an image is likely to be large, from an estimate of it.

    As in FOCUSS (Gorodnitsky & Rao 1997), an estimate's own magnitude is the prior of the next:
    what undersampling leaves open goes to the places where there is something already.

    Args:
        square: (..., H, W), the estimate's squares.
        width: pixels over which they are averaged.
        everywhere: share of the variance that is the same in all pixels.

    Returns:
        (..., H, W), standard deviation over its root mean square over the image.
    """
    variance = low_pass(square, width).clamp(min=0)
    mean = variance.mean(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(square.dtype).tiny)
    return (everywhere + (1 - everywhere) * variance / mean).sqrt()

