"""Train a prior, or continue one: ``python -m guided_diffusion.train --help``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data.crops import TrainingCrops, to_channels
from data.dataloader import Picture
from data.sources import find_shares, find_sources
from guided_diffusion.config import ModelConfig, read_model_config, read_schedule
from guided_diffusion.devices import compile_network, native_bf16, pick_device
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, create_sampler
from guided_diffusion.launch import gathered, lost_others, setup_dist, together
from guided_diffusion.losses import loss_weights, timestep_probabilities
from guided_diffusion.training.config import Budget, TrainConfig, read_train_config
from guided_diffusion.training.logs import LossLog, Validation, cut_csv
from guided_diffusion.training.state import (
    TrainState,
    check_new,
    files_of,
    first_state,
    load_state,
)
from guided_diffusion.training.trainer import Trainer, mendable
from guided_diffusion.unet import UNetModel
from util import terminal
from util.errors import ArgumentParser, UserError
from util.flags import local_path, minutes
from util.lock import Lock, Locked


@dataclass(frozen=True)
class Options:
    """What the command line says, see `parse_args`."""

    config: str
    data_dir: list[str]
    val_dir: list[str]
    out: str
    max_minutes: float
    set: list[str]


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Read the command line; a mistake ends the program with one sentence and status 2."""
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
    parser.add_argument(
        "--out", type=local_path, required=True, help="folder for weights, state and logs"
    )
    parser.add_argument(
        "--max_minutes",
        type=minutes,
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
    return Options(**vars(parser.parse_args(argv)))


def prepare(options: Options, held: contextlib.ExitStack, rank: int, world: int) -> Trainer:
    """Read the training file and the images' names, build the network and load its state.

    Args:
        held: by which the folder is kept for this training, from here to its end.
        rank, world: this process, and how many share each batch.

    Raises:
        UserError: a flag, file or key that is not as it should be.
    """
    device = pick_device(0)
    config = read_train_config(options.config, options.set)
    budget = Budget(config.max_steps, options.max_minutes)
    if not budget.steps and not budget.minutes:
        raise UserError(f"{options.config}: give max_steps, or --max_minutes on the command line")
    model_config = read_model_config(config.model_config)
    if model_config.class_cond:
        raise UserError(f"{config.model_config}: class_cond: true, and no labels are read")
    schedule = replace(read_schedule(config.diffusion_config), timestep_respacing="", start="")
    diffusion = create_sampler(**schedule.sampler_arguments())
    _check_outputs(config, model_config, diffusion)
    if rank == 0:  # the only one that writes
        held.enter_context(keep_folder(options.out))
    check_new(options.out)
    state = first_state(config, model_config, device, options.out)
    sources = find_sources(options.data_dir, "--data_dir")
    state.files = files_of(model_config, schedule)
    state.sources = {name: len(paths) for name, paths in sources.items()}
    note = load_state(state, options.out, config)
    if note and rank == 0:
        print(f"note: {note}", file=sys.stderr)
    _check_sizes(config, state.model, diffusion, world)
    if config.compile:
        compile_network(state.model, device, "train config: compile")
    log, validation = (os.path.join(options.out, n) for n in ("log.csv", "validation.csv"))
    if rank == 0:
        cut_csv(log, state.step)
        cut_csv(validation, state.step)
        _tell_notes("--data_dir", _one_of_each(sources))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device))
    weights = loss_weights(
        config.loss_weighting,
        diffusion.alphas_cumprod,
        config.min_snr_gamma,
        config.high_noise_weight,
    )
    return Trainer(
        config,
        budget,
        options.out,
        state,
        diffusion,
        weights.to(device),
        _crops(config, sources, state.model.in_channels, diffusion),
        LossLog(log, list(sources), torch.zeros(2, len(sources), device=device)),
        Validation(
            validation,
            diffusion,
            _validation_images(options.val_dir, config.val_images, state.model, device, rank),
            config.val_timesteps,
            autocast,
        ),
        device,
        autocast,
        rank,
        world,
    )


