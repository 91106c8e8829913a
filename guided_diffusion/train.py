"""Train a prior, or continue one: ``python -m guided_diffusion.train --help``."""

import argparse
import csv
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.crops import TrainingCrops, to_channels
from data.dataloader import read_image
from data.sources import find_shares, find_sources
from guided_diffusion.checkpoints import load_checkpoint, load_weights_only, save_checkpoint
from guided_diffusion.config import read_model_config, read_schedule
from guided_diffusion.devices import native_bf16
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.launch import setup_dist
from guided_diffusion.losses import loss_weights, timestep_probabilities, training_loss
from guided_diffusion.optimiser import OPTIMIZERS, SCHEDULES, Optimiser, learning_rate_factor
from guided_diffusion.unet import create_model
from util.config import build, locate, parse_yaml_value, read_yaml
from util.errors import ArgumentParser, UserError
from util.files import replacing, replacing_text


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run; models/README.md explains the keys."""

    model_config: str
    diffusion_config: str
    init_from: str = ""
    shares: dict = field(default_factory=dict)
    crop_size: int = 256
    batch_size: int
    flip: bool = True
    augment: float = 0.0
    num_workers: int = 0
    max_steps: int = 0
    learning_rate: float
    schedule: str = "cosine"
    decay_share: float = 0.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float = 1.0
    ema_decay: float | list = 0.999
    loss_weighting: str = "uniform"
    min_snr_gamma: float = 5.0
    timestep_sampling: str = "uniform"
    compile: bool = False
    seed: int = 0
    log_steps: int = 25
    val_minutes: float = 15.0
    val_images: int = 8
    val_timesteps: list = field(default_factory=lambda: [20, 50, 100, 200, 400, 700])
    save_minutes: float = 5.0


def validate(diffusion, model, images, timesteps, autocast):
    """PSNR (dB) of one-evaluation denoising at each timestep, over whole images, fixed noise."""
    psnr = []
    with torch.no_grad(), autocast():
        for t in timesteps:
            mse = []
            for i, x_0 in enumerate(images):
                generator = torch.Generator().manual_seed(1000 * t + i)
                noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
                steps = torch.tensor([t], device=x_0.device)
                x_t = diffusion.q_sample(x_0, steps, noise)
                x_hat = diffusion.p_mean_variance(model, x_t, steps)["pred_xstart"]
                mse.append(((x_hat.float() - x_0) / 2).square().mean().item())
            psnr.append(float(np.mean([-10 * math.log10(m) for m in mse])))
    return psnr


def check_values(config, where):
    """Check what a type does not tell; `ema_decay` becomes a list.

    Raises:
        UserError: a value out of its range.
    """
    for key, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if config[key] not in known:
            raise UserError(
                f"{where}: {key}: expected one of {', '.join(known)}, found {config[key]!r}"
            )
    if not 0 <= config["decay_share"] <= 1:
        raise UserError(
            f"{where}: decay_share: expected a number from 0 to 1, found {config['decay_share']}"
        )
    if config["schedule"] == "cosine" and config["decay_share"]:
        raise UserError(f"{where}: decay_share is of schedule: constant; cosine falls throughout")
    decays = config["ema_decay"]
    decays = decays if isinstance(decays, list) else [decays]
    if not decays or not all(isinstance(d, float) and 0 <= d < 1 for d in decays):
        raise UserError(
            f"{where}: ema_decay: expected numbers from 0 to below 1, found {config['ema_decay']}"
        )
    config["ema_decay"] = decays


def evenly(items: list, count: int) -> list:
    """`count` of the items, or all where there are fewer, evenly spaced."""
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(count, len(items)))]


def append_csv(path: str, row: dict[str, object]) -> None:
    """Append a row to a CSV file; a column that the file lacks is added to it."""
    columns = list(row)
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or columns)
            rows = list(reader)
        if set(row) <= set(columns):
            with open(path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerow(row)
            return
        columns += [c for c in row if c not in columns]
    else:
        rows = []
    with replacing_text(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows([*rows, row])


class Divergence:
    """Counts updates without finite loss and gradient, which are skipped."""

    MOST_IN_A_ROW = 10

    def __init__(self) -> None:
        self.in_a_row = 0
        self.since_log = 0

    def count(self, finite: bool) -> bool:
        """Take note of an update; returns whether training must stop."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.since_log += not finite
        return self.in_a_row >= self.MOST_IN_A_ROW

    def describe(self, step: int) -> str:
        return f"the last {self.in_a_row} updates up to {step} had no finite loss or gradient"


