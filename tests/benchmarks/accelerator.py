"""Throughput of the network on an accelerator: ``python tests/benchmarks/accelerator.py``.

Prints a Markdown table, a row for each network, precision and batch size: images a second for one
network evaluation, its share of the bf16 peak, and what a DMPS step adds. The peak is measured, as
a large matrix product in bf16; the FLOPs of the network are those that torch counts (products and
convolutions, 2 a multiply-add). fp32 is as torch has it, with convolutions in TF32 where the
hardware has that. The networks are untrained, which changes no time.

On a CPU: --size 64 --batch_sizes 1 --repeats 2, or it takes very long.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.config import read_model_config
from guided_diffusion.devices import compile_network, pick_device
from guided_diffusion.unet import create_model
from tests.benchmarks.speed import DTYPES, REPOSITORY, machine, milliseconds, sampler_time
from util.errors import ArgumentParser, UserError, status_of
from util.flags import positive

CONFIGS = ("configs/model_config_mri.yaml", "configs/model_config_mri_rgb.yaml")
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the matrices that show the peak


def parse_args(argv=None):
    parser = ArgumentParser(
        description="Measure the network's throughput, and its share of the hardware's peak.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_configs", nargs="+", default=CONFIGS, help="YAMLs of the networks")
    add("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--batch_sizes", nargs="+", type=positive, default=[1, 8, 64])
    add("--size", type=positive, default=256, help="side of the images in pixels")
    add("--repeats", type=positive, default=10, help="evaluations, of which the median counts")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--gpu", type=int, default=0, help="index of the GPU, -1 for the CPU")
    return parser.parse_args(argv)


def peak_flops(device, repeats):
    """FLOP/s of a large bf16 matrix product."""
    n = MATRIX[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / (milliseconds(lambda: a @ b, device, repeats) / 1000)


def count_flops(model, size, device):
    """FLOPs of one evaluation of one image."""
    x = torch.zeros(1, model.in_channels, size, size, device=device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(x, torch.zeros(1, device=device))
    return counter.get_total_flops()


def network_row(model, precision, batch, flops, peak, device, args):
    """The table's cells after the network's name."""
    cells = [precision, str(batch)]
    try:
        x = torch.randn(batch, model.in_channels, args.size, args.size, device=device)
        t = torch.full((batch,), 500, device=device)
        with torch.inference_mode():
            ms = milliseconds(lambda: model(x, t), device, args.repeats)
        sampler = sampler_time(model, device, batch, args.size, args.repeats)
    except torch.OutOfMemoryError:
        return [*cells, *["out of memory"] * 5]
    rate = batch * flops / (ms / 1000)
    cells += [f"{ms:.2f}", f"{1000 * batch / ms:.1f}", f"{rate / 1e12:.2f}"]
    return [*cells, f"{100 * rate / peak:.1f} %", f"{sampler:.2f} ({100 * sampler / ms:.1f} %)"]


def measure(args):
    device = pick_device(args.gpu)
    peak = peak_flops(device, args.repeats)
    print(f"{machine(device)}, images of {args.size}×{args.size}")
    print(f"bf16 matrix peak, measured: {peak / 1e12:.2f} TFLOP/s\n")
    print("| network | precision | batch | ms | images/s | TFLOP/s | of the peak | DMPS adds, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for path in args.model_configs:
        config = replace(read_model_config(path), model_path="", use_fp16=False)
        model = create_model(**vars(config)).requires_grad_(False)
        if args.size % model.size_multiple:
            raise UserError(
                f"--size: expected a multiple of {model.size_multiple} for {path}, "
                f"found {args.size}"
            )
        model.to(device, memory_format=torch.channels_last)
        flops = count_flops(model, args.size, device)
        name = f"{os.path.basename(path)}, {flops / 1e9:.1f} GFLOP an image"
        if args.compile:
            compile_network(model, device)
        for precision in args.precisions:
            model.set_torso_dtype(DTYPES[precision])
            for batch in args.batch_sizes:
                cells = network_row(model, precision, batch, flops, peak, device, args)
                print(f"| {' | '.join([name, *cells])} |", flush=True)


def main(argv=None):
    args = parse_args(argv)
    os.chdir(REPOSITORY)
    return status_of(partial(measure, args))


if __name__ == "__main__":
    sys.exit(main())
