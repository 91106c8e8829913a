"""The setting of a method that is best on the tuning slices."""

import math
import statistics

from tests.benchmarks import rows, settings
from tests.benchmarks.classical import CLASSICAL

CRITERION = "psnr"


def grid_of(method: str, task: str) -> list[settings.Setting]:
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


def sweep(method: str, task: str, steps: int) -> dict[str, dict[str, float]]:
    """label → mean of each headline metric on the tuning slices that all settings have restored."""
    found = {
        name: {(image, row["prior"]): row for image, row in images.items()}
        for (chosen, *key, name, count), images in rows.everything().items()
        if (chosen, *key, count) == ("tuning", task, method, str(steps))
    }
    labels = [settings.label(s) for s in grid_of(method, task)]
    if not found or any(name not in found for name in labels):
        return {}
    common = set.intersection(*(set(found[name]) for name in labels))
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


def tuned(method: str, task: str, steps: int) -> settings.Setting | None:
    """The setting of best mean PSNR; None where the sweep is not complete."""
    level = level_of(method, steps)
    means = sweep(method, task, level) if level is not None else {}
    if not means:
        return None
    best = max(means, key=lambda name: means[name][CRITERION])
    return next(s for s in grid_of(method, task) if settings.label(s) == best)
