"""A run of main.py: its images, restored batch by batch, and what becomes of them."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray

from data.kspace import KSpaceSlice
from data.masks import Mask
from data.volumes import Slice, Whole, reason
from guided_diffusion.batches import Restored, own_schedules
from guided_diffusion.closing import close
from guided_diffusion.config import Measurement
from guided_diffusion.devices import pick_device
from guided_diffusion.evidence import keep
from guided_diffusion.intervals import load_factor
from guided_diffusion.item_noise import ItemSigmas
from guided_diffusion.job import Job, files_read, read_job, results_folder, settings_of
from guided_diffusion.measuring import check_volume, enlargement, fit
from guided_diffusion.methods import METHODS
from guided_diffusion.operators import operator_class
from guided_diffusion.options import Options
from guided_diffusion.prior import Prior, load_prior
from guided_diffusion.ranks import Ranks
from guided_diffusion.restoration import restore
from guided_diffusion.sampling import forget
from guided_diffusion.scan import Scan, prepare
from guided_diffusion.statistics import NATURAL_IMAGES
from guided_diffusion.volume_items import (
    as_volume,
    counted_in,
    head_of,
    interpolated_of,
    measurement_of,
    note_of_lengths,
    note_of_planes,
    note_of_ranks,
    place_of,
)
from guided_diffusion.volumes import AsVolume
from util.errors import UserError
from util.image_files import Recorder
from util.random import ImageRandom, image_generator
from util.results import Results, open_results

SIMULATED = (
    "the input is taken for the truth: it is degraded first, and restored from that; --measured "
    "restores it as it is"
)
UNSURE = (
    "samples of spectral lie closer together than those of the posterior; for an honest "
    "spread take configs/diffusion_config_samples.yaml"
)
NO_STATISTICS = (
    "no statistics of the prior's images beside its weights, those of natural images are taken; "
    "python -m guided_diffusion.statistics measures them"
)


def run(options: Options, ranks: Ranks) -> int:
    """One process's part of a run; returns its exit status.

    Raises:
        UserError: nothing can be restored.
    """
    job = read_job(options)
    prior = load_prior(job.model, pick_device(options.gpu), options.precision, options.compile)
    folder = results_folder(job)
    title = os.path.relpath(folder, options.save_dir)
    if ranks.rank:
        ranks.open(len(job.items))
    settings = settings_of(job, prior)
    how = options.overwrite, ranks.rank, files_read(job) if options.overwrite else ()
    results = open_results(folder, title, settings, job.items, *how)
    if not ranks.rank:
        ranks.open(len(job.items))
    closing = False
    try:
        part = Run(job, prior, results, ranks, ItemSigmas(prior, job.schedule, job.sigma_map))
        part.restore_all()
        ranks.close()
        records = ranks.leave(found=part.found, failed=part.failed)
        closing = records is not None
        return 0 if records is None else close(job, prior, results, part, records)
    finally:
        ranks.close()
        results.lock.release(last=closing or not ranks)


@dataclass
class Run:
    """What a process does of a job."""

    job: Job
    prior: Prior
    results: Results
    ranks: Ranks
    sigmas: ItemSigmas
    found: int = 0  # images that an earlier run had restored
    failed: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    factor: float | None = None  # on samples' standard deviations, see `load_factor`

    def restore_all(self) -> None:
        """Restore every image that falls to this process."""
        options = self.job.options
        self.tell_notes()
        self._check_writing()
        self.tell(note_of_ranks(self.job.items, self.ranks.size))
        measurement = self.job.task.measurement
        if measurement and measurement.simulated and (options.input or options.output):
            self.tell(SIMULATED)
        if self.job.task.measurement is not None:
            method = METHODS[self.job.method]
            if options.num_samples > 1:
                operator = self.job.task.measurement.operator.name
                self.factor = load_factor(self.prior, self.job.method, operator, self.job.in_turn)
                if not method.honest_spread:
                    self.tell(UNSURE)
            if self.prior.statistics is NATURAL_IMAGES and self.job.uses_statistics:
                self.tell(NO_STATISTICS)
        for items, images in self.batches():
            if all(map(self._is_done, items)):
                self.found += len(items)
                self.ranks.advance(len(items), done=len(items), found=len(items))
                continue
            for item in items:
                self.results.begin(item.name)
            self.restore(items, images)

    def _check_writing(self) -> None:
        """Before the first network evaluation, name the volumes that could not be written."""
        measurement = self.job.task.measurement
        for item in self.job.items:
            try:
                item.check_writable(enlargement(measurement))
            except UserError as error:
                self._say_once(error)

    def tell(self, note: str | None) -> None:
        """Print a note once."""
        if note and note not in self.told:
            self.ranks.say(f"note: {note}", error=True)
            self.told.add(note)

    def _say_once(self, error: Exception | str) -> None:
        if str(error) not in self.told:  # a damaged volume has one error for all its slices
            self.ranks.say(f"error: {error}", error=True)
        self.told.add(str(error))

    def fail(self, item: Any, error: Exception | str) -> None:
        """Report an image that cannot be restored; the others still are."""
        self.failed.append(item.name)
        self._say_once(error)

    def batches(self) -> Iterator[tuple[list[Any], torch.Tensor]]:
        """Yield (items, images), images (N, C, H, W) in [-1, 1] of one shape: this rank's share.

        Which images make a batch is decided by their order alone, not by what was done before.
        """
        single = own_schedules(self.job.task.measurement, self.job.schedule)
        whole = any(isinstance(i, (KSpaceSlice, Whole)) for i in self.job.items)
        size = 1 if single or whole or self.job.sigma_map else self.job.options.batch_size
        for i in self.ranks.share(-(-len(self.job.items) // size)):
            yield from self._batch(self.job.items[i * size : (i + 1) * size])

    def _batch(self, part: list[Any]) -> Iterator[tuple[list[Any], torch.Tensor]]:
        items: list[Any] = []
        images: list[torch.Tensor] = []
        for item in part:
            try:
                image = self._read(item)
            except UserError as error:
                self.fail(item, error)
                self.ranks.advance(1, done=1)
                continue
            if items and image.shape != images[0].shape:
                yield items, torch.stack(images)
                items, images = [], []
            items.append(item)
            images.append(image)
        if items:
            yield items, torch.stack(images)

    def _read(self, item: Any) -> torch.Tensor:
        image = torch.from_numpy(item.read())
        measurement = self._measurement(item)
        if measurement is None or isinstance(item, KSpaceSlice):
            return image
        try:
            whole = self._as_volume(item)
            check_volume(measurement, self.prior, whole)
            image = fit(image, measurement, self.prior, whole is not None)
            if not self._is_done(item):
                self.tell(self.sigmas.find(item, image, measurement))
        except UserError as error:
            raise UserError(f"{item.label}: {error}") from None
        item.check_writable(enlargement(measurement))
        self.tell(item.note)
        return image

    def restore(self, items: list[Any], images: torch.Tensor) -> None:
        """Restore one batch and write its files."""
        start, options = time.perf_counter(), self.job.options
        recorder: Recorder | None = None
        last, done = 0, 0.0  # steps taken, and images' worth of work
        which = items[0].name if len(items) == 1 else f"{items[0].name} … {items[-1].name}"

        whole, measurement = self._as_volume(items[0]), self._measurement(items[0])
        self.tell(note_of_planes(items[0], self.job.task.data, whole))
        self.tell(note_of_lengths(items[0], self.job.task.measurement))

        def watch(left: int, steps: int, x: torch.Tensor) -> None:
            nonlocal recorder, last, done
            shown = steps  # of a volume the first sample, for the others come after it
            if whole is not None:
                x, shown = x[:, x.shape[1] // 2, None], steps // options.num_samples
            if left == steps and (options.record or options.video):
                recorder = Recorder(shown)
                recorder.frame(x)
            elif recorder and left >= steps - shown:
                recorder(left - (steps - shown), x)
            now = f"{which}: step {steps - left}/{steps}"
            work = len(items) * (steps - left - last) / steps
            self.ranks.advance(work, now)
            last, done = steps - left, done + work

        measured = measurement is not None and not measurement.simulated
        try:
            restored = restore(
                images,
                measurement,
                self.prior,
                self.job.method,
                self.job.schedule,
                self.job.params,
                names=[i.name for i in items],
                places=[place_of(i, self.job.task.data) for i in items],
                num_samples=options.num_samples,
                seed=options.seed,
                sigma=self.sigmas.take(items, images, measurement),
                watch=watch,
                scan=self._scan(items[0]) if isinstance(items[0], KSpaceSlice) else None,
                volume=whole,
                padding=[self._not_counted(i) for i in items] if measured else None,
                state_file=self._state_file(items[0]),
            )
        except UserError as error:
            for item in items:
                self.fail(item, f"{item.label}: {error}")
            self.ranks.advance(len(items) - done, done=len(items))
            return
        self._tell_sampled(restored)
        seconds = (time.perf_counter() - start) / len(items)
        for i, item in enumerate(items):
            if restored.finite[i]:
                self._write(i, item, images[i].numpy(), restored, recorder, seconds)
            else:
                self.fail(item, f"{item.label}: {self._not_finite()}")
            self.ranks.advance(0, done=1)

    def _state_file(self, item: Any) -> str | None:
        """Where the state of a whole volume is kept between steps; frames are not kept."""
        if not isinstance(item, Whole) or self.job.options.record or self.job.options.video:
            return None
        return os.path.join(self.results.folder, "unfinished", f"{item.name}.pt")

    def _scan(self, item: KSpaceSlice) -> Scan:
        """The slice's k-space, made ready; raises UserError, see `guided_diffusion.scan`."""
        measurement = self.job.task.measurement
        assert measurement is not None
        sigma = measurement.noise.sigma
        return prepare(
            item.acquisition(),
            operator_class("mri").check(measurement.operator.params),
            None if sigma == "auto" else float(sigma or 0),
            self.prior,
            self.job.schedule.sampler_arguments(),
            ImageRandom([image_generator(item.name, "phase", self.job.options.seed)]).randn_like,
        )

    def _tell_sampled(self, restored: Restored) -> None:
        mask = restored.sampled
        if mask is not None:
            self.tell(
                f"{mask.sum()} of {mask.size} {'lines' if 1 in mask.shape else 'points'} of "
                f"k-space are measured: acceleration {mask.size / mask.sum():.3g}"
            )

    def _as_volume(self, item: Any) -> AsVolume | None:
        options, least = self.job.options, self.prior.network.least_side
        task = self.job.task
        return as_volume(item, task.data, task.measurement, options.batch_size, least)

    def _measurement(self, item: Any) -> Measurement | None:
        return measurement_of(item, self.job.task.measurement)

    def _not_finite(self) -> str:
        half = self.prior.dtype == torch.float16
        hint = "--precision fp32 has a wider range" if half else "the prior may be damaged"
        return f"the network's output is not finite (nan or inf), so there is no image; {hint}"

    def _write(
        self,
        i: int,
        item: Any,
        image: NDArray,
        restored: Restored,
        recorder: Recorder | None,
        seconds: float,
    ) -> None:
        options, measurement = self.job.options, self.job.task.measurement
        truth = image if measurement is not None and measurement.simulated else None
        try:
            mask = None if truth is None else self._mask(item, truth)
        except UserError as error:
            self.fail(item, error)
            return
        self._keep_evidence(i, item, restored)
        # A film is that of the first sample.
        each = 1 if isinstance(item, Whole) else options.num_samples
        stem = item.volume.name if isinstance(item, Slice) else item.name
        line = self.results.add(
            item,
            restored.mean[i],
            restored.samples[i],
            truth,
            restored.measurements[i],
            mask,
            interpolated_of(item, measurement, restored.measurements[i], restored.mean[i]),
            {**restored.figures[i], "seconds": seconds},
            recorder.movie(i * each, len(restored.mean) * each) if recorder else [],
            gif=options.record,
            mp4=options.video,
            source="" if item.label.startswith(stem) else item.label,
            sampled=restored.sampled,
            factor=self.factor or 1.0,
        )
        if (state_file := self._state_file(item)) is not None:
            forget(state_file)
        self.ranks.say(line)

    def _keep_evidence(self, i: int, item: Any, restored: Restored) -> None:
        """For the report, for want of which no image is lost."""
        measurement = self.job.task.measurement
        if measurement is None:
            return
        try:
            ignored = self._not_counted(item)
            schedule = self.job.schedule
            keep(self.results, item, i, restored, measurement, self.prior, schedule, ignored)
        except Exception as error:  # noqa: BLE001 - whatever it is, the image itself is restored
            self.tell(f"{item.label}: the report lacks its residual ({reason(error)})")

    def _mask(self, item: Any, truth: NDArray) -> Mask | None:
        """The pixels of which metrics are taken: the mask's, but those that are no data."""
        mask, padding = counted_in(item, truth, self.job.mask), item.padding()
        if padding is None:
            return mask
        return ~padding if mask is None else mask & ~padding

    def _not_counted(self, item: Any) -> NDArray | None:
        """The pixels that the residual is not taken of: no data, or outside of the mask."""
        head, padding = head_of(item), item.padding()
        if head is None:
            return padding
        return ~head if padding is None else ~head | padding

    def _is_done(self, item: Any) -> bool:
        measurement = self.job.task.measurement
        kind = "truth" if measurement and measurement.simulated else "input" if measurement else ""
        return self.results.is_done(item, kind, self.job.options.record, self.job.options.video)

    def tell_notes(self) -> None:
        for note in self.results.notes:
            self.tell(note)
