"""What a run does besides restoring: its lock, failed images, closed pipes, --output."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest
import torch
from tqdm import tqdm

from guided_diffusion.unet import UNetModel
from tests.conftest import REPOSITORY, SR, task, write_yaml
from tests.volume_files import head, write_nifti
from util.errors import UserError
from util.journal import read_table
from util.lock import NAME, Lock, Locked

FOLDER = f"out/{SR}"


def rows(folder=FOLDER):
    with open(f"{folder}/metrics.csv", encoding="utf-8") as file:
        return file.read().splitlines()


# one at a time


def test_a_second_run_in_a_folder_is_one_sentence(tiny_run, capsys):
    os.makedirs(FOLDER)
    lock = Lock(FOLDER)
    lock.acquire()
    assert tiny_run("--save_dir", "out") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --save_dir: ") and "is in use by process" in line
    assert str(os.getpid()) in line and "torchrun" in line and "began 0 minutes ago" in line
    assert os.listdir(FOLDER) == [NAME]
    lock.release()
    assert tiny_run("--save_dir", "out") == 0
    assert NAME not in os.listdir(FOLDER)


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tiny_run):
    os.makedirs(FOLDER)
    hold = "import os, sys; from util.lock import Lock; Lock(sys.argv[1]).acquire(); os._exit(1)"
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    subprocess.run([sys.executable, "-c", hold, FOLDER], env=environment, check=False)
    assert os.listdir(FOLDER) == [NAME]
    assert tiny_run("--save_dir", "out") == 0


@pytest.mark.parametrize(
    ("owner", "age", "free"),
    [
        ({"process": 2**22 + 1}, 0, True),  # no such process here
        ({"process": os.getpid()}, 10_000, False),
        ({"host": "elsewhere", "process": 1}, 0, False),
        ({"host": "elsewhere", "process": 1}, 10_000, True),
    ],
)
def test_where_the_system_keeps_no_locks_the_file_decides(
    tmp_path, monkeypatch, owner, age, free
):
    monkeypatch.setattr("util.lock.fcntl", None)
    first = Lock(str(tmp_path))
    first.acquire()
    with open(first.path, encoding="utf-8") as file:
        signed = json.load(file)
    with open(first.path, "w", encoding="utf-8") as file:
        json.dump(signed | owner, file)
    os.utime(first.path, (os.path.getmtime(first.path) - age,) * 2)
    if free:
        Lock(str(tmp_path)).acquire()
    else:
        with pytest.raises(Locked, match=f"process {owner['process']}"):
            Lock(str(tmp_path)).acquire()


@pytest.mark.parametrize(("age", "free"), [(0, False), (10_000, True)])
def test_on_windows_no_process_is_asked_whether_it_lives(tmp_path, monkeypatch, age, free):
    monkeypatch.setattr("util.lock.fcntl", None)
    monkeypatch.setattr("util.lock.WINDOWS", True)
    monkeypatch.delattr("os.pwrite", raising=False)
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("that is Ctrl-C to a process"))
    first = Lock(str(tmp_path))
    first.acquire()
    os.utime(first.path, (os.path.getmtime(first.path) - age,) * 2)
    second = Lock(str(tmp_path))
    if free:
        second.acquire()
    else:
        with pytest.raises(Locked, match=f"process {os.getpid()}"):
            second.acquire()
        first.release()
        assert os.listdir(tmp_path) == []


def test_a_lock_that_is_held_gives_signs_of_life_whatever_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("util.lock.fcntl", None)
    monkeypatch.setattr("util.lock.WINDOWS", True)
    monkeypatch.setattr("util.lock.SIGN_SECONDS", 0.02)
    before = set(threading.enumerate())
    lock = Lock(str(tmp_path / "held"))
    os.mkdir(tmp_path / "held")
    lock.acquire()
    [signs] = set(threading.enumerate()) - before
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 20
    while not os.path.getmtime(lock.path) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(Locked):
        Lock(str(tmp_path / "held")).acquire()
    shutil.rmtree(tmp_path / "held")
    time.sleep(0.1)
    assert signs.is_alive()
    lock.release()
    assert not signs.is_alive()


def test_a_lock_that_is_held_does_not_keep_a_process_alive(tmp_path):
    hold = "import sys; from util.lock import Lock; Lock(sys.argv[1]).acquire()"
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    command = [sys.executable, "-c", hold, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=20)


# output that is no image


def test_output_that_is_not_finite_is_a_failed_image(tiny_run, capsys, monkeypatch):
    """Of one image in a batch, at one step, whose infinity clipping would make a grey value."""
    forward, calls = UNetModel.forward, []

    def overflows(self, x, timesteps, y=None):
        calls.append(1)
        output = forward(self, x, timesteps, y)
        if len(calls) == 3:
            output = output.clone()
            output[1, 0, 4, 5] = torch.inf
        return output

    monkeypatch.setattr(UNetModel, "forward", overflows)
    assert tiny_run("--save_dir", "out", "--batch_size", "2") == 2
    errors = capsys.readouterr().err
    assert "error: a2.png: the network's output is not finite" in errors
    assert "error: 1 of 3 images could not be restored: a2" in errors.splitlines()[-1]
    assert sorted(os.listdir(f"{FOLDER}/recon")) == ["a1.png", "a10.png"]
    assert [line.split(",")[0] for line in rows()] == ["image", "a1", "a10"]
    monkeypatch.setattr(UNetModel, "forward", forward)
    assert tiny_run("--save_dir", "out", "--batch_size", "2") == 0
    assert os.path.exists(f"{FOLDER}/recon/a2.png")


def test_an_image_that_cannot_be_restored_does_not_end_the_run(tiny_run, capsys, monkeypatch):
    from guided_diffusion import run

    restore = run.restore

    def fails(*arguments, names, **options):
        if names == ["a2"]:
            raise UserError("nothing can be made of it")
        return restore(*arguments, names=names, **options)

    monkeypatch.setattr(run, "restore", fails)
    assert tiny_run("--save_dir", "out") == 2
    errors = capsys.readouterr().err
    assert "error: a2.png: nothing can be made of it" in errors
    assert "error: 1 of 3 images could not be restored: a2" in errors.splitlines()[-1]
    assert sorted(os.listdir(f"{FOLDER}/recon")) == ["a1.png", "a10.png"]


def test_weights_that_are_not_finite_are_refused(tiny_run, capsys):
    state = torch.load("tiny.pt", weights_only=True)
    state["out.2.bias"][0] = torch.nan
    torch.save(state, "tiny.pt")
    assert tiny_run("--save_dir", "out") == 2
    error = capsys.readouterr().err
    assert "model_path: tiny.pt holds weights that are not finite, in out.2.bias" in error
    assert not os.path.exists("out")


# the terminal


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_does_not_end_a_run(tiny_run, stream):
    command = [sys.executable, os.path.join(REPOSITORY, "main.py"), "--model_config", "model.yaml"]
    command += ["--diffusion_config", "diffusion.yaml", "--task_config", "task.yaml"]
    reader, writer = os.pipe()
    os.close(reader)
    others = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
    process = subprocess.Popen([*command, "--save_dir", "out"], text=True, **others)
    os.close(writer)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in f"{out}{err}" and "Exception ignored" not in f"{out}{err}"
    if stream == "stdout":
        assert "note: standard output was closed" in err
    assert len(rows()) == 4


def test_world_size_alone_starts_one_process(tiny_run, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    for value in ("", "4"):
        monkeypatch.setenv("WORLD_SIZE", value)
        assert tiny_run("--save_dir", f"out{value}", "--limit", "1") == 0
        assert ("WORLD_SIZE is 4 and RANK is not set" in capsys.readouterr().err) == bool(value)
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert tiny_run("--save_dir", "out") == 2
    assert "environment variable WORLD_SIZE: expected a number" in capsys.readouterr().err


class Eager(tqdm):
    """A bar that shows every change, however quickly they come."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, mininterval=0, **options)


