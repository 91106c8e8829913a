"""The measured rows, a CSV file for each part: one row for each job and image.

Processes that share the work write a file each beside it, which `merge` puts into the part's own.
"""

import contextlib
import csv
import functools
import glob
import io
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.benchmarks.parts import PARTS
from tests.benchmarks.settings import ALL_TASKS, REPOSITORY, SETS, Job, label, names
from util.errors import UserError
from util.files import replacing_text
from util.lock import NAME, Lock, Locked
from util.metrics import METRICS

FOLDER = os.path.join(REPOSITORY, "saved_results", "benchmarks")
KEY = ("set", "task", "method", "setting", "steps", "image")
HEADLINE = ("psnr", "ssim", "haarpsi")  # stand first
CALIBRATION = ("in_50", "in_90", "rescale")  # of means of samples

Row = dict[str, str]


def metrics() -> tuple[str, ...]:
    """Every metric of the program, and the benchmarks' own."""
    return (*HEADLINE, *(name for name in METRICS if name not in HEADLINE), "hf_ratio")


def numbers() -> tuple[str, ...]:
    return "evaluations", *metrics(), *CALIBRATION, "seconds"


def columns(rows: Iterable[Row] = ()) -> tuple[str, ...]:
    """Of a file of `rows`: a column that is not known, of a metric that is gone, is kept."""
    known = (*KEY, *numbers(), "prior", "machine")
    return (*known, *dict.fromkeys(name for row in rows for name in row if name not in known))


def group_of(job: Job) -> tuple[str, ...]:
    return job.set, job.task, job.method, label(job.setting), str(job.steps)


def key_of(job: Job, image: str) -> tuple[str, ...]:
    return *group_of(job), image


class Rows:
    """One part's file; every row is on the disk when `add` returns."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.rows = {tuple(r[k] for k in KEY): r for r in read(path)}
        self.columns: tuple[str, ...] = ()  # of the file
        if os.path.exists(path):
            self.save()  # with today's columns, without the half row that a stop may have left

    def add(self, key: tuple[str, ...], figures: dict[str, float | str]) -> None:
        row = dict(zip(KEY, key, strict=True))
        row |= {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in figures.items()}
        self.rows[key] = row
        names = columns(self.rows.values())
        if names != self.columns:
            self.save()
            return
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, names, restval="", lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def save(self) -> None:
        """Write the file anew, each row once and in the order of the tables."""
        ordered = sorted(self.rows.values(), key=place)
        self.columns = columns(ordered)
        with replacing_text(self.path) as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(ordered)


def forget(keys: set[tuple[str, ...]]) -> None:
    """Take rows out of all files: of another prior, or of a program that has changed."""
    for path in {row_path for key, row_path in _places().items() if key in keys}:
        table = Rows(path)
        table.rows = {key: row for key, row in table.rows.items() if key not in keys}
        table.save()


def forget_priors_but(digest: str) -> None:
    """Take the rows of all other priors out of all files; those of no prior stay."""
    forget(of_other_priors(digest))


def of_other_priors(digest: str) -> set[tuple[str, ...]]:
    found = [row for path in paths() for row in read(path)]
    return {tuple(row[k] for k in KEY) for row in found if row["prior"] not in ("", digest)}


def _places() -> dict[tuple[str, ...], str]:
    return {tuple(row[k] for k in KEY): path for path in paths() for row in read(path)}


def place(row: Row) -> tuple[tuple[int, str], ...]:
    """Where a row stands in its file."""

    def rank(names: Iterable[str], name: str) -> tuple[int, str]:
        known = list(names)
        return (known.index(name) if name in known else len(known), name)

    return (
        rank(SETS, row["set"]),
        rank(ALL_TASKS, row["task"]),
        rank(names(), row["method"]),
        (0, row["setting"]),
        (int(row["steps"]), row["image"]),
    )


def read(path: str) -> list[Row]:
    """The rows of a file, none where there is no file; what a stop amid a row left is skipped.

    Raises:
        UserError: a file without the columns that name a row.
    """
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    found = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if not set(KEY) <= set(found.fieldnames or ()):
        raise UserError(f"{path}: expected the columns {', '.join(KEY)}")
    return list(found)


Group = tuple[str, ...]  # set, task, method, setting, steps


def everything() -> dict[Group, dict[str, Row]]:
    """Every job's rows by image, of all parts, as the files are now."""
    return _unchanged(tuple((path, os.stat(path).st_mtime_ns) for path in paths()))


@functools.lru_cache(maxsize=1)
def _unchanged(files: tuple[tuple[str, int], ...]) -> dict[Group, dict[str, Row]]:
    found: dict[Group, dict[str, Row]] = {}
    for path, _ in files:
        for row in read(path):
            found.setdefault(tuple(row[k] for k in KEY[:-1]), {})[row["image"]] = row
    return found


class Share(NamedTuple):
    """The first of two processes is 1 of 2."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}of{self.count}"


FILES = {"headline": "frontier"}  # part → the part whose file it writes; otherwise its own


def path_of(part: str, share: Share | None = None) -> str:
    return os.path.join(FOLDER, FILES.get(part, part) + (f".{share}" if share else "") + ".csv")


def shares_of(part: str) -> list[str]:
    """The files that processes have written which shared the work."""
    pattern = glob.escape(path_of(part)[: -len(".csv")]) + ".[0-9]*of[0-9]*.csv"
    return sorted(glob.glob(pattern))


def paths() -> list[str]:
    """Every file of rows; what stands in a later one counts."""
    found = [path for part in PARTS for path in (path_of(part), *shares_of(part))]
    return [path for path in dict.fromkeys(found) if os.path.exists(path)]


def of_part(part: str) -> list[Row]:
    """The rows of a part's file, those of its shares included."""
    found = [row for path in (path_of(part), *shares_of(part)) for row in read(path)]
    return list({tuple(row[k] for k in KEY): row for row in found}.values())


def merge() -> None:
    """Put the rows of all shares into their parts' files; needs the folder for itself."""
    for part in PARTS:
        shares = shares_of(part)
        if shares:
            table = Rows(path_of(part))
            table.rows = {tuple(row[k] for k in KEY): row for row in of_part(part)}
            table.save()
        for path in shares:
            os.remove(path)


@contextlib.contextmanager
def held(share: Share | None) -> Iterator[None]:
    """Keep the folder for this process, or a share of it beside the other shares.

    Raises:
        UserError: another process has it.
    """
    os.makedirs(FOLDER, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            if share:
                own = Lock(FOLDER, f"{NAME}-{share}")
                own.acquire()
                held.callback(own.release)
            whole = Lock(FOLDER)
            whole.acquire(shared=share is not None)
            held.callback(whole.release, last=share is None)
        except Locked as owner:
            raise UserError(
                f"{FOLDER}: in use by {owner}; --share 1/2 and --share 2/2 may run side by side"
            ) from None
        yield
