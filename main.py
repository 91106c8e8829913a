"""DMPS-MRI: restore MR slices with a diffusion prior. ``python main.py --help`` explains."""

import errno
import json
import os
import signal
import sys
import time
from functools import partial

import torch
from torch.distributed import DistError
from tqdm import tqdm

from data.dataloader import list_items
from data.volumes import Slice, write_volumes
from guided_diffusion.dist_util import (
    checkpoint_digest,
    compile_network,
    pick_device,
    pick_dtype,
    pick_memory_format,
)
from guided_diffusion.methods import METHODS, VANILLA, check_conditioning, method_names
from guided_diffusion.ranks import share_out
from guided_diffusion.restoration import Restoration
from guided_diffusion.statistics import NATURAL_IMAGES, load_statistics
from guided_diffusion.unet import create_model
from util import flags
from util.config import read_diffusion_config, read_model_config, read_task_config
from util.errors import UserError
from util.image_files import Recorder
from util.results import Results, results_folder

VANILLA_SAMPLES = 10
UNSURE = (
    "note: samples of spectral lie closer together than those of the posterior; for an honest "
    "spread take configs/diffusion_config_samples.yaml"
)
NO_STATISTICS = (
    "note: no statistics of the prior's images beside its weights, those of natural images are "
    "taken; python -m guided_diffusion.statistics measures them"
)
LEAST_SIDE = 16  # pixels of a restored image; SSIM's window takes 11 of them


def parse_args(argv=None):
    return flags.parse_args(argv, method_names())


