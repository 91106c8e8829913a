"""What moves the weights in training: the optimisers, and the learning rate over a run."""

import math
from typing import Literal

import torch
from torch import nn

from util.errors import UserError

OptimiserName = Literal["adamw", "muon"]
RateSchedule = Literal["cosine", "constant"]
# Not Muon's: the first and the last layer, and class embeddings (Jordan et al. 2024).
NOT_HIDDEN = ("input_blocks.0.", "out.", "label_emb.")


class Optimiser:
    """AdamW, or Muon for the hidden weight matrices and AdamW for all else.

    Muon (Jordan et al. 2024) takes a momentum's nearest orthogonal matrix for the update. A kernel
    (out, in, height, width) counts as the matrix (out, in·height·width) that multiplies a patch;
    `torch.optim.Muon` takes two axes only, so it is given views of the weights. The size of its
    updates is matched to AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section
    2.2), so that one learning rate serves both.

    Raises:
        UserError: this torch has no Muon.
    """

    def __init__(self, model: nn.Module, name: OptimiserName, weight_decay: float):
        hidden = {}
        if name == "muon":
            if not hasattr(torch.optim, "Muon"):
                raise UserError(
                    f"train config: optimizer: muon needs torch 2.9 or later, found "
                    f"{torch.__version__}; take adamw"
                )
            hidden = {
                n: p
                for n, p in model.named_parameters()
                if p.ndim > 1 and not n.startswith(NOT_HIDDEN)
            }
        self.weight_decay = weight_decay
        rest = [p for n, p in model.named_parameters() if n not in hidden]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(rest, weight_decay=weight_decay, fused=True)
        }
        self.weights = list(hidden.values())
        self.matrices = [as_matrix(w.detach(), w) for w in self.weights]
        if hidden:
            self.parts["muon"] = torch.optim.Muon(
                self.matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )

    def step(self, learning_rate: float) -> None:
        """One update of the weights from their gradients."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            if weight.grad is not None:
                matrix.grad = as_matrix(weight.grad, weight)
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def state_dict(self) -> dict[str, dict]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Take over the moments of an earlier run; the weight decay stays this one's."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            for group in part.param_groups:
                group["weight_decay"] = self.weight_decay


def as_matrix(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A weight, or its gradient, (out, ...) → (out, all other axes); of a weight it is a view.

    In channels_last memory the columns come in another order, which no orthogonalisation sees.
    """
    if not weight.is_contiguous():
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(len(tensor), -1)


def learning_rate_factor(schedule: RateSchedule, decay_share: float, progress: float) -> float:
    """What the learning rate is multiplied with, in [0, 1].

    Args:
        schedule: "cosine" falls from 1 to 0 over the whole budget; "constant" stays at 1 and falls
            linearly to 0 over the last `decay_share` of it (Hu et al. 2024, MiniCPM, section 4).
            With a share of 0 it never falls, and the run can be prolonged.
        progress: share of the budget that is used.
    """
    left = max(0.0, 1 - progress)
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return min(1.0, left / decay_share) if decay_share else 1.0
