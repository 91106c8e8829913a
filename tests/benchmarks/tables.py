"""The tables of the pages, as Markdown, made of the measured rows alone."""

import csv
import os
from collections.abc import Callable

from guided_diffusion.methods import METHODS
from tests.benchmarks import comparison, parts, rows, settings
from tests.benchmarks.cells import (
    MISSING,
    TITLES,
    counted,
    figures,
    images_of,
    kinds_of,
    markdown,
    mean,
    named,
    on_frontier,
    titles,
)
from tests.benchmarks.classical import CLASSICAL
from tests.benchmarks.kspace_tables import kspace, kspace_intervals, kspace_measured
from tests.benchmarks.rows import HEADLINE
from tests.benchmarks.sweeps import ahead, settings_table, tuning
from tests.benchmarks.tuned import tuned
from tests.benchmarks.volume_rows import compared, listed

QUALITY = {"psnr": 2, "ssim": 4, "haarpsi": 4}  # measures, and digits shown of them
NOISE, THICK = ("part", "noise_percent"), ("thickness", "spacing")
VARYING = ("part", "noise", "noise_percent")
ESTIMATED = ("air", "pixels", "sigma", "images")
PLANES = {"psnr": 2, "ssim": 4, "ssim_rows": 4, "ssim_columns": 4, "delta": 2}
SAMPLED = {"psnr_sample": 2, "psnr_mean": 2, "in_50": 2, "in_90": 2, "rescale": 2, "seconds": 0}
SAMPLED |= {"delta": 2, "delta_mean": 2, "drawn": 2}
REAL = {"sigma_percent": 2, "removed": 2, "edges": 2, "in_plane": 2, "across": 2, "seconds": 0}
# The arguments are the words after the name in the page's marker.


def frontier(task: str) -> str:
    """A row for each method and kind of setting, a column for each number of evaluations."""
    most, lines = len(images_of("own" if task in settings.OWN else "frontier")), []
    for method in METHODS:
        for kind in kinds_of(method):
            found = [on_frontier(task, method, kind, steps) for steps in settings.STEPS]
            if any(found):
                lines.append([named(method, kind), *(figures(m, most=most) for m in found)])
    return markdown([counted("method", most), *map(str, settings.STEPS)], lines)


def sharpness() -> str:
    """The ratio of high-frequency energy to the truth's, at 20 and 100 evaluations."""
    most, lines = len(images_of("frontier")), []
    for method in METHODS:
        for kind in kinds_of(method):
            found = [
                on_frontier(task, method, kind, steps)
                for steps in (20, 100)
                for task in settings.TASKS
            ]
            if any(found):
                cells = [figures(m, ["hf_ratio"], most) for m in found]
                lines.append([named(method, kind), *cells])
    head = [f"{TITLES[task]}, {steps}" for steps in (20, 100) for task in settings.TASKS]
    return markdown([counted("method", most), *head], lines)


def thousand() -> str:
    """100 and 1000 evaluations on the same slices."""
    images, lines = images_of("thousand"), []
    for method in METHODS:
        for kind in kinds_of(method):
            for steps in (100, 1000):
                found = [on_frontier(task, method, kind, steps, images) for task in settings.TASKS]
                if images and any(found):
                    lines.append([named(method, kind), str(steps), *map(figures, found)])
    head = [counted("method", len(images)), "evaluations"]
    return markdown([*head, *titles(settings.TASKS)], lines)


def quality(chosen: str) -> str:
    """Classical methods with their tuned settings, and what the shipped files give."""
    tasks, found = settings.ALL_TASKS, {}
    for name in CLASSICAL:
        jobs = [
            settings.Job(chosen, task, name, setting, 0)
            if name in settings.classical_for(task)
            and (setting := tuned(name, task, 0)) is not None
            else None
            for task in tasks
        ]
        found[f"{name}, tuned"] = [mean(job) if job else None for job in jobs]
    for title, method, steps, extra in (
        ("dmps, the shipped 100 steps", "dmps", 100, {}),
        *((f"spectral, {n} evaluations (denoising 2)", "spectral", n, {}) for n in parts.FEW),
        ("spectral_sample, one sample of 20", "spectral_sample", 20, {}),
        ("spectral_sample, mean of eight", "spectral_sample", 20, {settings.SAMPLES: 8}),
    ):
        found[title] = [
            mean(settings.Job(chosen, task, method, shipped_setting(method, task) | extra, steps))
            for task in tasks
        ]
    most = max((m["images"] for row in found.values() for m in row if m), default=0)
    lines = [[k, *(figures(m, most=most) for m in row)] for k, row in found.items() if any(row)]
    return markdown([counted("method", most), *titles(tasks)], lines)


def shipped_setting(method: str, task: str) -> settings.Setting:
    if method == "dmps":
        return {"scale": comparison.shipped_scale(task)}
    return settings.compared(method).published(task)


def calibration() -> str:
    """How often the truth lies in the intervals that samples give, in both sets of slices."""
    lines = []
    for job in (*parts.calibration(), *parts.ood()):
        means = mean(job) if settings.SAMPLES in job.setting else None
        if means is None:
            continue
        cells = [f"{100 * means[k]:.0f} %" for k in rows.CALIBRATION[:2]]
        name = f"{job.method} ({job.steps})"
        place = "other scanners" if job.set == "ood" else "validation"
        slices = f"{place} ({means['images']})"
        lines.append(
            [name, settings.label(job.setting), slices, TITLES[job.task], *cells]
            + [f"{means['rescale']:.2f}", figures(means)]
        )
    lines.sort(key=lambda line: (*line[:2], line[2].startswith("other")))
    head = ["method (evaluations)", "setting", "slices", "task", "in the 50 % interval"]
    return markdown([*head, "in the 90 % interval", "factor on s", "mean of eight"], lines)


