"""The flags of main.py."""

import argparse

from util.errors import ArgumentParser


def parse_args(argv, methods):
    """Read the command line; `methods` are the names that --method takes."""
    parser = ArgumentParser(
        description="Restore MR slices with a diffusion prior (DMPS).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_config", default="configs/model_config_mri.yaml", help="YAML of the prior")
    add(
        "--diffusion_config",
        default="configs/diffusion_config_100.yaml",
        help="YAML of the schedule; configs/diffusion_config.yaml takes all 1000 steps, "
        "configs/diffusion_config_fast.yaml ten, with its own method",
    )
    add(
        "--task_config",
        default="configs/SR_config_mri.yaml",
        help="YAML of the task: data, degradation, noise, method",
    )
    add(
        "--method",
        choices=methods,
        default=None,
        help="replace the task's conditioning.method, and the schedule's, with that method's "
        "own parameters",
    )
    add(
        "--measured",
        action="store_true",
        help="the images are measurements, to be restored as they are (data.measured: true)",
    )
    add("--save_dir", default="results", help="folder for the results, a tree by task")
    add("--seed", type=int, default=0, help="decides all random numbers, with the image's name")
    add(
        "--gpu",
        type=int,
        default=0,
        help="index of the GPU, -1 for the CPU; 0 means the CPU where there is no GPU",
    )
    add("--record", action="store_true", help="keep progress frames and write a GIF an image")
    add("--video", action="store_true", help="write the sampling as an MP4 an image")
    add("--batch_size", type=positive, default=1, help="images restored at once")
    add(
        "--num_samples",
        type=positive,
        default=1,
        help="posterior samples an image; recon/ holds their mean, std/ their spread",
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
        help="torch.compile the network: minutes at the start, then faster steps",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace a results folder that was made with other settings",
    )
    return parser.parse_args(argv)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    return value
