"""Training: exact resumption, several sources, several processes."""

import contextlib
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from data.crops import TrainingCrops
from data.sources import Interleaving, find_shares, find_sources
from guided_diffusion.checkpoints import read_checkpoint
from guided_diffusion.losses import training_loss
from guided_diffusion.train import main, parse_args
from guided_diffusion.train import prepare as prepare_training
from guided_diffusion.training.optimiser import Optimiser, learning_rate_factor
from guided_diffusion.training.trainer import Trainer
from guided_diffusion.unet import create_model
from tests.conftest import LINEAR, REPOSITORY, TINY, rnd, write_yaml
from tests.trainings import prepare, rows, train, weights
from util.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to train in; cwd is there."""
    monkeypatch.chdir(tmp_path)
    prepare()
    return tmp_path


@pytest.fixture
def sources(folder):
    """Two sources in one folder, of two and of five images, and a third beside it."""
    for name, images in (("many/t1", (0, 1)), ("many/t2", (2, 3, 4, 5, 6)), ("pd", (0, 6))):
        os.makedirs(name)
        for i in images:
            os.link(f"train/{i}.png", f"{name}/{i}.png")
    return ["--data_dir", "many", "--val_dir", "many"]


def train_sources(out, *arguments):
    return main(["--config", "train.yaml", "--out", out, *arguments])


def test_training_writes_weights_and_logs(folder):
    assert train("out") == 0
    model = create_model(**TINY, model_path="out/ema.pt")  # strict
    assert next(model.parameters()).dtype == torch.float32
    assert all(v.dtype == torch.float16 for v in read_checkpoint("out/ema.pt").values())
    log = rows("out/log.csv")
    assert list(log[0]) == ["step", "minutes", "learning_rate", "simple_loss", "skipped"]
    assert [int(r["step"]) for r in log] == [1, 2, 3, 4, 5, 6]
    assert float(log[0]["simple_loss"]) == pytest.approx(1, abs=0.1)  # predicts nothing yet
    rates = [float(r["learning_rate"]) for r in log]
    assert rates[0] == pytest.approx(0.5e-3, rel=0.01)  # first of two warm-up steps
    assert rates[3] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi / 2)), rel=0.01)
    (row,) = rows("out/validation.csv")
    assert float(row["psnr_t100"]) > float(row["psnr_t500"])


@pytest.mark.parametrize(("optimizer", "dropout"), [("adamw", 0), ("muon", 0), ("adamw", 0.3)])
def test_a_stopped_run_resumes_exactly(sources, optimizer, dropout, monkeypatch):
    """Stop after three of six steps, in training from two sources: the end is the same, exactly."""
    write_yaml("model.yaml", {**TINY, "dropout": dropout, "model_path": ""})
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    arguments = [*sources, "--set", f"optimizer={optimizer}", "ema_decay=[0.5, 0.9]"]
    assert train_sources("straight", *arguments) == 0
    original = Trainer.update

    def stop_after_three(self, *arguments):
        original(self, *arguments)
        self.stopped = self.state.step == 3

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop_after_three)
        assert train_sources("broken", *arguments) == 0
    assert torch.load("broken/state.pt", weights_only=True)["step"] == 3
    assert train_sources("broken", *arguments) == 0
    a, b = weights("straight/state.pt"), weights("broken/state.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    for name in ("ema.pt", "ema_0.9.pt"):
        a, b = read_checkpoint(f"straight/{name}"), read_checkpoint(f"broken/{name}")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_dropout_differs_between_updates_and_between_processes(folder, monkeypatch):
    masks = []

    def seen(*arguments):
        masks.append(torch.nn.functional.dropout(torch.ones(100)))
        return training_loss(*arguments)

    monkeypatch.setattr("guided_diffusion.training.trainer.training_loss", seen)
    arguments = ["--config", "train.yaml", "--data_dir", "train", "--out", "out"]
    with contextlib.ExitStack() as held:
        trainer = prepare_training(parse_args(arguments), held, 0, 1)
    batch = next(trainer._batches())
    for rank, step in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]:
        trainer.rank, trainer.state.step = rank, step
        trainer.update(trainer.state.model, batch, 1e-3)
    assert torch.equal(masks[0], masks[4])
    assert len({tuple(mask.tolist()) for mask in masks}) == 4


def test_loss_and_validation_of_each_source(sources):
    """Also with a third source that comes when the run is continued: the table grows."""
    assert train_sources("out", *sources) == 0
    log = rows("out/log.csv")
    counts = np.bincount([drawn_from(4 * i + k, [2, 5]) for i in range(6) for k in range(4)])
    assert counts.sum() == 24 and counts.min() > 0
    for row in log:
        share = [drawn_from(4 * (int(row["step"]) - 1) + k, [2, 5]) for k in range(4)]
        losses = [row["loss_t1"], row["loss_t2"]]
        assert [bool(x) for x in losses] == [share.count(0) > 0, share.count(1) > 0]
        mean = sum(share.count(i) * float(x) for i, x in enumerate(losses) if x) / 4
        assert mean == pytest.approx(float(row["simple_loss"]), abs=2e-5)
    validation = rows("out/validation.csv")
    assert [r["source"] for r in validation] == ["t1", "t2", "mean"]
    psnr = [float(r["psnr_t100"]) for r in validation]
    assert psnr[2] == pytest.approx((psnr[0] + psnr[1]) / 2, abs=2e-3) and psnr[0] != psnr[1]
    assert train_sources("out", *sources, "--data_dir", "pd", "--set", "max_steps=7") == 0
    grown = rows("out/log.csv")
    assert len(grown) == 7 and [r["loss_t1"] for r in grown[:6]] == [r["loss_t1"] for r in log]
    assert "loss_pd" in grown[0]


def test_pictures_that_are_dark_are_said_to_be(sources, capsys):
    """A scanner's 12 bits in 16, once for each source and flag; and nothing of full pictures."""
    os.makedirs("dark")
    for i in range(3):
        pixels = np.linspace(0, 4000 + i, 24 * 32).reshape(24, 32).astype(np.uint16)
        iio.imwrite(f"dark/{i}.png", pixels)
    arguments = ["--data_dir", "dark", "--val_dir", "dark", "--set", "max_steps=1"]
    assert train_sources("out", *sources, *arguments) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note[: note.index(" of 65535")] for note in notes] == [
        "note: --data_dir: dark: 1.png: its values end at 4001",
        "note: --val_dir: dark: 0.png: its values end at 4000",
    ]


