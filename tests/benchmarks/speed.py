"""Speed and memory of this machine: ``python tests/benchmarks/speed.py``.

Prints Markdown tables: milliseconds per network evaluation for each precision, the sampler's own
cost of a step as a share of the network's, peak memory of the main job, and, with --psnr, what bf16
changes in the restored images. With ``--out saved_results/benchmarks/speed`` they are also written
as CSVs, of which report.py makes those of the page.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import torch
import yaml

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.condition_methods import get_conditioning_method
from guided_diffusion.config import read_model_config, read_schedule
from guided_diffusion.devices import native_bf16, pick_device
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.measurements import get_operator
from guided_diffusion.unet import create_model
from tests.benchmarks.comparison import processor
from tests.benchmarks.tables import markdown
from util.errors import status_of
from util.files import file_digest, replacing_text
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
    """ms that a DMPS step of ×4 takes to size × size pixels, without its network."""
    channels = model.in_channels
    operator = get_operator("super_resolution", (channels, size, size), device=device)
    y = torch.zeros(batch, *operator.out_shape, device=device)
    method = get_conditioning_method("dmps", operator, y, 0.05)
    schedule = read_schedule("configs/diffusion_config.yaml")
    diffusion = create_sampler(**schedule.sampler_arguments())
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
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    name += " with native bf16" if native_bf16(device) else ""
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_config", default="configs/model_config_mri.yaml")
    add("--gpu", type=int, default=0)
    add("--batch_size", type=int, default=1)
    add("--repeats", type=int, default=10)
    add(
        "--psnr",
        type=int,
        default=0,
        metavar="N",
        help="also compare bf16 with fp32 on the first N samples, 100 steps",
    )
    add("--out", metavar="FOLDER", help="write the tables there, too, as CSVs")
    return parser.parse_args(argv)


def tables(args):
    """Yield (name, headings, lines) of every table."""
    device = pick_device(args.gpu)
    config = read_model_config(args.model_config)
    model = create_model(**vars(replace(config, use_fp16=False))).to(device)
    size = model.image_size
    batch = f"batch {args.batch_size} of {size}×{size}"
    prior = "untrained"
    if config.model_path:
        prior = f"prior {file_digest(config.model_path)[:8]}"
    yield "machine", ["measured on"], [[f"{machine(device)}, {batch}, {prior}"]]

    times = network_times(model, device, args.batch_size, args.repeats)
    slowest = times["fp32, autograd, contiguous"]
    lines = [[name, f"{ms:.0f}", f"{slowest / ms:.1f}×"] for name, ms in times.items()]
    yield "network", ["network evaluation", "ms", "relative"], lines

    own = sampler_time(model, device, args.batch_size, size, 5 * args.repeats)
    head = ["sampler's own cost of a step", "ms", "share of the fastest network's"]
    share = f"{100 * own / min(times.values()):.1f} %"
    yield "sampler", head, [["DMPS, super-resolution ×4", f"{own:.2f}", share]]

    with tempfile.TemporaryDirectory() as folder:
        base = ["--model_config", args.model_config, "--gpu", str(args.gpu)]
        lines = []
        for images in (1, 4):
            peak, _ = run_main(folder, 5, *base, "--limit", str(images), "--record")
            lines.append([f"{images} image{'s' * (images > 1)}", f"{peak:.0f}"])
        yield "memory", ["peak memory of the main job, batch 1, --record", "MB"], lines
        if args.psnr:
            yield precision_table(folder, base, args.psnr)


def precision_table(folder, base, images):
    lines = []
    for precision in ("fp32", "bf16"):
        flags = ("--limit", str(images), "--precision", precision)
        _, rows = run_main(folder, 100, *base, *flags)
        psnr, ssim = (statistics.mean(float(r[k]) for r in rows) for k in ("psnr", "ssim"))
        lines.append([precision, f"{psnr:.3f}", f"{ssim:.4f}"])
    return "precision", [f"precision, {images} images, 100 steps", "PSNR", "SSIM"], lines


def main():
    args = parse_args()
    out = args.out and os.path.abspath(args.out)
    os.chdir(REPOSITORY)
    for name, head, lines in tables(args):
        print(markdown(head, lines), flush=True)
        if out:
            os.makedirs(out, exist_ok=True)
            with replacing_text(os.path.join(out, f"{name}.csv")) as file:
                csv.writer(file, lineterminator="\n").writerows([head, *lines])


if __name__ == "__main__":
    sys.exit(status_of(main))
