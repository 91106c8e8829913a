"""The training loop."""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.crops import TrainingCrops
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.launch import together
from guided_diffusion.losses import training_loss
from guided_diffusion.training.config import Budget, TrainConfig
from guided_diffusion.training.logs import LossLog, Validation
from guided_diffusion.training.optimiser import learning_rate_factor
from guided_diffusion.training.state import TrainState, diverged, save_state
from util.errors import UserError, hindrance

MOST_SKIPPED = 10  # updates in a row that are not finite


def mendable(error: Exception) -> UserError | None:
    """What a user can mend of it, in one sentence; None of what is the program's own mistake."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        reason = str(error).partition(". ")[0].strip()
        return UserError(f"train config: num_workers: {reason}")
    stopped = hindrance(error, "--out", "train config: batch_size")
    return None if stopped is None else UserError(f"{stopped}; the state of the last save is kept")


@dataclass
class Trainer:
    """Trains `state` until the budget is used.

    Attributes:
        out: the folder for weights and logs.
        weights: (steps,), of the simple loss.
        autocast: of the network's evaluations.
        rank, world: this process, and how many share each batch.
        stopped: whether a signal asked to stop.
        failure: what ends the training, as this process has found it.
        failed: whether a process has found any.
        skipped: updates in a row, up to the last, that were not finite.
        saved: the step of the last save.
    """

    config: TrainConfig
    budget: Budget
    out: str
    state: TrainState
    diffusion: GaussianDiffusion
    weights: torch.Tensor
    crops: TrainingCrops
    log: LossLog
    validation: Validation
    device: torch.device
    autocast: torch.autocast
    rank: int
    world: int
    stopped: bool = False
    failure: UserError | None = None
    failed: bool = False
    skipped: int = 0
    saved: int = 0

    def used(self) -> float:
        """The share of the budget that is used."""
        return self.budget.used(self.state.step, self.state.minutes)

    def learning_rate(self) -> float:
        config = self.config
        warmup = min(1.0, (self.state.step + 1) / max(1, config.warmup_steps))
        factor = learning_rate_factor(config.schedule, config.decay_share, self.used())
        return config.learning_rate * warmup * factor

    def run(self) -> None:
        """Train until the budget is used or a signal asks to stop; then save and validate.

        What one process cannot go on after ends all of them, and what they have trained is saved.

        Raises:
            UserError: an image cannot be read, a process that reads them died, the weights or
                losses are not finite any more, or the folder takes no more files.
            SystemExit: that is so in one of several processes, see `together`.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        self.saved = self.state.step
        network: nn.Module = self.state.model.train()
        if self.world > 1:
            network = DistributedDataParallel(network)
        form = "{l_bar}{bar}|{postfix}"
        with tqdm(total=100, disable=self.rank != 0, bar_format=form) as bar:
            self._loop(network, bar)
        if self.skipped:
            self._fail(self._diverged())
        if not self.failed or self.state.step > self.saved:
            self._attempt(self.save)
        if not self.failed:
            self._attempt(self.validate)
        del network  # before its process group
        with together():
            if self.failure is not None:
                raise self.failure
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def _attempt(self, work: Callable[[], object]) -> None:
        """Do it; what a user can mend of it becomes the failure with which all processes end."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - what no user can mend is raised again
            failure = mendable(error)
            if failure is None:
                raise
            self._fail(failure)

    def _fail(self, failure: UserError) -> None:
        self.failure, self.failed = self.failure or failure, True

    def _stop(self, number, frame) -> None:
        self.stopped = True

    def _loop(self, network: nn.Module, bar: tqdm) -> None:
        state, config = self.state, self.config
        clock = last_save = last_val = time.monotonic()
        batches = self._batches()
        while (batch := self._next(batches)) is not None:
            rate = self.learning_rate()
            self.update(network, batch, rate)
            now = time.monotonic()
            state.minutes += (now - clock) / 60
            clock = now
            if state.step % config.log_steps == 0:
                self._log(rate, bar)
            validates = now - last_val > 60 * config.val_minutes
            if validates or now - last_save > 60 * config.save_minutes:
                self._attempt(self.save)
                last_save = now
            if validates:
                self._attempt(self.validate)
                last_val = now

    def _next(self, batches: Iterator[list[torch.Tensor]]) -> list[torch.Tensor] | None:
        """This process's part of the next batch; None at the end, which is that of all."""
        batch: list[list[torch.Tensor]] = []
        if not (self.stopped or self.failed or self.used() >= 1):
            self._attempt(lambda: batch.append(next(batches)))
        return None if self._done() else batch[0]

    def _batches(self) -> Iterator[list[torch.Tensor]]:
        """This process's part of the batch of each step to come, see `TrainingCrops`."""
        size, share = self.config.batch_size, self.config.batch_size // self.world

        def indices() -> Iterator[list[int]]:
            step = self.state.step
            while True:
                first = step * size + self.rank * share
                yield list(range(first, first + share))
                step += 1

        loader = DataLoader(
            self.crops,
            batch_sampler=indices(),
            num_workers=self.config.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        items = iter(loader)
        while True:
            try:
                batch = next(items)
            except UserError as error:  # from a worker it brings the worker's traceback along
                raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
            yield [v.to(self.device, non_blocking=True) for v in batch]

    def update(self, network: nn.Module, batch: list[torch.Tensor], learning_rate: float) -> None:
        """One update of the weights; it is skipped if its loss or gradient is not finite.

        When too many in a row were skipped, training has failed.
        """
        x_0, t, noise, source = batch
        state = self.state
        # Dropout draws from the global generator.
        drawn_from = np.random.SeedSequence([self.config.seed, state.step, self.rank])
        torch.manual_seed(int(drawn_from.generate_state(1, np.uint64)[0]))
        with self.autocast:
            loss, simple = training_loss(self.diffusion, network, x_0, t, noise, self.weights)
        state.model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), self.config.grad_clip)
        state.step += 1
        if self._finite_everywhere(loss.detach() + norm):
            state.optimiser.step(learning_rate)
            state.update_averages()
            self.log.add(simple, source)
            self.skipped = 0
            return
        self.log.skipped += 1
        self.skipped += 1
        if self.skipped == MOST_SKIPPED:
            self._fail(self._diverged())

    def _finite_everywhere(self, value: torch.Tensor) -> bool:
        """Whether a number is finite in every process."""
        finite = torch.isfinite(value).float()
        if self.world > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def _diverged(self) -> UserError:
        how = f"the last {self.skipped} updates up to {self.state.step} had no finite loss or "
        return diverged(self.out, how + "gradient")

    def _done(self) -> bool:
        """Whether to stop; all processes agree, on the time used as well."""
        if self.world > 1:
            own = [float(self.stopped), float(self.failed), self.state.minutes]
            shared = torch.tensor(own, dtype=torch.float64, device=self.device)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            self.stopped, self.failed = bool(shared[0]), bool(shared[1])
            self.state.minutes = float(shared[2])
        return self.stopped or self.failed or self.used() >= 1

    def _log(self, learning_rate: float, bar: tqdm) -> None:
        if self.world > 1:
            dist.all_reduce(self.log.totals)
        if self.rank == 0:
            self._attempt(lambda: self._show(self.log.write(self.state, learning_rate), bar))
        self.log.clear()

    def _show(self, loss: float, bar: tqdm) -> None:
        bar.n = min(100, round(100 * self.used(), 1))
        minutes = f"{self.state.minutes:.0f} min"
        bar.set_postfix_str(f"step {self.state.step}, {minutes}, loss {loss:.4f}")

    def save(self) -> None:
        """Write state and weights, but after an update that was not finite: what is there stays.

        Raises:
            UserError: an average is beyond the range of float16, in which it is kept.
        """
        if self.rank != 0 or self.skipped:
            return
        if not self.state.fits_float16():
            how = f"the weights at update {self.state.step} are beyond float16"
            raise diverged(self.out, how)
        save_state(self.state, self.out, self.config)
        self.saved = self.state.step

    def validate(self) -> None:
        if self.rank == 0:
            self.validation.write(self.state)
