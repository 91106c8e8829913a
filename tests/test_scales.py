"""The benchmark of DMPS's weight: a row a value, each as main.py would restore with it."""

import csv
import os

import pytest

from tests.benchmarks import scales
from tests.conftest import LINEAR, SR, task, write_yaml


def test_a_row_is_what_main_py_gets_with_that_weight(tiny_run, capsys):
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 4})
    flags = ["--root", "images", "--model_config", "model.yaml", "--diffusion_config"]
    flags += ["diffusion.yaml", "--precision", "fp32", "--out", "out", "--tasks", "sr4"]
    assert scales.main([*flags, "--scales", "3", "0.5"]) == 0
    with open("out/scales.csv", encoding="utf-8") as file:
        rows = {row["parameters"]: float(row["psnr"]) for row in csv.DictReader(file)}
    assert list(rows) == ["scale 0.5", "scale 3"]
    assert os.path.exists("out/lambda.png")
    for scale in (0.5, 3):
        conditioning = {"method": "dmps", "params": {"scale": scale}}
        write_yaml("task.yaml", task(conditioning=conditioning))
        assert tiny_run("--save_dir", f"run{scale}") == 0
        with open(f"run{scale}/{SR}/metrics.csv", encoding="utf-8") as file:
            psnr = [float(row["psnr"]) for row in csv.DictReader(file)]
        assert rows[f"scale {scale:g}"] == pytest.approx(sum(psnr) / len(psnr), abs=1e-3)
