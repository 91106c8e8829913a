"""Speed and memory of this machine: ``python tests/benchmarks/speed.py``.

Prints Markdown tables: milliseconds per network evaluation for each precision, the sampler's own
cost a step as a share of the network's, peak memory of the main job, and, with --psnr, what bf16
changes in the restored images.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import yaml

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.condition_methods import get_conditioning_method
from guided_diffusion.devices import pick_device
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.measurements import get_operator
from guided_diffusion.unet import create_model
from util.config import read_diffusion_config, read_model_config
from util.random import ImageRandom, image_generator

REPOSITORY = sys.path[0]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def milliseconds(function, device, repeats):
    """Median duration of a call in ms, after two to warm up."""

    def once():
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    return statistics.median([once() for _ in range(2 + repeats)][2:])


def network_times(model, device, batch, repeats):
    """ms per evaluation of one batch, by precision; "fp32, autograd" is how it once ran."""
    size = model.image_size
    x = torch.randn(batch, model.in_channels, size, size, device=device)
    t = torch.full((batch,), 500, device=device)
    times = {}
    model.to(memory_format=torch.contiguous_format)
    times["fp32, autograd, contiguous"] = milliseconds(lambda: model(x, t), device, repeats)
    model.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            model.set_torso_dtype(dtype)
            times[name] = milliseconds(lambda: model(x, t), device, repeats)
    return times


def sampler_time(model, device, batch, size, repeats):
    """ms a DMPS step takes without its network, for super-resolution ×4 to size × size pixels."""
    channels = model.in_channels
    operator = get_operator("super_resolution", (channels, size, size), device=device)
    y = torch.zeros(batch, *operator.out_shape, device=device)
    method = get_conditioning_method("dmps", operator, y, 0.05)
    diffusion = create_sampler(**read_diffusion_config("configs/diffusion_config.yaml"))
    x = torch.randn(batch, channels, size, size, device=device)
    output = torch.randn(batch, model.out_channels, size, size, device=device)
    random = ImageRandom([image_generator(str(i), 0, 0) for i in range(batch)])
    with torch.inference_mode():
        return milliseconds(
            lambda: method.step(diffusion, lambda *_: output, x, 500, random.randn_like),
            device,
            repeats,
        )


def run_main(folder, steps, *arguments):
    """Run main.py for `steps` steps; returns (peak resident MB, rows of metrics.csv)."""
    with open("configs/diffusion_config_100.yaml", encoding="utf-8") as file:
        config = yaml.safe_load(file)
    config["timestep_respacing"] = steps
    path = os.path.join(folder, "diffusion.yaml")
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file)
    out = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-c", MEASURE, "--diffusion_config", path, "--save_dir", out]
    finished = subprocess.run(
        [*command, *arguments], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    peak = float(finished.stdout.decode().splitlines()[-1].split()[-1])
    for root, _, files in os.walk(out):
        if "metrics.csv" in files:
            with open(os.path.join(root, "metrics.csv"), encoding="utf-8") as file:
                return peak, list(csv.DictReader(file))
    raise RuntimeError("main.py wrote no metrics.csv")


# main.py as a process of its own, which tells its peak memory last
MEASURE = """
import resource, sys
sys.path.insert(0, ".")
import main
status = main.main()
kilo = 1 if sys.platform != "darwin" else 1024
print("peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / kilo)
sys.exit(status)
"""


def machine(device):
    """What the numbers are measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    name = name or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_config", default="configs/model_config_mri.yaml")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--psnr", type=int, default=0, metavar="N",
                        help="also compare bf16 with fp32 on the first N samples, 100 steps")  # fmt: skip
    args = parser.parse_args()
    os.chdir(REPOSITORY)
    device = pick_device(args.gpu)
    model = create_model(**{**read_model_config(args.model_config), "use_fp16": False}).to(device)
    print(f"{machine(device)}, batch {args.batch_size} of {model.image_size}×{model.image_size}\n")

    times = network_times(model, device, args.batch_size, args.repeats)
    print("| network evaluation | ms | relative |\n|---|---|---|")
    for name, value in times.items():
        print(f"| {name} | {value:.0f} | {times['fp32, autograd, contiguous'] / value:.1f}× |")

    own = sampler_time(model, device, args.batch_size, model.image_size, 5 * args.repeats)
    fastest = min(times.values())
    print("\n| sampler's own cost a step | ms | share of the fastest network's |\n|---|---|---|")
    print(f"| DMPS, super-resolution ×4 | {own:.2f} | {100 * own / fastest:.1f} % |")

    with tempfile.TemporaryDirectory() as folder:
        base = ["--model_config", args.model_config, "--gpu", str(args.gpu)]
        print("\n| peak memory of the main job, batch 1, --record | MB |\n|---|---|")
        for images in (1, 4):
            peak, _ = run_main(folder, 5, *base, "--limit", str(images), "--record")
            print(f"| {images} image{'s' * (images > 1)} | {peak:.0f} |")
        if args.psnr:
            print(f"\n| precision, {args.psnr} images, 100 steps | PSNR | SSIM |\n|---|---|---|")
            for precision in ("fp32", "bf16"):
                _, rows = run_main(
                    folder, 100, *base, "--limit", str(args.psnr), "--precision", precision
                )
                psnr, ssim = (statistics.mean(float(r[k]) for r in rows) for k in ("psnr", "ssim"))
                print(f"| {precision} | {psnr:.3f} | {ssim:.4f} |")


if __name__ == "__main__":
    main()
