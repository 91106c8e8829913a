"""What a large volume takes beside the network: ``python tests/benchmarks/volume_memory.py``.

A NIfTI volume of --shape (256×256×180) is restored by main.py, from reading to the report, with a
network that answers at once with zeros, each case in a process of its own. Writes its peak memory
(all of the process, Python and its libraries included) and seconds of the CPU to
saved_results/benchmarks/volume_memory.csv, and measures only what is missing there. The network's
own part comes on top; it depends on --batch_size, not on the volume.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial

import numpy as np
import yaml

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from tests.benchmarks.rows import FOLDER
from tests.benchmarks.settings import REPOSITORY
from tests.benchmarks.volume_rows import Rows
from util.config import read_yaml
from util.errors import ArgumentParser, status_of
from util.flags import positive

COLUMNS = ("case", "shape", "peak_MB", "seconds", "prior")
KEY = COLUMNS[:2]
FAST = ["--diffusion_config", "configs/diffusion_config_fast.yaml"]
SAMPLES = ["--diffusion_config", "configs/diffusion_config_samples.yaml"]
# name → task file, what of its data is changed, flags
CASES = {
    "scan denoised, three planes and 3-D filter": ("denoise_scan_config_mri.yaml", {}, []),
    "super-resolution ×4, planes in turn": ("SR_config_mri.yaml", {}, FAST),
    "super-resolution ×4, slices one by one": (
        "SR_config_mri.yaml", {"volume_mode": "slices"}, [*FAST, "--batch_size", "8"],
    ),
    "super-resolution ×4, four samples": (
        "SR_config_mri.yaml", {}, [*SAMPLES, "--num_samples", "4"],
    ),
    "thick slices, 5 mm": ("thick_slices_config_mri.yaml", {}, []),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure memory.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", type=positive, nargs=3, default=[256, 256, 180], help="voxels of 1 mm")
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--out", default=os.path.join(FOLDER, "volume_memory.csv"), help="the CSV")
    add("--case", help=argparse.SUPPRESS)  # this process is to do one, in --folder
    add("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write_volume(path: str, shape: list[int]) -> None:
    """A smooth ball on a dark ground, with noise."""
    import nibabel as nib

    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    ball = 800 / (1 + np.exp(20 * (np.sqrt(sum(a**2 for a in axes)) - 0.8)))
    noise = 30 * np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    voxels = np.hypot(ball * (1 + 0.2 * np.sin(20 * axes[0])) + noise[0], noise[1])
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), path)


def restore(case: str, folder: str) -> None:
    """Restore the folder's volume in this process, without a network."""
    import main as program
    from guided_diffusion.unet import UNetModel

    def zeros(self, x, timesteps, y=None):
        return x.new_zeros(len(x), self.out[-1].out_channels, *x.shape[2:])

    UNetModel.forward = zeros
    name, changes, flags = CASES[case]
    task = read_yaml(os.path.join(REPOSITORY, "configs", name))
    task["data"] = {**task["data"], **changes, "root": os.path.join(folder, "v.nii.gz")}
    path = os.path.join(folder, "task.yaml")
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(task, file)
    status = program.main(["--task_config", path, "--save_dir", folder, "--gpu", "-1", *flags])
    if status:
        sys.exit(status)


def measured(case: str, shape: list[int]) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as folder:
        write_volume(os.path.join(folder, "v.nii.gz"), shape)
        command = [sys.executable, os.path.abspath(__file__), "--case", case, "--folder", folder]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{case}: the run failed")
    seconds = usage.ru_utime + usage.ru_stime
    return {"peak_MB": f"{usage.ru_maxrss / 1024:.0f}", "seconds": f"{seconds:.0f}"}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.case:
        restore(args.case, args.folder)
        return 0
    rows = Rows(args.out, COLUMNS, KEY, "", own=lambda row: False)
    for case in args.cases:
        key = {"case": case, "shape": "×".join(map(str, args.shape))}
        rows.measure(key, partial(measured, case, args.shape))
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
