"""What drawing noise ahead of time is worth: ``python tests/benchmarks/noise_ahead.py``.

Prints a Markdown table of the milliseconds that a DMPS step takes besides its network, with the
noise drawn in the step, and by a thread while the network works. Both are measured in turn, so
that other work on the machine slows both. The network is a matrix product on the same device, of
about --network milliseconds.
"""

import argparse
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.config import read_schedule
from guided_diffusion.devices import pick_device
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.methods import get_conditioning_method
from guided_diffusion.operators import get_operator
from util.errors import ArgumentParser, status_of
from util.flags import positive
from util.random import ImageRandom, image_generator

SIDE = 512  # of the matrices that stand for the network


class InTheStep(ImageRandom):
    """Draws when it is asked, and not before."""

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        shape = torch.Size((len(x) // len(self.generators), *x.shape[1:]))
        return self._draw(shape).to(x.device, non_blocking=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure what drawing noise ahead of time is worth.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch_size", type=positive, default=8, help="images")
    add("--size", type=positive, default=256, help="side of the images in pixels")
    add("--network", type=positive, default=50, help="milliseconds of the network")
    add("--repeats", type=positive, default=30, help="steps of each kind")
    add("--gpu", type=int, default=0, help="index of the GPU, -1 for the CPU")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a step without its network, for each way to draw."""
    device = pick_device(args.gpu)
    shape = (args.batch_size, 1, args.size, args.size)
    operator = get_operator("super_resolution", shape, device=device)
    y = torch.zeros(args.batch_size, *operator.out_shape, device=device)
    method = get_conditioning_method("dmps", operator, y, 0.05)
    schedule = read_schedule("configs/diffusion_config.yaml")
    diffusion = create_sampler(**schedule.sampler_arguments())
    x = torch.randn(shape, device=device)
    output = x.repeat(1, 2, 1, 1)  # ε and the variance
    a = torch.randn(SIDE, SIDE, device=device)
    spent = 0.0

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def network(*_: torch.Tensor) -> torch.Tensor:
        nonlocal spent
        start = time.perf_counter()
        while time.perf_counter() - start < args.network / 1000:
            torch.mm(a, a)
            wait()
        spent = time.perf_counter() - start
        return output

    generators = [image_generator(str(i), 0, 0) for i in range(args.batch_size)]
    ways = {"in the step": InTheStep(generators)}
    generators = [image_generator(str(i), 0, 0) for i in range(args.batch_size)]
    ways["ahead, in a thread"] = ImageRandom(generators)
    own: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(2 + args.repeats):
            for name, random in ways.items():
                start = time.perf_counter()
                method.step(diffusion, network, x, 500, random.randn_like)
                wait()
                own[name].append(1000 * (time.perf_counter() - start - spent))
    return {name: statistics.median(times[2:]) for name, times in own.items()}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    found = measure(args)
    first = next(iter(found.values()))
    print("| noise is drawn | ms of a step besides its network | relative |\n|---|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} | {value / first:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