@contextlib.contextmanager
def keep_folder(path: str) -> Iterator[None]:
    """Make the folder for weights and logs, and keep it for this training.

    Raises:
        UserError: it cannot be written, or another training has it.
    """
    lock = Lock(path)
    try:
        os.makedirs(path, exist_ok=True)
        lock.acquire()
    except Locked as owner:
        raise UserError(
            f"--out: {path} is in use by {owner}; wait for its end or choose another folder "
            "(several processes share a training if torchrun or mpiexec starts them, not srun "
            "alone)"
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(f"--out: cannot write {path} ({error.strerror or error})") from None
    try:
        yield
    finally:
        lock.release()


def _check_outputs(
    config: TrainConfig, model_config: ModelConfig, diffusion: GaussianDiffusion
) -> None:
    """Raise UserError where the schedule reads other outputs than are trained."""
    if diffusion.model_mean_type != "epsilon":
        raise UserError(
            f"{config.diffusion_config}: model_mean_type: training is of the noise, expected "
            f"epsilon, found {diffusion.model_mean_type}"
        )
    learned = diffusion.model_var_type.startswith("learned")
    if model_config.learn_sigma and not learned:
        raise UserError(
            f"{config.diffusion_config}: model_var_type {diffusion.model_var_type} teaches no "
            f"variance, expected learned_range, for {config.model_config} has learn_sigma: true"
        )
    if learned and not model_config.learn_sigma:
        raise UserError(
            f"{config.diffusion_config}: model_var_type {diffusion.model_var_type} needs "
            f"learn_sigma: true, found false in {config.model_config}"
        )


def _check_sizes(
    config: TrainConfig, model: UNetModel, diffusion: GaussianDiffusion, world: int
) -> None:
    """Raise UserError for what does not fit the processes, the network or its noise schedule."""
    if config.batch_size % world:
        raise UserError(
            f"train config: batch_size {config.batch_size} cannot be shared equally by "
            f"{world} processes"
        )
    if config.crop_size % model.size_multiple:
        raise UserError(
            f"train config: crop_size: this network takes multiples of {model.size_multiple}, "
            f"found {config.crop_size}"
        )
    if max(config.val_timesteps, default=0) >= diffusion.num_timesteps:
        raise UserError(
            f"train config: val_timesteps: expected integers below {diffusion.num_timesteps}, "
            f"the steps of {config.diffusion_config}, found {config.val_timesteps}"
        )


def _check_agreement(state: TrainState) -> None:
    """Raise UserError where processes, as those of several machines, have found other files."""

    def told(step: int, sources: dict[str, int]) -> str:
        return f"step {step}, " + ", ".join(f"{n} images of {name}" for name, n in sources.items())

    found = gathered((state.step, state.sources))
    for rank, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"--out and --data_dir: expected the same files for all processes, process 0 found "
                f"{told(*found[0])}, and process {rank} {told(*other)}"
            )


def _crops(
    config: TrainConfig,
    sources: dict[str, list[str]],
    channels: int,
    diffusion: GaussianDiffusion,
) -> TrainingCrops:
    sizes = {name: len(paths) for name, paths in sources.items()}
    return TrainingCrops(
        list(sources.values()),
        find_shares(sizes, config.shares, "train config: shares"),
        channels,
        timestep_probabilities(config.timestep_sampling, diffusion.alphas_cumprod),
        config.crop_size,
        config.flip,
        config.augment,
        config.seed,
    )


def _one_of_each(sources: dict[str, list[str]]) -> list[tuple[str, Picture]]:
    """(source, picture), the middle one of each, which has been read."""
    found = [(name, Picture(paths[len(paths) // 2])) for name, paths in sources.items()]
    for _, picture in found:
        picture.read()
    return found


def _tell_notes(key: str, pictures: list[tuple[str, Picture]]) -> None:
    """Print of each source the first note on how its pictures, (source, picture), were read."""
    told = set()
    for name, picture in pictures:
        if picture.note and name not in told:
            print(f"note: {key}: {name}: {picture.note}", file=sys.stderr)
            told.add(name)


def _validation_images(
    folders: list[str], count: int, model: UNetModel, device: torch.device, rank: int
) -> dict[str, list[torch.Tensor]]:
    """`count` whole images of each source, or all where it has fewer, evenly spaced.

    Returns:
        source → images, (1, C, H, W), cut to sizes that the network takes.

    Raises:
        UserError: one cannot be read, or nothing of it would be left.
    """
    pictures = []
    for name, paths in find_sources(folders, "--val_dir").items():
        places = np.linspace(0, len(paths) - 1, min(count, len(paths)))
        pictures += [(name, Picture(paths[int(place)])) for place in places]
    found: dict[str, list[torch.Tensor]] = {}
    for name, picture in pictures:
        whole = torch.from_numpy(to_channels(picture.read(), model.in_channels))
        height, width = (n - n % model.size_multiple for n in whole.shape[1:])
        if not height or not width:
            raise UserError(
                f"--val_dir: {picture.label}: this network takes sides from {model.size_multiple}, "
                f"found {whole.shape[2]}×{whole.shape[1]}"
            )
        found.setdefault(name, []).append(whole[None, :, :height, :width].to(device))
    if rank == 0:
        _tell_notes("--val_dir", pictures)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line asks; returns the exit status."""
    terminal.prepare()
    options = parse_args(argv)
    try:
        rank, world = setup_dist()
        with contextlib.ExitStack() as held:
            with together():
                trainer = prepare(options, held, rank, world)
            with together():
                _check_agreement(trainer.state)
            trainer.run()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        failure = mendable(error)
        if failure is not None:
            print(f"error: {failure}", file=sys.stderr)
            return 2
        if not lost_others(error):
            raise
        print(
            "error: another process has gone; the state of the last save is kept", file=sys.stderr
        )
        return 1
    if trainer.rank == 0:
        state = trainer.state
        done = f"{state.step} steps, {state.minutes:.0f} minutes; weights in {options.out}/ema.pt"
        more = "" if trainer.used() >= 1 else "; the same command resumes it"
        print(done + more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