class Trainer:
    """The training loop and its state: weights, their average, the optimiser, step and clock."""

    def __init__(self, config, model_config, diffusion_config, args):
        self.config = config
        self.out = args.out
        self.max_minutes = args.max_minutes
        self.rank, self.world = setup_dist()
        self.device = self._device()
        if config["batch_size"] % self.world:
            raise UserError(
                f"train config: batch_size {config['batch_size']} cannot be shared equally by "
                f"{self.world} processes"
            )
        diffusion_config = {**diffusion_config, "timestep_respacing": "", "start": ""}
        self.diffusion = create_sampler(**diffusion_config)
        self.weights = loss_weights(
            config["loss_weighting"], self.diffusion.alphas_cumprod, config["min_snr_gamma"]
        )
        self.weights = self.weights.to(self.device)

        torch.manual_seed(config["seed"])
        self.model = create_model(**{**model_config, "model_path": "", "use_fp16": False})
        if config["init_from"]:
            load_checkpoint(self.model, config["init_from"])
        self.model.to(self.device, memory_format=torch.channels_last)
        self.averages = {}
        for decay in config["ema_decay"]:
            average = create_model(**{**model_config, "model_path": "", "use_fp16": False})
            average.load_state_dict(self.model.state_dict())
            self.averages[decay] = average.to(self.device, memory_format=torch.channels_last)
        self.optimiser = Optimiser(self.model, config["optimizer"], config["weight_decay"])
        self.step = 0
        self.minutes = 0.0
        self.stopped = False
        self._resume()

        channels, multiple = self.model.in_channels, self.model.size_multiple
        if config["crop_size"] < multiple or config["crop_size"] % multiple:
            raise UserError(
                f"train config: crop_size: this network takes multiples of {multiple}, found "
                f"{config['crop_size']}"
            )
        sources = find_sources(args.data_dir, "--data_dir")
        self.sources = list(sources)
        sizes = {name: len(paths) for name, paths in sources.items()}
        self.crops = TrainingCrops(
            list(sources.values()),
            find_shares(sizes, config["shares"], "train config: shares"),
            channels,
            timestep_probabilities(config["timestep_sampling"], self.diffusion.alphas_cumprod),
            config["crop_size"],
            config["flip"],
            config["augment"],
            config["seed"],
        )
        self.val_images = {
            name: [self._validation_image(p) for p in evenly(paths, config["val_images"])]
            for name, paths in find_sources(args.val_dir, "--val_dir").items()
        }
        self.divergence = Divergence()
        self.use_bf16 = native_bf16(self.device)

    def _device(self):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count()
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def _validation_image(self, path):
        """One whole image, (1, C, H, W), cut to a size that the network takes."""
        image = torch.from_numpy(to_channels(read_image(path), self.model.in_channels))
        multiple = self.model.size_multiple
        height, width = (n - n % multiple for n in image.shape[1:])
        return image[None, :, :height, :width].to(self.device)

    @property
    def state_path(self):
        return os.path.join(self.out, "state.pt")

    def _resume(self):
        if not os.path.exists(self.state_path):
            return
        state = load_weights_only(self.state_path, "--out")
        if "averages" not in state:
            raise UserError(
                f"--out {self.out}: {self.state_path} is no state that this version writes; choose "
                "another folder, and init_from to continue from its weights"
            )
        changed = [
            key
            for key in ("seed", "batch_size", "crop_size", "optimizer", "ema_decay")
            if state["config"][key] != self.config[key]
        ]
        if changed:
            raise UserError(
                f"--out {self.out}: holds a run with another {', '.join(changed)}; choose another "
                "folder, and init_from to continue from its weights"
            )
        self.model.load_state_dict(state["model"])
        for decay, average in self.averages.items():
            average.load_state_dict(state["averages"][decay])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.minutes = state["step"], state["minutes"]

    def save(self):
        """Write state.pt, from which training resumes, and ema.pt, the weights to use.

        Between updates that are not finite nothing is written: what is there stays.

        Raises:
            UserError: an average is beyond the range of float16, in which it is kept.
        """
        if self.rank != 0 or self.divergence.in_a_row:
            return
        for average in self.averages.values():
            if not all(p.half().isfinite().all() for p in average.parameters()):
                raise self._diverged(f"the weights at update {self.step} are beyond float16")
        state = {
            "model": self.model.state_dict(),
            "averages": {d: average.state_dict() for d, average in self.averages.items()},
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
            "config": self.config,
        }
        with replacing(self.state_path) as path:
            torch.save(state, path)
        for i, (decay, average) in enumerate(self.averages.items()):
            save_checkpoint(average, os.path.join(self.out, f"ema_{decay}.pt" if i else "ema.pt"))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16)

    def progress(self):
        """Share of the budget used, by steps or by minutes, whichever is further along."""
        done = []
        if self.config["max_steps"]:
            done.append(self.step / self.config["max_steps"])
        if self.max_minutes:
            done.append(self.minutes / self.max_minutes)
        return max(done)

    def learning_rate(self):
        config = self.config
        warmup = min(1.0, (self.step + 1) / max(1, config["warmup_steps"]))
        factor = learning_rate_factor(config["schedule"], config["decay_share"], self.progress())
        return config["learning_rate"] * warmup * factor

    def batches(self):
        """This rank's share of the batch of each step to come."""
        size, share = self.config["batch_size"], self.config["batch_size"] // self.world

        def indices():
            step = self.step
            while True:
                first = step * size + self.rank * share
                yield list(range(first, first + share))
                step += 1

        loader = DataLoader(
            self.crops,
            batch_sampler=indices(),
            num_workers=self.config["num_workers"],
            pin_memory=self.device.type == "cuda",
        )
        items = iter(loader)
        while True:
            try:
                batch = next(items)
            except UserError as error:  # from a worker it brings the worker's traceback along
                raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
            yield [v.to(self.device, non_blocking=True) for v in batch]

    def run(self):
        """Train until the budget is used or a signal asks to stop."""
        for name in ("SIGINT", "SIGTERM"):
            signal.signal(getattr(signal, name), lambda *_: setattr(self, "stopped", True))
        network = self.model
        if self.config["compile"]:
            network = torch.compile(network)
        if self.world > 1:
            network = DistributedDataParallel(network)
        self.model.train()
        form = "{l_bar}{bar}|{postfix}"
        with tqdm(total=100, disable=self.rank != 0, bar_format=form) as bar:
            try:
                self._loop(network, bar)
            except RuntimeError as error:  # a dead worker is noticed anywhere
                if "DataLoader worker" not in str(error):
                    raise
                reason = str(error).partition(". ")[0].strip()
                raise UserError(f"train config: num_workers: {reason}") from None
        if self.divergence.in_a_row:
            raise self._diverged(self.divergence.describe(self.step))
        self.save()
        self._log_validation()
        del network  # before its process group
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def _loop(self, network, bar):
        clock = last_save = last_val = time.monotonic()
        totals = torch.zeros(2, len(self.sources), device=self.device)  # losses, their number
        batches = self.batches()
        while not self._done():
            x_0, t, noise, source = next(batches)
            lr = self.learning_rate()
            with self.autocast():
                loss, simple = training_loss(self.diffusion, network, x_0, t, noise, self.weights)
            self.model.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config["grad_clip"])
            self.step += 1
            if self._finite(loss.detach() + norm):
                self.optimiser.step(lr)
                self._update_ema()
                totals[0].index_add_(0, source, simple)
                totals[1].index_add_(0, source, torch.ones_like(simple))

            now = time.monotonic()
            self.minutes += (now - clock) / 60
            clock = now
            if self.step % self.config["log_steps"] == 0:
                self._log(lr, totals, bar)
                totals.zero_()
            if now - last_save > 60 * self.config["save_minutes"]:
                self.save()
                last_save = now
            if now - last_val > 60 * self.config["val_minutes"]:
                self._log_validation()
                last_val = now

    def _finite(self, value):
        """Whether loss and gradient are finite on every rank; after too many that are not, stop."""
        finite = torch.isfinite(value).float()
        if self.world > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if self.divergence.count(bool(finite)):
            raise self._diverged(self.divergence.describe(self.step))
        return bool(finite)

    def _diverged(self, how):
        kept = "what it holds is from before" if os.path.exists(self.state_path) else "nothing kept"
        return UserError(
            f"--out {self.out}: training has diverged, {how}; {kept}, try a lower learning_rate"
        )

    def _log(self, lr, totals, bar):
        """A row of log.csv: the loss since the last one, of all crops and of each source's."""
        if self.world > 1:
            dist.all_reduce(totals)
        if self.rank != 0:
            return
        loss, count = totals.cpu()
        mean = float(loss.sum() / count.sum())
        row = {
            "step": self.step,
            "minutes": f"{self.minutes:.2f}",
            "learning_rate": f"{lr:.3e}",
            "simple_loss": f"{mean:.5f}",
            "skipped": self.divergence.since_log,
        }
        if len(self.sources) > 1:
            for name, part, n in zip(self.sources, loss, count, strict=True):
                row[f"loss_{name}"] = f"{part / n:.5f}" if n else ""
        self.divergence.since_log = 0
        append_csv(os.path.join(self.out, "log.csv"), row)
        bar.n = min(100, round(100 * self.progress(), 1))
        bar.set_postfix_str(f"step {self.step}, {self.minutes:.0f} min, loss {mean:.4f}")

    def _done(self):
        """Whether to stop; all ranks agree, on the time used as well."""
        if self.world > 1:
            shared = torch.tensor([self.stopped, self.minutes], dtype=torch.float64)
            shared = shared.to(self.device)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            self.stopped, self.minutes = bool(shared[0]), float(shared[1])
        return self.stopped or self.progress() >= 1

    @torch.no_grad()
    def _update_ema(self):
        values = [p.detach() for p in self.model.parameters()]
        for decay, average in self.averages.items():
            decay = min(decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(average.parameters()), values, 1 - decay)

    def _log_validation(self):
        """A row of validation.csv for each source, and with several one of their mean."""
        if self.rank != 0 or not self.val_images:
            return
        timesteps = self.config["val_timesteps"]
        for decay, average in self.averages.items():
            psnr = {
                name: validate(self.diffusion, average, images, timesteps, self.autocast)
                for name, images in self.val_images.items()
            }
            if len(self.val_images) > 1:
                psnr["mean"] = np.mean(list(psnr.values()), axis=0)
            for name, values in psnr.items():
                row = {"step": self.step, "minutes": f"{self.minutes:.2f}"}
                if len(self.averages) > 1:
                    row["ema_decay"] = decay
                if len(self.val_images) > 1:
                    row["source"] = name
                row |= {f"psnr_t{t}": f"{p:.3f}" for t, p in zip(timesteps, values, strict=True)}
                append_csv(os.path.join(self.out, "validation.csv"), row)


