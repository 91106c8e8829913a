"""Training gone on with: by another recipe, another network, after it was stopped."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from guided_diffusion.training.optimiser import Optimiser
from guided_diffusion.training.trainer import Trainer
from tests.conftest import LINEAR, TINY, largest_file, write_yaml
from tests.trainings import prepare, rows, train, weights
from util.lock import NAME, Lock


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to train in; cwd is there."""
    monkeypatch.chdir(tmp_path)
    prepare()
    return tmp_path


@pytest.fixture
def sources(folder):
    """Two more sources, of two and of five images."""
    for name, images in (("many/t1", (0, 1)), ("many/t2", (2, 3, 4, 5, 6))):
        os.makedirs(name)
        for i in images:
            os.link(f"train/{i}.png", f"{name}/{i}.png")
    return ["--data_dir", "many", "--val_dir", "many"]


def test_another_recipe_does_not_overwrite_a_run(folder, capsys):
    assert train("out", "--set", "max_steps=1") == 0
    assert train("out", "--set", "max_steps=1", "crop_size=8") == 2
    assert "another crop_size" in capsys.readouterr().err


def test_the_state_of_an_earlier_version(folder, capsys):
    os.mkdir("out")
    torch.save({"model": {}, "ema": {}, "step": 3, "config": {"seed": 0}}, "out/state.pt")
    assert train("out") == 2
    assert "no state that this version writes" in capsys.readouterr().err


def test_the_state_of_another_program(folder, capsys):
    os.mkdir("out")
    torch.save({"averages": {}, "model": {}}, "out/state.pt")
    assert train("out") == 2
    assert "no state that this version writes" in capsys.readouterr().err


def forget_the_files():
    """Make the state one of the versions that kept only the files' paths."""
    state = torch.load("out/state.pt", weights_only=True)
    del state["files"]
    torch.save(state, "out/state.pt")


def is_refused(capsys, says):
    kept = Path("out/state.pt").read_bytes()
    assert train("out", "--set", "max_steps=2") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: --out out: holds a run {says}; choose another folder")
    assert Path("out/state.pt").read_bytes() == kept


def test_a_run_is_not_gone_on_with_by_another_network(folder, capsys):
    assert train("out", "--set", "max_steps=1") == 0
    write_yaml("model.yaml", {**TINY, "num_channels": 64, "model_path": ""})
    is_refused(capsys, "with another num_channels of model_config")
    forget_the_files()
    is_refused(capsys, "of another network")


@pytest.mark.parametrize(
    ("model", "schedule", "says"),
    [
        ({"num_head_channels": 16}, {}, "num_head_channels of model_config"),  # of equal shapes
        ({"dropout": 0.1}, {}, "dropout of model_config"),
        ({}, {"noise_schedule": "cosine"}, "noise_schedule of diffusion_config"),
        (
            {"use_new_attention_order": True},
            {"steps": 800, "rescale_timesteps": True},
            "use_new_attention_order of model_config, steps of diffusion_config and "
            "rescale_timesteps of diffusion_config",
        ),
    ],
)
def test_files_that_say_another_thing_are_another_run(folder, capsys, model, schedule, says):
    assert train("out", "--set", "max_steps=1") == 0
    write_yaml("model.yaml", {**TINY, **model, "model_path": ""})
    write_yaml("diffusion.yaml", {**LINEAR, **schedule})
    is_refused(capsys, f"with another {says}")
    forget_the_files()
    assert train("out", "--set", "max_steps=2") == 0


def test_what_sampling_alone_reads_is_free(folder, capsys):
    assert train("out", "--set", "max_steps=1") == 0
    write_yaml("model.yaml", {**TINY, "use_checkpoint": True, "model_path": "elsewhere.pt"})
    free = {"sampler": "ddim", "eta": 0.5, "timestep_respacing": 20, "clip_denoised": "auto"}
    write_yaml("diffusion.yaml", {**LINEAR, **free})
    assert train("out", "--set", "max_steps=2") == 0
    assert "note:" not in capsys.readouterr().err


