"""Measure everything that the tables show: ``python tests/benchmarks/run_all.py --val PATH``.

Writes saved_results/benchmarks/PART.csv, one row for each set of images, task, method, setting,
number of network evaluations and image; ``python tests/benchmarks/report.py`` makes the pages of
them. Says beforehand how long it will take, and resumes: what stands in the CSVs is not measured
again. Rows of another prior are dropped, as no table may mix two. `tuning` comes first, for
`frontier`, `thousand` and `classical` take the settings that are best there.

All methods restore the same measurements with the same network and the same random numbers, those
of main.py. Images that do not ship are named by --val, --ood and --multi; without them their rows
are left.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.devices import pick_device
from guided_diffusion.methods import METHODS
from guided_diffusion.prior import Prior
from tests.benchmarks import comparison, rows, settings, tables
from tests.benchmarks.classical import CLASSICAL
from tests.benchmarks.tuned import tuned
from util.errors import ArgumentParser, UserError

APART = ("deepinv", "own")  # parts that are measured where they are asked for
CLASSICAL_SECONDS = 3.0  # an image, on average over methods and grids


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure the restorations that the tables of tests/benchmarks/README.md show.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--part",
        nargs="+",
        choices=settings.PARTS,
        default=None,
        help="what to measure, in this order; by default all but deepinv, which needs pip install "
        "deepinv, and own, which is of --task_config",
    )
    add("--val", metavar="PATH", default="", help="folder of validation slices, not shipped")
    add("--ood", metavar="PATH", default="", help="folder of slices of other scanners, not shipped")
    add("--multi", metavar="PATH", default="", help="folder of several sources' validation slices")
    add(
        "--task_config",
        nargs="+",
        metavar="FILE",
        default=[],
        help="task files of your own: the frontier of all methods is measured and printed",
    )
    add("--tasks", nargs="+", choices=settings.ALL_TASKS, default=list(settings.ALL_TASKS))
    add("--methods", nargs="+", choices=settings.names(), default=list(settings.names()))
    add("--steps", nargs="+", type=int, default=None, help="only these numbers of evaluations")
    add("--limit", type=int, default=None, help="only so many images of every set, spread over it")
    add("--again", action="store_true", help="measure the chosen rows anew: the program changed")
    add("--plan", action="store_true", help="only say how long it would take")
    add("--model_config", default="configs/model_config_mri.yaml", help="YAML of the prior")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--gpu", type=int, default=0, help="index of the GPU, -1 for the CPU")
    return parser.parse_args(argv)


Unit = tuple[settings.Job, str, torch.Tensor]  # a job, and the name and truth of an image


class Images:
    """The images of the sets whose folders are known."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folders = {"--val": args.val, "--ood": args.ood, "--multi": args.multi, "": ""}
        self.read: dict[str, list[tuple[str, torch.Tensor]]] = {}

    def of(self, name: str) -> list[tuple[str, torch.Tensor]]:
        if name not in self.read:
            self.read[name] = self._read(name)
        return self.read[name]

    def _read(self, name: str) -> list[tuple[str, torch.Tensor]]:
        chosen = settings.SETS[name]
        root = chosen.root or self.folders[chosen.flag]
        if not root:
            return []
        folder = os.path.join(root, chosen.inside) if chosen.inside else root
        if os.path.isdir(root) and not os.path.isdir(folder):
            return []
        flag = chosen.flag or "--root"
        return comparison.read_images(folder, flag, chosen.first, chosen.every)[: chosen.most]


def jobs_of(part: str, args: argparse.Namespace) -> list[settings.Job]:
    return [
        job
        for job in settings.PARTS[part](tuned)
        if job.task in (*args.tasks, *settings.OWN)
        and job.method in args.methods
        and (args.steps is None or job.steps in args.steps)
    ]


def units(jobs: list[settings.Job], images: Images, limit: int | None) -> Iterator[Unit]:
    """Every job with its images, every second image first: a table is soon there, if of fewer."""
    for start in (0, 1):
        for job in jobs:
            chosen = images.of(job.set)[:: job.every]
            first = len(chosen[::2]) if start else 0
            left = None if limit is None else max(limit - first, 0)
            for name, truth in chosen[start::2][:left]:
                yield job, name, truth