def parse_args(argv=None):
    parser = ArgumentParser(
        prog="python -m guided_diffusion.train",
        description="Train a diffusion prior on a folder of images, or continue one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config", default="configs/train_config_mri.yaml", help="YAML file of the training run"
    )
    parser.add_argument(
        "--data_dir",
        required=True,
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="folders of training images, each a source of its own, named after the folder or "
        "NAME=FOLDER; one that holds only folders stands for these. A source's share of the crops "
        "is in proportion to the square root of its size, unless shares in the YAML says another",
    )
    parser.add_argument(
        "--val_dir",
        default=[],
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="folders of images of other patients, likewise",
    )
    parser.add_argument("--out", required=True, help="folder for weights, state and logs")
    parser.add_argument(
        "--max_minutes",
        type=float,
        default=0.0,
        help="budget over all runs into --out; 0 leaves it to max_steps",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="replace keys of the training YAML",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        config = read_yaml(locate(args.config))
        for item in args.set:
            key, found, value = item.partition("=")
            if not found:
                raise UserError(f"--set: expected KEY=VALUE, found {item!r}")
            config[key] = parse_yaml_value(value, f"--set {key}")
        config = vars(build(TrainConfig, config, args.config))
        if not args.max_minutes and not config["max_steps"]:
            raise UserError(f"{args.config}: give max_steps, or --max_minutes on the command line")
        check_values(config, args.config)
        model_config = vars(read_model_config(config["model_config"]))
        diffusion_config = read_schedule(config["diffusion_config"]).sampler_arguments()
        if model_config["class_cond"]:
            raise UserError(f"{config['model_config']}: class_cond: true, and no labels are read")
        try:
            os.makedirs(args.out, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: cannot make {args.out} ({error.strerror})") from None
        trainer = Trainer(config, model_config, diffusion_config, args)
        trainer.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if trainer.rank == 0:
        done = f"{trainer.step} steps, {trainer.minutes:.0f} minutes; weights in {args.out}/ema.pt"
        more = "" if trainer.progress() >= 1 else "; the same command resumes it"
        print(done + more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