def denoiser() -> str:
    """`spectral`, two evaluations, beside BM3D on each source: both, and the gain in dB."""
    lines = []
    for name in ("val", *settings.SOURCES):
        cells, images = [], 0
        for task in ("denoise", "denoise_0.75"):
            jobs = [settings.Job(name, task, *run) for run in parts.DENOISERS]
            common = frozenset.intersection(
                *(frozenset(rows.everything().get(rows.group_of(job), {})) for job in jobs)
            )
            bm3d, prior = (mean(job, common) for job in jobs)
            cells += [figures(bm3d, HEADLINE[:2]), figures(prior, HEADLINE[:2])]
            cells.append(f"{prior['psnr'] - bm3d['psnr']:+.2f}" if bm3d and prior else "")
            images = max(images, len(common))
        if images:
            lines.append(["lgg" if name == "val" else name, str(images), *cells])
    noise = [TITLES[task].split()[-1] for task in ("denoise", "denoise_0.75")]
    head = [f"{name}, σ {value}" for value in noise for name in ("BM3D", "prior", "gain (dB)")]
    return markdown(["source", "slices", *head], lines)


def clipping() -> str:
    """x̂_0 clipped to [-1, 1] in each step, and not."""
    images, lines = images_of("clipping"), []
    for method in METHODS:
        for steps in (20, 100):
            for clip in (True, False):
                jobs = [
                    settings.Job(
                        "tuning",
                        task,
                        method,
                        settings.compared(method).published(task) | {"clip": clip},
                        steps,
                    )
                    for task in settings.TASKS
                ]
                found = [mean(job, images) for job in jobs]
                if any(found):
                    answer = "yes" if clip else "no"
                    lines.append([method, str(steps), answer, *map(figures, found)])
    head = [counted("method", len(images)), "evaluations", "clipped"]
    return markdown([*head, *titles(settings.TASKS)], lines)


def variance() -> str:
    """DMPS with the variance that the network learned and the posterior's own."""
    tasks, images = ("sr4", "denoise"), images_of("variance")
    lines = []
    for kind in ("learned_range", "fixed_small"):
        setting = {"scale": 1, "variance": kind}
        found = [mean(settings.Job("tuning", task, "dmps", setting, 100), images) for task in tasks]
        if images and any(found):
            lines.append([f"`{kind}`", *(figures(m, [*HEADLINE, "hf_ratio"]) for m in found)])
    return markdown([counted("`model_var_type`", len(images)), *titles(tasks)], lines)


def deepinv() -> str:
    """deepinv's methods, at 20 evaluations, and this program's own of the same names."""
    images, lines = images_of("deepinv"), []
    for method in settings.DEEPINV:
        found = [mean(settings.Job("val", task, method, {}, 20)) for task in settings.TASKS]
        if any(found):
            lines.append([method, *map(figures, found)])
        own = method.removeprefix("deepinv_")
        for kind in kinds_of(own):
            found = [on_frontier(task, own, kind, 20, images) for task in settings.TASKS]
            if images and any(found):
                lines.append([named(own, kind), *map(figures, found)])
    return markdown([counted("method", len(images)), *titles(settings.TASKS)], lines)


def measured(part: str) -> str:
    """What a part was measured on: slices, prior, machine."""
    found = rows.of_part(part)
    if not found:
        return MISSING
    priors = sorted({row["prior"] for row in found} - {""})
    machines = sorted({row["machine"] for row in found})
    return f"Prior {', '.join(priors) or 'none'}; {', '.join(machines)}.\n"


def table_of(name: str, *bold: str) -> str:
    """A CSV under saved_results/benchmarks/ as it is; `bold`: the largest of each column is."""
    path = os.path.join(rows.FOLDER, f"{name}.csv")
    if not os.path.exists(path):
        return MISSING
    with open(path, encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    for column in range(1, len(head) if bold else 0):
        numbers = [float(line[column]) for line in lines if line[column]]
        for line in lines:
            if head[column] in bold and line[column] and float(line[column]) == max(numbers):
                line[column] = f"**{line[column]}**"
    return markdown(head, lines)


TABLES: dict[str, Callable[..., str]] = {
    "frontier": frontier,
    "sharpness": sharpness,
    "thousand": thousand,
    "ahead": ahead,
    "settings": settings_table,
    "tuning": tuning,
    "quality": quality,
    "calibration": calibration,
    "denoiser": denoiser,
    "clipping": clipping,
    "variance": variance,
    "deepinv": deepinv,
    "measured": measured,
    "kspace": kspace,
    "kspace_intervals": kspace_intervals,
    "kspace_measured": kspace_measured,
    "volume_denoising": lambda: markdown(*compared("volume_denoising", NOISE, QUALITY)),
    "noise_maps": lambda: markdown(
        *compared("noise_maps", VARYING, {"sigma_error": 3, **QUALITY}, least=("sigma_error",))
    ),
    "noise_estimates": lambda: markdown(
        *compared(
            "noise_estimates", ESTIMATED, {"sigma_error": 3, **QUALITY}, least=("sigma_error",)
        )
    ),
    "thick_slices": lambda: markdown(*compared("thick_slices", THICK, PLANES, least=("delta",))),
    "volume_samples": lambda: markdown(*listed("volume_samples", SAMPLED)),
    "volume_real": lambda: markdown(*listed("volume_real", REAL)),
    "regression": lambda: markdown(*listed("training/regression", QUALITY)),
    "volume_memory": lambda: markdown(*listed("volume_memory", {})),
    "csv": table_of,
}
