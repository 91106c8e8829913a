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
from guided_diffusion.condition_methods import METHODS, check_conditioning, get_conditioning_method
from guided_diffusion.dist_util import (
    checkpoint_digest,
    compile_network,
    pick_device,
    pick_dtype,
)
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.measurements import get_noise, get_operator, restored_size
from guided_diffusion.ranks import share_out
from guided_diffusion.spectral import start_state, useful_levels
from guided_diffusion.unet import create_model
from util import flags
from util.config import read_diffusion_config, read_model_config, read_task_config
from util.errors import UserError
from util.image_files import Recorder
from util.noise_level import correct_rician_bias, estimate_sigma
from util.random import ImageRandom, image_generator
from util.results import Results, results_folder

VANILLA_SAMPLES = 10
UNSURE = (
    "note: samples of spectral lie closer together than those of the posterior; for an honest "
    "spread take --method dmps and configs/diffusion_config_100.yaml"
)
LEAST_SIDE = 16  # pixels of a restored image; SSIM's window takes 11 of them


def parse_args(argv=None):
    return flags.parse_args(argv, tuple(METHODS))


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
        self.task["conditioning"]["params"] = check_conditioning(
            method, self.task["conditioning"]["params"]
        )
        self.vanilla = method == "vanilla"
        if self.vanilla and args.num_samples > 1:
            raise UserError(
                "--num_samples: vanilla restores nothing that could be sampled more than once; "
                "--limit says how many samples of the prior to draw"
            )
        self.measured = not self.vanilla and self.task["data"]["measured"]
        self.items = [] if self.vanilla else list_items(self.task["data"])[: args.limit]
        self.device = pick_device(args.gpu)
        self.operators = {}
        if not self.vanilla:
            self.noise = get_noise(**self.task["measurement"]["noise"])
            self.rician = self.task["measurement"]["noise"]["name"] == "rician"
            self.sigmas = {} if self.noise.sigma == "auto" else None  # those estimated, by name
            self.volume_sigmas = {}
            size = model_config["image_size"]  # fails early on a task that fits no image
            self.operator((model_config["in_channels"], size, size))
        self.schedule = {k: v for k, v in diffusion_config.items() if k != "method"}
        self.starts_early = self.schedule["start"] != ""
        # Fails early, too; a task's own noise level matters to "auto" alone.
        create_sampler(**self.schedule, levels=None if self.vanilla else (1, 1))

        dtype = pick_dtype(args.precision, self.device, model_config["use_fp16"])
        self.model = create_model(**{**model_config, "use_fp16": False})
        self.model.to(self.device, memory_format=torch.channels_last).set_torso_dtype(dtype)
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
        self.failed, self.errors = [], set()

    def operator(self, in_shape):
        """The task's operator for images of this shape; images of one shape share it."""
        if in_shape not in self.operators:
            params = self.task["measurement"]["operator"]
            self.operators = {
                in_shape: get_operator(in_shape=in_shape, device=self.device, **params)
            }
        return self.operators[in_shape]

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
        # Estimated noise levels decide where "auto" starts, so each image has its own schedule.
        alone = not self.vanilla and self.sigmas is not None and self.schedule["start"] == "auto"
        size = 1 if alone else self.args.batch_size
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
            return self._fit(item, image)
        except UserError as error:
            raise UserError(f"{item.label}: {error}") from None

    def _fit(self, item, image):
        """The image with the channels that the prior, or if measured the operator, takes."""
        height, width = self._restored_size(image)
        least = max(LEAST_SIDE, self.model.least_side)
        if min(height, width) < least:
            raise UserError(f"{width}×{height} pixels to restore, and the least side is {least}")
        operator = self.operator((self.model.in_channels, height, width))
        channels = (operator.out_shape if self.measured else operator.in_shape)[0]
        if len(image) > channels and channels < operator.in_shape[0]:
            raise UserError(f"{len(image)} channels, and color restores measurements of one")
        if channels == 3 and len(image) == 1:
            image = image.repeat(3, 1, 1)
        if self.sigmas is not None:
            self.sigmas[item.name] = self._estimate_sigma(item, image, operator)
        return image

    def _estimate_sigma(self, item, image, operator):
        """σ of each contrast of a picture; of a slice its volume's, for a slice may be empty."""
        if not isinstance(item, Slice):
            rows = image.reshape(-1, *operator.out_shape).numpy()
            return torch.tensor([estimate_sigma(row, self.rician) for row in rows])
        if item.volume not in self.volume_sigmas:
            sigma = estimate_sigma(item.volume.sample(), self.rician)
            self.volume_sigmas[item.volume] = torch.tensor([sigma])
        return self.volume_sigmas[item.volume]

    def _restored_size(self, images):
        """(H, W) of what these images, (..., H, W), are restored to."""
        size = tuple(images.shape[-2:])
        if not self.measured:
            return size
        return restored_size(size, **self.task["measurement"]["operator"])

    def restore(self, names, images, bar):
        """Restore one batch, degraded first unless it is measured, and write its files.

        Of N images of C channels and K samples each, the network sees N·K·contrasts rows: a
        colour image under a one-channel prior is restored contrast by contrast.
        """
        start = time.perf_counter()
        count, shape = self.args.num_samples, (self.model.in_channels, *self._restored_size(images))
        levels = None
        if self.vanilla:
            rows, method = len(names), get_conditioning_method("vanilla")
        else:
            operator = self.operator(shape)
            y, sigma = self._measure(operator, names, images)
            unbiased = correct_rician_bias(y, sigma) if self.rician else y
            measured = self._once_a_sample(operator, unbiased, sigma, len(names))
            rows, method = len(y), self._conditioning(*measured)
            levels = useful_levels(operator, sigma)
        diffusion = create_sampler(**self.schedule, levels=levels)
        bar.reset(total=diffusion.num_timesteps)
        random = ImageRandom(
            [image_generator(n, k, self.args.seed) for n in names for k in range(count)]
        )
        recording = self.args.record or self.args.video
        recorder = Recorder(diffusion.num_timesteps) if recording else None

        def after_step(t, x_t, pred_xstart):
            bar.update()
            if recorder:
                recorder(t, x_t)

        x_T = random.randn_like(torch.empty(rows * count, *shape, device=self.device))
        if self.starts_early:
            x_T = start_state(*measured, diffusion, x_T)
        if recorder:
            recorder.frame(x_T)
        x_hat = diffusion.p_sample_loop(self.model, x_T, method.step, random.randn_like, after_step)
        samples = x_hat.clamp(-1, 1).float().cpu().reshape(len(names), count, -1, *shape[1:])
        seconds = (time.perf_counter() - start) / len(names)
        truth, shown, figures = [None] * len(names), [None] * len(names), [{}] * len(names)
        if not self.vanilla:
            shown = y.cpu().reshape(len(names), -1, *y.shape[2:]).numpy()
            figures = self._figures(operator, unbiased, sigma, samples)
            truth = truth if self.measured else images.numpy()
        for i, name in enumerate(names):
            line = self.results.add(
                name,
                samples[i].numpy(),
                truth[i],
                shown[i],
                figures[i],
                recorder.movie(i * count, len(names) * count) if recorder else [],
                seconds,
                gif=self.args.record,
                mp4=self.args.video,
            )
            self.ranks.say(line)

    def _are_done(self, names, images):
        kind = None if self.vanilla else "input" if self.measured else "truth"
        gif, mp4 = self.args.record, self.args.video
        return all(
            self.results.is_done(name, kind, None if self.vanilla else image.numpy(), gif, mp4)
            for name, image in zip(names, images, strict=True)
        )

    def _measure(self, operator, names, images):
        """y (rows, *out_shape), as it is or A x + n, n drawn once an image; and its σ.

        σ is one number, or (rows, 1, 1, 1) where it was estimated.
        """
        if not self.measured:
            x = images.reshape(-1, *operator.in_shape).to(self.device)
            random = ImageRandom([image_generator(n, "measurement", self.args.seed) for n in names])
            return self.noise(operator.forward(x), random), self.noise.sigma
        y = images.reshape(-1, *operator.out_shape).to(self.device)
        if self.noise.sigma != "auto":
            return y, self.noise.sigma
        sigma = torch.cat([self.sigmas[name] for name in names])
        return y, sigma.to(self.device).reshape(-1, 1, 1, 1)

    def _once_a_sample(self, operator, y, sigma, images):
        """(operator, y, sigma) with every image's rows once a sample."""

        def repeat(rows):
            per_image = rows.reshape(images, -1, *rows.shape[1:])
            per_sample = per_image.repeat_interleave(self.args.num_samples, dim=0)
            return per_sample.reshape(-1, *rows.shape[1:])

        return operator, repeat(y), repeat(sigma) if torch.is_tensor(sigma) else sigma

    def _conditioning(self, operator, y, sigma):
        conditioning = self.task["conditioning"]
        return get_conditioning_method(
            conditioning["method"], operator, y, sigma, **conditioning["params"]
        )

    def _figures(self, operator, y, sigma, samples):
        """What is known of each image without its truth: ‖y - A x̂‖/(σ√m), and an estimated σ."""
        figures = [{} for _ in samples]
        if torch.is_tensor(sigma) or sigma > 0:
            x_hat = samples.mean(dim=1).reshape(-1, *operator.in_shape).to(self.device)
            residual = (y - operator.forward(x_hat)) / sigma
            for found, image in zip(figures, residual.chunk(len(figures)), strict=True):
                found["residual"] = image.square().mean().sqrt().item()
        if torch.is_tensor(sigma):
            for found, image in zip(figures, sigma.chunk(len(figures)), strict=True):
                found["sigma"] = image.square().mean().sqrt().item()
        return figures

    def _write_volumes(self, done):
        title = self.results.title.replace(os.sep, "/")
        description = f"{self.task['conditioning']['method']} {title}"
        identity = json.dumps(self.results.settings, sort_keys=True)
        for line in write_volumes(self.items, done, self.results.folder, description, identity):
            self.ranks.say(line)

    def restore_all(self):
        """Restore every image that falls to this process; returns the exit status."""
        total, done, found = len(self.names), 0, 0
        if self.args.num_samples > 1 and self.task["conditioning"]["method"] == "spectral":
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
        self._write_volumes(set(self.results.rows) - set(failed))
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
        return 2 if failed else int(bool(missing))


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