def drawn_from(n, sizes):
    shares = np.sqrt(sizes) / np.sqrt(sizes).sum()
    return Interleaving(list(shares), seed=0)[n][0]


def test_each_source_gets_its_share_and_all_of_its_images(sources):
    found = find_sources(["other=train", "many", "pd"], "--data_dir")
    assert {n: len(p) for n, p in found.items()} == {"other": 7, "t1": 2, "t2": 5, "pd": 2}
    shares = [0.3, 0.5, 0.15, 0.05]
    crops = TrainingCrops(list(found.values()), shares, 1, np.ones(1), 8, False, 0.0, seed=4)
    drawn = [crops.path(n) for n in range(2000)]
    assert np.bincount([s for s, _ in drawn]) == pytest.approx(2000 * np.array(shares))
    assert [s for s, _ in drawn[:1000]] != [s for s, _ in drawn[1000:]]
    assert crops[700][3] == drawn[700][0]
    for source, paths in enumerate(found.values()):
        images = [p for s, p in drawn if s == source]
        for first in range(0, len(images) - len(paths), len(paths)):
            assert sorted(images[first : first + len(paths)]) == sorted(paths)


def test_shares():
    sizes = {"a": 100, "b": 25, "c": 1}
    assert find_shares(sizes, {}, "") == pytest.approx([10 / 16, 5 / 16, 1 / 16])
    assert find_shares(sizes, {"c": 0.4}, "") == pytest.approx([0.4, 0.2, 0.4])
    assert find_shares(sizes, {"a": 0, "b": 0.5, "c": 0.5}, "") == [0, 0.5, 0.5]
    for named, says in (
        ({"d": 1}, "no source 'd'"),
        ({"a": 2}, "from 0 to 1"),
        ({"a": 0.5, "b": 0.5}, "leave nothing for c"),
        ({"a": 0.5, "b": 0.1, "c": 0.1}, "sum to 0.7"),
    ):
        with pytest.raises(UserError, match=says):
            find_shares(sizes, named, "train.yaml: shares")


