"""The results folder of a run: its tree, its metrics table and its summary."""

import glob
import json
import math
import os
import platform
import shutil

import numpy as np
import torch

from util.errors import UserError
from util.files import replacing_text
from util.image_files import (
    read_png,
    to_uint8,
    write_comparison,
    write_floats,
    write_gif,
    write_mp4,
    write_png,
    write_std_map,
)
from util.journal import Journal, read_rows, write_rows
from util.metrics import image_metrics
from util.remote import base_name

FOLDERS = ("input", "recon", "truth", "samples", "std", "slices", "volumes")
FOLDERS += ("progress", "gif", "video")
FILES = ("metrics.csv", "summary.json", "comparison.png")
LABELS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "nmse": "NMSE",
    "sample_psnr": "PSNR of one sample (dB)",
    "sample_ssim": "SSIM of one sample",
    "sample_nmse": "NMSE of one sample",
    "residual": "residual / noise",
    "sigma": "estimated sigma",
    "seconds": "seconds",
}
COMPARED = 4  # images in comparison.png


def results_folder(save_dir, model_config, task_config):
    """{save_dir}/{model}/{task}/{variant}/{sigma}, or {save_dir}/{model}/vanilla."""
    path = model_config["model_path"]
    model = os.path.splitext(base_name(path))[0] or "untrained"
    if "measurement" not in task_config:
        return os.path.join(save_dir, model, "vanilla")
    operator, noise = (task_config["measurement"][k] for k in ("operator", "noise"))
    variant = noise["name"]
    if operator["name"] == "deblur":
        variant = operator.get("type", "gaussian")
    elif operator["name"] == "super_resolution":
        variant = f"x{operator.get('scale_factor', 4)}"
    sigma = noise["sigma"] if noise["sigma"] == "auto" else f"{noise['sigma']:g}"
    return os.path.join(save_dir, model, operator["name"], variant, sigma)


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


