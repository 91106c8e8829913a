"""What a user should be wary of in a run's results, each by a number that can be measured."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.evidence import Evidence, limit, rings
from guided_diffusion.job import Job
from guided_diffusion.methods import METHODS
from guided_diffusion.operators import operator_class
from guided_diffusion.schedules import noise_schedule_betas
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics
from guided_diffusion.volume_denoising import is_denoising
from util.results import Results

LOUD = 1.0  # σ, half of the displayed range: the data say little, or it is in other units
RATIO = 1.4  # of given and estimated σ
MISFIT = 1.15  # ‖y - A x̂‖/(σ√m): more than noise is left
# Of heads of nine public sources (T1, T2, FLAIR, proton density; with and without scalp), slices'
# mean intensities are within 0.35 of the training images' (5 to 95 %), and the distances of their
# spectra below 0.85; inverted, the mean is 1.6 away, and with squared intensities the distance 0.9.
MEAN, SPECTRUM = 0.4, 0.9
NAMED = 3  # images that a warning names


class Caution(NamedTuple):
    """A fact, and what to do about it."""

    what: str
    advice: str


def cautions_of(
    results: Results,
    job: Job,
    statistics: PriorStatistics,
    evidence: Sequence[tuple[str, Evidence | None, Sequence[Any]]],
    failed: Sequence[str],
    missing: Sequence[str],
) -> list[Caution]:
    """All that is to be said of a run.

    Args:
        statistics: of the prior's images.
        evidence: (label, what is known, items) of each image or volume.
        failed, missing: names of images that are not there.
    """
    found: list[Caution] = []
    for names, what in ((failed, "could not be restored"), (missing, "were not restored yet")):
        if names:
            found.append(
                Caution(f"{len(names)} of {len(job.items)} images {what}:", f"{_listed(names)}.")
            )
    measurement = job.task.measurement
    if measurement is None:
        return found
    known = [(label, e) for label, e, _ in evidence if e is not None]
    found += _of_sigma(results, job, evidence)
    found += _of_residual(known, measurement.operator)
    found += _of_contrast(known, statistics)
    method = METHODS[job.method]
    if results.settings["num_samples"] > 1 and not method.honest_spread:
        found.append(
            Caution(
                f"Samples of {job.method} lie closer together than those of the posterior.",
                "Their intervals are too narrow; configs/diffusion_config_samples.yaml has an "
                "honest spread.",
            )
        )
    for note in dict.fromkeys(e.note for _, e in known if e.note):
        found.append(Caution("On reading:", note))
    return found


def _listed(names):
    shown = ", ".join(dict.fromkeys(names[:NAMED]))
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def prior_range(job: Job) -> tuple[float, float]:
    """The least and the greatest noise √((1-ᾱ)/ᾱ) that the network was trained on."""
    betas = noise_schedule_betas(job.schedule.noise_schedule, job.schedule.steps)
    left = np.cumprod(1 - betas)
    return math.sqrt((1 - left[0]) / left[0]), math.sqrt((1 - left[-1]) / left[-1])


def _of_sigma(results, job, evidence):
    given = job.task.measurement.noise.sigma
    low, high = prior_range(job)
    levels: dict[str, float] = {}
    for label, _, items in evidence:
        found = [results.rows[i.name].get("sigma") for i in items]
        numbers = [v for v in found if isinstance(v, float)]
        if numbers:
            levels[label] = float(np.median(numbers))
        elif isinstance(given, float | int) and job.task.measurement.noise.name != "clean":
            levels[label] = float(given)
    found = []
    denoised = is_denoising(job.task.measurement)  # others have more to restore than noise
    quiet = {k: v for k, v in levels.items() if v < low and denoised}
    loud = {k: v for k, v in levels.items() if LOUD < v <= high}
    beyond = {k: v for k, v in levels.items() if v > high}
    if quiet:
        found.append(
            Caution(
                f"σ {min(quiet.values()):.3g} is below the prior's range, {low:.3g} to {high:.3g}: "
                f"{_listed(list(quiet))}.",
                "The network never saw so little noise; expect no gain over the input.",
            )
        )
    if beyond:
        found.append(
            Caution(
                f"σ {max(beyond.values()):.3g} is above the prior's range, {low:.3g} to "
                f"{high:.3g}: {_listed(list(beyond))}.",
                "σ is counted in the [-1, 1] image, not in the file's units.",
            )
        )
    if loud:
        found.append(
            Caution(
                f"σ {max(loud.values()):.3g} is more than half of the displayed range: "
                f"{_listed(list(loud))}.",
                "Most of what is seen comes from the prior. σ is counted in the [-1, 1] image, "
                "not in the file's units.",
            )
        )
    off = [
        (label, levels[label], e.sigma)
        for label, e, _ in evidence
        if e is not None
        and e.sigma
        and label in levels
        and not levels[label] / RATIO < e.sigma < levels[label] * RATIO
    ]
    if off:
        label, level, estimate = off[0]
        more = f" (and {len(off) - 1} more)" if len(off) > 1 else ""
        found.append(
            Caution(
                f"σ was given as {level:.3g}, and {label} looks like {estimate:.3g}{more}.",
                "Too large a σ smooths or leaves a negative of the noise, too small a one keeps "
                "noise; --sigma auto takes the estimate.",
            )
        )
    return found


def _of_residual(known, operator):
    found = []
    edges = (
        " Where the picture goes on beyond its edges, boundary: reflect is the better operator."
        if operator_class(operator.name).check(operator.params).get("boundary") == "zero"
        else ""
    )
    much = [(label, e.rms) for label, e in known if e.rms is not None and e.rms > MISFIT]
    if much:
        found.append(
            Caution(
                f"The residual is {max(v for _, v in much):.2f} times the noise: "
                f"{_listed([label for label, _ in much])}.",
                "The data are not explained: σ is too small, or the operator is not what was done "
                "to the image." + edges,
            )
        )
    seen = [
        (label, e, float(rings(np.array(e.correlation)).max()))
        for label, e in known
        if e.correlation is not None
    ]
    left = [(label, most) for label, e, most in seen if most > limit(e.pixels)]
    if left:
        found.append(
            Caution(
                f"The residual has structure, autocorrelation {max(v for _, v in left):.2f}: "
                f"{_listed([label for label, _ in left])}.",
                "Look for outlines of the anatomy in it: they are detail that was lost. Without "
                "outlines, the noise itself is correlated." + edges,
            )
        )
    if known and not seen:
        found.append(
            Caution(
                "There is no residual picture.",
                "No noise was assumed, or the data are k-space, which are no image.",
            )
        )
    return found


def _of_contrast(known, statistics):
    if statistics is NATURAL_IMAGES:
        return []
    found = []
    for label, e in known:
        dark = abs(e.mean - statistics.mean_intensity) > MEAN
        far = e.spectrum is not None and e.spectrum > SPECTRUM
        if dark or far:
            found.append((label, e, dark, far))
    if not found:
        return []
    label, e, dark, far = found[0]
    facts = []
    if dark:
        facts.append(f"mean intensity {e.mean:.2f}, theirs {statistics.mean_intensity:.2f}")
    if far:
        facts.append(f"power spectrum a factor of {10**e.spectrum:.0f} off")
    names = _listed([f[0] for f in found])
    return [
        Caution(
            f"The contrast is unlike the prior's training images ({'; '.join(facts)}): {names}.",
            "What the prior adds to such images is not to be trusted.",
        )
    ]
