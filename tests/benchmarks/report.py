"""Make the tables and plots of the pages from the CSVs: ``python tests/benchmarks/report.py``.

In tests/benchmarks/README.md and models/README.md, what stands between ``<!-- table NAME … -->``
and ``<!-- end of table -->`` is replaced by what `tables.TABLES` makes of the CSVs in
saved_results/benchmarks/. The prose around it is written by hand, without figures.
"""

import argparse
import hashlib
import os
import re
import sys

import imageio.v3 as iio
from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from guided_diffusion.methods import METHODS
from tests.benchmarks import cells, comparison, rows, settings, tables
from tests.benchmarks.settings import REPOSITORY
from tests.benchmarks.sweeps import SHIPPED_STEPS, outdated_scales
from tests.benchmarks.tuned import sweep
from util.errors import ArgumentParser, UserError
from util.files import replacing, replacing_text

PAGES = ("tests/benchmarks/README.md", "models/README.md")
MARKED = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Lines = dict[str, list[tuple[float, float]]]  # name of a line → its points


def page(text: str) -> str:
    """The page with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        name, *arguments = found[2].split()
        if name not in tables.TABLES:
            known = ", ".join(tables.TABLES)
            raise UserError(f"expected a table of {known}, found {name!r}")
        return f"{found[1]}\n{tables.TABLES[name](*arguments)}\n{found[3]}"

    return MARKED.sub(table, text)


def read(name: str) -> str:
    with open(os.path.join(REPOSITORY, name), encoding="utf-8") as file:
        return file.read()


def frontier_lines() -> dict[tuple[str, str], Lines]:
    """Metric, task → the lines of the frontier's plot."""
    found: dict[tuple[str, str], Lines] = {}
    for metric in rows.HEADLINE:
        for task in settings.TASKS:
            lines: Lines = {}
            for method in METHODS:
                for kind in cells.kinds_of(method):
                    points: dict[float, float] = {}
                    for steps in settings.STEPS:
                        means = cells.on_frontier(task, method, kind, steps)
                        if means is not None:
                            points[means["evaluations"]] = means[metric]
                    lines[cells.named(method, kind)] = sorted(points.items())
            found[metric, task] = lines
    return found


def lambda_lines() -> dict[tuple[str, str], Lines]:
    """DMPS on the first tuning slices at 100 evaluations over its λ, a line for each task."""
    found: dict[tuple[str, str], Lines] = {}
    for metric in rows.HEADLINE:
        lines: Lines = {}
        for task in settings.TASKS:
            means = sweep("dmps", task, SHIPPED_STEPS).tried
            grid = {settings.label(s): s["scale"] for s in settings.compared("dmps").grid}
            lines[cells.TITLES[task]] = [
                (grid[k], m[metric]) for k, m in means.items() if k in grid
            ]
        found[metric, ""] = lines
    return found


def draw(path: str, panels: dict[tuple[str, str], Lines], by_task: bool, axis: str) -> None:
    """A panel for each measure (and task); the figure carries the digest of its numbers."""
    measures = list(dict.fromkeys(metric for metric, _ in panels))
    tasks = list(dict.fromkeys(task for _, task in panels))
    shape = (len(measures), len(tasks)) if by_task else (1, len(measures))
    size = (3.4 * shape[1] + 1.6, 2.6 * shape[0])  # the legend stands beside
    figure = Figure(figsize=size, layout="constrained", dpi=90)
    grid = figure.subplots(*shape, squeeze=False)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = {
        n: colormaps["tab10"](i % 10) for i, n in enumerate(dict.fromkeys(map(group, names)))
    }
    for axes, ((metric, task), lines) in zip(grid.flat, panels.items(), strict=True):
        for name, points in lines.items():
            style = "--" if name.endswith(("published", "shipped")) else "-"
            axes.plot(*zip(*points, strict=True) if points else ([], []), style, marker="o",
                      markersize=3, color=colours[group(name)], label=name)  # fmt: skip
        values = [y for points in lines.values() for _, y in points]
        if values and by_task:  # what fails would hide the others
            best, depth = max(values), 8 if metric == "psnr" else 0.4
            axes.set_ylim(best - depth, best + depth / 20)
        axes.set_xscale("log")
        if not by_task:  # a range that has no two powers of ten
            known = sorted({x for points in lines.values() for x, _ in points})
            axes.set_xticks(known, [f"{x:g}" for x in known])
            axes.set_xticks([], minor=True)
        axes.set_xlabel(axis)
        axes.set_title(" ".join(filter(None, (cells.TITLES[metric], cells.TITLES.get(task)))))
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Description": digest(panels)})


def group(name: str) -> str:
    return name.split(",")[0]


def digest(panels: dict[tuple[str, str], Lines]) -> str:
    return hashlib.sha256(repr(panels).encode()).hexdigest()


def drawn(path: str) -> str:
    """The digest of the numbers that a plot shows; "" where there is none."""
    if not os.path.exists(path):
        return ""
    return iio.immeta(path).get("Description", "")


PLOTS = {
    "saved_results/frontier.png": (frontier_lines, True, "network evaluations"),
    "models/lambda.png": (lambda_lines, False, "λ"),
}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description="Make the pages' tables and plots from the CSVs.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.parse_args(argv)
    try:
        for name in PAGES:
            text = page(read(name))
            with replacing_text(os.path.join(REPOSITORY, name)) as file:
                file.write(text)
        for name, (lines, as_rows, axis) in PLOTS.items():
            panels, path = lines(), os.path.join(REPOSITORY, name)
            if drawn(path) != digest(panels):
                draw(path, panels, as_rows, axis)
        for task, (scale, best) in outdated_scales().items():
            file = comparison.TASK_FILES[task][0]
            print(f"configs/{file}: scale {scale:g}; on the tuning slices {best:g} is best")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