class Run:
    """One run: the prior, the sampler and the task, and what happens to a batch of images."""

    def __init__(self, args, ranks):
        self.args, self.ranks = args, ranks
        model_config = read_model_config(args.model_config)
        if model_config["class_cond"]:
            raise UserError(
                f"{args.model_config}: class_cond: true, and this program gives no class labels"
            )
        diffusion_config = read_diffusion_config(args.diffusion_config)
        replaced = args.method or diffusion_config.get("method")
        self.task = read_task_config(args.task_config, replaced, args.measured)
        method = self.task["conditioning"]["method"]
        self.vanilla = method == VANILLA
        self.task["conditioning"]["params"] = check_conditioning(
            method,
            self.task["conditioning"]["params"],
            "" if self.vanilla else self.task["measurement"]["operator"]["name"],
        )
        if self.vanilla and args.num_samples > 1:
            raise UserError(
                "--num_samples: vanilla restores nothing that could be sampled more than once; "
                "--limit says how many samples of the prior to draw"
            )
        self.items = [] if self.vanilla else self._list_items()[: args.limit]
        self.device = pick_device(args.gpu)
        statistics = load_statistics(model_config["model_path"])
        if statistics is None and not self.vanilla:
            if METHODS[method].uses_statistics or diffusion_config["start"] != "":
                ranks.say(NO_STATISTICS, error=True)
        statistics = statistics or NATURAL_IMAGES
        self.restoration = Restoration(
            self.task,
            {k: v for k, v in diffusion_config.items() if k != "method"},
            model_config["in_channels"],
            model_config["image_size"],
            self.device,
            args.seed,
            args.num_samples,
            statistics,
        )
        self.sigmas, self.volume_sigmas = {}, {}  # those estimated: by name, by volume

        dtype = pick_dtype(args.precision, self.device, model_config["use_fp16"])
        self.model = create_model(**{**model_config, "use_fp16": False})
        differentiates = not self.vanilla and METHODS[method].needs_gradient
        layout = pick_memory_format(self.device, differentiates)
        self.model.to(self.device, memory_format=layout).set_torso_dtype(dtype)
        self.model.requires_grad_(False)
        if args.compile:
            compile_network(self.model, self.device)
        settings = {
            "model_config": model_config,
            "checkpoint_sha256": checkpoint_digest(model_config["model_path"]),
            "diffusion_config": diffusion_config,
            "task_config": self.task,
            "seed": args.seed,
            "num_samples": args.num_samples,
            "precision": str(dtype).removeprefix("torch."),
        }
        folder = results_folder(args.save_dir, model_config, self.task)
        title = os.path.relpath(folder, args.save_dir)
        if self.vanilla:
            self.names = [f"sample_{i:03d}" for i in range(args.limit or VANILLA_SAMPLES)]
        else:
            self.names = [item.name for item in self.items]
        items = {item.name: item for item in self.items}
        if ranks.rank:
            ranks.open(len(self.names))
        self.results = Results(
            folder, title, settings, self.names, args.overwrite, items, ranks.rank
        )
        if ranks.rank == 0:
            ranks.open(len(self.names))
        self.failed, self.errors, self.notes = [], set(), set()

    def _list_items(self):
        rician = self.task["measurement"]["noise"]["name"] == "rician"
        return list_items(self.task["data"], magnitude=rician)

    def fail(self, name, error):
        """Report an image that cannot be restored; the others still are."""
        self.failed.append(name)
        self.ranks.count(1)
        if str(error) not in self.errors:  # a damaged volume has one error for all its slices
            self.ranks.say(f"error: {error}", error=True)
        self.errors.add(str(error))

    def batches(self):
        """Yield (names, images), images (N, C, H, W) in [-1, 1] of one shape: this rank's share.

        Which images make a batch is decided by their order alone, not by what was done before.
        """
        size = 1 if self.restoration.own_schedules else self.args.batch_size
        for i in self.ranks.share(-(-len(self.names) // size)):
            part = slice(i * size, (i + 1) * size)
            yield from self._samples(part) if self.vanilla else self._images(part)

    def _samples(self, part):
        size, channels = self.model.image_size, self.model.in_channels
        names = self.names[part]
        yield names, torch.zeros(len(names), channels, size, size)

    def _images(self, part):
        names, images = [], []
        for item in self.items[part]:
            try:
                image = self._read(item)
            except UserError as error:
                self.fail(item.name, error)
                continue
            if names and image.shape != images[0].shape:
                yield names, torch.stack(images)
                names, images = [], []
            names.append(item.name)
            images.append(image)
        if names:
            yield names, torch.stack(images)

    def _read(self, item):
        image = torch.from_numpy(item.read())
        try:
            fitted = self._fit(item, image)
        except UserError as error:
            raise UserError(f"{item.label}: {error}") from None
        item.check_writable(self.restoration.restored_size(image)[0] // image.shape[-2])
        if item.note and item.note not in self.notes:
            self.ranks.say(f"note: {item.note}", error=True)
            self.notes.add(item.note)
        return fitted

    def _fit(self, item, image):
        """The image with the channels that the prior, or if measured the operator, takes."""
        restoration = self.restoration
        height, width = restoration.restored_size(image)
        least = max(LEAST_SIDE, self.model.least_side)
        if min(height, width) < least:
            raise UserError(f"{width}×{height} pixels to restore, and the least side is {least}")
        operator = restoration.operator((restoration.channels, height, width))
        channels = (operator.out_shape if restoration.measured else operator.in_shape)[0]
        if len(image) > channels and channels < operator.in_shape[0]:
            raise UserError(f"{len(image)} channels, and color restores measurements of one")
        if channels == 3 and len(image) == 1:
            image = image.repeat(3, 1, 1)
        if restoration.estimates_sigma:
            self.sigmas[item.name] = self._estimate_sigma(item, image, operator)
        return image

    def _estimate_sigma(self, item, image, operator):
        """σ of each contrast of a picture; of a slice its volume's, for a slice may be empty."""
        estimate = self.restoration.noise.estimate
        if not isinstance(item, Slice):
            rows = image.reshape(-1, *operator.out_shape).numpy()
            return torch.tensor([estimate(row) for row in rows])
        if item.volume not in self.volume_sigmas:
            sigma = estimate(item.volume.sample())
            self.volume_sigmas[item.volume] = torch.tensor([sigma])
        return self.volume_sigmas[item.volume]

    def restore(self, names, images, bar):
        """Restore one batch and write its files."""
        start, recorder = time.perf_counter(), None

        def on_start(steps, x_T):
            nonlocal recorder
            bar.reset(total=steps)
            if self.args.record or self.args.video:
                recorder = Recorder(steps)
                recorder.frame(x_T)

        def after_step(t, x_t):
            bar.update()
            if recorder:
                recorder(t, x_t)

        sigma = torch.cat([self.sigmas[n] for n in names]) if self.sigmas else None
        restored = self.restoration.restore(self.model, names, images, sigma, on_start, after_step)
        seconds = (time.perf_counter() - start) / len(names)
        rows = len(names) * self.args.num_samples
        has_truth = not (self.vanilla or self.restoration.measured)
        for i, name in enumerate(names):
            line = self.results.add(
                name,
                restored.means[i],
                restored.samples[i],
                images[i].numpy() if has_truth else None,
                restored.measurements[i],
                restored.figures[i],
                recorder.movie(i * self.args.num_samples, rows) if recorder else [],
                seconds,
                gif=self.args.record,
                mp4=self.args.video,
            )
            self.ranks.say(line)

    def _are_done(self, names, images):
        kind = None if self.vanilla else "input" if self.restoration.measured else "truth"
        gif, mp4 = self.args.record, self.args.video
        return all(
            self.results.is_done(name, kind, None if self.vanilla else image.numpy(), gif, mp4)
            for name, image in zip(names, images, strict=True)
        )

    def _write_volumes(self, done):
        title = self.results.title.replace(os.sep, "/")
        description = f"{self.task['conditioning']['method']} {title}"
        identity = json.dumps(self.results.settings, sort_keys=True)
        failed = False
        for line, bad in write_volumes(
            self.items, done, self.results.folder, description, identity
        ):
            self.ranks.say(f"error: {line}" if bad else line, error=bad)
            failed = failed or bad
        return failed

    def restore_all(self):
        """Restore every image that falls to this process; returns the exit status."""
        total, done, found = len(self.names), 0, 0
        method = self.task["conditioning"]["method"]
        if self.args.num_samples > 1 and not METHODS[method].honest_spread:
            self.ranks.say(UNSURE, error=True)
        with tqdm(unit="step", dynamic_ncols=True, disable=bool(self.ranks)) as bar:
            for names, images in self.batches():
                first, done = done + 1, done + len(names)
                if self._are_done(names, images):
                    found += len(names)
                else:
                    which = f"{first}" if len(names) == 1 else f"{first}-{done}"
                    bar.set_description(f"image {which}/{total} {names[0]}")
                    for name in names:
                        self.results.begin(name)
                    self.restore(names, images, bar)
                self.ranks.count(len(names))
        records = self.ranks.leave(found=found, failed=self.failed)
        return 0 if records is None else self._close(records)

    def _close(self, records):
        """Merge what the processes did, say it and return the exit status."""
        total, found = len(self.names), sum(r["found"] for r in records)
        failed = {name for r in records for name in r["failed"]}
        failed = [name for name in self.names if name in failed]
        self.results.merge()
        missing = [n for n in self.names if n not in self.results.rows and n not in failed]
        unwritten = self._write_volumes(set(self.results.rows) - set(failed))
        if found:
            self.ranks.say(f"{found} of {total} images had been restored by an earlier run")
        self.results.write_comparison()
        self.results.write_summary(finished=not missing, failed=failed)
        self.ranks.say(self.results.table())
        for names, what in (
            (failed, "could not be restored"),
            (missing, "are left to the next run, as a process died"),
        ):
            if names:
                listed = ", ".join(names)
                self.ranks.say(
                    f"error: {len(names)} of {total} images {what}: {listed}", error=True
                )
        return 2 if failed or unwritten else int(bool(missing))


def main(argv=None):
    try:
        return share_out(partial(run, argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(argv, ranks):
    """One process's part of a run; returns its exit status."""
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        return Run(parse_args(argv), ranks).restore_all()
    except UserError as error:
        ranks.say(f"error: {error}", error=True)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        ranks.say(
            f"error: --save_dir: {error.strerror}; make room and run the same command again, "
            "which goes on where it stopped",
            error=True,
        )
        return 2
    except torch.OutOfMemoryError as error:
        ranks.say(
            f"error: --gpu: {str(error).split('. ')[0]}; with a smaller --batch_size "
            "the same command goes on where it stopped",
            error=True,
        )
        return 2
    except DistError:
        text = "error: the first process has gone; the same command goes on where it stopped"
        print(text, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        text = "interrupted: run the same command again to go on where it stopped"
        ranks.say(text, error=True)
        return 130


def interrupt(signum, frame):
    """Stop, as Ctrl-C does; launchers send more than one signal, and one is enough."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
