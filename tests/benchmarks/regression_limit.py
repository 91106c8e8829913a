"""How far the data go: ``python tests/benchmarks/regression_limit.py --data_dir TRAIN --val VAL``.

The prior's network, from the prior's weights, is trained to say x straight from the measurement of
super-resolution ×4, by the mean squared error: its PSNR is close to the greatest that a network of
this size can reach from these data, and it can do nothing but this one task. What it is beside the
mean of eight samples stands in models/README.md; the weights do not ship.

Trains for --minutes in all, resumes, and writes saved_results/benchmarks/training/regression.csv.
"""

import argparse
import csv
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from data.crops import TrainingCrops
from data.sources import find_sources
from guided_diffusion.checkpoints import load_weights_only, save_tensors
from guided_diffusion.config import read_schedule
from guided_diffusion.devices import native_bf16, pick_device
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.prior import load_prior
from guided_diffusion.restoration import noise_of
from guided_diffusion.training.optimiser import Optimiser
from tests.benchmarks import comparison, rows, settings
from util.errors import ArgumentParser, UserError
from util.files import replacing_text

TASK = "sr4"
TIMESTEP = 20  # √r is 0.08 there, near what a magnified measurement lacks
BATCH = 2
RATE = 2e-4
WARM_UP = 50  # updates
AVERAGED = 0.999
SEED = 14
SAVE_EVERY = 100  # updates
OUT = os.path.join(settings.REPOSITORY, "models", "regression")
TABLE = os.path.join(rows.FOLDER, "training", "regression.csv")
COLUMNS = ("what", "updates", "minutes", "slices", *rows.HEADLINE)


class Regression(nn.Module):
    """x̂ = z - √r ε(√ᾱ z): the prior's denoiser, of the magnified y, (N, 1, H, W)."""

    def __init__(self, network: nn.Module, alpha_bar: float):
        super().__init__()
        self.network = network
        self.alpha_bar = alpha_bar

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        t = torch.full((len(z),), TIMESTEP, device=z.device)
        epsilon = self.network(self.alpha_bar**0.5 * z, t)[:, :1].float()
        return z - (1 / self.alpha_bar - 1) ** 0.5 * epsilon


def magnified(y: torch.Tensor) -> torch.Tensor:
    """The measurement on the grid of the image, by bicubic interpolation."""
    return F.interpolate(y, scale_factor=4, mode="bicubic")


def train(model, average, args, device) -> tuple[int, float]:
    """Train until args.minutes are used; (updates, minutes) in all runs."""
    sources = find_sources([args.data_dir], "--data_dir")
    paths = [path for found in sources.values() for path in found]
    crops = TrainingCrops([paths], [1.0], 1, torch.ones(1).numpy(), 256, True, 0.0, SEED)
    operator = comparison.operator_of(TASK, (1, 256, 256))
    sigma = noise_of(comparison.measurement_of(TASK)).sigma
    optimiser = Optimiser(model, "adamw", 0.0)
    step, minutes = resume(args.out, model, average, optimiser)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device))
    form = "{l_bar}{bar}|{postfix}"
    with tqdm(total=100, bar_format=form) as bar:
        while minutes < args.minutes:
            start = time.monotonic()
            items = [crops[n] for n in range(BATCH * step, BATCH * (step + 1))]
            truth = torch.stack([item[0] for item in items])
            y = operator.forward(truth)
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(step))
            z = magnified(y + sigma * noise)
            with autocast:
                loss = F.mse_loss(model(z.to(device)), truth.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step(RATE * min(1, step / WARM_UP) * (1 - minutes / args.minutes))
            model.zero_grad(set_to_none=True)
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()),
                    list(model.parameters()),
                    1 - min(AVERAGED, step / (9 + step)),
                )
            spent = (time.monotonic() - start) / 60
            minutes += spent
            bar.set_postfix_str(f"update {step}, loss {loss.item():.5f}", refresh=False)
            bar.update(min(100, 100 * minutes / args.minutes) - bar.n)
            if step % SAVE_EVERY == 0:
                save(args.out, model, average, optimiser, step, minutes)
    save(args.out, model, average, optimiser, step, minutes)
    return step, minutes


def save(out, model, average, optimiser, step, minutes):
    states = (m.state_dict() for m in (model, average, optimiser))
    kept = dict(zip(("model", "average", "optimiser"), states, strict=True))
    save_tensors(kept | {"step": step, "minutes": minutes}, os.path.join(out, "state.pt"))


def resume(out, model, average, optimiser) -> tuple[int, float]:
    path = os.path.join(out, "state.pt")
    if not os.path.exists(path):
        return 0, 0.0
    found = load_weights_only(path, "--out")
    for part, name in ((model, "model"), (average, "average"), (optimiser, "optimiser")):
        part.load_state_dict(found[name])
    return found["step"], found["minutes"]


@torch.no_grad()
def validate(model, val, device) -> tuple[int, dict[str, float]]:
    """(slices, mean measures) on the slices that the frontier reports."""
    chosen = settings.SETS["val"]
    found = []
    for name, truth in comparison.read_images(val, "--val", chosen.first, chosen.every):
        image = comparison.measure(TASK, name, truth)
        x_hat = model(magnified(image.y).to(device)).cpu()
        found.append(comparison.figures_of(image, x_hat[0].numpy()))
    return len(found), {m: sum(f[m] for f in found) / len(found) for m in rows.HEADLINE}


def write(name: str, figures: dict) -> None:
    """Put one line in the place of that of the same name."""
    lines = {}
    if os.path.exists(TABLE):
        with open(TABLE, encoding="utf-8", newline="") as file:
            lines = {line["what"]: line for line in csv.DictReader(file)}
    lines[name] = {"what": name} | figures
    with replacing_text(TABLE) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())


def parse_args(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="folder of training slices")
    parser.add_argument("--val", required=True, help="folder of validation slices")
    parser.add_argument("--minutes", type=float, default=120.0, help="of training, in all runs")
    parser.add_argument("--out", default=OUT, help="folder for the state")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    device = pick_device(0)
    schedule = read_schedule(os.path.join(comparison.CONFIGS, "diffusion_config.yaml"))
    sampler = create_sampler(**schedule.sampler_arguments())
    alpha_bar = float(sampler.alphas_cumprod[TIMESTEP])
    model, average = (
        Regression(load_prior(device=device, precision="fp32").network, alpha_bar) for _ in "ab"
    )
    model.train().requires_grad_(True)
    os.makedirs(args.out, exist_ok=True)
    try:
        step, minutes = train(model, average, args, device)
        slices, measures = validate(average, args.val, device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = {"updates": step, "minutes": f"{minutes:.0f}", "slices": slices}
    write("regression", figures | {m: f"{v:.6g}" for m, v in measures.items()})
    said = ", ".join(f"{m} {v:.4f}" for m, v in measures.items())
    print(f"{step} updates, {slices} slices: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
