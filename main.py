"""DMPS-MRI: restore MR slices with a diffusion prior. ``python main.py --help`` explains."""

import argparse
import errno
import os
import signal
import sys
import time
from functools import partial

import torch
from torch.distributed import DistError
from tqdm import tqdm

from data.dataloader import check_names, image_name, list_images, read_image
from guided_diffusion.condition_methods import METHODS, check_conditioning, get_conditioning_method
from guided_diffusion.dist_util import checkpoint_digest, pick_device, pick_dtype
from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.measurements import get_noise, get_operator
from guided_diffusion.ranks import share_out
from guided_diffusion.unet import create_model
from util.config import read_diffusion_config, read_model_config, read_task_config
from util.errors import ArgumentParser, UserError
from util.image_files import Recorder
from util.random import ImageRandom, image_generator
from util.results import Results, results_folder

VANILLA_SAMPLES = 10


def parse_args(argv=None):
    parser = ArgumentParser(
        description="Restore MR slices with a diffusion prior (DMPS).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_config", default="configs/model_config_mri.yaml", help="YAML of the prior")
    add(
        "--diffusion_config",
        default="configs/diffusion_config_fast.yaml",
        help="YAML of the schedule; configs/diffusion_config.yaml takes all 1000 steps",
    )
    add(
        "--task_config",
        default="configs/SR_config_mri.yaml",
        help="YAML of the task: data, degradation, noise, method",
    )
    add(
        "--method",
        choices=tuple(METHODS),
        default=None,
        help="replace the task's conditioning.method, with that method's own parameters",
    )
    add("--save_dir", default="results", help="folder for the results, a tree by task")
    add("--seed", type=int, default=0, help="decides all random numbers, with the image's name")
    add(
        "--gpu",
        type=int,
        default=0,
        help="index of the GPU, -1 for the CPU; 0 means the CPU where there is no GPU",
    )
    add("--record", action="store_true", help="keep progress frames and write a GIF an image")
    add("--video", action="store_true", help="write the sampling as an MP4 an image")
    add("--batch_size", type=positive, default=1, help="images restored at once")
    add(
        "--num_samples",
        type=positive,
        default=1,
        help="posterior samples an image; recon/ holds their mean, std/ their spread",
    )
    add("--limit", type=positive, default=None, help="restore the first LIMIT images only")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the network; auto takes bf16 where the hardware has it, else fp32",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace a results folder that was made with other settings",
    )
    return parser.parse_args(argv)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    return value


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
        self.task = read_task_config(args.task_config, args.method)
        method = self.task["conditioning"]["method"]
        self.task["conditioning"]["params"] = check_conditioning(
            method, self.task["conditioning"]["params"]
        )
        self.vanilla = method == "vanilla"
        self.paths = [] if self.vanilla else list_images(self.task["data"]["root"])
        check_names(self.paths)
        self.paths = self.paths[: args.limit]
        self.device = pick_device(args.gpu)
        self.operators = {}
        if not self.vanilla:
            self.noise = get_noise(**self.task["measurement"]["noise"])
            size = model_config["image_size"]  # fails early on a task that fits no image
            self.operator((model_config["in_channels"], size, size))

        dtype = pick_dtype(args.precision, self.device, model_config["use_fp16"])
        self.diffusion = create_sampler(**diffusion_config)
        self.model = create_model(**{**model_config, "use_fp16": False})
        self.model.to(self.device, memory_format=torch.channels_last).set_torso_dtype(dtype)
        self.model.requires_grad_(False)
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
            self.names = [image_name(p) for p in self.paths]
        if ranks.rank:
            ranks.open(len(self.names))
        self.results = Results(folder, title, settings, self.names, args.overwrite, ranks.rank)
        if ranks.rank == 0:
            ranks.open(len(self.names))
        self.failed = []

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
        self.ranks.say(f"error: {error}", error=True)

    def batches(self):
        """Yield (names, images), images (N, C, H, W) in [-1, 1] of one shape: this rank's share.

        Which images make a batch is decided by their order alone, not by what was done before.
        """
        size = self.args.batch_size
        for i in self.ranks.share(-(-len(self.names) // size)):
            part = slice(i * size, (i + 1) * size)
            yield from self._samples(part) if self.vanilla else self._images(part)

    def _samples(self, part):
        size, channels = self.model.image_size, self.model.in_channels
        names = self.names[part]
        yield names, torch.zeros(len(names), channels, size, size)

    def _images(self, part):
        names, images = [], []
        for path in self.paths[part]:
            try:
                image = self._read(path)
            except UserError as error:
                self.fail(image_name(path), error)
                continue
            if names and image.shape != images[0].shape:
                yield names, torch.stack(images)
                names, images = [], []
            names.append(image_name(path))
            images.append(image)
        if names:
            yield names, torch.stack(images)

    def _read(self, path):
        image = torch.from_numpy(read_image(path))
        multiple, channels = self.model.size_multiple, self.model.in_channels
        height, width = image.shape[1:]
        if height % multiple or width % multiple:
            raise UserError(
                f"{os.path.basename(path)}: {width}×{height} pixels, and the network takes "
                f"sides that are multiples of {multiple}"
            )
        try:
            self.operator((channels, height, width))
        except UserError as error:
            raise UserError(f"{os.path.basename(path)}: {error}") from None
        if channels == 3 and len(image) == 1:
            image = image.repeat(3, 1, 1)
        return image

    def restore(self, names, truth, bar):
        """Degrade and restore one batch and write its files.

        Of N images of C channels and K samples each, the network sees N·K·contrasts rows: a
        colour image under a one-channel prior is restored contrast by contrast.
        """
        start = time.perf_counter()
        count, channels = self.args.num_samples, self.model.in_channels
        x = truth.reshape(-1, channels, *truth.shape[2:]).to(self.device)
        y = None if self.vanilla else self._measure(x, names)
        method = self._conditioning(x, y, len(names))
        random = ImageRandom(
            [image_generator(n, k, self.args.seed) for n in names for k in range(count)]
        )
        recording = self.args.record or self.args.video
        recorder = Recorder(self.diffusion.num_timesteps) if recording else None

        def after_step(t, x_t, pred_xstart):
            bar.update()
            if recorder:
                recorder(t, x_t)

        x_T = random.randn_like(x.repeat(count, 1, 1, 1))
        if recorder:
            recorder.frame(x_T)
        x_hat = self.diffusion.p_sample_loop(
            self.model, x_T, method.step, random.randn_like, after_step
        )
        samples = x_hat.clamp(-1, 1).float().cpu().reshape(len(names), count, *truth.shape[1:])
        seconds = (time.perf_counter() - start) / len(names)
        if y is not None:
            y = y.cpu().reshape(len(names), -1, *y.shape[2:])
        for i, name in enumerate(names):
            line = self.results.add(
                name,
                samples[i].numpy(),
                None if y is None else truth[i].numpy(),
                None if y is None else y[i].numpy(),
                recorder.movie(i * count, len(names) * count) if recorder else [],
                seconds,
                gif=self.args.record,
                mp4=self.args.video,
            )
            self.ranks.say(line)

    def _are_done(self, names, images):
        args = self.args
        truth = [None if self.vanilla else image.numpy() for image in images]
        return all(
            map(partial(self.results.is_done, gif=args.record, mp4=args.video), names, truth)
        )

    def _measure(self, x, names):
        """y = A x + n, n drawn once an image."""
        random = ImageRandom([image_generator(n, "measurement", self.args.seed) for n in names])
        return self.noise(self.operator(tuple(x.shape[1:])).forward(x), random)

    def _conditioning(self, x, y, images):
        """The method for this batch, with every image's measurement once a sample."""
        conditioning = self.task["conditioning"]
        if self.vanilla:
            return get_conditioning_method("vanilla")
        per_sample = y.reshape(images, -1, *y.shape[1:])
        per_sample = per_sample.repeat_interleave(self.args.num_samples, dim=0)
        return get_conditioning_method(
            conditioning["method"],
            self.operator(tuple(x.shape[1:])),
            per_sample.reshape(-1, *y.shape[1:]),
            self.noise.sigma,
            **conditioning["params"],
        )

    def restore_all(self):
        """Restore every image that falls to this process; returns the exit status."""
        total, done, found = len(self.names), 0, 0
        with tqdm(unit="step", dynamic_ncols=True, disable=bool(self.ranks)) as bar:
            for names, images in self.batches():
                first, done = done + 1, done + len(names)
                if self._are_done(names, images):
                    found += len(names)
                else:
                    which = f"{first}" if len(names) == 1 else f"{first}-{done}"
                    bar.reset(total=self.diffusion.num_timesteps)
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
