"""Runs that are stopped, by every kind of signal, and gone on with."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import yaml

from tests.conftest import REPOSITORY, SR, contents

# One thread, so that sums run in one order; a pause a step, so that there is time to be killed in.
PROGRAM = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
sys.path.insert(0, {repository!r})
torch.set_num_threads(1)
import main
from guided_diffusion.condition_methods import DMPS
step = DMPS.step
def slow(self, *args):
    time.sleep(float(sys.argv[1]))
    return step(self, *args)
DMPS.step = slow
sys.exit(main.main(sys.argv[2:]))
"""


def start(out, pause):
    command = [sys.executable, "-c", PROGRAM.format(repository=REPOSITORY), str(pause)]
    command += ["--model_config", "model.yaml", "--diffusion_config", "diffusion.yaml"]
    command += ["--task_config", "task.yaml", "--precision", "fp32", "--record", "--save_dir", out]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    )


def wait_for(path, process):
    for _ in range(1200):
        if os.path.exists(path):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


@pytest.fixture
def reference(tiny_run):
    with open("diffusion.yaml", encoding="utf-8") as file:
        config = yaml.safe_load(file)
    config["timestep_respacing"] = 10
    with open("diffusion.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file)
    process = start("whole", 0)
    assert process.wait(120) == 0, process.stderr.read()
    return contents("whole")


def test_a_run_killed_at_any_moment_ends_with_the_same_files(reference):
    """kill -9 before the first image, within the second and the third; then once to the end."""
    moments = ["summary.json", "recon/a1.png", "recon/a2.png"]
    for moment in moments:
        process = start("broken", 0.1)
        wait_for(f"broken/{SR}/{moment}", process)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        with open(f"broken/{SR}/summary.json", encoding="utf-8") as file:
            assert not json.load(file)["finished"]
    assert os.path.exists(f"broken/{SR}/recon/a2.png")
    process = start("broken", 0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "had been restored by an earlier run" in output
    assert contents("broken") == reference


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_polite_stop_says_how_to_go_on(tiny_run, name):
    process = start("out", 0.5)
    wait_for(f"out/{SR}/summary.json", process)
    time.sleep(0.3)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("interrupted: run the same command again")
    assert "Traceback" not in errors


def test_what_is_done_is_not_done_again(tiny_run, capsys):
    assert tiny_run("--save_dir", "out", "--limit", "2") == 0
    before = {n: os.stat(f"out/{SR}/recon/{n}.png").st_mtime_ns for n in ("a1", "a2")}
    assert tiny_run("--save_dir", "out") == 0
    assert "2 of 3 images had been restored by an earlier run" in capsys.readouterr().out
    assert before == {n: os.stat(f"out/{SR}/recon/{n}.png").st_mtime_ns for n in before}
    with open(f"out/{SR}/metrics.csv", encoding="utf-8") as file:
        assert [r["image"] for r in csv.DictReader(file)] == ["a1", "a2", "a10"]
    # a GIF that is asked for later is made
    assert tiny_run("--save_dir", "out", "--limit", "1", "--record") == 0
    assert os.listdir(f"out/{SR}/gif") == ["a1.gif"]


def test_another_image_of_the_same_name_is_restored_anew(tiny_run):
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    iio.imwrite("images/a1.png", 255 - iio.imread("images/a1.png"))
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert np.array_equal(iio.imread(f"out/{SR}/truth/a1.png"), iio.imread("images/a1.png"))


def test_a_stop_while_an_image_is_restored_anew_leaves_no_old_row(tiny_run, monkeypatch):
    """Stopped after the truth of the new image is written, and before its metrics are."""
    import util.results

    def stop(x, truth, mask):
        raise KeyboardInterrupt

    assert tiny_run("--save_dir", "out") == 0
    iio.imwrite("images/a1.png", 255 - iio.imread("images/a1.png"))
    with monkeypatch.context() as patched:
        patched.setattr(util.results, "image_metrics", stop)
        assert tiny_run("--save_dir", "out") == 130
    assert tiny_run("--save_dir", "out") == 0
    assert tiny_run("--save_dir", "fresh") == 0
    assert contents("out") == contents("fresh")


def test_a_full_disk_is_one_sentence(tiny_run, capsys, monkeypatch):
    import errno

    import util.results

    def full(path, image):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(util.results, "write_png", full)
    assert tiny_run("--save_dir", "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --save_dir: No space left on device; make room")
