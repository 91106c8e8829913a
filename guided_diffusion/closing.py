"""What the last process of a run does: the files of all its images together, and what is said."""

import json
import os
from typing import Any, Protocol

from data.bids import write_bids
from data.output import write_output
from data.volumes import Slice, Whole, reason, write_volumes
from guided_diffusion import __version__
from guided_diffusion.intervals import load_factor
from guided_diffusion.item_noise import ItemSigmas
from guided_diffusion.job import Job
from guided_diffusion.prior import Prior
from guided_diffusion.ranks import Ranks
from guided_diffusion.report import write_report
from guided_diffusion.volume_maps import Maps, maps_of
from util.results import Results

NOT_CALIBRATED = (
    "the 90 % intervals are those of the samples, for with these weights, this method and operator "
    "it was not measured how often they hold the truth"
)


class Teller(Protocol):
    """The process's part of the run, which does not say a thing twice."""

    ranks: Ranks
    sigmas: ItemSigmas

    def tell(self, note: str | None) -> None: ...

    def tell_notes(self) -> None: ...


def _write_volumes(
    job: Job, prior: Prior, results: Results, teller: Teller, done: set[str]
) -> bool:
    """Put the volumes together; returns whether that failed for one."""
    title = results.title.replace(os.sep, "/")
    description = f"{job.method} {title}"
    identity = json.dumps(results.settings, sort_keys=True)
    measurement, failed = job.task.measurement, False
    how = results.folder, description, identity, _more_of(job, prior, results, teller)
    measured = measurement is not None and not measurement.simulated
    for written in write_volumes(job.items, done, *how, measured):
        bad, line = written.failed, written.line
        teller.ranks.say(f"error: {line}" if bad else line, error=bad)
        failed = failed or bad
    return failed


def _write_bids(job: Job, results: Results) -> str:
    given = job.task.measurement.noise.sigma if job.task.measurement else None
    found = {n: row.get("sigma", given) for n, row in results.rows.items()}
    sigmas = {n: float(s) for n, s in found.items() if isinstance(s, float | int)}
    return write_bids(job.items, results.folder, results.settings, sigmas, __version__)


def _write_comparison(results: Results) -> str | None:
    """Write comparison.png, and say in a sentence if that fails."""
    try:
        results.write_comparison()
    except Exception as error:  # noqa: BLE001 - the results are there, whatever it was
        said = f"comparison.png cannot be written ({reason(error)})"
        return f"{said}; the results are complete without it"
    return None


def _more_of(job: Job, prior: Prior, results: Results, teller: Teller) -> Maps | None:
    """What else is written of each volume."""
    measurement = job.task.measurement
    if measurement is None or not any(isinstance(i, (Slice, Whole)) for i in job.items):
        return None
    factor = load_factor(prior, job.method, measurement.operator.name, job.in_turn)
    if factor is None and job.options.num_samples > 1:
        teller.tell(NOT_CALIBRATED)
    return maps_of(job, teller.sigmas, results.rows, factor)


def close(
    job: Job, prior: Prior, results: Results, teller: Teller, records: list[dict[str, Any]]
) -> int:
    """Merge what the processes did, say it and return the exit status."""
    names = [item.name for item in job.items]
    total, found = len(names), sum(r["found"] for r in records)
    anywhere = {name for r in records for name in r["failed"]}
    failed = [name for name in names if name in anywhere]
    results.merge()
    teller.tell_notes()
    missing = [n for n in names if n not in results.rows and n not in anywhere]
    unwritten = _write_volumes(job, prior, results, teller, set(results.rows) - anywhere)
    if found:
        teller.ranks.say(f"{found} of {total} images had been restored by an earlier run")
    teller.tell(_write_comparison(results))
    teller.tell(write_report(results, job, prior, failed, missing))
    results.write_summary(finished=not missing, failed=failed)
    teller.ranks.say(results.table())
    if job.options.bids and not (failed or missing or unwritten):
        teller.ranks.say(_write_bids(job, results))
    output = job.options.output
    if output and not (failed or missing or unwritten):
        teller.ranks.say(write_output(output, job.items, results.folder))
    for left, what in (
        (failed, "could not be restored"),
        (missing, "are left to the next run, as a process died"),
    ):
        if left:
            listed = ", ".join(left)
            teller.ranks.say(f"error: {len(left)} of {total} images {what}: {listed}", error=True)
    return 2 if failed or unwritten else int(bool(missing))
