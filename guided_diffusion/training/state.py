"""What training changes: weights, their averages, the optimiser. Kept in state.pt and ema.pt."""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from guided_diffusion.checkpoints import (
    load_checkpoint,
    load_weights_only,
    save_checkpoint,
    save_tensors,
)
from guided_diffusion.config import ModelConfig, Schedule
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.optimiser import Optimiser
from guided_diffusion.unet import UNetModel, create_model
from util.config import as_dict
from util.errors import UserError

STATE = "state.pt"
FIXED = ("seed", "batch_size", "crop_size", "optimizer")  # a run's, from its beginning to its end
FREE = (  # of which the weights know nothing
    *("model_config", "diffusion_config", "init_from", "num_workers", "compile", "max_steps"),
    *("log_steps", "val_minutes", "val_images", "val_timesteps", "save_minutes"),
)
UNTRAINED = ("model_path", "use_checkpoint", "use_fp16")  # keys of a model file, likewise
TRAINED = (  # keys of a diffusion file that decide what is learnt
    *("steps", "noise_schedule", "model_mean_type", "model_var_type", "rescale_timesteps"),
)


@dataclass
class TrainState:
    """Where a training has come to.

    Attributes:
        averages: decay → exponential moving average of the weights.
        step: updates so far.
        minutes: of training so far, in all runs.
        sources: name → number of images of each source.
        files: see `files_of`.
    """

    model: UNetModel
    averages: dict[float, UNetModel]
    optimiser: Optimiser
    step: int = 0
    minutes: float = 0.0
    sources: dict[str, int] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @torch.no_grad()
    def update_averages(self) -> None:
        """Move the averages towards the weights; fast at the start, or the first would last."""
        values = [p.detach() for p in self.model.parameters()]
        for decay, average in self.averages.items():
            decay = min(decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(average.parameters()), values, 1 - decay)

    def fits_float16(self) -> bool:
        """Whether the averages are within the range of float16, in which they are kept."""
        averages = self.averages.values()
        return all(p.half().isfinite().all() for a in averages for p in a.parameters())


def first_state(
    config: TrainConfig, model: ModelConfig, device: torch.device, folder: str
) -> TrainState:
    """Random weights, or those of `init_from`, and averages that are equal to them.

    Where `folder` has a state, `load_state` replaces all of these, and `init_from` is not read.

    Raises:
        UserError: the checkpoint cannot be read or does not fit, or this torch lacks the optimiser.
    """

    def network() -> UNetModel:
        return create_model(**vars(replace(model, model_path="", use_fp16=False)))

    torch.manual_seed(config.seed)
    trained = network()
    if config.init_from and not os.path.exists(os.path.join(folder, STATE)):
        load_checkpoint(trained, config.init_from, "train config: init_from")
    trained.to(device).to(memory_format=torch.channels_last)
    averages = {}
    for decay in config.ema_decays:
        average = network()
        average.load_state_dict(trained.state_dict())
        averages[decay] = average.to(device).to(memory_format=torch.channels_last)
    return TrainState(trained, averages, Optimiser(trained, config.optimizer, config.weight_decay))


def files_of(model: ModelConfig, schedule: Schedule) -> dict[str, dict[str, Any]]:
    """What of the model and the diffusion file is a run's, from its beginning to its end."""
    return {
        "model_config": {k: v for k, v in as_dict(model).items() if k not in UNTRAINED},
        "diffusion_config": {k: v for k, v in as_dict(schedule).items() if k in TRAINED},
    }


def check_new(folder: str) -> None:
    """See that a training that begins writes over no other's weights.

    Raises:
        UserError: the folder holds some, and no state from which that training would go on.
    """
    if os.path.exists(os.path.join(folder, STATE)) or not os.path.isdir(folder):
        return
    names = sorted(os.listdir(folder))
    found = [n for n in names if n == "ema.pt" or (n.startswith("ema_") and n.endswith(".pt"))]
    if found:
        raise UserError(
            f"--out {folder}: holds {found[0]} and no {STATE} to go on from; choose another "
            "folder, or continue from it there with init_from"
        )


def load_state(state: TrainState, folder: str, config: TrainConfig) -> str | None:
    """Bring `state` to where the run in `folder` stopped; nothing if there is none.

    Returns:
        What a user is to be told: what of the recipe is another one from here on.

    Raises:
        UserError: the file is damaged, of another version, or of a run whose network, noise
            schedule, random numbers or averages are others.
    """
    path = os.path.join(folder, STATE)
    if not os.path.exists(path):
        return None
    found = load_weights_only(path, "--out")
    other = "choose another folder, and init_from to continue from its weights"
    try:
        written, averages = found["config"], found["averages"]
        changed = [k for k, v in as_dict(config).items() if k not in FREE and written.get(k) != v]
        refused = [key for key in FIXED if key in changed]
        if list(averages) == config.ema_decays:
            changed = [key for key in changed if key != "ema_decay"]
        else:
            refused += ["ema_decay"]
        for name, keys in state.files.items():
            before = found.get("files", {}).get(name, {})  # earlier versions kept none
            refused += [f"{k} of {name}" for k, v in keys.items() if before.get(k, v) != v]
        if refused:
            raise UserError(f"--out {folder}: holds a run with another {_and(refused)}; {other}")
        shapes = {key: value.shape for key, value in state.model.state_dict().items()}
        if shapes != {key: value.shape for key, value in found["model"].items()}:
            raise UserError(f"--out {folder}: holds a run of another network; {other}")
        state.model.load_state_dict(found["model"])
        for decay, average in state.averages.items():
            average.load_state_dict(averages[decay])
        state.optimiser.load_state_dict(found["optimiser"])
        state.step, state.minutes = int(found["step"]), float(found["minutes"])
        changed += ["data_dir"] if found.get("sources", state.sources) != state.sources else []
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - whatever another program's file brings about
        raise UserError(
            f"--out {folder}: {path} is no state that this version writes; {other}"
        ) from None
    return f"--out {folder}: goes on with another {_and(changed)}" if changed else None


def _and(keys: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(keys[:-1]), keys[-1])))


def save_state(state: TrainState, folder: str, config: TrainConfig) -> None:
    """Write state.pt, from which `load_state` resumes, and ema.pt, the weights to use.

    Of several averages the first is ema.pt, the others are ema_DECAY.pt.
    """
    contents = {
        "model": state.model.state_dict(),
        "averages": {d: average.state_dict() for d, average in state.averages.items()},
        "optimiser": state.optimiser.state_dict(),
        "step": state.step,
        "minutes": state.minutes,
        "sources": state.sources,
        "files": state.files,
        "config": as_dict(config),
    }
    save_tensors(contents, os.path.join(folder, STATE))
    for i, (decay, average) in enumerate(state.averages.items()):
        save_checkpoint(average, os.path.join(folder, f"ema_{decay}.pt" if i else "ema.pt"))


def diverged(folder: str, how: str) -> UserError:
    """The sentence that ends a training whose numbers have left the range of floats."""
    there = os.path.exists(os.path.join(folder, STATE))
    kept = "what it holds is from before" if there else "nothing kept"
    return UserError(
        f"--out {folder}: training has diverged, {how}; {kept}, try a lower learning_rate"
    )