class Results:
    """Writes one run's files; `rows` holds the metrics of each image by name.

    A folder that a run with the same settings left unfinished is gone on with. Of several
    processes the first opens the folder; each notes its rows in a table of its own, and one of
    them merges these at the end, or the next run does.

    Args:
        title: stands over the comparison picture.
        settings: all that decides the files' contents; another run's folder is refused.
        names: of the images to restore, in the order of the tables.
        items: name → the item restored, whose `floats` says where its result is also kept as
            floats, a folder and an ending, or None; `to_floats(x)` gives them.
        rank: this process's number where several share the images; None for one on its own.

    Raises:
        UserError: the folder cannot be written, or holds a run with other settings (or files
            that no run wrote) and `overwrite` is not given.
    """

    def __init__(self, folder, title, settings, names, overwrite, items, rank=None):
        self.folder = folder
        self.names = names
        self.items = items
        self.title = title
        self.settings = json.loads(json.dumps(settings))  # as they are read back
        self.rows = {}
        table = os.path.join(folder, "metrics.csv")
        if rank:  # the first process has opened the folder
            self.rows = read_rows(table, LABELS)
        else:
            self._claim(overwrite)
        if rank is None:
            self.journal = Journal(table, self._columns(self.rows))
        else:
            self.journal = Journal(os.path.join(folder, f"metrics.rank{rank}.csv"))

    def _claim(self, overwrite):
        try:
            os.makedirs(self.folder, exist_ok=True)
            if os.listdir(self.folder):
                self._check_earlier(overwrite)
            self.write_summary(finished=False)
        except OSError as error:
            raise UserError(
                f"--save_dir: cannot write {self.folder} ({error.strerror or error})"
            ) from None

    def _check_earlier(self, overwrite):
        try:
            with open(os.path.join(self.folder, "summary.json"), encoding="utf-8") as file:
                earlier = json.load(file)["settings"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            earlier = None
        if earlier == self.settings:
            self.merge()
            return
        if not overwrite:
            if earlier is None:
                found = "files that no run of this program left there"
            else:
                keys = [k for k in self.settings if earlier.get(k) != self.settings[k]]
                found = f"a run with another {' and '.join(keys) or 'set of settings'}"
            raise UserError(
                f"--save_dir: {self.folder} holds {found}; choose another --save_dir, "
                "or --overwrite to replace it"
            )
        if earlier is not None:
            for name in FOLDERS:
                shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)
            for path in [os.path.join(self.folder, name) for name in FILES] + self._rank_tables():
                if os.path.exists(path):
                    os.remove(path)

    def _rank_tables(self):
        """The tables of a run of several processes, where they are not merged yet."""
        return sorted(glob.glob(os.path.join(glob.escape(self.folder), "metrics.rank*.csv")))

    def merge(self):
        """Read what all processes have noted, and write metrics.csv in its final form."""
        table, others = os.path.join(self.folder, "metrics.csv"), self._rank_tables()
        self.rows = {}
        for path in [table, *others]:
            self.rows |= read_rows(path, LABELS)
        self.rows = {name: row for name, row in self.rows.items() if row is not None}
        names = [n for n in self.names if n in self.rows]
        listed = set(names)
        names += [n for n in self.rows if n not in listed]
        if names:
            write_rows(table, self._columns(names), {name: self.rows[name] for name in names})
        elif os.path.exists(table):  # part of a row, which none must be added to
            os.remove(table)
        for path in others:
            os.remove(path)

    def is_done(self, name, kind, image, gif, mp4):
        """Whether an earlier run with the same settings wrote all files of this very image.

        Args:
            kind, image: the folder that shows the image read, "truth" or "input", and the image,
                (C, H, W) in [-1, 1]; None and None for a sample of the prior.
        """
        files = [("recon", ".png")] + [("gif", ".gif")] * gif + [("video", ".mp4")] * mp4
        files += [self.items[name].floats] if self._keeps_floats(name) else []
        files += [] if image is None else [(kind, ".png")]
        paths = [os.path.join(self.folder, kind, name + end) for kind, end in files]
        if name not in self.rows or not all(map(os.path.exists, paths)):
            return False
        return image is None or np.array_equal(to_uint8(read_png(paths[-1])), to_uint8(image))

    def _keeps_floats(self, name):
        return name in self.items and self.items[name].floats is not None

    def begin(self, name):
        """Take back the row of an image that is restored anew, as its files will not match it."""
        if self.rows.pop(name, None) is not None:
            self.journal.add(name, {})

    def path(self, kind, name):
        """Path of a file in one of the subfolders, which is made if need be."""
        folder = os.path.join(self.folder, kind)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, name)

    def add(self, name, mean, samples, truth, y, figures, frames, seconds, gif, mp4):
        """Write an image's files, and last its row of metrics.csv, which says that it is done.

        Args:
            mean: (C, H, W) in [-1, 1], for recon/.
            samples: (K, C, H, W) in [-1, 1], the posterior samples.
            truth, y: (C, H, W) and the measurement; truth is None for a measured image, and both
                are for a sample of the prior.
            figures: what is known without a truth, "residual" and "sigma".
            frames: uint8 frames of the sampling, for progress/ and a GIF, an MP4, or both.
            seconds: what the image took.

        Returns:
            One line for the terminal.
        """
        row, line, png = {}, [], f"{name}.png"
        write_png(self.path("recon", png), mean)
        if self._keeps_floats(name):
            folder, end = self.items[name].floats
            write_floats(self.path(folder, name + end), self.items[name].to_floats(mean))
        if len(samples) > 1:
            self._write_spread(name, samples)
        if y is not None:
            write_png(self.path("input", png), y)
        if truth is not None:
            write_png(self.path("truth", png), truth)
            row = image_metrics(mean, truth)
            line += [f"PSNR {row['psnr']:.2f} dB", f"SSIM {row['ssim']:.4f}"]
            if len(samples) > 1:
                single = image_metrics(samples[0], truth)
                row |= {f"sample_{k}": v for k, v in single.items()}
        if gif:
            for i, frame in enumerate(frames):
                write_png(self.path(os.path.join("progress", name), f"{i:04d}.png"), frame)
            write_gif(self.path("gif", f"{name}.gif"), frames)
        if mp4:
            write_mp4(self.path("video", f"{name}.mp4"), frames)
        # Rounded here already, so that means do not depend on having been read back.
        row |= {**figures, "seconds": seconds}
        self.rows[name] = {k: float(f"{v:.6g}") for k, v in row.items()}
        self.journal.add(name, self.rows[name])
        line += [f"{k} {v:.3g}" for k, v in figures.items()]
        return f"{name}: {', '.join([*line, f'{seconds:.1f} s'])}"

    def _write_spread(self, name, samples):
        for k, sample in enumerate(samples):
            write_png(self.path("samples", f"{name}_{k}.png"), sample)
        std = samples.std(axis=0, ddof=1)
        write_floats(self.path("std", f"{name}.npy"), std)
        write_std_map(self.path("std", f"{name}.png"), std)

    def _columns(self, names):
        """The metrics of these images, each with its values."""
        rows = [self.rows[n] for n in names if n in self.rows]
        columns = {k: [r[k] for r in rows if k in r] for k in LABELS}
        return {k: v for k, v in columns.items() if v}

    def write_comparison(self):
        """Write comparison.png, of the first images that were measured, with the truth if known."""
        rows = []
        for name in [n for n in self.names if n in self.rows][:COMPARED]:
            row, caption = self.rows[name], ""
            if "psnr" in row:
                caption = f"PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}"
            elif "residual" in row:
                caption = f"residual {row['residual']:.3g}"
            kinds = ("input", "recon", "truth")
            paths = [os.path.join(self.folder, k, f"{name}.png") for k in kinds]
            images = [read_png(p) if os.path.exists(p) else None for p in paths]
            if images[0] is not None:
                rows.append((name, *images, caption))
        if rows:
            write_comparison(os.path.join(self.folder, "comparison.png"), rows, self.title)

    def means(self):
        """Mean of each metric over this run's images, but those where it is not defined."""
        return {k: float(np.mean(v)) for k, v in self._defined().items()}

    def _defined(self):
        """This run's columns without NaN, the NMSE of a black truth."""
        columns = self._columns(self.names).items()
        columns = {k: [v for v in values if not math.isnan(v)] for k, values in columns}
        return {k: values for k, values in columns.items() if values}

    def table(self):
        """Means and standard deviations over this run's images, as lines of text."""
        done = sum(n in self.rows for n in self.names)
        lines = [f"{done} images in {self.folder}"]
        for key, values in self._defined().items():
            lines.append(f"  {LABELS[key]:<24} {np.mean(values):9.4f} ± {np.std(values):.4f}")
        return "\n".join(lines)

    def write_summary(self, finished=True, failed=()):
        summary = {
            "finished": finished,
            "images": sum(n in self.rows for n in self.names),
            "failed": list(failed),
            "means": self.means(),
            "settings": self.settings,
            "versions": versions(),
        }
        with replacing_text(os.path.join(self.folder, "summary.json")) as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