def evaluations(job: settings.Job) -> int:
    """Network evaluations of an image, at most."""
    return job.steps * job.setting.get(settings.SAMPLES, 1)


class Speed:
    """Seconds of one network evaluation, measured here and now: without and with its gradient."""

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.known: dict[bool, float] = {}

    def seconds(self, differentiated: bool) -> float:
        if differentiated not in self.known:
            self.known[differentiated] = self._measure(differentiated)
        return self.known[differentiated]

    def _measure(self, differentiated: bool) -> float:
        self.prior.lay_out(differentiated)
        size = self.prior.image_size
        x = torch.zeros(1, 1, size, size, device=self.prior.device)
        t = torch.full((1,), 500, device=self.prior.device)
        return min(self._once(x, t, differentiated) for _ in range(3))

    def _once(self, x: torch.Tensor, t: torch.Tensor, differentiated: bool) -> float:
        start = time.perf_counter()
        if differentiated:
            x = x.clone().requires_grad_()
            torch.autograd.grad(self.prior.network(x, t).sum(), x)
        else:
            with torch.inference_mode():
                self.prior.network(x, t)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def of(self, job: settings.Job) -> float:
        """Seconds of an image."""
        if job.method in CLASSICAL:
            return CLASSICAL_SECONDS
        return evaluations(job) * self.seconds(
            job.method in METHODS and METHODS[job.method].needs_gradient
        )


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def left(part: str, args: argparse.Namespace, images: Images, prior: Prior) -> list[Unit]:
    """What is to be measured: what no part has measured with this prior, or all of it."""
    found = list(units(jobs_of(part, args), images, args.limit))
    known = {} if args.again else rows.everything()

    def measured(job: settings.Job, name: str) -> bool:
        row = known.get(rows.group_of(job), {}).get(name)
        return row is not None and row["prior"] in (
            "",
            comparison.digest_of(prior),
        )  # "": a classical method's

    return [unit for unit in found if not measured(*unit[:2])]


def measure_part(
    part: str, args: argparse.Namespace, images: Images, prior: Prior, speed: Speed
) -> None:
    work = left(part, args, images, prior)
    print(plan(part, work, speed), flush=True)
    if args.plan or not work:
        return
    rows.forget({rows.key_of(job, name) for job, name, _ in work})
    rows.forget_priors_but(comparison.digest_of(prior))
    table = rows.Rows(rows.path_of(part))
    try:
        with tqdm(total=round(sum(speed.of(job) for job, *_ in work)), unit="s") as bar:
            for job, name, truth in work:
                bar.set_description(f"{part} {job.task} {job.method} {job.steps}")
                table.add(rows.key_of(job, name), one_row(job, name, truth, prior))
                bar.update(round(speed.of(job)))
    finally:
        table.save()


def one_row(
    job: settings.Job, name: str, truth: torch.Tensor, prior: Prior
) -> dict[str, float | str]:
    image = comparison.measure(job.task, name, truth)
    start = time.perf_counter()
    estimate = comparison.estimate(job, image, prior)
    seconds = time.perf_counter() - start
    return {
        **comparison.figures_of(image, estimate.x_hat),
        **estimate.figures,
        "evaluations": estimate.evaluations,
        "seconds": seconds,
        "prior": "" if job.method in CLASSICAL else comparison.digest_of(prior),
        "machine": comparison.machine(prior),
    }


def plan(part: str, work: list[Unit], speed: Speed) -> str:
    total = sum(evaluations(job) for job, *_ in work)
    seconds = sum(speed.of(job) for job, *_ in work)
    return (
        f"{part}: {len(work)} images to restore, {total} network evaluations, "
        f"at most {duration(seconds)}"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        settings.OWN[:] = [comparison.add_task(path) for path in args.task_config]
        standard = ["own"] if settings.OWN else [n for n in settings.PARTS if n not in APART]
        images = Images(args)
        prior = comparison.load_grey_prior(args.model_config, pick_device(args.gpu), args.precision)
        os.makedirs(rows.FOLDER, exist_ok=True)
        speed = Speed(prior)
        for part in args.part or standard:
            measure_part(part, args, images, prior, speed)
        for name in settings.OWN:
            print(f"\n{name}\n\n{tables.frontier(name)}", end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
