"""The results folder of a run: its tree, its metrics table and its summary."""

import csv
import json
import os
import platform
import shutil

import numpy as np
import torch

from util.errors import UserError
from util.files import replacing_text

FOLDERS = ("input", "recon", "truth", "progress", "gif", "video")
FILES = ("metrics.csv", "summary.json", "comparison.png")
METRICS = ("psnr", "ssim", "nmse", "seconds")


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

    Raises:
        UserError: the folder cannot be written, or holds a run with other settings (or files
            that no run wrote) and `overwrite` is not given.
    """

    def __init__(self, folder, settings, overwrite):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))  # as they are read back
        self.rows = {}
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

    def add(self, name, metrics):
        """Add an image's row and rewrite metrics.csv."""
        self.rows[name] = metrics
        with replacing_text(os.path.join(self.folder, "metrics.csv")) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", *METRICS])
            for image, row in self.rows.items():
                writer.writerow([image, *(_cell(row.get(key)) for key in METRICS)])

    def means(self):
        """Mean of each metric over the images that have it."""
        columns = {k: [r[k] for r in self.rows.values() if k in r] for k in METRICS}
        return {k: float(np.mean(v)) for k, v in columns.items() if v}

    def table(self):
        """Means and standard deviations over the images, as lines of text."""
        lines = [f"{len(self.rows)} images in {self.folder}"]
        for key, label in zip(METRICS, ("PSNR (dB)", "SSIM", "NMSE", "seconds"), strict=True):
            column = [r[key] for r in self.rows.values() if key in r]
            if column:
                lines.append(f"  {label:<10} {np.mean(column):9.4f} ± {np.std(column):.4f}")
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


def _cell(value):
    return "" if value is None else f"{value:.6g}"
