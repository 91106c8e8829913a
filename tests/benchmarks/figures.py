"""Make the figures that saved_results/README.md shows: ``python tests/benchmarks/figures.py``.

Restores the ten sample slices by main.py, each task as its file has it, with recordings, and one
of them with posterior samples; then copies what that page shows into saved_results/, in main.py's
own tree. The full runs stay in --work_dir, where an interrupted call goes on. The same weights on
the same machine give the same PNGs, byte for byte. What this program does not know is passed on to
main.py, for instance ``--gpu -1``.
"""

import argparse
import os
import shutil
import subprocess
import sys

REPOSITORY = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
TASKS = (
    "denoise_config_mri",
    "mri_deblur_gauss_config",
    "mri_deblur_uniform_config",
    "SR_config_mri",
)
SHOWN = ("colin27_t1_z032", "colin27_t1_z092")
TABLES = ("comparison.png", "metrics.csv", "summary.json")
SPREAD = ("--diffusion_config", "configs/diffusion_config_samples.yaml")  # of the posterior
PICTURES = {"input": ".png", "recon": ".png", "truth": ".png", "gif": ".gif", "std": ".png"}


def restore(task, save_dir, *arguments):
    """Run main.py on one task, at the repository's root."""
    command = [sys.executable, "main.py", "--task_config", f"configs/{task}.yaml"]
    command += ["--save_dir", save_dir, "--overwrite", *arguments]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=REPOSITORY, check=True)


def keep(work_dir, saved_dir):
    """Replace every results folder of saved_dir by what README shows of work_dir's."""
    for folder, _, files in list(os.walk(work_dir)):
        if "summary.json" not in files or os.path.basename(folder) == "vanilla":
            continue
        kept = os.path.join(saved_dir, os.path.relpath(folder, work_dir))
        shutil.rmtree(kept, ignore_errors=True)
        names = [name for name in TABLES if name in files]
        names += [os.path.join(kind, s + end) for kind, end in PICTURES.items() for s in SHOWN]
        for name in names:
            source, target = os.path.join(folder, name), os.path.join(kept, name)
            if os.path.exists(source):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copyfile(source, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work_dir", default=os.path.join(REPOSITORY, "results", "figures"))
    parser.add_argument("--saved_dir", default=os.path.join(REPOSITORY, "saved_results"))
    parser.add_argument("--num_samples", default="4", help="of the posterior")
    args, passed_on = parser.parse_known_args()
    args.work_dir, args.saved_dir = map(os.path.abspath, (args.work_dir, args.saved_dir))
    galleries = {
        "": ["--record"],
        "posterior": ["--num_samples", args.num_samples, "--limit", "1", *SPREAD],
    }
    for name, arguments in galleries.items():
        for task in TASKS:
            restore(task, os.path.join(args.work_dir, name).rstrip(os.sep), *arguments, *passed_on)
    keep(args.work_dir, args.saved_dir)


if __name__ == "__main__":
    main()
