"""What a training file holds, and how much a training run may use."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from guided_diffusion.losses import LossWeighting, TimestepSampling
from guided_diffusion.training.optimiser import OptimiserName, RateSchedule
from util.config import build, changed, describe, locate, read_yaml
from util.errors import UserError

POSITIVE = (
    *("crop_size", "batch_size", "learning_rate", "grad_clip", "min_snr_gamma"),
    *("log_steps", "val_images"),
)
NOT_NEGATIVE = (
    *("num_workers", "max_steps", "weight_decay", "warmup_steps", "seed"),
    *("val_minutes", "save_minutes", "high_noise_weight"),
)
PARTS = ("augment", "decay_share")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run; configs/README.md has a table of the keys."""

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
    schedule: RateSchedule = "cosine"
    decay_share: float = 0.0
    optimizer: OptimiserName = "adamw"
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float = 1.0
    ema_decay: float | list = 0.999
    loss_weighting: LossWeighting = "uniform"
    min_snr_gamma: float = 5.0
    high_noise_weight: float = 0.0
    timestep_sampling: TimestepSampling = "uniform"
    compile: bool = False
    seed: int = 0
    log_steps: int = 25
    val_minutes: float = 15.0
    val_images: int = 8
    val_timesteps: list = field(default_factory=lambda: [20, 50, 100, 200, 400, 700])
    save_minutes: float = 5.0

    @property
    def ema_decays(self) -> list[float]:
        """Of each moving average of the weights."""
        decays = self.ema_decay if isinstance(self.ema_decay, list) else [self.ema_decay]
        return [float(decay) for decay in decays]


@dataclass(frozen=True)
class Budget:
    """What a training may use, over all runs into one folder; 0 sets no limit, of one of them."""

    steps: int
    minutes: float

    def used(self, steps: int, minutes: float) -> float:
        """The share used, 1 at the end: of steps or of minutes, whichever is further along."""
        pairs = ((steps, self.steps), (minutes, self.minutes))
        return max(done / limit for done, limit in pairs if limit)


def read_train_config(path: str, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a training file.

    Args:
        path: of the YAML file.
        changes: "KEY=VALUE", each replaces a key of it.

    Raises:
        UserError: see `build`; or a value out of its range.
    """
    path = locate(path)
    config = build(TrainConfig, changed(read_yaml(path), changes), path)
    _check_ranges(config, path)
    return replace(
        config,
        model_config=locate(config.model_config, path),
        diffusion_config=locate(config.diffusion_config, path),
        init_from=locate(config.init_from, path),
    )


def _check_ranges(config: TrainConfig, where: str) -> None:
    for key in POSITIVE:
        if not 0 < getattr(config, key) < math.inf:
            raise _out_of_range(config, key, "a number above 0", where)
    for key in NOT_NEGATIVE:
        if not 0 <= getattr(config, key) < math.inf:
            raise _out_of_range(config, key, "0 or more", where)
    for key in PARTS:
        if not 0 <= getattr(config, key) <= 1:
            raise _out_of_range(config, key, "a number from 0 to 1", where)
    if config.seed >= 2**63:
        raise _out_of_range(config, "seed", "an integer below 2**63", where)
    decays = config.ema_decay if isinstance(config.ema_decay, list) else [config.ema_decay]
    if not decays or not all(type(d) in (int, float) and 0 <= d < 1 for d in decays):
        raise _out_of_range(config, "ema_decay", "numbers from 0 to below 1", where)
    if len(set(decays)) < len(decays):  # each names its file
        raise _out_of_range(config, "ema_decay", "each number once", where)
    if not all(type(t) is int and t >= 0 for t in config.val_timesteps):
        raise _out_of_range(config, "val_timesteps", "integers from 0", where)
    if config.schedule == "cosine" and config.decay_share:
        raise UserError(f"{where}: decay_share is of schedule: constant; cosine falls throughout")


def _out_of_range(config: TrainConfig, key: str, expected: str, where: str) -> UserError:
    found = describe(getattr(config, key))
    return UserError(f"{where}: {key}: expected {expected}, found {found}")
