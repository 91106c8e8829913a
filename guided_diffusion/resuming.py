"""A sampling that is stopped and continued: its state, kept in a file between steps."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from util.files import replacing

COST = 0.02  # share of a run that keeping states may take


class Sampling:
    """All that changes while an image is sampled, kept in a file from which it is taken up again.

    Of the method these are the attributes that its steps assign; of the random numbers how many
    were drawn, which are drawn anew. So what follows has the same bytes as without the stop. The
    file is written after a step, at once as a whole, if at most a share `COST` of the time since
    the last writing goes into it.

    Args:
        path: of the file.
        identity: of all that decides the sampling, see `identity_of`; another's file is ignored.
        step: a method's bound ``step``, or a function that keeps nothing.
        randn_like: what the steps draw from.
        others: objects and the attributes of theirs that change.
    """

    def __init__(
        self,
        path: str,
        identity: str,
        step: Callable[..., Any],
        randn_like: Callable[[torch.Tensor], torch.Tensor],
        others: Sequence[tuple[Any, str]],
    ):
        self.path, self.identity = path, identity
        self.method = getattr(step, "__self__", None)
        self.before = {} if self.method is None else dict(vars(self.method))
        self.draw, self.draws = randn_like, 0
        self.others = others
        self.since, self.spent = time.monotonic(), 0.0

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        self.draws += 1
        return self.draw(x)

    def resumed(self, steps: int, x: torch.Tensor) -> tuple[int, torch.Tensor]:
        """(steps that are left, x_t): those of the file, or if there is none those given.

        Args:
            x: the first state; all draws are like it.
        """
        state = self._load()
        if state is None:
            return steps, x
        while self.draws < state["draws"]:
            self.randn_like(x)
        for key, value in state["method"].items():
            setattr(self.method, key, _on(value, x.device))
        for (owner, key), value in zip(self.others, state["others"], strict=True):
            setattr(owner, key, _on(value, x.device))
        return state["left"], _on(state["x"], x.device)

    def _load(self) -> dict[str, Any] | None:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            return state if state["identity"] == self.identity else None
        except Exception:  # noqa: BLE001 - no file, or whatever a damaged one brings about
            return None

    def keep(self, left: int, x: torch.Tensor) -> None:
        """Write down, if it is time to, that `left` steps are left from x on."""
        start = time.monotonic()
        if COST * (start - self.since) < self.spent:
            return
        now = {} if self.method is None else vars(self.method)
        state = {
            "identity": self.identity,
            "left": left,
            "x": x,
            "draws": self.draws,
            "method": {k: v for k, v in now.items() if v is not self.before.get(k, self)},
            "others": [getattr(owner, key) for owner, key in self.others],
        }
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with replacing(self.path) as temporary:
            torch.save(state, temporary)
        self.since = time.monotonic()
        self.spent = self.since - start


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if torch.is_tensor(value) else value


def identity_of(*parts: Any) -> str:
    """A digest of what decides a sampling: tensors by their bytes, all else by its repr."""
    digest = hashlib.sha256()
    for part in parts:
        tensor = torch.is_tensor(part)
        digest.update(part.cpu().numpy().tobytes() if tensor else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def forget(path: str) -> None:
    """Remove a state's file, and its folder where that is empty then."""
    folder = os.path.dirname(path)
    if os.path.exists(path):
        os.remove(path)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
