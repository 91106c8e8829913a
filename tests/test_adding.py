"""What it costs to add a thing: one class or row, registered, and the command line has it.

Each toy is what a file of guided_diffusion/operators/ and so on would hold; a registry is a dict.
"""

import csv
import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import main
from data.formats import FORMATS
from data.items import Format
from data.pictures import Picture
from guided_diffusion.methods import METHODS
from guided_diffusion.methods.base import Method
from guided_diffusion.operators import OPERATORS
from guided_diffusion.operators.separable import (
    SeparableOperator,
    identity_factor,
    matrix_factor,
)
from tests.benchmarks import rows, run_all, settings
from tests.conftest import SR, task, write_yaml
from util.metrics import METRICS, Metric
from util.parameters import Parameter


class Stripes(SeparableOperator):
    """Every EVERYth column is not measured."""

    name = "stripes"
    parameters = {
        "every": Parameter(4, "distance of the columns that are lost", (int,), low=2),
        **SeparableOperator.parameters,
    }

    @classmethod
    def factors_of(cls, in_shape, **parameters):
        kept = torch.eye(in_shape[2], dtype=torch.float64)
        kept = kept[torch.arange(in_shape[2]) % parameters["every"] != 0]
        threshold = parameters["singular_value_threshold"]
        rows = [identity_factor(n) for n in in_shape[:2]]
        return *rows, matrix_factor(kept, threshold)

    @classmethod
    def variant(cls, parameters):
        return f"every{parameters['every']}"


class Pull(Method):
    """The prior's step, then a share of the way to the measurement."""

    name = "pull"
    label = "a toy"
    parameters = {"share": Parameter(0.5, "of the way", low=0, high=1)}
    share: float

    def step(self, diffusion, model, x, t, randn_like):
        x, x_0 = diffusion.p_sample(model, x, t, randn_like)
        change = self.operator.posterior_mean(x, self.reduced, 0.0, 1.0) - x
        return x + self.share * change, x_0


def brightness(x, truth, mask=None):
    """Mean of x less that of the truth."""
    seen = (x - truth) if mask is None else (x - truth)[:, mask]
    return float(seen.mean())


class Ramp(Picture):
    """A file that names the brightest value of a ramp."""

    def read(self):
        with open(self.path, encoding="utf-8") as file:
            top = float(file.read().split()[1])
        return np.linspace(-1, top, 1024, dtype=np.float32).reshape(1, 32, 32)


RAMP = Format(
    "ramp",
    (".ramp",),
    lambda head, path: head.startswith(b"RAMP "),
    lambda paths, options: [Ramp(path) for path in paths],
)


def table(folder):
    with open(f"{folder}/metrics.csv", encoding="utf-8") as file:
        return {row.pop("image"): row for row in csv.DictReader(file)}


def help_text(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    return " ".join(capsys.readouterr().out.split())


def resumed(run, folder, *flags):
    """Run two images, then the third: the first two stay as they are."""
    assert run("--save_dir", "out", "--limit", "2", *flags) == 0
    before = {n: os.stat(f"{folder}/recon/{n}.png").st_mtime_ns for n in ("a1", "a2")}
    assert run("--save_dir", "out", *flags) == 0
    after = {n: os.stat(f"{folder}/recon/{n}.png").st_mtime_ns for n in ("a1", "a2")}
    assert before == after
    rows = table(folder)
    assert list(rows) == ["a1", "a2", "a10"]
    return rows


def measured(monkeypatch, method="dmps"):
    """The benchmark's rows of task.yaml, of two evaluations: image → its row."""
    monkeypatch.setattr(rows, "FOLDER", os.path.abspath("benchmark"))
    monkeypatch.setattr(settings, "STEPS", (2,))
    every = settings.SETS["val"]._replace(first=0, every=1)
    monkeypatch.setitem(settings.SETS, "val", every)
    known = ["--val", "images", "--model_config", "model.yaml", "--precision", "fp32"]
    assert run_all.main([*known, "--task_config", "task.yaml", "--methods", method]) == 0
    with open("benchmark/own.csv", encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def test_an_operator(tiny_run, monkeypatch, capsys):
    monkeypatch.setitem(OPERATORS, Stripes.name, Stripes)
    write_yaml("task.yaml", task({"name": "stripes", "every": 3}))
    folder = "out/tiny/stripes/every3/0.05"
    rows = resumed(tiny_run, folder)
    assert all(float(row["residual"]) > 0 for row in rows.values())
    assert iio.imread(f"{folder}/input/a1.png").shape == (32, 21)
    assert f"operators: {', '.join(OPERATORS)} noise:" in help_text(capsys)
    assert set(measured(monkeypatch)) == {"a1", "a10", "a2"}
    write_yaml("task.yaml", task({"name": "stripes", "every": 1}))
    assert tiny_run("--save_dir", "other") == 2
    assert "measurement.operator.every: expected at least 2" in capsys.readouterr().err


def test_a_method(tiny_run, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, Pull.name, Pull)
    rows = resumed(tiny_run, f"out/{SR}", "--method", "pull")
    assert float(rows["a1"]["residual"]) > 0
    assert "spectral_sample,pull,vanilla}" in help_text(capsys).replace(", ", ",")
    found = measured(monkeypatch, "pull")
    assert float(found["a1"]["psnr"]) > 0 and found["a1"]["setting"] == "share 0.5"
    config = {"method": "pull", "params": {"share": 2}}
    write_yaml("task.yaml", task(conditioning=config))
    assert tiny_run("--save_dir", "other") == 2
    assert "conditioning.params.share: expected a number in [0, 1]" in capsys.readouterr().err


def test_a_metric(tiny_run, monkeypatch, capsys):
    row = Metric(label="Brightness", format="+.3f", function=brightness, line=True)
    monkeypatch.setitem(METRICS, "brightness", row)
    rows = resumed(tiny_run, f"out/{SR}", "--num_samples", "2")
    printed = capsys.readouterr().out
    for name, found in rows.items():
        recon, truth = (iio.imread(f"out/{SR}/{k}/{name}.png") / 255 for k in ("recon", "truth"))
        assert float(found["brightness"]) == pytest.approx(np.mean(recon - truth), abs=0.003)
        assert f"Brightness {float(found['brightness']):+.3f}" in printed
        assert "sample_brightness" in found
    found = measured(monkeypatch)
    assert -1 < float(found["a1"]["brightness"]) < 1
    assert list(rows["a1"])[:5] == ["psnr", "ssim", "nmse", "haarpsi", "brightness"]
    assert "Brightness of one sample" in printed
    assert "metrics: psnr, ssim, nmse, haarpsi, brightness" in help_text(capsys)


def test_a_file_format(tiny_run, monkeypatch, capsys):
    monkeypatch.setitem(FORMATS, "ramp", RAMP)
    for name, top in (("a1", 0.5), ("a2", 1.0), ("a10", 0.0)):
        os.remove(f"images/{name}.png")
        with open(f"images/{name}.ramp", "w", encoding="utf-8") as file:
            file.write(f"RAMP {top}")
    resumed(tiny_run, f"out/{SR}")
    assert set(measured(monkeypatch)) == {"a1", "a10", "a2"}
    truth = iio.imread(f"out/{SR}/truth/a1.png") / 127.5 - 1
    np.testing.assert_allclose(truth, np.linspace(-1, 0.5, 1024).reshape(32, 32), atol=0.005)
    assert "pictures, ramp" in help_text(capsys)