def test_a_small_share_is_not_rounded_away():
    interleaving = Interleaving([0.9999, 0.0001, 0.0], seed=0)
    drawn = [interleaving[n][0] for n in range(1000)]
    assert np.bincount(drawn, minlength=3).tolist() == [999, 1, 0]


def test_more_sources_than_a_block_has_items():
    """Each still gets its share: a third of them is seen twice as often as the others."""
    shares = [2.0 if i % 3 == 0 else 1.0 for i in range(1200)]
    interleaving = Interleaving([share / sum(shares) for share in shares], seed=0)
    drawn = Counter(interleaving[n][0] for n in range(4800))
    assert sum(drawn.values()) == 4800 and len(drawn) == 1200
    assert all(drawn[i] == 3 * share for i, share in enumerate(shares))


def test_a_constant_run_is_prolonged_and_then_decays(folder):
    """Six steps at one rate, six more in the same folder, of which the last three decay."""
    constant = ["--set", "schedule=constant", "warmup_steps=0"]
    assert train("out", *constant) == 0
    assert train("out", *constant, "max_steps=12", "decay_share=0.25") == 0
    rates = [float(r["learning_rate"]) for r in rows("out/log.csv")]
    assert rates == pytest.approx([1e-3] * 10 + [2e-3 / 3, 1e-3 / 3], rel=1e-3)
    assert learning_rate_factor("constant", 0.25, 1.0) == 0


def test_muon_makes_orthogonal_updates_of_hidden_matrices_alone():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = create_model(**TINY).to(memory_format=memory_format)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for i, p in enumerate(model.parameters()):
            p.grad = rnd(p.shape, i).to(p)
        Optimiser(model, "muon", 0.0).step(1e-3)
        change = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        for name in ("input_blocks.0.0.weight", "out.2.weight", "out.2.bias"):
            # The first update of Adam is the sign of the gradient.
            assert change[name].abs() == pytest.approx(1e-3, rel=0.01)
        name = "middle_block.0.in_layers.2.weight"
        matrix = change[name].flatten(1) / 1e-3
        values = torch.linalg.svdvals(matrix) / (0.2 * max(matrix.shape) ** 0.5)
        assert 0.6 < values.min() and values.max() < 1.3  # of Newton and Schulz's five iterations
        aligned = (change[name] * model.get_parameter(name).grad).sum()
        assert aligned < 0


