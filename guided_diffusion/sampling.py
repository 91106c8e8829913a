"""The reverse process, watched, and kept in a file between steps so that it can be continued."""

import glob
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from guided_diffusion.checkpoints import save_tensors
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, RandnLike

COST = 0.02  # share of a run that keeping states may take
# Called as watch(left, steps, x): before the first step with left = steps and x_T, after each
# other with the steps that are left and the state x (rows, C, H, W). Images that have steps of
# their own follow one another: `steps` are all of theirs, and x is one's.
Watch = Callable[[int, int, torch.Tensor], None]


def sample(
    diffusion: GaussianDiffusion,
    network: Callable,
    x_T: torch.Tensor,
    step: Callable,
    randn_like: RandnLike,
    watch: Watch | None = None,
    kept: "Kept | None" = None,
) -> torch.Tensor:
    """`GaussianDiffusion.p_sample_loop`, from where it was stopped if `kept` says so."""
    steps = diffusion.num_timesteps
    left, x = steps, x_T
    if watch is not None:
        watch(steps, steps, x)
    if kept is not None:
        randn_like = kept.randn_like
        left, x = kept.resumed(steps, x)

    def after(t: int, x_t: torch.Tensor, _: torch.Tensor) -> None:
        if watch is not None:
            watch(t, steps, x_t)
        if kept is not None:
            kept.keep(t, x_t)

    return diffusion.p_sample_loop(network, x, step, randn_like, after, left)


def part_of(watch: Watch, before: int, total: int) -> Watch:
    """How one sampling of several is watched as a part of them all.

    Args:
        before: steps of those that came before it; total: of all.
    """

    def seen(left: int, steps: int, x: torch.Tensor) -> None:
        if before == 0 or left < steps:
            watch(total - before - steps + left, total, x)

    return seen


class Watched:
    """The network, and whether all it said of each row was finite."""

    def __init__(self, network: Callable, rows: int, device: torch.device):
        self.network = network
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        output = self.network(x, timesteps)
        self.finite = self.finite & torch.isfinite(output.detach()).flatten(1).all(dim=1)
        return output


class Kept:
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
        randn_like: RandnLike,
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
        save_tensors(state, self.path)
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
    """Remove what `restore` kept at `path`, and the folder where that is empty then."""
    folder = os.path.dirname(path)
    for file in [path, *glob.glob(f"{glob.escape(path)}.*")]:
        if os.path.exists(file):
            os.remove(file)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
