"""DPS: the gradient of the residual through the network."""

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.methods.base import Method, Network, RandnLike, Step, through_the_network
from util.parameters import Parameter


class DPS(Method):
    """Chung et al. 2023, "Diffusion posterior sampling", Algorithm 1.

    The ancestral step, then a step of length `scale` down the gradient of ‖y - A x̂_0(x_t)‖,
    through the network. The norm is each image's own, so a batch changes nothing; of a volume each
    slice's own, so that a step is as long as in the slice alone. As in the published program, σ
    plays no part.
    """

    name = "dps"
    label = "DPS (Chung et al. 2023)"
    parameters = {"scale": Parameter(0.3, "length of the step down the residual's gradient")}
    needs_gradient = True
    scale: float

    def step(
        self,
        diffusion: GaussianDiffusion,
        model: Network,
        x: torch.Tensor,
        t: int,
        randn_like: RandnLike,
    ) -> Step:
        def norms(x_0: torch.Tensor) -> torch.Tensor:
            residual = self.y - self.operator.forward(x_0)
            images = residual.flatten(0, 1) if self.slices else residual
            return images.flatten(1).norm(dim=1).sum()

        out, gradient = through_the_network(diffusion, model, x, t, norms)
        sample = diffusion.sample_from(out, x, t, randn_like)
        return sample - self.scale * gradient, out["pred_xstart"]