def test_without_muon_in_torch(folder, capsys, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    assert train("out", "--set", "optimizer=muon") == 2
    assert "muon needs torch 2.9" in capsys.readouterr().err


def spoilt(steps):
    """`training_loss` that is NaN at some updates, counted from 1."""
    updates = iter(range(1, 1000))

    def loss(*arguments):
        value, simple = training_loss(*arguments)
        return (value * math.nan if next(updates) in steps else value), simple

    return loss


def test_an_update_that_is_not_finite_is_skipped(folder, monkeypatch):
    assert train("out", "--set", "max_steps=2") == 0
    before = weights("out/state.pt")
    monkeypatch.setattr("guided_diffusion.training.trainer.training_loss", spoilt({2}))
    assert train("out", "--set", "log_steps=3") == 0
    first, second = rows("out/log.csv")[-2:]
    assert (first["skipped"], second["skipped"]) == ("0", "1")
    assert math.isfinite(float(second["simple_loss"]))
    after = weights("out/state.pt")
    assert all(v.isfinite().all() for v in after.values())
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("max_steps", [5, 40])
def test_diverged_training_ends_in_a_sentence_and_keeps_what_was(
    folder, max_steps, capsys, monkeypatch
):
    assert train("out", "--set", "max_steps=2") == 0
    kept = [Path("out", name).read_bytes() for name in ("state.pt", "ema.pt")]
    monkeypatch.setattr("guided_diffusion.training.trainer.training_loss", spoilt(range(100)))
    assert train("out", "--set", f"max_steps={max_steps}", "save_minutes=0") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "training has diverged" in error
    assert f"the last {min(10, max_steps - 2)} updates" in error
    assert kept == [Path("out", name).read_bytes() for name in ("state.pt", "ema.pt")]


def test_weights_beyond_float16_are_not_written(folder, capsys):
    arguments = ["max_steps=1", "learning_rate=1e9", "schedule=constant", "warmup_steps=0"]
    assert train("out", "--set", *arguments) == 2
    assert "beyond float16" in capsys.readouterr().err
    assert not os.path.exists("out/ema.pt")


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                 "--standalone"],
    "mpiexec": [os.path.join(os.path.dirname(sys.executable), "mpiexec"), "-n", "2",
                sys.executable],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_what_one_would(folder, launcher):
    if launcher == "mpiexec":
        pytest.importorskip("mpi4py")
        if not os.path.exists(LAUNCHERS["mpiexec"][0]):
            pytest.skip("no mpiexec in this environment")
    # float32, and gradients' sums in one order, so that only rounding may differ
    script = "import glob, torch; torch.set_num_threads(1); import guided_diffusion.train as t\n"
    script += "t.native_bf16 = lambda device: False\nassert t.main() == 0\n"
    # a thread of gloo that is left may abort the process after all is done
    script += "left = [open(path).read() for path in glob.glob('/proc/self/task/*/comm')]\n"
    script += "assert not any('gloo' in name for name in left), left\n"
    with open("launch.py", "w", encoding="utf-8") as file:
        file.write(script)
    arguments = ["launch.py", "--config", "train.yaml", "--data_dir", "train", "--max_minutes", "0"]
    environment = {**os.environ, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1"}
    for out, prefix in (("one", [sys.executable]), ("two", LAUNCHERS[launcher])):
        finished = subprocess.run(
            [*prefix, *arguments, "--out", out],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
    one, two = weights("one/state.pt"), weights("two/state.pt")
    start = create_model(**TINY).state_dict()
    moved = sum((one[k] - start[k]).norm() for k in one)
    apart = sum((one[k] - two[k]).norm() for k in one)
    assert apart < 0.02 * moved


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "crop_size=15"], "multiples of 2"),
        (["--set", "crop_size=64"], "smaller than crop_size 64"),
        (["--set", "loss_weighting=none"], "loss_weighting"),
        (
            ["--set", "timestep_sampling=log"],
            "timestep_sampling: expected uniform or lognormal",
        ),
        (["--set", "max_steps=0"], "max_minutes"),
        (["--set", "steps=3"], "unknown key 'steps'"),
        (["--set", "augment"], "KEY=VALUE"),
        (["--set", "optimizer=sgd"], "optimizer: expected adamw or muon, found str 'sgd'"),
        (["--set", "schedule=step"], "schedule: expected cosine or constant"),
        (["--set", "decay_share=0.2"], "decay_share is of schedule: constant"),
        (["--set", "schedule=constant", "decay_share=2"], "decay_share: expected a number from 0"),
        (["--set", "ema_decay=[0.9, 1.5]"], "ema_decay: expected numbers from 0 to below 1"),
        (["--set", "ema_decay=[true]"], "ema_decay: expected numbers from 0 to below 1"),
        (["--set", "ema_decay=[0.9, 0.5, 0.9]"], "ema_decay: expected each number once, found"),
        (["--set", "min_snr_gamma=0"], "min_snr_gamma: expected a number above 0, found float 0.0"),
        (["--set", "log_steps=0"], "log_steps: expected a number above 0, found int 0"),
        (["--set", "learning_rate=.nan"], "learning_rate: expected a number above 0"),
        (["--set", "seed=-1"], "seed: expected 0 or more, found int -1"),
        (["--set", "val_timesteps=[0.5]"], "val_timesteps: expected integers from 0"),
        (["--set", "val_timesteps=[1000]"], "val_timesteps: expected integers below 1000"),
        (["--set", "shares={t1: 0.5}"], "shares: no source 't1' (found: train)"),
        (["--set", "num_workers=1", "crop_size=64"], "smaller than crop_size 64"),
        (["--data_dir", "train"], "two sources are named 'train'"),
        (["--data_dir", "nowhere"], "--data_dir: no folder nowhere"),
        (["--set", "init_from=nowhere.pt"], "no checkpoint at nowhere.pt"),
    ],
)
def test_bad_training_input_is_one_sentence(folder, capsys, arguments, says):
    assert train("out", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert not os.path.exists("out") or not os.listdir("out")


def test_a_validation_image_smaller_than_the_network_takes(folder, capsys):
    """This one takes multiples of 2."""
    os.mkdir("val")
    iio.imwrite("val/a.png", np.zeros((24, 1), np.uint8))
    assert train_sources("out", "--data_dir", "train", "--val_dir", "val") == 2
    error = "error: --val_dir: a.png: this network takes sides from 2, found 1×24\n"
    assert capsys.readouterr().err == error
    assert not os.listdir("out")


@pytest.mark.parametrize(
    ("schedule", "model", "says"),
    [
        ({"model_mean_type": "start_x"}, {}, "model_mean_type: training is of the noise, expected"),
        ({"model_mean_type": "previous_x"}, {}, "expected epsilon, found previous_x"),
        ({}, {"learn_sigma": False}, "learned_range needs learn_sigma: true, found false in model"),
        ({"model_var_type": "fixed_small"}, {}, "fixed_small teaches no variance, expected"),
        ({"model_var_type": "fixed_large"}, {}, "fixed_large teaches no variance, expected"),
    ],
)
def test_what_is_trained_is_what_the_schedule_reads(folder, capsys, schedule, model, says):
    write_yaml("model.yaml", {**TINY, **model, "model_path": "unused.pt"})
    write_yaml("diffusion.yaml", {**LINEAR, **schedule})
    arguments = ["--config", "train.yaml", "--data_dir", "train", "--out", "out"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: diffusion.yaml: ") and says in error
    assert not os.path.exists("out")


def test_an_average_of_decay_zero_is_the_weights(folder):
    assert train("out", "--set", "ema_decay=[0, 0.9]", "max_steps=3") == 0
    assert train("out", "--set", "ema_decay=[0.0, 0.9]", "max_steps=4") == 0  # the same run
    trained, average = weights("out/state.pt"), read_checkpoint("out/ema.pt")
    assert all(torch.equal(average[k], trained[k].half()) for k in average)


@pytest.mark.parametrize("minutes", ["-1", "nan", "soon"])
def test_a_budget_that_is_none(folder, capsys, minutes):
    with pytest.raises(SystemExit, match="2"):
        train("out", "--max_minutes", minutes)
    assert capsys.readouterr().err.startswith("error: argument --max_minutes: ")


def test_a_seed_beyond_the_generators(folder, capsys):
    assert train("out", "--set", f"seed={2**64}") == 2
    assert "seed: expected an integer below 2**63" in capsys.readouterr().err
