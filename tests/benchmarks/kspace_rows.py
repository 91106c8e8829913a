"""The rows of kspace.csv: kept, resumed, and shown as a table."""

import csv
import os
from collections.abc import Iterator

import numpy as np

from util.files import replacing_text

COLUMNS = ("coils", "mask", "R", "true_R", "seen", "sigma", "method", "weight", "set", "image")
COLUMNS += ("psnr", "ssim", "haarpsi", "in_90", "rescale", "seconds", "prior")
KEY = ("coils", "mask", "R", "sigma", "method", "weight", "set", "image")
MEANS = ("psnr", "ssim", "haarpsi", "seconds", "true_R")


class Table:
    """kspace.csv; every row is on the disk when `add` returns.

    Rows of another prior than `digest` are left out; "" takes them all.
    """

    def __init__(self, path: str, digest: str = ""):
        self.path, self.digest, self.rows = path, digest, {}
        if not os.path.exists(path):
            return
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if not digest or row["prior"] in ("", digest):
                    self.rows[key_of(row)] = row

    def write(self) -> None:
        with replacing_text(self.path) as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(self.rows.values())

    def add(self, row: dict[str, str]) -> None:
        self.rows[key_of(row)] = row
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)

    def forget_weights(self, best: dict[str, str]) -> None:
        """Drop validation rows of `best`'s case and method that have another weight than it."""
        of = key_of(best)
        stale = [
            key
            for key in self.rows
            if key[:5] == of[:5] and key[6] == "val" and float(key[5]) != float(of[5])
        ]
        if stale:
            self.rows = {key: row for key, row in self.rows.items() if key not in stale}
            self.write()


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[k] for k in KEY)


def known_seen(table: Table, row: dict[str, str]) -> str:
    """What another method's row of the same scan says, to save the SVD."""
    scan = ("coils", "mask", "R", "sigma", "image")
    same = (other for other in table.rows.values() if all(other[k] == row[k] for k in scan))
    return next((other["seen"] for other in same if other.get("seen")), "")


def lines(table: Table) -> Iterator[str]:
    """The means over the validation slices, as a table in Markdown."""
    yield "| coils | mask | R (true) | σ | method | λ | images | PSNR | SSIM | HaarPSI | s |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    groups: dict[tuple, list[dict]] = {}
    for row in table.rows.values():
        if row["set"] == "val":
            groups.setdefault(key_of(row)[:6], []).append(row)
    for (coils, mask, R, sigma, method, weight), rows in sorted(groups.items()):
        mean = {k: np.mean([float(r[k]) for r in rows]) for k in MEANS}
        shown = weight if float(weight) else ""
        yield (
            f"| {coils} | {mask} | {R} ({mean['true_R']:.2f}) | {sigma} | {method} | {shown} | "
            f"{len(rows)} | {mean['psnr']:.2f} | {mean['ssim']:.4f} | {mean['haarpsi']:.4f} | "
            f"{mean['seconds']:.1f} |"
        )
