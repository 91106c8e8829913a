"""Runs of several processes: they write what one writes, and outlive each other."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import main
from guided_diffusion import devices, launch
from guided_diffusion.condition_methods import DMPS
from tests.conftest import LINEAR, REPOSITORY, SR, contents, write_yaml
from tests.volume_files import head, write_nifti
from util.errors import UserError

ARGUMENTS = ["--model_config", "model.yaml", "--diffusion_config", "diffusion.yaml"]
ARGUMENTS += ["--task_config", "task.yaml", "--precision", "fp32"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


@pytest.fixture
def folder(tiny_run):
    """Seven images, one of them damaged, and what one process makes of them."""
    rows, cols = np.mgrid[:32, :32]
    for i in (3, 4, 5):
        iio.imwrite(f"images/b{i}.png", np.uint8(127.5 + 100 * np.sin(rows / i) * np.cos(cols / 7)))
    with open("images/a5.png", "wb") as file:
        file.write(b"no image")
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 3})
    assert tiny_run("--save_dir", "one") == 2
    return tiny_run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Started:
    """Processes forked from this one with torchrun's variables, for launchers take long."""

    def __init__(self, count, *arguments, output="output.txt"):
        port, self.output = free_port(), output
        self.pids = [self._fork(rank, count, port, arguments) for rank in range(count)]

    def _fork(self, rank, count, port, arguments):
        pid = os.fork()
        if pid:
            return pid
        found = (rank, count, rank, count, "127.0.0.1", port)
        os.environ.update(zip(launch.TORCHRUN_VARIABLES, map(str, found), strict=True))
        os.setpgid(0, 0)
        file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        try:
            status = main.main([*ARGUMENTS, *arguments])
        except SystemExit as stop:
            status = stop.code
        except Exception:  # noqa: BLE001 - as a program ends, and nothing of pytest's runs
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def kill(self, number):
        for pid in self.pids:
            os.killpg(pid, number)

    def wait(self):
        """Returns the exit statuses and what was printed, a line each."""
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        with open(self.output, encoding="utf-8") as file:
            return statuses, file.read().replace("\r", "\n").splitlines()


