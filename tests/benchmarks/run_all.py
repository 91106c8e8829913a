"""Measure everything that the tables show: ``python tests/benchmarks/run_all.py --val PATH``.

Writes saved_results/benchmarks/PART.csv, one row for each set of images, task, method, setting,
number of network evaluations and image; ``python tests/benchmarks/report.py`` makes the pages of
them. Says beforehand how long it will take, and resumes: what stands in the CSVs is not measured
again. Rows of another prior are dropped, as no table may mix two. Without --part, what most readers
look for comes first (`parts.ORDER`); `frontier` and `classical` take the settings that the sweeps
have found best.

All methods restore the same measurements with the same network and the same random numbers, those
of main.py. Images that do not ship are named by --val, --ood and --multi; without them their rows
are left. Processes with --share 1/2 and --share 2/2 measure at once, each into files of its own.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.devices import pick_device
from guided_diffusion.prior import Prior
from tests.benchmarks import comparison, parts, rows, settings, tables
from tests.benchmarks.classical import CLASSICAL
from tests.benchmarks.planning import Speed, duration, plan
from tests.benchmarks.tuned import CHOICE, LATER, NEXT
from util.errors import ArgumentParser, UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Measure the restorations that the tables of tests/benchmarks/README.md show.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--part",
        nargs="+",
        choices=parts.PARTS,
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
    add(
        "--share",
        type=share,
        metavar="K/N",
        help="the K'th of N processes that measure at once, each its methods of each task",
    )
    add(
        "--merge",
        action="store_true",
        help="only put together what shares have measured, as every call without --share does, and "
        "drop rows of other priors",
    )
    add("--model_config", default="configs/model_config_mri.yaml", help="YAML of the prior")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--gpu", type=int, default=0, help="index of the GPU, -1 for the CPU")
    return parser.parse_args(argv)


def share(text: str) -> rows.Share:
    """K/N, as in 1/2."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected K/N, as in 1/2, found {text!r}")
    return rows.Share(int(number), int(count))


Key = tuple[str, ...]  # of a row
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


class Work:
    """What is to be measured, of which images, with which prior."""

    def __init__(self, args: argparse.Namespace, prior: Prior) -> None:
        self.args, self.prior = args, prior
        self.images, self.speed = Images(args), Speed(prior)
        self.done: set[Key] = set()  # measured by this call

    def wanted(self, job: settings.Job, most_steps: float) -> bool:
        args = self.args
        return (
            job.task in (*args.tasks, *settings.OWN)
            and job.method in args.methods
            and (args.steps is None or job.steps in args.steps)
            and job.steps <= most_steps
            and (args.share is None or args.share.number == parts.share_of(job, args.share.count))
        )

    def units(self, stage: parts.Stage, choice: parts.Choice, most_steps: float) -> list[Unit]:
        jobs = [job for job in stage(choice) if self.wanted(job, most_steps)]
        return list(units(jobs, self.images, self.args.limit))

    def left(self, stage: parts.Stage, choice: parts.Choice, most_steps: float) -> list[Unit]:
        """What no part has measured with this prior."""
        known, of_any = rows.everything(), ("", comparison.digest_of(self.prior))

        def measured(job: settings.Job, name: str) -> bool:
            row = known.get(rows.group_of(job), {}).get(name)
            return row is not None and row["prior"] in of_any  # "": a classical method's

        return [unit for unit in self.units(stage, choice, most_steps) if not measured(*unit[:2])]

    def ahead(
        self, part: str, most_steps: float, choice: parts.Choice = NEXT
    ) -> dict[Key, settings.Job]:
        """What a part will measure at most, all its stages together."""
        found = self.units if self.args.again else self.left
        keys = {
            rows.key_of(job, name): job
            for stage in parts.PARTS[part]
            for job, name, _ in found(stage, choice, most_steps)
        }
        return {key: job for key, job in keys.items() if key not in self.done}

    def measure(self, part: str, most_steps: float) -> None:
        ahead = self.ahead(part, most_steps)
        print(plan(part, ahead.values(), self.speed), flush=True)
        if self.args.again:
            rows.forget(outdated(part, ahead) - self.done)
        if ahead:
            table = rows.Rows(rows.path_of(part, self.args.share))
            try:
                with tqdm(total=round(self.speed.total(ahead.values())), unit="s") as bar:
                    self.restore(part, most_steps, table, bar)
            finally:
                table.save()

    def restore(self, part: str, most_steps: float, table: rows.Rows, bar: tqdm) -> None:
        for stage in parts.PARTS[part]:
            for job, name, truth in self.left(stage, CHOICE, most_steps):
                bar.set_description(f"{part} {job.task} {job.method} {job.steps}")
                key = rows.key_of(job, name)
                table.add(key, one_row(job, name, truth, self.prior))
                self.done.add(key)
                bar.update(round(self.speed.of(job)))