def test_progress_is_of_the_whole_run(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr("util.terminal.tqdm", Eager)
    assert tiny_run("--save_dir", "out", "--limit", "2") == 0
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any("images 0/2" in line and "a1: step 6/6" in line for line in shown)
    assert any("images 1/2" in line and "75%" in line and "a2: step 3/6" in line for line in shown)
    assert tiny_run("--save_dir", "out") == 0  # two are done: a third of the bar is new work
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any("images 2/3" in line and "a10: step" in line for line in shown)


# --input, --sigma, --output


def test_input_sigma_and_output_restore_one_picture(tiny_run, capsys):
    os.mkdir("mine")
    pixels = (iio.imread("images/a1.png").astype(np.uint16) * 257) // 2
    iio.imwrite("mine/deep.png", pixels)
    write_yaml("task.yaml", task({"name": "denoise"}))
    flags = ("--save_dir", "out", "--input", "mine/deep.png", "--sigma", "0.02", "--measured")
    assert tiny_run(*flags, "--output", "restored.png") == 0
    restored = iio.imread("restored.png")
    assert restored.dtype == np.uint16 and restored.shape == pixels.shape
    kept = iio.imread("out/tiny/denoise/gaussian/0.02/recon/deep.tif")
    assert np.abs(restored - kept.clip(0, 65535)).max() <= 0.5
    assert "restored: restored.png" in capsys.readouterr().out
    os.remove("restored.png")
    assert tiny_run(*flags, "--output", "restored.npy") == 0  # of the run that is done
    assert np.array_equal(np.load("restored.npy"), kept)


def test_a_comparison_that_fails_costs_nothing_else(tiny_run, capsys, monkeypatch):
    def fails(*_):
        raise ValueError("no such font")

    monkeypatch.setattr("util.results.write_comparison", fails)
    write_yaml("task.yaml", task({"name": "denoise"}))
    flags = ("--save_dir", "out", "--input", "images/a1.png", "--output", "restored.png")
    assert tiny_run(*flags) == 0
    assert "note: comparison.png cannot be written (no such font)" in capsys.readouterr().err
    with open("out/tiny/denoise/gaussian/0.05/summary.json", encoding="utf-8") as file:
        assert json.load(file)["finished"]
    assert os.path.exists("restored.png")


def test_output_of_a_volume_has_its_grid(tiny_run):
    write_nifti("v.nii.gz", head((32, 32, 3)))
    write_yaml("task.yaml", task({"name": "denoise"}))
    flags = ("--save_dir", "out", "--input", "v.nii.gz", "--measured")
    assert tiny_run(*flags, "--output", "r.nii") == 0
    source, result = nibabel.load("v.nii.gz"), nibabel.load("r.nii")
    assert result.shape == source.shape and np.allclose(result.affine, source.affine)
    written = nibabel.load("out/tiny/denoise/gaussian/0.05/volumes/v.nii.gz")
    assert np.array_equal(result.get_fdata(), written.get_fdata())


@pytest.mark.parametrize(
    ("source", "path", "says"),
    [
        ("images", "r.png", "expected one picture, volume or series to restore, found 3"),
        ("images/a1.png", "r.jpg", "r.jpg: expected .png or .tif or .npy, the format of a1.png"),
        ("images/a1.png", "r", "found no suffix"),
        ("images/a1.png", "nowhere/r.png", "there is no folder"),
        ("images/a1.png", "folder.png", "folder.png is a folder"),
        ("v.nii.gz", "r.png", "expected .nii or .nii.gz, the format of v.nii.gz, found .png"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(
    tiny_run, capsys, source, path, says
):
    write_nifti("v.nii.gz", head((32, 32, 2)))
    os.mkdir("folder.png")
    assert tiny_run("--save_dir", "out", "--input", source, "--output", path) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --output: ") and says in line
    assert not os.path.exists("out")


def test_defaults_are_found_from_another_folder(tmp_path):
    """The shipped task on one of your own images, from your own folder."""
    image = np.uint8(np.random.default_rng(0).integers(0, 255, (32, 32)))
    iio.imwrite(tmp_path / "x.png", image)
    fast = ["--diffusion_config", "configs/diffusion_config_fast.yaml", "--precision", "fp32"]
    command = [sys.executable, os.path.join(REPOSITORY, "main.py"), *fast, "--input", "x.png"]
    finished = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "results/mri/super_resolution/x4/0.05"
    assert (folder / "recon/x.png").exists()
    with open(folder / "summary.json", encoding="utf-8") as file:
        settings = json.load(file)["settings"]
    assert settings["model_config"]["model_path"] == "models/mri.pt"  # as from everywhere


def test_a_name_that_results_cannot_carry_stands_in_the_table(tiny_run):
    strange = "a: what?.png"
    os.rename("images/a1.png", f"images/{strange}")
    assert tiny_run("--save_dir", "out") == 0
    found = read_table(f"{FOLDER}/metrics.csv").rows
    assert [row.get("source") for row in found.values()].count(strange) == 1
    assert sum("source" in row for row in found.values()) == 1
    (name,) = [name for name, row in found.items() if "source" in row]
    assert os.path.exists(f"{FOLDER}/recon/{name}.png") and "?" not in name
