"""The tables of accelerated MRI, made of kspace.csv and kspace_measured.csv."""

import csv
import os
import statistics
from collections.abc import Iterable, Mapping

from tests.benchmarks import rows
from tests.benchmarks.cells import MISSING, markdown
from tests.benchmarks.volume_rows import read

Scans = dict[tuple[str, ...], dict[str, dict[str, dict[str, str]]]]  # case → method → image → row


def _scans() -> Scans:
    """kspace.csv's rows of validation slices."""
    scans: Scans = {}
    path = os.path.join(rows.FOLDER, "kspace.csv")
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["set"] == "val":
                case = (row["coils"], row["mask"], row["R"], row["sigma"])
                scans.setdefault(case, {}).setdefault(row["method"], {})[row["image"]] = row
    return dict(sorted(scans.items()))


def _mean(found: Iterable[Mapping[str, str]], column: str, digits: int) -> str:
    """Of the rows that have a number there; "" if none has."""
    numbers = [float(row[column]) for row in found if row.get(column)]
    return f"{statistics.fmean(numbers):.{digits}f}" if numbers else ""


def kspace() -> str:
    """Accelerated MRI: each method on the slices that all methods of its case have restored."""
    lines = []
    for case, methods in _scans().items():
        single = {m: found for m, found in methods.items() if not _several(found)}
        common = frozenset.intersection(*(frozenset(found) for found in single.values()))
        everyone = [found[image] for found in single.values() for image in common]
        scan = [_mean(everyone, "true_R", 2), _mean(everyone, "seen", 2), str(len(common))]
        for method, found in sorted(single.items()):
            chosen = [found[image] for image in common]
            quality = [_mean(chosen, k, n) for k, n in (("psnr", 2), ("ssim", 3), ("haarpsi", 3))]
            lines.append([*case, method, " / ".join(quality), *scan])
    head = ["coils", "mask", "R", "σ", "method", "PSNR (dB) / SSIM / HaarPSI"]
    return markdown([*head, "true R", "seen", "slices"], lines)


def _several(found: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a method draws several samples."""
    return any(row.get("in_90") for row in found.values())


def kspace_intervals() -> str:
    """Accelerated MRI: how many of the pixels lie within the 90 % intervals of eight samples."""
    lines = [
        [*case, method, _mean(found.values(), "in_90", 3), _mean(found.values(), "rescale", 2),
         _mean(found.values(), "psnr", 2), str(len(found))]
        for case, methods in _scans().items()
        for method, found in sorted(methods.items())
        if _several(found)
    ]  # fmt: skip
    head = ["coils", "mask", "R", "σ", "method", "in 90 %", "factor"]
    head += ["PSNR (dB) of the mean", "slices"]
    return markdown(head, lines) if lines else MISSING


def kspace_measured() -> str:
    """Measured scans: each method with the best weight for each measure, its λ that of PSNR.

    The best of each scan is bold.
    """
    measures = {"psnr": 2, "ssim": 3, "haarpsi": 3}
    best: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in read(os.path.join(rows.FOLDER, "kspace_measured.csv")):
        of = best.setdefault((row["scan"], row["axis"], row["R"]), {})
        known = of.setdefault(row["method"], dict(row))
        if float(row["psnr"]) > float(known["psnr"]):
            known["weight"] = row["weight"]
        for k in measures:
            known[k] = max(known[k], row[k], key=float)
    lines = []
    for case, methods in best.items():
        leaders = {k: max(float(row[k]) for row in methods.values()) for k in measures}
        for method, row in methods.items():
            cells = [f"{float(row[k]):.{n}f}" for k, n in measures.items()]
            ahead = [float(row[k]) == leaders[k] for k in measures]
            cells = [f"**{c}**" if b else c for c, b in zip(cells, ahead, strict=True)]
            weight = row["weight"] if float(row["weight"]) else ""
            lines.append([*case, f"{float(row['true_R']):.2f}", method, weight, *cells,
                          f"{float(row['seconds']):.0f}"])  # fmt: skip
    head = ["scan", "phase encoding along", "R", "true R", "method", "λ"]
    head += ["PSNR (dB)", "SSIM", "HaarPSI", "seconds"]
    return markdown(head, lines) if lines else MISSING
