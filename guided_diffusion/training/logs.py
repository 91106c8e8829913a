"""What training writes down: log.csv, the losses; validation.csv, the quality of denoising."""

import contextlib
import csv
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.training.state import TrainState
from util.files import patiently, replacing_text


def append_csv(path: str, row: Mapping[str, object]) -> None:
    """Append a row to a CSV file; a column that the file lacks is added to it.

    No training is stopped because a spreadsheet has the file open: then the row is left out.
    """
    try:
        _append(path, row)
    except PermissionError as error:
        tqdm.write(f"note: {path}: {error.strerror}, a row is left out", file=sys.stderr)


def _append(path: str, row: Mapping[str, object]) -> None:
    columns = list(row)
    rows: list[Mapping[str, object]] = []
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or columns)
            rows = list(reader)
        if set(row) <= set(columns):
            with patiently(lambda: open(path, "a", newline="", encoding="utf-8")) as file:
                csv.DictWriter(file, columns).writerow(row)
            return
        columns += [c for c in row if c not in columns]
    with replacing_text(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows([*rows, row])


def cut_csv(path: str, step: int) -> None:
    """Take out rows of later steps, which a run wrote between its last save and its sudden end.

    So is a row that it did not finish. A file that a spreadsheet has open stays as it is.
    """
    try:
        header, *rows = _rows(path) or [[]]
        if "step" not in header:
            return
        at = header.index("step")
        whole = [row for row in rows if len(row) >= len(header) and row[at].isdecimal()]
        kept = [row for row in whole if int(row[at]) <= step]
        if len(kept) < len(rows):
            with replacing_text(path) as file:
                csv.writer(file).writerows([header, *kept])
    except PermissionError as error:
        tqdm.write(f"note: {path}: {error.strerror}, rows after step {step} stay", file=sys.stderr)


def has_step(path: str, step: int) -> bool:
    """Whether a CSV file has rows of a step; it has none known while a spreadsheet has it open."""
    with contextlib.suppress(PermissionError):
        header, *rows = _rows(path) or [[]]
        if "step" in header:
            at = header.index("step")
            return any(row[at] == str(step) for row in rows if len(row) > at)
    return False


def _rows(path: str) -> list[list[str]]:
    """Of a CSV file, the header first; none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@dataclass
class LossLog:
    """The losses since the last row of log.csv, of all crops and of each source's.

    Attributes:
        sources: their names.
        totals: (2, sources), the sum of the losses and their number.
        skipped: updates that were not finite.
    """

    path: str
    sources: list[str]
    totals: torch.Tensor
    skipped: int = 0

    def add(self, simple: torch.Tensor, source: torch.Tensor) -> None:
        """Add an update's losses, (N,), and the indices of the crops' sources, (N,)."""
        self.totals[0].index_add_(0, source, simple)
        self.totals[1].index_add_(0, source, torch.ones_like(simple))

    def write(self, state: TrainState, learning_rate: float) -> float:
        """Append a row; returns the mean loss."""
        loss, count = self.totals.cpu()
        mean = float(loss.sum() / count.sum())
        row: dict[str, object] = {
            "step": state.step,
            "minutes": f"{state.minutes:.2f}",
            "learning_rate": f"{learning_rate:.3e}",
            "simple_loss": f"{mean:.5f}",
            "skipped": self.skipped,
        }
        if len(self.sources) > 1:
            for name, part, n in zip(self.sources, loss, count, strict=True):
                row[f"loss_{name}"] = f"{part / n:.5f}" if n else ""
        append_csv(self.path, row)
        return mean

    def clear(self) -> None:
        self.totals.zero_()
        self.skipped = 0


def denoising_psnr(
    diffusion: GaussianDiffusion, model: nn.Module, images: Sequence[torch.Tensor], t: int
) -> float:
    """Mean PSNR (dB) of x̂_0 after one evaluation at timestep t, of fixed noise.

    Args:
        images: (1, C, H, W) in [-1, 1], of any sizes.
    """
    psnr = []
    for i, x_0 in enumerate(images):
        generator = torch.Generator().manual_seed(1000 * t + i)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        steps = torch.tensor([t], device=x_0.device)
        x_t = diffusion.q_sample(x_0, steps, noise)
        x_hat = diffusion.p_mean_variance(model, x_t, steps)["pred_xstart"]
        psnr.append(-10 * math.log10(((x_hat.float() - x_0) / 2).square().mean().item()))
    return float(np.mean(psnr))


@dataclass(frozen=True)
class Validation:
    """Denoising of whole images, for validation.csv.

    Attributes:
        images: source → its images, (1, C, H, W) in [-1, 1].
        timesteps: the noise levels.
        autocast: of the network's evaluations.
    """

    path: str
    diffusion: GaussianDiffusion
    images: dict[str, list[torch.Tensor]]
    timesteps: list[int]
    autocast: torch.autocast

    def write(self, state: TrainState) -> None:
        """Append a row for each average and source, and with several sources one of their mean.

        A step that has its rows gets no others. They are written when all are there.
        """
        if has_step(self.path, state.step):
            return
        rows: list[dict[str, object]] = []
        for decay, average in state.averages.items():
            psnr = {name: self._psnr(average, images) for name, images in self.images.items()}
            if len(psnr) > 1:
                psnr["mean"] = list(np.mean(list(psnr.values()), axis=0))
            for name, values in psnr.items():
                row: dict[str, object] = {"step": state.step, "minutes": f"{state.minutes:.2f}"}
                if len(state.averages) > 1:
                    row["ema_decay"] = decay
                if len(self.images) > 1:
                    row["source"] = name
                pairs = zip(self.timesteps, values, strict=True)
                rows.append(row | {f"psnr_t{t}": f"{p:.3f}" for t, p in pairs})
        for row in rows:
            append_csv(self.path, row)

    @torch.no_grad()
    def _psnr(self, model: nn.Module, images: Sequence[torch.Tensor]) -> list[float]:
        with self.autocast:
            return [denoising_psnr(self.diffusion, model, images, t) for t in self.timesteps]
