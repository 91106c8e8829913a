"""A CSV of measured rows that a benchmark of volumes resumes, and the tables of such files."""

import csv
import math
import os
from collections.abc import Callable, Iterable, Mapping

from tests.benchmarks.rows import FOLDER
from util.files import replacing_text

HEADS = {  # column of a CSV → head of a table's, where they differ
    **{"psnr": "PSNR (dB)", "ssim": "SSIM", "haarpsi": "HaarPSI", "noise_percent": "noise (%)"},
    **{"ssim_rows": "SSIM along rows", "ssim_columns": "SSIM along columns", "delta": "Δ (%)"},
    **{"delta_mean": "Δ of the mean (%)", "psnr_sample": "PSNR of a sample (dB)"},
    **{"psnr_mean": "PSNR of the mean (dB)", "in_50": "in 50 %", "in_90": "in 90 %"},
    **{"rescale": "factor", "drawn": "drawn share", "in_plane": "in the plane"},
    **{"sigma_error": "error of σ", "sigma_percent": "σ (%)", "peak_MB": "peak (MB)"},
    **{"thickness": "thickness (mm)", "spacing": "spacing (mm)", "sigma": "σ"},
}
OURS = "ours"  # begins the names of this program's own methods, whose rows a new prior replaces
Row = dict[str, str]
Lines = tuple[list[str], list[list[str]]]  # head and body of a table


def shown(value: float | str) -> str:
    return f"{value:.5g}" if isinstance(value, float) else value


class Rows:
    """The rows of one file, by the columns `key`; on the disk when `measure` returns.

    Args:
        prior: what a row of this program's own method must have in the column "prior".
        own: whether a row, of which the key is known, is of this program's own method.
    """

    def __init__(
        self,
        path: str,
        columns: tuple[str, ...],
        key: tuple[str, ...],
        prior: str,
        own: Callable[[Mapping[str, str]], bool] = lambda row: row["method"].startswith(OURS),
    ):
        self.path, self.columns, self.key, self.prior, self.own = path, columns, key, prior, own
        self.rows = {tuple(row[k] for k in key): row for row in read(path)}

    def measure(self, key: Mapping[str, str], make: Callable[[], Mapping[str, float | str]]) -> Row:
        """The row of this key: as it stands there, or else what `make` finds, added."""
        at = tuple(key[k] for k in self.key)
        row, own = self.rows.get(at), self.own(key)
        if row is None or (own and row["prior"] != self.prior):
            found = {k: shown(v) for k, v in make().items()}
            self.rows[at] = row = {**key, **found, "prior": self.prior if own else ""}
            with replacing_text(self.path) as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows.values())
            print(*row.values(), sep=", ", flush=True)
        return row


def read(path: str) -> list[Row]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _order(value: str) -> tuple[float, str]:
    """Numbers by their size, before texts."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def compared(
    name: str, groups: tuple[str, ...], measures: Mapping[str, int], least: tuple[str, ...] = ()
) -> Lines:
    """A row for each of the groups and methods of a file, the best of each group in bold.

    Args:
        name: of the CSV, without its ending.
        groups: the columns in which the rows that are compared agree.
        measures: column → digits shown; of those in `least` the smallest is the best.
    """
    rows = read(os.path.join(FOLDER, f"{name}.csv"))
    rows.sort(key=lambda row: [_order(row[k]) for k in groups])
    of: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        of.setdefault(tuple(row[k] for k in groups), []).append(row)
    lines = []
    for group, members in of.items():
        members.sort(key=lambda row: row["method"].startswith(OURS))
        best = {k: (min if k in least else max)(float(row[k]) for row in members) for k in measures}
        for row in members:
            cells = [f"{float(row[k]):.{digits}f}" for k, digits in measures.items()]
            bold = [float(row[k]) == best[k] for k in measures]
            cells = [f"**{c}**" if b else c for c, b in zip(cells, bold, strict=True)]
            lines.append([*group, row["method"], *cells, f"{float(row['seconds']):.0f}"])
    return heads([*groups, "method", *measures, "seconds"]), lines


def heads(columns: Iterable[str]) -> list[str]:
    return [HEADS.get(name, name) for name in columns]


def listed(name: str, digits: Mapping[str, int]) -> Lines:
    """All rows of a file, without the prior; `digits` are those shown of each number."""
    rows = read(os.path.join(FOLDER, f"{name}.csv"))
    columns = [k for k in (rows[0] if rows else ()) if k != "prior"]
    lines = [
        [f"{float(row[k]):.{digits[k]}f}" if k in digits and row[k] else row[k] for k in columns]
        for row in rows
    ]
    return heads(columns), lines
