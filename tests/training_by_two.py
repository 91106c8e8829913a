"""Training by several processes: what one of them finds, all of them end with."""

import errno
import os
import signal
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.crops import TrainingCrops
from guided_diffusion import launch
from guided_diffusion.training.trainer import Trainer
from tests.trainings import prepare, train, weights
from util.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to train in; cwd is there."""
    monkeypatch.chdir(tmp_path)
    prepare()
    return tmp_path


def train_by_two(*arguments, before=lambda rank: None):
    """Two processes forked from this one with torchrun's variables, for launchers take long.

    Args:
        before: called in each, with its rank.

    Returns:
        their exit statuses, and the lines that they printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = [_fork(rank, port, arguments, before) for rank in range(2)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    with open("output.txt", encoding="utf-8") as file:
        lines = file.read().replace("\r", "\n").splitlines()
    os.remove("output.txt")
    return statuses, [line for line in lines if line.strip() and "|" not in line]  # no bar


def _fork(rank, port, arguments, before):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        found = (rank, 2, rank, 2, "127.0.0.1", port)
        os.environ.update(zip(launch.TORCHRUN_VARIABLES, map(str, found), strict=True))
        file = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.alarm(60)  # whatever waits for ever
        before(rank)
        status = train("out", *arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:  # noqa: BLE001 - as a program ends, and nothing of pytest's runs
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def test_a_mistake_is_said_once(folder):
    statuses, lines = train_by_two("--set", "batch_size=3")
    assert statuses == [2, 2]
    [line] = lines
    assert line.startswith("error: train config: batch_size 3 cannot be shared equally by 2")


def test_processes_that_find_different_states_do_not_train(folder):
    assert train("out", "--set", "max_steps=1") == 0
    os.mkdir("elsewhere")
    os.symlink("../train", "elsewhere/train")
    for name in ("train.yaml", "model.yaml", "diffusion.yaml"):
        os.symlink(f"../{name}", f"elsewhere/{name}")

    def move(rank):
        if rank == 1:
            os.chdir("elsewhere")

    statuses, lines = train_by_two("--set", "max_steps=2", before=move)
    assert statuses == [2, 2]
    [line] = lines
    assert line.startswith("error: --out and --data_dir: expected the same files for all processes")
    assert "process 0 found step 1, 7 images of train, and process 1 step 0, 7 images" in line


def spoil_an_image(batch_size):
    """Damage an image that is first drawn in the third update or later; returns (its name, step).

    Not one of those that are read at the start, for validation and for notes.
    """
    crops = TrainingCrops([[f"{i}.png" for i in range(7)]], [1], 1, np.ones(1), 16, True, 0.5, 0)
    drawn = [crops.path(n)[1] for n in range(7)]
    name = next(n for n in drawn[2 * batch_size :] if n not in ("0.png", "3.png", "6.png"))
    Path("train", name).write_bytes(b"no image")
    return name, drawn.index(name) // batch_size


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_trained_is_kept_when_an_image_cannot_be_read(folder, capsys, processes):
    settings = ["--set", "schedule=constant", "log_steps=1000", "batch_size=2"]
    name, steps = spoil_an_image(batch_size=2)
    if processes == 1:
        statuses, lines = [train("out", *settings)], capsys.readouterr().err.splitlines()
    else:
        statuses, lines = train_by_two(*settings)
    assert statuses == [2] * processes
    [line] = [line for line in lines if line.startswith("error: ")]
    assert line.startswith(f"error: {name}: cannot be read as an image")
    assert not any("Traceback" in line for line in lines)
    kept = torch.load("out/state.pt", weights_only=True)
    assert kept["step"] == steps >= 2
    if processes == 1:
        assert train("straight", *settings, f"max_steps={steps}") == 0
        expected = weights("straight/state.pt")
        assert all(torch.equal(kept["model"][k], expected[k]) for k in expected)


@pytest.mark.parametrize("where", ["_log", "save"])
def test_what_stops_the_first_process_stops_the_others(folder, where):
    """Here a full disk: of what only the first does."""

    def fill(rank):
        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        name = {"_log": "logs.append_csv", "save": "trainer.save_state"}[where]
        setattr(*_owner(f"guided_diffusion.training.{name}"), full)

    statuses, lines = train_by_two("--set", "save_minutes=0", before=fill)
    assert statuses == [2, 2]
    sentence = (
        "error: --out: No space left on device; make room; the state of the last save is kept"
    )
    assert lines == [sentence]


def _owner(name):
    module, _, attribute = name.rpartition(".")
    return sys.modules[module], attribute


def test_a_process_that_dies_is_one_sentence(folder):
    def die(rank):
        def update(self, *arguments):
            os._exit(7)

        if rank == 1:
            Trainer.update = update

    statuses, lines = train_by_two(before=die)
    assert statuses == [1, 7]
    assert lines == ["error: another process has gone; the state of the last save is kept"]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in zip(launch.TORCHRUN_VARIABLES, (0, 2, 0, 2, "x", 1), strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="2 processes were started on a machine with 1 GPU, "):
        launch.setup_dist()


def test_processes_that_see_a_gpu_of_their_own_each_are_taken(monkeypatch):
    """As SLURM's --gpus-per-task shows them one each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "init_process_group", lambda *backend, **options: None)
    for name, value in zip(launch.TORCHRUN_VARIABLES, (0, 2, 0, 2, "x", 1), strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert launch.setup_dist() == (0, 2)


def test_a_validation_may_take_hours_while_the_others_wait(folder, monkeypatch):
    """The defaults are 10 minutes of NCCL and 30 of gloo."""
    given = {}
    monkeypatch.setattr(
        dist, "init_process_group", lambda *backend, **options: given.update(options)
    )
    for name, value in zip(launch.TORCHRUN_VARIABLES, (0, 2, 0, 2, "x", 1), strict=True):
        monkeypatch.setenv(name, str(value))
    assert launch.setup_dist() == (0, 2)
    assert given["timeout"] >= timedelta(hours=12)


def test_what_was_trained_is_saved_before_each_validation(folder, monkeypatch):
    steps = {"save": [], "validate": []}
    for name, found in steps.items():
        monkeypatch.setattr(
            Trainer, name, lambda self, f=found: f.append((self.state.step, when()))
        )
    when = iter(range(100)).__next__
    assert train("out", "--set", "max_steps=3", "val_minutes=0", "save_minutes=1000") == 0
    assert [step for step, _ in steps["save"]] == [step for step, _ in steps["validate"]]
    assert {1, 2, 3} == {step for step, _ in steps["validate"]}
    order = zip(steps["save"], steps["validate"], strict=True)
    assert all(saved < validated for (_, saved), (_, validated) in order)
