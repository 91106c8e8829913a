"""What a method is: how the measurement y = A x_0 + σ n steers the reverse process.

To add one: a class in a file of this folder and a row of `METHODS` in `__init__.py`. It is built
as ``Method(operator, y, sigma, statistics=..., **parameters)`` and does one step of the reverse
process as ``step(diffusion, model, x_t, t, randn_like) -> (x_{t-1}, x̂_0)``, in the symbols of its
paper. What else the program needs to know of it (its parameters and their ranges, its traits)
stands on the class; help texts, manuals and tests read it there.

Methods see A through `guided_diffusion.operators.base.Operator` alone, and the network through
`GaussianDiffusion.predict`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    Network,
    Prediction,
    RandnLike,
    Step,
)
from guided_diffusion.operators.base import Operator, Sigma
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from util.parameters import Parameter, Parameters, check_parameters

WHERE = "conditioning.params"


class Method:
    """One batch of measurements and the way to restore it.

    Class attributes:
        name: in task files (conditioning.method), --method and tables.
        label: in plots and tables for people, with the source.
        parameters: its keys under conditioning.params; each becomes an attribute.
        needs_gradient: whether it differentiates the network.
        needs_svd: whether it looks into A's singular directions, and not only at posterior means.
        draws_samples: whether it draws from the posterior where one evaluation of the network
            would give the mean; with ``start: auto`` its levels then go on below the measurement's.
        honest_spread: whether the spread of its samples may be taken for the posterior's.
        unclipped_from: steps from which it does without clipping of x̂_0, for
            ``clip_denoised: auto``; never by default.
        uses_statistics: whether `statistics` matter to it; with ``start:`` they do to all.
        schedule: the file of configs/ that was made for it, "" for those that serve all.

    Attributes:
        operator, y, sigma, statistics, slices: as given.
        reduced: what counts of y, `Operator.reduced`, or Uᵀy if it `needs_svd`; it never changes
            during a run.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    parameters: ClassVar[Parameters] = {}
    needs_gradient: ClassVar[bool] = False
    needs_svd: ClassVar[bool] = False
    draws_samples: ClassVar[bool] = False
    honest_spread: ClassVar[bool] = True
    unclipped_from: ClassVar[float] = math.inf
    uses_statistics: ClassVar[bool] = False
    schedule: ClassVar[str] = ""

    def __init__(
        self,
        operator: Operator,
        y: torch.Tensor,
        sigma: Sigma,
        statistics: PriorStatistics = NATURAL_IMAGES,
        slices: bool = False,
        **parameters: Any,
    ):
        """
        Args:
            operator: A.
            y: (N, *operator.out_shape).
            sigma: standard deviation of y's noise, in units of the [-1, 1] image; a number, or
                (N, 1, 1, 1) where each image has its own.
            statistics: of the prior's images.
            slices: whether the channels of x and y are the slices of volumes, each an image.
            parameters: of `parameters`; those left out have the default for this operator.

        Raises:
            UserError: see `check`.
        """
        self.operator, self.y, self.sigma, self.statistics = operator, y, sigma, statistics
        self.slices = slices
        self.reduced = operator.Ut(y) if self.needs_svd else operator.reduced(y)
        for key, value in self.check(parameters, operator.name).items():
            setattr(self, key, value)

    @classmethod
    def check(cls, parameters: Mapping[str, Any], operator: str = "") -> dict[str, Any]:
        """Complete parameters with the defaults of the others.

        Args:
            operator: the name of the operator, where defaults differ by task.

        Raises:
            UserError: an unknown parameter, or a value out of its range.
        """
        return check_parameters(cls.parameters, parameters, WHERE, cls.name, operator)

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        """One reverse step of a batch.

        Args:
            diffusion: the schedule, see `GaussianDiffusion`.
            model: the network.
            x: (N, C, H, W), x_t.
            t: the step, from diffusion.num_timesteps - 1 down to 0.
            randn_like: maps a tensor to standard normal noise of its shape.

        Returns:
            (x_{t-1}, x̂_0), each (N, C, H, W).
        """
        raise NotImplementedError


def share(default: float, help: str, **more: Any) -> Parameter:
    """A parameter in [0, 1]."""
    return Parameter(default, help, low=0, high=1, **more)


def through_the_network(
    diffusion: GaussianDiffusion,
    model: Network,
    x: torch.Tensor,
    t: int,
    objective: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[Prediction, torch.Tensor]:
    """The prediction at x_t, and ∇_{x_t} of a scalar function of its x̂_0."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        out = diffusion.predict(model, x, t)
        (gradient,) = torch.autograd.grad(objective(out["pred_xstart"]), x)
    return {k: v.detach() for k, v in out.items()}, gradient
