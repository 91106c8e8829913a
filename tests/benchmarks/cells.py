"""What stands in the cells of the tables: means of measured rows, named and rounded."""

import statistics
from collections.abc import Iterable

from tests.benchmarks import rows, settings
from tests.benchmarks.rows import HEADLINE
from tests.benchmarks.tuned import tuned

DIGITS = {"psnr": 2, "ssim": 3, "haarpsi": 3, "hf_ratio": 2, "nmse": 4}
TITLES = {
    "sr4": "×4",
    "denoise": "denoising σ 0.2",
    "denoise_0.75": "denoising σ 0.75",
    "gauss": "Gaussian blur",
    "uniform": "uniform blur",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "haarpsi": "HaarPSI",
}
KINDS = ("published", "tuned")
MISSING = "Not measured yet.\n"
Means = dict[str, float]


def titles(names: Iterable[str]) -> list[str]:
    return [TITLES[name] for name in names]


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table; a sentence where it would have no line."""
    body = [head, ["---"] * len(head), *lines]
    if len(body) == 2:
        return MISSING
    return "".join(f"| {' | '.join(line)} |\n" for line in body)


def mean(job: settings.Job, images: frozenset[str] | None = None) -> Means | None:
    """Means of a job's rows over its images, or over `images`; None where any is missing."""
    found = rows.everything().get(rows.group_of(job), {})
    if images is not None:
        if not images <= found.keys():
            return None
        found = {name: found[name] for name in images}
    if not found:
        return None
    names = [k for k in rows.numbers() if all(row.get(k) for row in found.values())]
    means = {k: statistics.fmean(float(row[k]) for row in found.values()) for k in names}
    return means | {"images": len(found)}


def figures(means: Means | None, metrics: Iterable[str] = HEADLINE, most: float = 0) -> str:
    """A table's cell; the number of slices is added where it is less than `most`."""
    if means is None:
        return ""
    text = " / ".join(f"{means[m]:.{DIGITS[m]}f}" for m in metrics)
    return text if means["images"] >= most else f"{text} ({means['images']})"


def setting_of(method: str, task: str, steps: int, kind: str) -> settings.Setting | None:
    if kind == "published":
        return settings.compared(method).published(task)
    return tuned(method, task, steps)


def kinds_of(method: str) -> tuple[str, ...]:
    return KINDS if settings.compared(method).grid else KINDS[:1]


def named(method: str, kind: str) -> str:
    return f"{method}, {'as shipped' if method in settings.OURS and kind == 'published' else kind}"


def on_frontier(
    task: str,
    method: str,
    kind: str,
    steps: int,
    images: frozenset[str] | None = None,
) -> Means | None:
    setting = setting_of(method, task, steps, kind)
    if setting is None:
        return None
    return mean(settings.Job("val", task, method, setting, steps), images)


def images_of(part: str) -> frozenset[str]:
    return frozenset(row["image"] for row in rows.of_part(part))


def counted(title: str, images: float) -> str:
    """The head of a column, with the number of slices that its cells are means of."""
    return f"{title} ({images:g} slice{'' if images == 1 else 's'})"
