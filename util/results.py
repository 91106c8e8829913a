"""The results folder of a run: its tree, its metrics table and its summary."""

import csv
import json
import os
import platform
import shutil

import numpy as np
import torch

from util.errors import UserError
from util.files import replacing, replacing_text
from util.image_files import write_comparison, write_gif, write_mp4, write_png, write_std_map
from util.metrics import image_metrics

FOLDERS = ("input", "recon", "truth", "samples", "std", "progress", "gif", "video")
FILES = ("metrics.csv", "summary.json", "comparison.png")
LABELS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "nmse": "NMSE",
    "sample_psnr": "PSNR of one sample (dB)",
    "sample_ssim": "SSIM of one sample",
    "sample_nmse": "NMSE of one sample",
    "seconds": "seconds",
}
COMPARED = 4  # images in comparison.png


def results_folder(save_dir, model_config, task_config):
    """{save_dir}/{model}/{task}/{variant}/{sigma}, or {save_dir}/{model}/vanilla."""
    path = model_config["model_path"]
    model = os.path.splitext(os.path.basename(path))[0] or "untrained"
    if "measurement" not in task_config:
        return os.path.join(save_dir, model, "vanilla")
    operator, noise = (task_config["measurement"][k] for k in ("operator", "noise"))
    variant = noise["name"]
    if operator["name"] == "deblur":
        variant = operator.get("type", "gaussian")
    elif operator["name"] == "super_resolution":
        variant = f"x{operator.get('scale_factor', 4)}"
    return os.path.join(save_dir, model, operator["name"], variant, f"{noise['sigma']:g}")


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


class Results:
    """Writes one run's files; `rows` collects the metrics of each image by name.

    `title` stands over the comparison picture; `settings` decide whether a folder is this run's.

    Raises:
        UserError: the folder cannot be written, or holds a run with other settings (or files
            that no run wrote) and `overwrite` is not given.
    """

    def __init__(self, folder, title, settings, overwrite):
        self.folder = folder
        self.title = title
        self.settings = json.loads(json.dumps(settings))  # as they are read back
        self.rows = {}
        self._compared = []
        self._claim(overwrite)

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
            for name in FILES:
                if os.path.exists(os.path.join(self.folder, name)):
                    os.remove(os.path.join(self.folder, name))

    def path(self, kind, name):
        """Path of a file in one of the subfolders, which is made if need be."""
        folder = os.path.join(self.folder, kind)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, name)

    def add(self, name, samples, truth, y, seconds):
        """Write an image's pictures and its row of metrics.csv.

        Args:
            samples: (K, C, H, W) in [-1, 1], the posterior samples; recon/ gets their mean.
            truth, y: (C, H, W) and the measurement; both None for a sample of the prior.
            seconds: what the image took.

        Returns:
            One line for the terminal.
        """
        mean, row, png = samples.mean(axis=0), {}, f"{name}.png"
        write_png(self.path("recon", png), mean)
        if len(samples) > 1:
            for k, sample in enumerate(samples):
                write_png(self.path("samples", f"{name}_{k}.png"), sample)
            std = samples.std(axis=0, ddof=1)
            with (
                replacing(self.path("std", f"{name}.npy")) as temporary,
                open(temporary, "wb") as file,
            ):
                np.save(file, std)
            write_std_map(self.path("std", png), std)
        if truth is not None:
            write_png(self.path("input", png), y)
            write_png(self.path("truth", png), truth)
            row = image_metrics(mean, truth)
            if len(samples) > 1:
                single = image_metrics(samples[0], truth)
                row |= {f"sample_{k}": v for k, v in single.items()}
            if len(self._compared) < COMPARED:
                caption = f"PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}"
                self._compared.append((name, y, mean, truth, caption))
        self.rows[name] = row | {"seconds": seconds}
        self._write_metrics()
        if truth is None:
            return f"{name}: {seconds:.1f} s"
        return f"{name}: PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}, {seconds:.1f} s"

    def add_movie(self, name, frames, gif, mp4):
        """Write an image's sampling: progress frames and a GIF, or an MP4, or both."""
        if gif:
            for i, frame in enumerate(frames):
                write_png(self.path(os.path.join("progress", name), f"{i:04d}.png"), frame)
            write_gif(self.path("gif", f"{name}.gif"), frames)
        if mp4:
            write_mp4(self.path("video", f"{name}.mp4"), frames)

    def _columns(self):
        """The metrics that this run has, each with its values over the images."""
        columns = {k: [r[k] for r in self.rows.values() if k in r] for k in LABELS}
        return {k: v for k, v in columns.items() if v}

    def _write_metrics(self):
        columns = self._columns()
        with replacing_text(os.path.join(self.folder, "metrics.csv")) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", *columns])
            for image, row in self.rows.items():
                writer.writerow([image, *(f"{row[key]:.6g}" for key in columns)])

    def write_comparison(self):
        """Write comparison.png, of the first images that have a truth."""
        if self._compared:
            path = os.path.join(self.folder, "comparison.png")
            write_comparison(path, self._compared, self.title)

    def means(self):
        """Mean of each metric over the images."""
        return {k: float(np.mean(v)) for k, v in self._columns().items()}

    def table(self):
        """Means and standard deviations over the images, as lines of text."""
        lines = [f"{len(self.rows)} images in {self.folder}"]
        for key, values in self._columns().items():
            lines.append(f"  {LABELS[key]:<24} {np.mean(values):9.4f} ± {np.std(values):.4f}")
        return "\n".join(lines)

    def write_summary(self, finished=True, failed=()):
        summary = {
            "finished": finished,
            "images": len(self.rows),
            "failed": list(failed),
            "means": self.means(),
            "settings": self.settings,
            "versions": versions(),
        }
        with replacing_text(os.path.join(self.folder, "summary.json")) as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
