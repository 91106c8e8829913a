"""Tuning by successive halving, the same for every method.

All settings of a method's grid, and the published one, restore the first tuning slices. Only those
that are among the `LEADERS` best there in one of the measures, and the published one, restore all
slices; the tuned setting is the best of these. At more evaluations the first slices see only the
settings that won at fewer, the published one, and what is next in the grid to any that is best.

What has led is read from the rows: means are always over the slices that all settings compared
have restored.
"""

import math
import statistics
from typing import NamedTuple

from tests.benchmarks import parts, rows, settings
from tests.benchmarks.classical import CLASSICAL
from tests.benchmarks.settings import Setting, label

CRITERION = "psnr"
LEADERS = 2  # of each measure on the first slices
REFINES = {100: 20}  # number of evaluations → the one whose winners are tried there
Means = dict[str, dict[str, float]]  # label of a setting → mean of each headline metric, "images"
Measured = dict[str, dict[tuple[str, str], rows.Row]]  # label → (image, prior) → row


class Sweep(NamedTuple):
    """The means of a sweep: of all candidates on the first slices, and of the leaders on all."""

    tried: Means
    led: Means


def grid_of(method: str, task: str) -> list[Setting]:
    """The settings that a method was tuned among; the published one is one of them."""
    if method in CLASSICAL:
        return CLASSICAL[method].grid
    row = settings.compared(method)
    return settings.dict_of((row.published(task), *row.grid))


def level_of(method: str, steps: int) -> int | None:
    """The number of evaluations at which a method is tuned for so many steps: the nearest."""
    if method in CLASSICAL:
        return 0
    known = settings.compared(method).tuned_at if settings.compared(method).grid else ()
    return min(known, key=lambda n: abs(math.log(n / steps)), default=None)


def sweep(method: str, task: str, steps: int) -> Sweep:
    """What is measured so far; empty until all candidates have a slice in common."""
    found = measured(method, task, steps)
    tried = means_of(found, [label(s) for s in candidates(method, task, steps)])
    return Sweep(tried, means_of(found, _leading(method, task, tried)))


def measured(method: str, task: str, steps: int) -> Measured:
    return {
        name: {(image, row["prior"]): row for image, row in images.items()}
        for (chosen, *key, name, count), images in rows.everything().items()
        if (chosen, *key, count) == ("tuning", task, method, str(steps))
    }


def means_of(found: Measured, labels: list[str]) -> Means:
    """Over the slices that the settings of all `labels` have restored; {} where there is none."""
    common = set.intersection(*(set(found.get(name, ())) for name in labels)) if labels else set()
    if not common:
        return {}
    return {
        name: {
            metric: statistics.fmean(float(found[name][i][metric]) for i in sorted(common))
            for metric in rows.HEADLINE
        }
        | {"images": len(common)}
        for name in labels
    }


def best(means: Means, count: int) -> list[str]:
    """The `count` best of each measure."""
    return list(
        dict.fromkeys(
            name
            for metric in rows.HEADLINE
            for name in sorted(means, key=lambda name: -means[name][metric])[:count]
        )
    )


def _leading(method: str, task: str, tried: Means) -> list[str]:
    if not tried:
        return []
    published = [] if method in CLASSICAL else [label(settings.compared(method).published(task))]
    chosen = {*best(tried, LEADERS), *published}
    return [name for name in tried if name in chosen]


def candidates(method: str, task: str, steps: int) -> list[Setting]:
    """The settings that are tried on the first slices."""
    grid = grid_of(method, task)
    winners = best(sweep(method, task, REFINES[steps]).led, 1) if steps in REFINES else []
    if not winners:
        return grid
    found = measured(method, task, steps)
    tried = [settings.compared(method).published(task)]
    while winners:
        won = [s for s in grid if label(s) in winners]
        near = [*won, *(s for one in won for s in neighbours(one, grid))]
        new = [s for s in near if s not in tried]
        tried += new
        # Where the best is one of the last, there may be a better one beyond it.
        winners = best(means_of(found, [label(s) for s in tried]), 1) if new else []
    return [s for s in grid if s in tried]


def neighbours(setting: Setting, grid: list[Setting]) -> list[Setting]:
    """The settings that differ in one parameter, and in that to the next value up or down."""
    found = []
    for key, value in setting.items():
        others = [
            s for s in grid if s.keys() == setting.keys() and _but(s, key) == _but(setting, key)
        ]
        values = sorted({s[key] for s in others})
        at = values.index(value)
        near = values[max(at - 1, 0) : at] + values[at + 1 : at + 2]
        found += [s for s in others if s[key] in near]
    return found


def _but(setting: Setting, key: str) -> Setting:
    return {k: v for k, v in setting.items() if k != key}


def leaders(method: str, task: str, steps: int) -> list[Setting]:
    """The settings that are tried on all slices: none before the first are done."""
    chosen = sweep(method, task, steps).led
    return [s for s in grid_of(method, task) if label(s) in chosen]


def tuned(method: str, task: str, steps: int) -> Setting | None:
    """The setting of best mean PSNR; None where the sweep is not complete."""
    level = level_of(method, steps)
    means = sweep(method, task, level).led if level is not None else {}
    if not means:
        return None
    first = max(means, key=lambda name: means[name][CRITERION])
    return next(s for s in grid_of(method, task) if label(s) == first)


def candidates_at_most(method: str, task: str, steps: int) -> list[Setting]:
    """All that may still be tried, where what is tried first is not done."""
    chosen = candidates(method, task, steps)
    return chosen if sweep(method, task, steps).tried else grid_of(method, task)


def leaders_at_most(method: str, task: str, steps: int) -> list[Setting]:
    """As many settings as can lead, where the first slices are not done."""
    means, grid = sweep(method, task, steps).tried, grid_of(method, task)
    if means and all(m["images"] >= parts.FIRST for m in means.values()):
        return leaders(method, task, steps)
    return grid[: LEADERS * len(rows.HEADLINE) + 1]


def tuned_at_most(method: str, task: str, steps: int) -> Setting | None:
    """The tuned setting, or another that is not measured, where there will be one."""
    found = tuned(method, task, steps)
    if found is not None or level_of(method, steps) is None or task in settings.OWN:
        return found
    return {"tuned": "later"}


CHOICE = parts.Choice(tuned, candidates, leaders)
# At most, for an estimate beforehand: of a part, and of one whose settings another will tune.
NEXT = CHOICE._replace(candidates=candidates_at_most, leaders=leaders_at_most)
LATER = NEXT._replace(best=tuned_at_most)
