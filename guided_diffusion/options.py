"""The flags of main.py."""

import argparse
from dataclasses import dataclass

from data.formats import FORMATS
from guided_diffusion.config import HUNDRED
from guided_diffusion.methods import method_names
from guided_diffusion.noise import NOISES
from guided_diffusion.operators import OPERATORS
from guided_diffusion.prior import SHIPPED
from util.errors import ArgumentParser
from util.flags import local_path, noise_level, positive
from util.metrics import METRICS


@dataclass(frozen=True)
class Options:
    """What the command line says, see `parse_args`."""

    model_config: str
    diffusion_config: str | None
    task_config: str
    input: str | None
    output: str | None
    bids: bool
    sigma: float | str | None
    method: str | None
    measured: bool
    set: list[str]
    save_dir: str
    seed: int
    gpu: int
    record: bool
    video: bool
    batch_size: int
    num_samples: int
    limit: int | None
    precision: str
    compile: bool
    overwrite: bool


def _known() -> str:
    """What can be named, for --help."""
    lists = (
        ("methods", method_names()),
        ("operators", OPERATORS),
        ("noise", NOISES),
        ("metrics", METRICS),
        ("files", FORMATS),
    )
    return "\n".join(f"{what}: {', '.join(names)}" for what, names in lists)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help of each flag, and the lists after it as they are."""


def parse_args(argv: list[str] | None = None) -> Options:
    """Read the command line; a mistake ends the program with one sentence and status 2."""
    parser = ArgumentParser(
        description="Restore MR slices with a diffusion prior (DMPS).",
        epilog=f"What the YAML files may name:\n{_known()}",
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add("--model_config", default=SHIPPED, help="YAML of the prior")
    add(
        "--diffusion_config",
        default=None,
        help=f"YAML of the schedule, instead of the task's own or {HUNDRED}; "
        "configs/diffusion_config.yaml takes all 1000 steps, "
        "configs/diffusion_config_fast.yaml ten, with its own method",
    )
    add(
        "--task_config",
        default="configs/SR_config_mri.yaml",
        help="YAML of the task: data, degradation, noise, method",
    )
    add("--input", metavar="PATH", default=None, help="replaces the task's data.root")
    add(
        "--output",
        metavar="PATH",
        type=local_path,
        default=None,
        help="write the restored picture, volume or series here, too, in the input's format",
    )
    add(
        "--bids",
        action="store_true",
        help="write the restored volumes as a BIDS derivative data set, too, in the results' bids/",
    )
    add(
        "--sigma",
        type=noise_level,
        default=None,
        help="replaces the task's measurement.noise.sigma: a number, or with --measured auto, "
        "local (a map of it is estimated) or the NIfTI file of a map",
    )
    add(
        "--method",
        choices=method_names(),
        default=None,
        help="replace the task's conditioning.method, and the schedule's, with that method's "
        "own parameters",
    )
    add(
        "--measured",
        action="store_true",
        help="the images are measurements, to be restored as they are (data.measured: true)",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="replace keys of the task file: data.mask=auto measurement.noise.name=gaussian",
    )
    add(
        "--save_dir",
        type=local_path,
        default="results",
        help="folder for the results, a tree by task",
    )
    add("--seed", type=int, default=0, help="decides all random numbers, with the image's name")
    add(
        "--gpu",
        type=int,
        default=0,
        help="index of the GPU, -1 for the CPU; 0 means the CPU where there is no GPU",
    )
    add("--record", action="store_true", help="keep progress frames and write a GIF per image")
    add("--video", action="store_true", help="write the sampling as an MP4 per image")
    add("--batch_size", type=positive, default=1, help="images restored at once")
    add(
        "--num_samples",
        type=positive,
        default=1,
        help="posterior samples per image; recon/ holds their mean, std/ their spread",
    )
    add("--limit", type=positive, default=None, help="restore the first LIMIT images only")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the network; auto takes bf16 where the hardware has it, else fp32",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the network: minutes at the start; some machines are faster after it",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace a results folder that was made with other settings, and --output",
    )
    return Options(**vars(parser.parse_args(argv)))