LAUNCHERS = {
    "mpiexec": [os.path.join(os.path.dirname(sys.executable), "mpiexec"), "-n", "2",
                sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3",
                 "--master-port"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_processes_write_what_one_writes(folder, launcher):
    command = LAUNCHERS[launcher]
    if launcher == "mpiexec":
        pytest.importorskip("mpi4py")
        if not os.path.exists(command[0]):
            pytest.skip("no mpiexec in this environment")
    else:
        command = [*command, str(free_port())]
    finished = subprocess.run(
        [*command, os.path.join(REPOSITORY, "main.py"), *ARGUMENTS, "--save_dir", "several"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode != 0  # for the damaged image
    assert contents("several") == contents("one")
    lines = (finished.stdout + finished.stderr).replace("\r", "\n").splitlines()
    assert sum(line.startswith("error: a5.png: cannot be read") for line in lines) == 1
    assert sum("images in several" in line for line in lines) == 1
    assert sum(line.startswith("b3: PSNR") for line in lines) == 1
    assert any("7/7" in line for line in lines)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["killed", "out of memory"])
def test_the_others_finish_when_one_dies(folder, monkeypatch, rank, how):
    step = DMPS.step

    def deadly(self, *arguments):
        if os.environ.get("RANK") == str(rank):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("CUDA out of memory")
        time.sleep(0.05)  # or the other takes all
        return step(self, *arguments)

    monkeypatch.setattr(DMPS, "step", deadly)
    statuses, lines = Started(2, "--save_dir", "two").wait()
    assert 0 not in statuses
    said = "was ended by SIGKILL" if how == "killed" else "CUDA out of memory"
    assert any(said in line for line in lines)
    [left] = [line for line in lines if "left to the next run" in line]
    missing = left.split(": ")[-1].split(", ")
    assert left.startswith(f"error: {len(missing)} of 7 images")
    assert len({*missing} - {"a5"}) == 1  # it may have found the damaged one before
    with open(f"two/{SR}/metrics.csv", encoding="utf-8") as file:
        found = [row["image"] for row in csv.DictReader(file)]
    with open(f"one/{SR}/metrics.csv", encoding="utf-8") as file:
        assert found == [r["image"] for r in csv.DictReader(file) if r["image"] not in missing]
    with open(f"two/{SR}/summary.json", encoding="utf-8") as file:
        assert not json.load(file)["finished"]
    monkeypatch.setattr(DMPS, "step", step)
    assert folder("--save_dir", "two") == 2
    assert contents("two") == contents("one")


@pytest.mark.parametrize("next_run", [1, 3])
def test_a_run_killed_as_a_whole_is_gone_on_with(folder, monkeypatch, capsys, next_run):
    step = DMPS.step
    monkeypatch.setattr(DMPS, "step", lambda self, *a: time.sleep(0.1) or step(self, *a))
    started = Started(2, "--save_dir", "two")
    for _ in range(1200):
        if sum(os.path.exists(f"two/{SR}/metrics.rank{r}.csv") for r in (0, 1)) == 2:
            break
        time.sleep(0.05)
    started.kill(signal.SIGKILL)
    statuses, _ = started.wait()
    assert statuses == [-signal.SIGKILL] * 2
    monkeypatch.setattr(DMPS, "step", step)
    if next_run == 1:
        assert folder("--save_dir", "two") == 2
        said = capsys.readouterr().out.splitlines()
    else:
        statuses, said = Started(next_run, "--save_dir", "two", output="next.txt").wait()
        assert sorted(statuses) == [0, 0, 2]
    [found] = re.findall(r"(\d+) of 7 images had been restored by an earlier run", "\n".join(said))
    assert int(found) >= 2
    assert contents("two") == contents("one")


def test_a_volume_is_put_together_once_of_all_processes_slices(folder, monkeypatch):
    """Also when one process died and the next run had to restore its slice."""
    write_nifti("images/v.nii.gz", head((32, 32, 4)))
    assert folder("--save_dir", "one", "--overwrite", "--limit", "20") == 2
    step = DMPS.step

    def deadly(self, *arguments):
        if os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return step(self, *arguments)

    monkeypatch.setattr(DMPS, "step", deadly)
    Started(2, "--save_dir", "two").wait()
    monkeypatch.setattr(DMPS, "step", step)
    statuses, _ = Started(2, "--save_dir", "two", output="next.txt").wait()
    assert 2 in statuses
    assert f"{SR}/volumes/v.nii.gz" in contents("two")
    assert contents("two") == contents("one")


def test_an_interruption_is_one_line(folder, monkeypatch):
    step = DMPS.step
    monkeypatch.setattr(DMPS, "step", lambda self, *a: time.sleep(0.3) or step(self, *a))
    started = Started(2, "--save_dir", "two")
    for _ in range(1200):
        if os.path.exists(f"two/{SR}/summary.json"):
            break
        time.sleep(0.05)
    time.sleep(0.5)
    started.kill(signal.SIGINT)
    statuses, lines = started.wait()
    assert statuses == [130, 130]
    assert sum(line.startswith("interrupted: run the same command") for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def test_a_mistake_is_said_once(folder):
    statuses, lines = Started(2, "--save_dir", "two", "--task_config", "none.yaml").wait()
    assert statuses == [2, 2]
    assert [line for line in lines if line.strip()] == ["error: none.yaml: no such file"]
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 2})
    statuses, lines = Started(2, "--save_dir", "one", output="next.txt").wait()
    assert statuses == [2, 2]
    [line] = [line for line in lines if line.strip()]
    assert "holds a run with another diffusion_config" in line


def test_processes_take_a_gpu_each_and_share_the_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "0"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    taken = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        taken.append(devices.pick_device(0).index)
    assert taken == [0, 1, 0]
    assert devices.pick_device(-1).type == "cpu"

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch.share_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    launch.share_threads()
    assert threads == [2]


def test_one_process_needs_no_mpi(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("PMI_SIZE", "1")
    assert launch.launched() == (0, 1)
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="mpiexec: 2 processes need mpi4py"):
        launch.launched()
