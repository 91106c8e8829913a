"""What other systems do: drives of Windows, files in use, no locks, no torch.distributed."""

import csv
import os
import shutil
import subprocess
import sys

import imageio_ffmpeg
import pytest
import torch

import data.bids
import util.files
from guided_diffusion.devices import compile_network, reuse_memory
from guided_diffusion.options import parse_args
from guided_diffusion.training.logs import append_csv
from tests.conftest import REPOSITORY, SR
from util.errors import UserError
from util.journal import Journal, read_table
from util.remote import base_name, is_remote, is_web


def test_a_home_folder_is_filled_in(monkeypatch, tmp_path):
    """Which shells do not in --flag=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    options = parse_args(["--save_dir=~/results", "--output=~/a.png"])
    assert options.save_dir == os.path.join(tmp_path, "results").replace(os.sep, "/")
    assert options.output == os.path.join(tmp_path, "a.png").replace(os.sep, "/")


@pytest.mark.parametrize(
    ("path", "remote"),
    [("C://Users//me//a.nii", False), ("gs://b/a.png", True), ("https://x.org/a.png", True)],
)
def test_a_drive_is_no_scheme(path, remote):
    assert is_remote(path) is remote
    assert base_name(path).startswith("a.")


def test_what_is_no_address_is_one_sentence():
    with pytest.raises(UserError, match=r"http://\[x/a.png: is no address"):
        is_web("http://[x/a.png")


def test_a_data_set_on_another_drive(monkeypatch, tmp_path):
    def apart(path, start):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", apart)
    assert data.bids._link(str(tmp_path), "D:/results") == tmp_path.as_uri()


class Busy:
    """A function that fails as often as said, as long as another program has the file."""

    def __init__(self, function, times):
        self.function, self.left = function, times

    def __call__(self, *arguments, **options):
        if self.left:
            self.left -= 1
            raise PermissionError(13, "Permission denied", arguments[0])
        return self.function(*arguments, **options)


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(util.files, "WAIT", 0)
    monkeypatch.setattr(util.files, "ATTEMPTS", 5)


def test_a_file_in_use_for_a_moment_is_written_all_the_same(windows, monkeypatch, tmp_path):
    busy = Busy(os.replace, 3)
    monkeypatch.setattr(os, "replace", busy)
    with util.files.replacing_text(str(tmp_path / "a.txt")) as file:
        file.write("new")
    assert (tmp_path / "a.txt").read_text() == "new" and not busy.left


def test_a_table_in_use_for_a_moment_gets_its_row(windows, monkeypatch, tmp_path):
    journal = Journal(str(tmp_path / "metrics.csv"))
    monkeypatch.setattr("builtins.open", Busy(open, 3))
    journal.add("a", {"psnr": 30.0})
    assert read_table(journal.path).rows == {"a": {"psnr": 30.0}}


def test_a_log_in_use_costs_a_row_and_no_training(monkeypatch, tmp_path, capsys):
    path = str(tmp_path / "log.csv")
    append_csv(path, {"step": 1})
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", Busy(open, 100))
        append_csv(path, {"step": 2})
    append_csv(path, {"step": 3})
    assert "log.csv: Permission denied, a row is left out" in capsys.readouterr().err
    with open(path, encoding="utf-8") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "3"]


def test_overwriting_says_what_is_in_use(tiny_run, monkeypatch, capsys):
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    arguments = ("--save_dir", "out", "--limit", "1", "--seed", "1", "--overwrite")
    assert tiny_run(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: --overwrite: {os.path.join('out', SR)}")
    assert said.endswith("cannot be removed; is a file in it open?")


def test_a_video_without_ffmpeg_is_refused_before_the_work(tiny_run, monkeypatch, capsys):
    def none():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    assert tiny_run("--save_dir", "out", "--video") == 2
    assert capsys.readouterr().err.startswith("error: --video: imageio-ffmpeg brings no ffmpeg")
    assert not os.path.exists("out")


def test_elsewhere_than_on_linux_the_c_library_is_not_asked(monkeypatch):
    def ask():
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("platform.libc_ver", ask)
    monkeypatch.setattr(sys, "platform", "win32")
    assert reuse_memory() is False


def test_compiling_as_a_user_without_a_name_is_one_sentence(monkeypatch):
    def compile_(function):
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(UserError, match="--compile: torch.compile does not work here"):
        compile_network(torch.nn.Identity(), torch.device("cpu"))


def test_torch_without_distributed_serves_one_process():
    """As AMD's builds for Windows are: the names are not there at all."""
    script = (
        "import sys, torch, torch.distributed as d\n"
        "for name in ('Store', 'TCPStore', 'PrefixStore', 'DistError'):\n"
        "    delattr(d, name)\n"
        "import main\n"
        "sys.exit(main.main(['--task_config', 'none.yaml']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == "error: none.yaml: no such file"