def outdated(part: str, ahead: dict[Key, settings.Job]) -> set[Key]:
    """The rows to measure anew, and those of a sweep's settings that may not lead any more."""

    def but_setting(key: Key) -> Key:
        return *key[:3], *key[4:]

    chosen = {but_setting(key) for key in ahead} if len(parts.PARTS[part]) > 1 else set()
    found = [tuple(row[k] for k in rows.KEY) for row in rows.of_part(part)]
    return {*ahead, *(key for key in found if but_setting(key) in chosen)}


def units(jobs: list[settings.Job], images: Images, limit: int | None) -> Iterator[Unit]:
    """Every job with its images, every second image first: a table is soon there, if of fewer."""
    for half in (0, 1):
        for job in jobs:
            chosen = images.of(job.set)[:: job.every]
            spread = (chosen[::2] + chosen[1::2])[: job.first][:limit]
            middle = len(chosen[::2])
            for name, truth in spread[middle:] if half else spread[:middle]:
                yield job, name, truth


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


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.share and (args.again or args.merge):
            raise UserError("--share: not with --again or --merge, which need the files alone")
        settings.OWN[:] = [comparison.add_task(path) for path in args.task_config]
        prior = comparison.load_grey_prior(args.model_config, pick_device(args.gpu), args.precision)
        work = Work(args, prior)
        chosen = order(args.part)
        if args.plan:
            say(work, chosen)
        else:
            with rows.held(args.share):
                tidy(args.share, comparison.digest_of(prior))
                for part, most_steps in chosen if not args.merge else ():
                    work.measure(part, most_steps)
        for name in settings.OWN:
            print(f"\n{name}\n\n{tables.frontier(name)}", end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def order(chosen: list[str] | None) -> list[tuple[str, float]]:
    """Parts, and up to how many evaluations."""
    if chosen:
        return [(part, math.inf) for part in chosen]
    return [("own", math.inf)] if settings.OWN else list(parts.ORDER)


def say(work: Work, chosen: list[tuple[str, float]]) -> None:
    """How long each part will take, and all together."""
    ahead: dict[Key, settings.Job] = {}
    choice = LATER if "tuning" in dict(chosen) else NEXT
    for part, most_steps in chosen:
        found = work.ahead(part, most_steps, choice)
        new = {key: job for key, job in found.items() if key not in ahead}
        title = part if most_steps == math.inf else f"{part}, up to {most_steps} evaluations"
        print(plan(title, new.values(), work.speed), flush=True)
        ahead |= new
    if len(chosen) > 1:
        print(f"in all: at most {duration(work.speed.total(ahead.values()))}")


def tidy(share: rows.Share | None, digest: str) -> None:
    """Put shares together and drop rows of other priors, if nobody else is measuring."""
    if share is None:
        rows.merge()
        rows.forget_priors_but(digest)
    elif rows.of_other_priors(digest):
        raise UserError(f"{rows.FOLDER}: has rows of another prior; --merge drops them")


if __name__ == "__main__":
    sys.exit(main())
