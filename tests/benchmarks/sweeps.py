"""The tables of settings and sweeps, as Markdown, made of the measured rows alone."""

import math
import statistics
from collections.abc import Iterable

from guided_diffusion.methods import METHODS
from tests.benchmarks import comparison, rows, settings
from tests.benchmarks.cells import DIGITS, MISSING, TITLES, counted, markdown, named, titles
from tests.benchmarks.classical import CLASSICAL
from tests.benchmarks.rows import HEADLINE
from tests.benchmarks.tuned import grid_of, sweep, tuned

SHIPPED_STEPS = 100  # of configs/diffusion_config_100.yaml, for which the task files' λ is
# The arguments are the words after the name in the page's marker.


def settings_table() -> str:
    """Published and tuned settings, a row for each method and number of evaluations."""
    lines = []
    for method in METHODS:
        row = settings.compared(method)
        published = [settings.label(row.published(task)) for task in settings.TASKS]
        lines.append([named(method, "published"), "", *merged(published)])
        for steps in row.tuned_at if row.grid else ():
            found = [chosen(method, task, steps) for task in settings.TASKS]
            if any(found):
                lines.append([named(method, "tuned"), str(steps), *found])
        if method == "dmps":
            lines.append(["dmps, task files", str(SHIPPED_STEPS), *map(shipped, settings.TASKS)])
    return markdown(["method", "evaluations", *titles(settings.TASKS)], lines)


def chosen(method: str, task: str, steps: int) -> str:
    """A tuned setting, and on how many slices it was chosen."""
    found = tuned(method, task, steps)
    if found is None:
        return ""
    name = settings.label(found)
    return f"{name} ({sweep(method, task, steps).led[name]['images']:g})"


def shipped(task: str) -> str:
    name = f"scale {comparison.shipped_scale(task):g}"
    return f"{name}, not the tuned one" if task in outdated_scales() else name


def outdated_scales() -> dict[str, tuple[float, float]]:
    """Task → (λ of its file, the tuned λ), where they differ."""
    found = {}
    for task in settings.TASKS:
        setting, scale = tuned("dmps", task, SHIPPED_STEPS), comparison.shipped_scale(task)
        if setting is not None and setting != {"scale": scale}:
            found[task] = scale, setting["scale"]
    return found


def merged(cells: list[str]) -> list[str]:
    return [cell if i == 0 or cell != cells[i - 1] else '"' for i, cell in enumerate(cells)]


def tuning(method: str, steps: str) -> str:
    """A sweep, a row for each setting of the grid.

    A setting that led has its means, the best of each task and measure in bold; one that was left
    after the first slices how far it was behind the best there.
    """
    classical = method in CLASSICAL
    tasks = [
        task
        for task in (settings.ALL_TASKS if classical else settings.TASKS)
        if not classical or method in settings.classical_for(task)
    ]
    found = {task: sweep(method, task, int(steps)) for task in tasks}
    if not any(one.led for one in found.values()):
        return MISSING

    def cell(task: str, name: str) -> str:
        tried, led = found[task]
        if name in led:
            return " / ".join(bold(led, name, metric) for metric in HEADLINE)
        if name not in tried:
            return ""
        behind = [
            f"{tried[name][m] - max(v[m] for v in tried.values()):.{DIGITS[m]}f}" for m in HEADLINE
        ]
        return f"{' / '.join(behind)} ({tried[name]['images']:g})"

    labels = dict.fromkeys(settings.label(s) for task in tasks for s in grid_of(method, task))
    heads = [
        counted(TITLES[task], next(iter(led.values()))["images"]) if led else TITLES[task]
        for task, (_, led) in found.items()
    ]
    lines = [[name or "(none)", *(cell(task, name) for task in tasks)] for name in labels]
    return markdown(["setting", *heads], lines)


def bold(means: dict[str, dict[str, float]], name: str, metric: str) -> str:
    value = means[name][metric]
    shown = f"{value:.{DIGITS[metric]}f}"
    return f"**{shown}**" if value == max(m[metric] for m in means.values()) else shown


def ahead(chosen: str) -> str:
    """`spectral` as shipped at 10 and 20 evaluations beside the best of the others up to 100.

    The best is that of the largest lead over `spectral` at 20, or of the smallest gap. Both are
    means over the slices that both have restored: at least half of them. A lead has the standard
    error of its mean over the slices, and on how many of them it is one.
    """
    lines = []
    for task in settings.TASKS:
        few = [
            settings.Job(
                chosen, task, "spectral", settings.compared("spectral").published(task), steps
            )
            for steps in (10, 20)
        ]
        ours = [rows.everything().get(rows.group_of(job), {}) for job in few]
        measured = ours[0].keys() & ours[1].keys()
        others = {
            group: names
            for group, images in others_of(chosen, task).items()
            if (names := images.keys() & measured) and 2 * len(names) >= len(measured)
        }
        for metric in HEADLINE if others else ():
            leads = {
                group: average(rows.everything()[group], metric, names)
                - average(ours[1], metric, names)
                for group, names in others.items()
            }
            which = max(leads, key=leads.__getitem__)
            compared = [*ours, rows.everything()[which]]
            values = [average(images, metric, others[which]) for images in compared]
            won = [value > values[2] for value in values[:2]]
            shown = [f"{value:.{DIGITS[metric]}f}" for value in values]
            marked = [*won, not any(won)]
            cells = [f"**{v}**" if b else v for v, b in zip(shown, marked, strict=True)]
            name = f"{which[2]}, {which[3]}, {which[4]} evaluations"
            other = rows.everything()[which], metric, others[which]
            found = [lead_of(images, *other) for images in ours]
            lines.append([TITLES[task], TITLES[metric], *cells, *found, name])
    head = ["task", "measure", "spectral, 10", "spectral, 20", "best of the others"]
    return markdown([*head, "lead at 10 (slices)", "lead at 20", "which"], lines)


def lead_of(
    ours: dict[str, rows.Row], other: dict[str, rows.Row], metric: str, names: Iterable[str]
) -> str:
    """The mean of the slices' differences ± its standard error, and how many are above 0."""
    found = [float(ours[name][metric]) - float(other[name][metric]) for name in sorted(names)]
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else math.nan
    digits = DIGITS[metric] + (metric != "psnr")
    won = sum(value > 0 for value in found)
    return f"{statistics.fmean(found):+.{digits}f} ± {error:.{digits}f} ({won} of {len(found)})"


def others_of(chosen: str, task: str) -> dict[rows.Group, dict[str, rows.Row]]:
    """What restored a set by one sample of another method, of up to 100 evaluations."""
    return {
        group: images
        for group, images in rows.everything().items()
        if group[:2] == (chosen, task)
        and group[2] in METHODS
        and group[2] not in settings.OURS
        and settings.SAMPLES not in group[3]
        and int(group[4]) <= 100
    }


def average(images: dict[str, rows.Row], metric: str, names: Iterable[str]) -> float:
    return statistics.fmean(float(images[name][metric]) for name in names)
