"""The results folder of a run: its tree, its metrics table and its summary."""

import glob
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from util import averages
from util.columns import DIGEST, FIGURES, SOURCE, columns
from util.config import differing
from util.errors import UserError
from util.files import PART, replacing_text
from util.image_files import (
    read_png,
    write_comparison,
    write_floats,
    write_gif,
    write_mp4,
    write_png,
    write_std_map,
)
from util.journal import Journal, Row, read_table, set_aside, write_rows
from util.lock import NAME as LOCK
from util.lock import Lock, Locked
from util.metrics import METRICS, image_metrics, interval

FOLDERS = (
    *("input", "cubic", "recon", "truth", "samples", "std", "slices", "volumes", "unfinished"),
    *("residual", "sigma", "lower", "upper", "interval", "mask"),
    *("progress", "gif", "video", "report", "bids"),
)
FILES = ("metrics.csv", "fastmri.csv", "summary.json", "comparison.png", "report.html")
OURS = ("summary.json", "metrics.csv")  # of these at least one is in every folder of results
NAMED = 3  # settings that differ
COMPARED = 4  # images in comparison.png
COLUMNS = ("input", "cubic", "recon", "truth")  # of it


class Item(Protocol):
    """One image of a run.

    floats: where its result is also kept as floats, a folder and an ending, or None.
    digest: of what was read, by which a later run knows it again; "" for a sample of the prior.
    """

    @property
    def name(self) -> str: ...

    @property
    def floats(self) -> tuple[str, str] | None: ...

    @property
    def digest(self) -> str: ...

    def to_floats(self, x: NDArray) -> NDArray: ...

    def picture(self, x: NDArray) -> NDArray: ...


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def open_results(
    folder: str,
    title: str,
    settings: Mapping[str, Any],
    items: Sequence[Item],
    overwrite: bool,
    rank: int | None = None,
    read: Sequence[str] = (),
) -> "Results":
    """Claim a results folder, for a run or for one of the processes that share it.

    A folder that a run with the same settings left unfinished is resumed. Of several processes
    the first opens the folder; each notes its rows in a table of its own, and one of them merges
    these at the end, or the next run does.

    Args:
        title: stands over the comparison picture.
        settings: all that decides the files' contents; another run's folder is refused.
        items: the images to restore, in the order of the tables.
        rank: this process's number where several share the images; None for one on its own.
        read: local files and folders that the run reads, which `overwrite` never replaces.

    Raises:
        UserError: the folder cannot be written, is in use by another run, or holds a run with
            other settings (or files that no run wrote) and `overwrite` is not given, or would
            replace what the run reads.
    """
    # As they are read back: JSON has no number that is not finite.
    settings = json.loads(json.dumps(settings), parse_constant=lambda _: None)
    lock = Lock(folder)
    table = os.path.join(folder, "metrics.csv")
    own = table if rank is None else os.path.join(folder, f"metrics.rank{rank}.csv")
    results = Results(folder, title, settings, list(items), lock, Journal(own))
    try:
        os.makedirs(folder, exist_ok=True)
        lock.acquire(shared=bool(rank))
        if rank:  # the first process has opened the folder
            results.read([table])
            return results
        # What was killed while it wrote its first file has left only a part of that.
        if any(n != LOCK and not n.startswith(PART) for n in os.listdir(folder)):
            results.check_earlier(overwrite, read)
        results.write_summary(finished=False)
        if rank is None:
            results.journal = Journal(own, results.columns_of(list(results.rows)))
        else:
            lock.share()
    except Locked as owner:
        raise UserError(
            f"--save_dir: {folder} is in use by {owner}; wait for its end or choose another "
            "--save_dir (several processes share the images of one run if torchrun or mpiexec "
            "starts them, not srun alone)"
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(f"--save_dir: cannot write {folder} ({error.strerror or error})") from None
    except BaseException:
        lock.release()
        raise
    return results


@dataclass
class Results:
    """One run's files, see `open_results`; `rows` holds the metrics of each image by name."""

    folder: str
    title: str
    settings: Mapping[str, Any]
    items: list[Item]
    lock: Lock
    journal: Journal
    rows: dict[str, Row] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)  # columns of metrics.csv that are not ours
    notes: list[str] = field(default_factory=list)  # what a user is to be told

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.items]

    def read(self, paths: Iterable[str]) -> None:
        """Read what was noted, in these tables; the last word counts."""
        rows: dict[str, Row | None] = {}
        for path in paths:
            table = read_table(path)
            if table.unread:
                self.notes.append(
                    f"{path} holds lines that are no rows of it, kept in {set_aside(path)}"
                )
            rows |= table.rows
            known = columns()
            self.extra += [c for c in table.columns if c not in known and c not in self.extra]
        self.rows = {name: row for name, row in rows.items() if row is not None}

    def check_earlier(self, overwrite: bool, read: Sequence[str] = ()) -> None:
        """Take over a folder that is not empty; raises UserError, see `open_results`."""
        try:
            with open(os.path.join(self.folder, "summary.json"), encoding="utf-8") as file:
                earlier = json.load(file)["settings"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            earlier = None
        earlier = earlier if isinstance(earlier, dict) else None
        if earlier == self.settings:
            self.merge()
            return
        if not overwrite:
            if earlier is None:
                found = "files that no run of this program left there"
            else:
                keys = list(differing(earlier, self.settings))
                more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
                found = f"a run with another {' and '.join(keys[:NAMED])}{more}"
            raise UserError(
                f"--save_dir: {self.folder} holds {found}; choose another --save_dir, "
                "or --overwrite to replace it"
            )
        self._check_nothing_read_is_lost(read)
        if any(os.path.exists(os.path.join(self.folder, name)) for name in OURS):
            for name in FOLDERS:
                path = os.path.join(self.folder, name)
                shutil.rmtree(path, ignore_errors=True)
                if os.path.exists(path):
                    raise UserError(f"--overwrite: {path} cannot be removed; is a file in it open?")
            for path in [os.path.join(self.folder, name) for name in FILES] + self._rank_tables():
                if os.path.exists(path):
                    os.remove(path)

    def _check_nothing_read_is_lost(self, read: Sequence[str]) -> None:
        """Raises UserError where what the run reads lies among its results."""
        ours = [os.path.join(os.path.realpath(self.folder), name) for name in (*FOLDERS, *FILES)]
        for path in read:
            real = os.path.realpath(path)
            if any(real == one or real.startswith(one + os.sep) for one in ours):
                raise UserError(
                    f"--overwrite: {self.folder} holds what the run reads ({path}); choose another "
                    "--save_dir"
                )

    def _rank_tables(self) -> list[str]:
        """The tables of a run of several processes, where they are not merged yet."""
        return sorted(glob.glob(os.path.join(glob.escape(self.folder), "metrics.rank*.csv")))

    def merge(self) -> None:
        """Read what all processes have noted, and write metrics.csv in its final form."""
        table, others = os.path.join(self.folder, "metrics.csv"), self._rank_tables()
        self.read([table, *others])
        listed = set(self.names)
        names = [n for n in self.names if n in self.rows]
        names += [n for n in self.rows if n not in listed]
        if names:
            write_rows(table, self.columns_of(names), {name: self.rows[name] for name in names})
        elif os.path.exists(table):  # part of a row, which none must be added to
            os.remove(table)
        for path in others:
            os.remove(path)

    def is_done(self, item: Item, kind: str, gif: bool, mp4: bool) -> bool:
        """Whether an earlier run with the same settings wrote all files of this very image.

        Args:
            kind: the folder that shows the image read, "truth" or "input"; "" for a sample of the
                prior.
        """
        row = self.rows.get(item.name)
        if row is None or row.get(DIGEST, "") != item.digest:
            return False
        files = [("recon", ".png")] + [("gif", ".gif")] * gif + [("video", ".mp4")] * mp4
        files += [] if item.floats is None else [item.floats]
        files += [(kind, ".png")] if kind else []
        paths = [os.path.join(self.folder, kind, item.name + end) for kind, end in files]
        return all(map(os.path.exists, paths))

    def begin(self, name: str) -> None:
        """Take back the row of an image that is restored anew, as its files will not match it."""
        if self.rows.pop(name, None) is not None:
            self.journal.add(name, {})

    def path(self, kind: str, name: str) -> str:
        """Path of a file in one of the subfolders, which is made if need be."""
        folder = os.path.join(self.folder, kind)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, name)

    def add(
        self,
        item: Item,
        mean: NDArray,
        samples: NDArray,
        truth: NDArray | None,
        y: NDArray | None,
        mask: NDArray[np.bool_] | None,
        other: NDArray | None,
        figures: Mapping[str, float],
        frames: Sequence[NDArray[np.uint8]],
        gif: bool,
        mp4: bool,
        sampled: NDArray[np.bool_] | None = None,
        source: str = "",
        factor: float = 1.0,
    ) -> str:
        """Write an image's files, and last its row of metrics.csv, which says that it is done.

        Args:
            mean: (C, H, W) in [-1, 1], for recon/.
            samples: (K, C, H, W) in [-1, 1], the posterior samples.
            truth, y: (C, H, W) and the measurement; truth is None for a measured image, and both
                are for a sample of the prior.
            mask: (H, W) or (C, H, W), the pixels of which metrics are taken; None for all.
            other: x as a simpler way restores it, for a picture beside; None for none.
            figures: what is known without a truth, see `FIGURES`.
            frames: uint8 frames of the sampling, for progress/ and a GIF, an MP4, or both.
            sampled: (1, N), (N, 1) or (H, W), what of k-space was measured, for mask/; None where
                there are none.
            source: what the image is called where `item.name` is not its own name.
            factor: on the samples' standard deviation, for interval/.

        Returns:
            One line for the terminal.
        """
        name, png = item.name, f"{item.name}.png"
        row: dict[str, float] = {}
        write_png(self.path("recon", png), item.picture(mean))
        if item.floats is not None:
            folder, end = item.floats
            write_floats(self.path(folder, name + end), item.to_floats(mean))
        if len(samples) > 1:
            self._write_spread(item, samples)
        if y is not None:
            write_png(self.path("input", png), item.picture(y))
        if other is not None:
            write_png(self.path("cubic", png), item.picture(other))
        if truth is not None:
            write_png(self.path("truth", png), item.picture(truth))
            row = image_metrics(mean, truth, mask)
            if len(samples) > 1:
                single = image_metrics(samples[0], truth, mask)
                row |= {f"sample_{k}": v for k, v in single.items()}
        if sampled is not None:
            self._write_scan(item, mean, samples, sampled, factor)
        if gif:
            for i, frame in enumerate(frames):
                write_png(self.path(os.path.join("progress", name), f"{i:04d}.png"), frame)
            write_gif(self.path("gif", f"{name}.gif"), frames)
        if mp4:
            write_mp4(self.path("video", f"{name}.mp4"), frames)
        # Rounded here already, so that means do not depend on having been read back.
        row = {k: float(f"{v:.6g}") for k, v in (row | dict(figures)).items()}
        words = {SOURCE: source, DIGEST: item.digest}
        self.rows[name] = {**row, **{k: v for k, v in words.items() if v}}
        self.journal.add(name, self.rows[name])
        return f"{name}: {', '.join(self._shown(row))}"

    @staticmethod
    def _shown(row: Mapping[str, float]) -> list[str]:
        """What the line that is printed for an image says of it."""
        line = [m.show(row[k]) for k, m in METRICS.items() if m.line and k in row]
        line += [f"{k} {row[k]:.3g}" for k in FIGURES if k in row and k != "seconds"]
        return [*line, f"{row['seconds']:.1f} s"]

    def _write_spread(self, item: Item, samples: NDArray) -> None:
        name = item.name
        for k, sample in enumerate(samples):
            write_png(self.path("samples", f"{name}_{k}.png"), item.picture(sample))
            if item.floats and item.floats[1] == ".npy":  # a volume is put together of them
                write_floats(self.path("samples", f"{name}_{k}.npy"), item.to_floats(sample))
        std = samples.std(axis=0, ddof=1)
        write_floats(self.path("std", f"{name}.npy"), std)
        write_std_map(self.path("std", f"{name}.png"), item.picture(std).clip(min=0))

    def _write_scan(
        self, item: Item, mean: NDArray, samples: NDArray, sampled: NDArray, factor: float
    ) -> None:
        """What scans have besides: their mask and, of several samples, the 90 % intervals."""
        name = item.name
        write_floats(self.path("mask", f"{name}.npy"), sampled.squeeze())
        mask = np.broadcast_to(2.0 * sampled - 1, (1, *mean.shape[-2:]))
        write_png(self.path("mask", f"{name}.png"), mask)
        if len(samples) > 1:
            bounds = interval(mean, samples, factor)
            write_floats(self.path("interval", f"{name}.npy"), bounds)
            for bound, end in zip(bounds, ("low", "high"), strict=True):
                write_png(self.path("interval", f"{name}_{end}.png"), item.picture(bound))

    def columns_of(self, names: Iterable[str]) -> list[str]:
        """The columns that these images have values in, in the order of the table."""
        found = {key for n in names if n in self.rows for key in self.rows[n]}
        return [key for key in (*columns(), *self.extra) if key in found]

    def write_comparison(self) -> None:
        """Write comparison.png, of the first images that were measured, with the truth if known."""
        rows = []
        for name in [n for n in self.names if n in self.rows][:COMPARED]:
            numbers = {k: v for k, v in self.rows[name].items() if isinstance(v, float)}
            shown = [m.show(numbers[k]) for k, m in METRICS.items() if m.line and k in numbers]
            if not shown and "residual" in numbers:
                shown = [f"residual {numbers['residual']:.3g}"]
            paths = {k: os.path.join(self.folder, k, f"{name}.png") for k in COLUMNS}
            images = {k: read_png(p) for k, p in paths.items() if os.path.exists(p)}
            if "input" in images:
                rows.append((name, images, ", ".join(shown)))
        if rows:
            write_comparison(os.path.join(self.folder, "comparison.png"), rows, self.title)

    def finite(self) -> averages.Finite:
        """See `averages.finite`, of this run's images."""
        rows = [self.rows[n] for n in self.names if n in self.rows]
        return averages.finite(rows, self.columns_of(self.names))

    def table(self) -> str:
        """Means and standard deviations over this run's images, as lines of text."""
        done = sum(n in self.rows for n in self.names)
        return "\n".join([f"{done} images in {self.folder}", *averages.lines(self.finite())])

    def write_summary(self, finished: bool = True, failed: Iterable[str] = ()) -> None:
        summary = {
            "finished": finished,
            "images": sum(n in self.rows for n in self.names),
            "failed": list(failed),
            "means": averages.means(self.finite()),
            "settings": self.settings,
            "versions": versions(),
        }
        with replacing_text(os.path.join(self.folder, "summary.json")) as file:
            json.dump(summary, file, indent=2, allow_nan=False)
            file.write("\n")
