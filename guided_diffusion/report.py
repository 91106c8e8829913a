"""report.html: what a run did, what came of it and what to be wary of, as one file for people.

It is made at a run's end from the files of the run alone, so that a resumed run's is the same. It
holds no times and no dates.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.kspace import KSpaceSlice, KSpaceVolume
from data.volumes import Slice, Volume, Whole, reason
from guided_diffusion.cautions import cautions_of
from guided_diffusion.evidence import SHOWN, Evidence, combined, limit, rings
from guided_diffusion.intervals import load_factor
from guided_diffusion.job import Job
from guided_diffusion.methods import METHODS
from guided_diffusion.prior import Prior
from util.columns import FIGURES
from util.files import replacing_text
from util.image_files import LABELS, read_png, to_uint8
from util.metrics import METRICS, half_width
from util.page import curve, details, escape, figure, flat, heat, page, picture, section, signed
from util.page import table as table_of
from util.results import Results, versions

NAME = "report.html"
DRAWN = 4  # images or volumes that are shown
LISTED = 1000  # images in the table
CORRELATED = 0.3  # autocorrelation that is shown in full colour

READING = (
    "The residual is what the restored image leaves unexplained of the data, y - A x̂, in units of "
    "the noise σ. It should look like noise: without outlines of the anatomy, near 1 in root mean "
    "square (below 1 where the data were fitted, noise and all), and without correlation from "
    "pixel to pixel. A small negative correlation of direct neighbours is what a good restoration "
    "leaves; a positive one above the dashed line is structure: detail that was lost, an operator "
    "that does not fit, or noise that the scanner's own interpolation or parallel imaging has "
    "made smooth.",
    "Contrast is compared with the prior's training images in two numbers alone: the mean "
    "intensity, and the power in octaves of spatial frequency up to 96 half cycles in 256 pixels. "
    "They tell an inverted, cropped or wrongly scaled image; a sequence or an organ that the prior "
    "has not seen may pass.",
    "A restored image shows what is likely to the prior, given the data. Where data are few or "
    "noise is strong, detail may be invented.",
)


@dataclass(frozen=True)
class Subject:
    """What is shown together: an image, or the slices of a volume.

    Attributes:
        items: that are restored. volume: None for an image, and for slices of one that lacks some.
        evidence: None where none was kept.
    """

    label: str
    items: Sequence[Any]
    volume: Volume | None
    evidence: Evidence | None

    def picture(self, results: Results, kind: str) -> NDArray[np.float32] | None:
        """(C, h, w) in [-1, 1] out of a folder of PNGs; of a volume three planes."""
        paths = [os.path.join(results.folder, kind, f"{item.name}.png") for item in self.items]
        if not all(map(os.path.exists, paths)):
            return None
        if self.volume is None or isinstance(self.items[0], Whole):
            return read_png(paths[0])
        return self.planes(np.stack([read_png(path).mean(axis=0) for path in paths]))

    def planes(self, slices: NDArray[np.float32]) -> NDArray[np.float32]:
        """(1, h, w), three planes of (slices, H, W); the middle one where some are missing."""
        if self.volume is None or self.volume.gaps:
            return slices[len(slices) // 2][None]
        return self.volume.three_planes(slices)[None]

    def std(self, results: Results) -> NDArray[np.float32] | None:
        """The samples' standard deviation, (C, H, W), a volume's slices as channels."""
        paths = [os.path.join(results.folder, "std", f"{item.name}.npy") for item in self.items]
        if not all(map(os.path.exists, paths)):
            return None
        found = [np.load(path) for path in paths]
        whole = isinstance(self.items[0], Whole)
        return found[0] if len(found) == 1 or whole else np.stack([f.mean(axis=0) for f in found])


def write_report(
    results: Results,
    job: Job,
    prior: Prior,
    failed: Sequence[str],
    missing: Sequence[str],
) -> str | None:
    """Write report.html into the results' folder, and say in a sentence if that fails.

    Args:
        prior: what restored.
        failed, missing: names of images that could not be restored, and that no process did.
    """
    try:
        text = make_report(results, job, prior, failed, missing)
        with replacing_text(os.path.join(results.folder, NAME)) as file:
            file.write(text)
    except Exception as error:  # noqa: BLE001 - the results are there, whatever it was
        return f"{NAME} cannot be written ({reason(error)}); the results are complete without it"
    return None


def make_report(
    results: Results,
    job: Job,
    prior: Prior,
    failed: Sequence[str],
    missing: Sequence[str],
) -> str:
    """The page, see `write_report`."""
    subjects = subjects_of(results, job.items)
    title = results.title.replace(os.sep, "/")
    evidence = [(s.label, s.evidence, s.items) for s in subjects]
    found = cautions_of(results, job, prior.statistics, evidence, failed, missing)
    measurement = job.task.measurement
    of = measurement and (prior, job.method, measurement.operator.name, job.in_turn)
    factor = load_factor(*of) if of else None
    body = [
        f"<header><h1>Restoration report: {escape(title)}</h1>",
        f"<p>{escape(_summary(job, subjects))}</p>",
        '<p class="soft">For research, not for diagnosis.</p></header>',
        "<main>",
        section("Warnings", [_cautions(found)], "warnings"),
        section("What was done", [table_of(_settings(results, job))], "done"),
        section("Quality against the truth", [_quality(results)], "quality"),
        section("Images", [_shown(s, results, factor) for s in subjects[:DRAWN]], "images"),
        section("All images", [_table(results, subjects)], "all"),
        section("How to read this", [f"<p>{escape(p)}</p>" for p in READING], "reading"),
        section("All settings", [_everything(results)], "settings"),
        "</main>",
        '<footer><p class="soft">DMPS-MRI ' + escape(_version()) + "</p></footer>",
    ]
    return page(f"Restoration report: {title}", [part for part in body if part])


def subjects_of(results: Results, items: Sequence[Any]) -> list[Subject]:
    """The restored images and volumes of a run, in its order."""
    done = [item for item in items if item.name in results.rows]
    groups: dict[Any, list[Any]] = {}
    for item in done:
        whole = isinstance(item, Slice) and not isinstance(item, KSpaceSlice)
        complete = whole and all(s.name in results.rows for s in item.volume.slices)
        groups.setdefault(item.volume if complete else item, []).append(item)
    found = []
    for key, members in groups.items():
        volume = key if isinstance(key, Volume) else getattr(members[0], "volume", None)
        single = not isinstance(key, Volume) and not isinstance(members[0], Whole)
        label = members[0].label if not isinstance(members[0], Slice) or not single else key.name
        kept = [
            Evidence.load(os.path.join(results.folder, "report", f"{m.name}.json")) for m in members
        ]
        known = [e for e in kept if e is not None]
        evidence = combined(known) if known else None
        found.append(Subject(label, members, None if single else volume, evidence))
    return found


def _version():
    from guided_diffusion import __version__

    return __version__


def _summary(job, subjects):
    measurement = job.task.measurement
    what = measurement.operator.name if measurement else "samples of the prior"
    volumes = sum(s.volume is not None for s in subjects)
    counts = [
        f"{count} {noun}{'' if count == 1 else 's'}"
        for count, noun in ((volumes, "volume"), (len(subjects) - volumes, "image"))
        if count
    ]
    return f"{' and '.join(counts) or 'Nothing'} restored: {what}, by {_method(job)}."


def _method(job):
    return METHODS[job.method].label if job.method in METHODS else "the prior alone"


def _cautions(found):
    if not found:
        return "<p>None.</p>"
    rows = "\n".join(
        f"<li><strong>{escape(w.what)}</strong> {escape(w.advice)}</li>" for w in found
    )
    return f'<div class="warnings"><ul>\n{rows}\n</ul></div>'


def _settings(results, job):
    settings, task = results.settings, job.task
    rows = [("program", f"DMPS-MRI {_version()}")]
    if task.data is not None:
        labels = dict.fromkeys(item.label for item in job.items)
        more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
        rows.append(("input", f"{', '.join(list(labels)[:3])}{more}"))
        rows += [(f"data.{k}", v) for k, v in flat(settings["task_config"]["data"]) if v]
    if task.measurement is not None:
        measured = "measured" if not task.measurement.simulated else "simulated from the images"
        rows.append(("measurement", measured))
        rows += flat(settings["task_config"]["measurement"]["operator"], "operator.")
        rows += flat(settings["task_config"]["measurement"]["noise"], "noise.")
    rows.append(("method", _method(job)))
    rows += flat(job.params, "method.")
    steps = job.schedule.timestep_respacing or job.schedule.steps
    rows.append(("steps", f"{steps} of {job.schedule.steps}, {job.schedule.sampler}"))
    digest = settings["checkpoint_sha256"]
    rows.append(
        (
            "prior",
            f"{os.path.basename(job.model.model_path) or 'untrained'}"
            + (f", SHA-256 {digest[:16]}…" if digest else ""),
        )
    )
    for key in ("num_samples", "seed", "precision"):
        rows.append((key, settings[key]))
    for volume in dict.fromkeys(i.volume for i in job.items if isinstance(i, Slice | Whole)):
        rows.append((f"volume {volume.label}", _grid(volume)))
    return rows


def _grid(volume):
    side, apart = volume.plane.pixel, np.diff(volume.positions)
    if isinstance(volume, KSpaceVolume):  # whose header is read with its samples
        *sides, between = volume.raw().spacing
        side, apart = min(sides), [between]
    shape = f"{len(volume.slices)} slices, pixels of {side:.4g} mm"
    if len(volume.slices) > 1:
        shape += f", {float(np.median(apart)):.4g} mm apart"
    return shape if volume.plane.square else f"{shape} (the shorter side)"


def _quality(results):
    rows, heading = [], ["", "mean", "standard deviation"]
    found = results.finite()
    for key, metric in METRICS.items():
        values, others = found.get(key, ([], 0))
        if values or others:
            mean = f"{np.mean(values):{metric.format}}" if values else "none"
            spread = f"{np.std(values):{metric.format}}" if len(values) > 1 else ""
            rows.append([metric.heading, mean, spread, str(others or "")])
    if any(row[-1] for row in rows):
        return table_of(rows, [*heading, "left out, not finite"])
    return table_of([row[:-1] for row in rows], heading) if rows else ""


def _shown(subject, results, factor):
    """The figures of one image or volume, under its name."""
    figures, planes = [], ""
    if subject.volume is not None:
        planes = " (the middle slice)" if subject.volume.gaps else " (three planes)"
    images = {kind: subject.picture(results, kind) for kind in LABELS}
    for kind, label in LABELS.items():
        if images[kind] is not None:
            text = f"{label}{planes}"
            figures.append(
                figure(picture(to_uint8(images[kind]), f"{subject.label}: {text}"), text)
            )
    truth, recon = images["truth"], images["recon"]
    if truth is not None and recon is not None and truth.shape == recon.shape:
        error = np.abs(recon - truth).mean(axis=0) / 2
        scale = float(np.quantile(error, 0.999))
        text = f"absolute error, black 0 to bright {scale:.1%} of the displayed range"
        figures.append(figure(picture(heat(error, scale), f"{subject.label}: {text}"), text))
    residual, evidence = subject.picture(results, "residual"), subject.evidence
    if residual is not None:
        text = f"residual, black -{SHOWN:g} σ to white {SHOWN:g} σ"
        figures.append(figure(picture(to_uint8(residual), f"{subject.label}: {text}"), text))
    if evidence is not None and evidence.correlation is not None:
        figures += _correlation(subject.label, evidence)
    figures += _interval(subject, results, factor)
    return (
        f"<article><h3>{escape(subject.label)}</h3>\n"
        f'<div class="figures">\n' + "\n".join(figures) + "\n</div></article>"
    )


def _correlation(label, evidence):
    rows = np.array(evidence.correlation)
    shown = rows.copy()
    shown[len(rows) // 2, len(rows) // 2] = 0  # 1 by definition
    bound = limit(evidence.pixels)
    means = rings(rows)
    text = (
        f"the residual's autocorrelation to {len(rows) // 2} pixels, red positive and blue "
        f"negative, full colour at {CORRELATED}"
    )
    drawn = (
        "its mean at 1, 2, 3, … pixels' distance: "
        + ", ".join(f"{v:.3f}" for v in means[:3])
        + f", …; above the dashed line, {bound:.3f}, it is structure; root mean square "
        f"{evidence.rms:.3f} σ in {evidence.pixels} pixels of the head"
    )
    if evidence.across is not None:
        drawn += f"; neighbouring slices {evidence.across:.3f}"
    return [
        figure(picture(signed(shown, CORRELATED), f"{label}: {text}", coarse=True), text),
        figure(curve([float(v) for v in means], bound, f"{label}: {drawn}"), drawn),
    ]


def _interval(subject, results, factor):
    std = subject.std(results)
    if std is None:
        return []
    samples = results.settings["num_samples"]
    half = half_width(samples, factor or 1.0)
    width = half * std  # both halves, of the displayed range, which is 2
    shown = width.mean(axis=0)[None] if subject.volume is None else subject.planes(width)
    median, most = (float(np.quantile(width, q)) for q in (0.5, 0.95))
    scale = max(float(np.quantile(shown, 0.999)), 1e-6)
    text = (
        f"width of the 90 % interval of {samples} samples ({2 * half:.3g} standard deviations, "
        f"{'not ' if factor is None else ''}calibrated), black 0 to bright {scale:.1%} of the "
        f"displayed range; median {median:.1%}, 95 % of voxels below {most:.1%}"
    )
    if subject.volume is not None:
        black, white, _ = subject.volume.scale
        text += f", that is {most * abs(white - black):.3g} in the file's units"
    return [figure(picture(heat(shown[0].clip(0), scale), f"{subject.label}: {text}"), text)]


def _table(results, subjects):
    columns = {
        **{k: m.heading for k, m in METRICS.items()},
        **{k: c.heading for k, c in FIGURES.items() if k != "seconds"},
    }
    names = [item.name for s in subjects for item in s.items]
    present = [k for k in columns if any(k in results.rows[n] for n in names)]
    if not present:
        return ""
    rows = []
    for name in names[:LISTED]:
        row = results.rows[name]
        rows.append(
            (name, *(f"{row[k]:.4g}" if isinstance(row.get(k), float) else "" for k in present))
        )
    text = table_of(rows, ("image", *(columns[k] for k in present)))
    more = len(names) - len(rows)
    rest = f'<p class="soft">and {more} more in metrics.csv</p>' if more > 0 else ""
    return details(f"{len(names)} rows", text + rest) if len(names) > 20 else text + rest


def _everything(results):
    text = json.dumps({"settings": results.settings, "versions": versions()}, indent=2)
    return details("as in summary.json", f"<pre>{escape(text)}</pre>")
