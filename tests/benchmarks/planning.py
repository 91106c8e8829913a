"""How long a measurement will take: network evaluations × the seconds of one, here and now."""

import time
from collections.abc import Collection, Iterable

import torch

from guided_diffusion.methods import METHODS
from guided_diffusion.prior import Prior
from tests.benchmarks import comparison, rows, settings
from tests.benchmarks.classical import CLASSICAL

CLASSICAL_SECONDS = 3.0  # an image, on average over methods and grids


class Speed:
    """Seconds of one network evaluation, measured here and now: without and with its gradient."""

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.known: dict[bool, float] = {}
        self.taken: dict[tuple[str, ...], int] = {}

    def seconds(self, differentiated: bool) -> float:
        if differentiated not in self.known:
            self.known[differentiated] = self._measure(differentiated)
        return self.known[differentiated]

    def _measure(self, differentiated: bool) -> float:
        size = self.prior.image_size
        x = torch.zeros(1, 1, size, size, device=self.prior.device)
        t = torch.full((1,), 500, device=self.prior.device)
        return min(self._once(x, t, differentiated) for _ in range(3))

    def _once(self, x: torch.Tensor, t: torch.Tensor, differentiated: bool) -> float:
        start = time.perf_counter()
        if differentiated:
            x = x.clone().requires_grad_()
            torch.autograd.grad(self.prior.network(x, t).sum(), x)
        else:
            with torch.inference_mode():
                self.prior.network(x, t)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def evaluations(self, job: settings.Job) -> int:
        """Network evaluations of an image, at most."""
        key = rows.group_of(job)[1:]
        if key not in self.taken:
            samples = job.setting.get(settings.SAMPLES, 1)
            self.taken[key] = samples * comparison.steps_of(job, self.prior)
        return self.taken[key]

    def of(self, job: settings.Job) -> float:
        """Seconds of an image."""
        if job.method in CLASSICAL:
            return CLASSICAL_SECONDS
        return self.evaluations(job) * self.seconds(
            job.method in METHODS and METHODS[job.method].needs_gradient
        )

    def total(self, jobs: Iterable[settings.Job]) -> float:
        return sum(self.of(job) for job in jobs)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plan(title: str, jobs: Collection[settings.Job], speed: Speed) -> str:
    """A sentence about what is left; a job for each image."""
    total = sum(speed.evaluations(job) for job in jobs)
    return (
        f"{title}: {len(jobs)} images to restore, {total} network evaluations, "
        f"at most {duration(speed.total(jobs))}"
    )