def test_what_is_changed_on_the_way_is_said(folder, capsys):
    """Not what the weights know nothing of."""
    assert train("out", "--set", "max_steps=1") == 0
    capsys.readouterr()
    assert train("out", "--set", "max_steps=2", "num_workers=0", "log_steps=1") == 0
    assert "note:" not in capsys.readouterr().err
    os.remove("train/6.png")
    changes = ("max_steps=3", "learning_rate=1e-5", "timestep_sampling=lognormal")
    assert train("out", "--set", *changes) == 0
    said = "note: --out out: goes on with another learning_rate, timestep_sampling and data_dir"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_another_weight_decay_is_that_of_the_run_from_there_on(optimizer):
    """AdamW's and Muon's is decoupled: without a gradient it shrinks weights by 1 - rate·decay."""
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(2, 2))
    earlier, now = (Optimiser(model, optimizer, decay) for decay in (0.0, 0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    earlier.step(1e-3)
    now.load_state_dict(earlier.state_dict())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    now.step(0.5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), (1 - 0.5 * 0.1) * before[name])


def test_the_weights_to_begin_with_are_read_at_the_beginning_alone(folder, capsys):
    assert train("first", "--set", "max_steps=1") == 0
    shutil.copy("first/ema.pt", "start.pt")
    settings = ["--set", "init_from=start.pt", "schedule=constant", "ema_decay=0"]
    assert train("straight", *settings, "max_steps=2") == 0
    assert train("out", *settings, "max_steps=1") == 0
    os.remove("start.pt")
    capsys.readouterr()
    assert train("out", *settings, "max_steps=2") == 0
    assert "note:" not in capsys.readouterr().err
    a, b = weights("straight/state.pt"), weights("out/state.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert train("other", *settings) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: train config: init_from: no checkpoint at start.pt")


def test_a_step_is_in_the_tables_once_after_a_run_was_killed(sources):
    """Here after step 2 and in the midst of a row; its last save was at step 1."""
    settings = ["--set", "schedule=constant", "ema_decay=[0.5, 0.9]", "val_timesteps=[100]"]
    assert train("out", *sources, *settings, "max_steps=1") == 0
    shutil.copy("out/state.pt", "state.pt")
    assert train("out", *sources, *settings, "max_steps=2") == 0
    straight = rows("out/log.csv"), rows("out/validation.csv")
    shutil.copy("state.pt", "out/state.pt")
    with open("out/log.csv", "a", encoding="utf-8") as file:
        file.write("1,0.1")  # of 12, perhaps
    assert train("out", *sources, *settings, "max_steps=2") == 0
    for name, expected in zip(("log.csv", "validation.csv"), straight, strict=True):
        found = rows(f"out/{name}")
        for row in (*found, *expected):
            del row["minutes"]
        assert found == expected
    # of two averages those of three sources and of their mean
    assert [row["step"] for row in found] == 8 * ["1"] + 8 * ["2"]


def test_a_run_that_is_finished_adds_nothing(folder):
    assert train("out", "--set", "max_steps=2") == 0
    before = {name: Path("out", name).read_bytes() for name in os.listdir("out")}
    assert train("out", "--set", "max_steps=2") == 0
    assert sorted(os.listdir("out")) == sorted(before)
    for name in ("log.csv", "validation.csv"):
        assert Path("out", name).read_bytes() == before[name]


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device", "x")])
def test_training_that_is_stopped_from_outside_is_one_sentence(folder, capsys, monkeypatch, error):
    def stop(*arguments):
        raise error

    monkeypatch.setattr("guided_diffusion.training.trainer.save_state", stop)
    assert train("out", "--set", "max_steps=1") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and said.endswith("the state of the last save is kept")


def test_a_second_training_into_a_folder_is_one_sentence(folder, capsys):
    os.mkdir("out")
    lock = Lock("out")
    lock.acquire()
    assert train("out") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --out: out is in use by process {os.getpid()} of ")
    assert os.listdir("out") == [NAME]
    lock.release()
    assert train("out", "--set", "max_steps=1") == 0
    assert NAME not in os.listdir("out")


def test_a_training_holds_its_folder_to_the_end(folder, monkeypatch):
    held = []
    monkeypatch.setattr(
        "guided_diffusion.training.trainer.save_state",
        lambda state, out, config: held.append(os.path.exists(f"{out}/{NAME}")),
    )
    assert train("out", "--set", "max_steps=1") == 0
    assert held == [True]


@pytest.mark.parametrize("left", ["ema.pt", "ema_0.9.pt"])
def test_weights_without_a_state_are_not_written_over(folder, capsys, left):
    os.mkdir("out")
    Path("out", left).write_bytes(b"what an earlier training left")
    assert train("out", "--set", "max_steps=1") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --out out: holds {left} and no state.pt")
    assert "continue from it there with init_from" in line
    assert os.listdir("out") == [left]
    assert Path("out", left).read_bytes() == b"what an earlier training left"


def test_a_disk_that_is_full_when_training_saves_is_one_sentence(folder, capsys):
    assert train("out", "--set", "max_steps=1") == 0
    kept = Path("out/state.pt").read_bytes()
    with largest_file(10_000):
        assert train("out", "--set", "max_steps=2") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "error: --out: File too large; the state of the last save is kept"
    assert Path("out/state.pt").read_bytes() == kept


def test_a_folder_that_cannot_be_written_is_found_before_training(folder, capsys, monkeypatch):
    def refuse(path, *arguments):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr("util.lock.os.open", refuse)
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it trains"))
    assert train("out") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line == "error: --out: cannot write out (Read-only file system)"
