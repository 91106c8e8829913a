"""CONTRIBUTING.md: what its examples add works from the command line."""

import os
import re

import numpy as np

from data.formats import FORMATS
from guided_diffusion.methods import METHODS
from guided_diffusion.operators import OPERATORS
from tests.conftest import REPOSITORY, SR, task, write_yaml
from util.metrics import METRICS


def example(title):
    """What the Python code under a heading defines."""
    with open(os.path.join(REPOSITORY, "CONTRIBUTING.md"), encoding="utf-8") as file:
        part = file.read().split(f"\n## {title}\n")[1]
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", part, re.DOTALL).group(1), found)  # noqa: S102
    return found


def test_an_operator(tiny_run, monkeypatch):
    monkeypatch.setitem(OPERATORS, "stripes", example("An operator")["Stripes"])
    write_yaml("task.yaml", task({"name": "stripes", "every": 3}))
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert os.path.exists("out/tiny/stripes/every3/0.05/recon/a1.png")


def test_a_method(tiny_run, monkeypatch):
    monkeypatch.setitem(METHODS, "pull", example("A method")["Pull"])
    assert tiny_run("--save_dir", "out", "--limit", "1", "--method", "pull") == 0
    assert os.path.exists(f"out/{SR}/recon/a1.png")


def test_a_metric(tiny_run, monkeypatch):
    monkeypatch.setitem(METRICS, "brightness", None)  # the example puts its own there
    example("A metric")
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    with open(f"out/{SR}/metrics.csv", encoding="utf-8") as file:
        assert "brightness" in file.readline().split(",")


def test_a_file_format(tiny_run, monkeypatch):
    monkeypatch.setitem(FORMATS, "grid", example("A file format")["FORMAT"])
    with open("images/scan.grid", "w", encoding="utf-8") as file:
        file.write("GRID\n")
        np.savetxt(file, np.linspace(0, 9, 1024).reshape(32, 32))
    assert tiny_run("--save_dir", "out", "--input", "images/scan.grid") == 0
    assert os.path.exists(f"out/{SR}/recon/scan.png")
