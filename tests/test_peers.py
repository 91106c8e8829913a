"""The benchmark beside deepinv: its operator, its denoiser, its tables."""

import csv
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import create_sampler
from guided_diffusion.measurements import GaussianNoise, get_operator
from tests.benchmarks import comparison, peers
from tests.benchmarks.comparison import CONFIGS, OWN_SCHEDULES, Prior, Slice, Task
from tests.conftest import LINEAR, rnd
from util.config import read_diffusion_config

TASKS = [
    {"name": "denoise"},
    {"name": "super_resolution", "scale_factor": 4},
    {"name": "deblur", "type": "gaussian", "kernel_size": 9, "intensity": 1.5},
    {"name": "color"},
]
tasks = pytest.mark.parametrize("params", TASKS, ids=lambda p: p["name"])


def operator_of(params):
    return get_operator(in_shape=(3, 16, 24), dtype=torch.float64, **params)


@tasks
def test_the_completed_operator_is_the_same_with_a_square_v(params):
    thin = operator_of(params)
    full = peers.full_operator(thin)
    x, y = (rnd((2, *shape), seed=0).double() for shape in (thin.in_shape, thin.out_shape))
    assert full.singular_values.shape == thin.in_shape
    assert torch.allclose(full.forward(x), thin.forward(x), atol=1e-12)
    assert torch.allclose(full.transpose(y), thin.transpose(y), atol=1e-12)
    for one in (lambda v: full.V(full.Vt(v)), lambda v: full.Vt(full.V(v))):
        assert torch.allclose(one(x), x, atol=1e-12)
    assert torch.allclose(full.U(full.Ut(y)), y, atol=1e-12)


@pytest.fixture(scope="module")
def deepinv():
    return pytest.importorskip("deepinv", exc_type=(ImportError, RuntimeError))


@tasks
def test_physics_agrees_and_its_proximal_step_solves_the_normal_equations(deepinv, params):
    operator = operator_of(params)
    physics = peers.physics_of(Task("", params, GaussianNoise(0.1), 1.0), operator)
    x = rnd((2, *operator.in_shape), seed=0).double()
    y = rnd((2, *operator.out_shape), seed=1).double()
    assert torch.allclose(physics.A(x), operator.forward(x), atol=1e-12)
    assert torch.allclose(physics.A_adjoint(y), operator.transpose(y), atol=1e-12)
    assert physics.noise_model.sigma.item() == pytest.approx(0.05)
    z = physics.prox_l2(x, y, gamma=2.0)
    left = z + 2 * operator.transpose(operator.forward(z))
    assert torch.allclose(left, x + 2 * operator.transpose(y), atol=1e-10)


MU, STD, SIGMA = 0.2, 0.4, 0.2


def gaussian_prior():
    """A stand-in for the network, optimal for pixels that are independently N(MU, STD²)."""
    free = {"clip_denoised": False, "model_var_type": "fixed_small"}
    diffusion = create_sampler(**{**LINEAR, **free})
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)

    def model(x, timesteps):
        a = alpha_bar.to(x)[timesteps].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MU) / (a * STD**2 + 1 - a)

    return Prior(model, diffusion, diffusion, torch.device("cpu"), "")


@pytest.mark.parametrize("level", [0.02, 0.3, 4.0, [0.1, 1.0]])
def test_the_denoiser_is_the_posterior_mean(deepinv, level):
    u = 0.6 + 0.3 * rnd((2, 1, 8, 8), seed=0)
    sigma = torch.tensor(level) if isinstance(level, list) else level
    noise = (2 * torch.as_tensor(sigma).reshape(-1, 1, 1, 1)) ** 2
    x = 2 * u - 1
    expected = (STD**2 * x + noise * MU) / (STD**2 + noise)
    restored = 2 * peers.denoiser_of(gaussian_prior())(u, sigma) - 1
    assert torch.allclose(restored, expected, atol=0.02)  # the t of nearest noise


def test_all_own_methods_clip_alike(monkeypatch):
    """As published, or none of them, whatever the shipped files say."""
    files = {"dmps": "diffusion_config_100.yaml", **OWN_SCHEDULES}
    configs = {name: read_diffusion_config(f"{CONFIGS}/{file}") for name, file in files.items()}
    assert all(config["clip_denoised"] == "auto" for config in configs.values())
    prior, clipped = gaussian_prior()._replace(schedules=configs), []

    def sample(name, params, schedule, *rest):
        clipped.append(schedule["clip_denoised"])
        return None, 20

    monkeypatch.setattr(comparison, "sample", sample)
    task = Task("", {"name": "denoise"}, GaussianNoise(SIGMA), 1.0)
    for arguments in ((), (False,)):
        for name in peers.OWN:
            peers.restore_with_own(name, task, None, prior, 20, 0, *arguments)
    assert clipped == [True] * len(peers.OWN) + [False] * len(peers.OWN)


@pytest.mark.parametrize("name", peers.PEERS)
def test_steps_are_evaluations_of_the_network(deepinv, name):
    prior, calls = gaussian_prior(), []

    def model(x, timesteps):
        calls.append(len(x))
        return prior.model(x, timesteps)

    task = Task("", {"name": "super_resolution"}, GaussianNoise(SIGMA), 1.0)
    image = Slice("x", torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 4, 4))
    peers.restore_with_peer(name, task, image, prior._replace(model=model), 7, 0)
    assert calls == [1] * 7


def test_peers_come_near_the_posterior_of_a_gaussian_prior(deepinv):
    operator = {"name": "denoise"}
    task = Task("", operator, GaussianNoise(SIGMA), 1.0)
    truth = MU + STD * rnd((1, 1, 32, 32), seed=0)
    image = Slice("x", truth, truth + SIGMA * rnd(truth.shape, seed=1))
    for name in ("deepinv_ddrm", "deepinv_diffpir"):
        x_hat, seconds = peers.restore_with_peer(name, task, image, gaussian_prior(), 20, 0)
        again, _ = peers.restore_with_peer(name, task, image, gaussian_prior(), 20, 0)
        assert torch.equal(x_hat, again) and seconds > 0
        # a sample of the posterior is √2 as far as its mean, whose error is 0.18 here
        assert (x_hat - truth.clamp(-1, 1)).square().mean().sqrt() < 0.3
        assert x_hat.std() > STD / 2


def run(*arguments):
    base = ["--root", "images", "--model_config", "model.yaml", "--diffusion_config"]
    return peers.main([*base, "diffusion.yaml", "--precision", "fp32", "--out", "out", *arguments])


def test_tables_hold_our_methods_by_steps(tiny_run, capsys):
    arguments = ("--limit", "2", "--tasks", "sr4", "--methods", "dmps", "ddrm", "--steps", "6", "9")
    assert run(*arguments) == 0
    with open("out/peers.md", encoding="utf-8") as file:
        assert file.read().endswith(capsys.readouterr().out)
    with open("out/peers.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(r["method"], r["parameters"]) for r in lines] == [
        ("dmps", "steps 6"), ("dmps", "steps 9"), ("ddrm", "steps 6"), ("ddrm", "steps 9"),
    ]  # fmt: skip
    assert all(r["images"] == "2" and float(r["hf_ratio"]) > 0 for r in lines)


def read_rows(path):
    """(what was run, its figures) of each row; the times are left out."""
    with open(path, encoding="utf-8") as file:
        rows = [{k: v for k, v in r.items() if "seconds" not in k} for r in csv.DictReader(file)]
    texts = ("task", "method", "parameters", "image")
    return [
        (
            [r[k] for k in texts if k in r],
            pytest.approx({k: float(v) for k, v in r.items() if k not in texts}, abs=1e-3),
        )
        for r in rows
    ]


def test_joined_runs_make_the_tables_of_one(tiny_run):
    both = ("--limit", "2", "--tasks", "sr4", "denoise")
    assert run(*both, "--methods", "dmps", "ddrm", "--steps", "3", "4") == 0
    for name, methods, steps in (("a", ("ddrm",), ("3", "4")), ("b", ("dmps",), ("4",))):
        assert run(*both, "--methods", *methods, "--steps", *steps, "--out", name) == 0
    last = (*both, "--methods", "dmps", "--steps", "3", "--join", "a", "b", "--out", "c")
    assert run(*last) == 0
    assert run(*both, "--methods", "--join", "c", "--out", "d") == 0
    for name in ("peers", "peers_images"):
        rows = read_rows(f"out/{name}.csv")
        for joined in ("c", "d"):
            again = read_rows(f"{joined}/{name}.csv")
            assert [r[0] for r in again] == [r[0] for r in rows]
            assert all(a[1].expected == b[1] for a, b in zip(again, rows, strict=True))
    assert run("--limit", "1", "--tasks", "denoise", "--methods", "--join", "c", "--out", "e") == 0
    names = [r[0] for r in read_rows("e/peers_images.csv")]
    whole = [r[0] for r in read_rows("out/peers_images.csv")]
    assert names == [name for name in whole if name[0] == "denoise" and name[3] == names[0][3]]


def test_joined_runs_of_one_image_each(tiny_run):
    """As a long measurement is spread over machines; in any order, several tasks in one run."""
    images = sorted(os.listdir("images"))
    for i, name in enumerate(images):
        os.mkdir(f"only{i}")
        shutil.copy(os.path.join("images", name), f"only{i}")
        one = ("--root", f"only{i}", "--methods", "dmps", "--steps", "3", "4", "--out", f"part{i}")
        assert run("--tasks", "denoise", "sr4", *one) == 0
    parts = [f"part{i}" for i in range(len(images))]
    assert run("--tasks", "denoise", "--methods", "--join", *parts[::-1], "--out", "all") == 0
    with open("all/frontier.md", encoding="utf-8") as file:
        *_, header, _, three, four = file.read().splitlines()
    with open("all/peers_images.csv", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["parameters"] == "steps 3"]
    assert len(rows) == len(images)
    assert header == "| method | evaluations | denoise |"
    means = [np.mean([float(r[key]) for r in rows]) for key in ("psnr", "ssim", "hf_ratio")]
    assert three == "| dmps | 3 | {:.2f} / {:.3f} / {:.2f} |".format(*means)
    assert four.startswith("| dmps | 4 | ")


def test_unclipped_rows_stand_beside_the_clipped(tiny_run):
    base = ("--limit", "1", "--tasks", "denoise", "--methods", "dmps", "ddrm")
    assert run(*base, "--steps", "3", "--out", "clipped") == 0
    assert run(*base, "--steps", "12", "3", "--no_clip", "--join", "clipped") == 0
    with open("out/frontier.md", encoding="utf-8") as file:
        cells = [
            [c.strip() for c in line.split("|")[1:3]] for line in file.read().splitlines()[-6:]
        ]
    assert cells == [
        ["dmps", "3"], ["dmps, no clipping", "3"], ["dmps, no clipping", "12"],
        ["ddrm", "3"], ["ddrm, no clipping", "3"], ["ddrm, no clipping", "12"],
    ]  # fmt: skip
    with open("out/peers.csv", encoding="utf-8") as file:
        psnr = [r["psnr"] for r in csv.DictReader(file) if r["parameters"].startswith("steps 3")]
    assert len(set(psnr)) == 4  # the untrained network's x̂_0 leave the range


def test_joined_runs_have_all_images(tiny_run, capsys):
    assert run("--limit", "1", "--tasks", "sr4", "--methods", "dmps", "--steps", "3") == 0
    again = ("--limit", "2", "--tasks", "sr4", "--methods", "--out", "c")
    assert run(*again, "--join", "out") == 2
    assert "--join: sr4 dmps steps 3 of out lacks " in capsys.readouterr().err
    assert run(*again, "--join", "nowhere") == 2
    assert "--join: cannot read nowhere/peers_images.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "dmps", "--steps", "2000"), "asks for 2000 of 1000 steps"),
        (("--methods", "dmps", "--out", "model.yaml"), "--out: cannot write to model.yaml"),
    ],
)
def test_errors_are_sentences(tiny_run, capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_table_that_cannot_be_written_is_one_sentence(tiny_run, capsys):
    common = ("--limit", "1", "--tasks", "denoise", "--methods")
    assert run(*common, "dmps", "--steps", "3") == 0
    os.makedirs("c/frontier.md")
    capsys.readouterr()
    assert run(*common, "--join", "out", "--out", "c") == 2
    error = capsys.readouterr().err
    path = os.path.join("c", "frontier.*")
    assert error.startswith(f"error: --out: cannot write {path} (") and error.count("\n") == 1


def test_a_missing_deepinv_is_one_sentence(tiny_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    assert run("--methods", "deepinv_ddrm") == 2
    assert "error: --methods: deepinv cannot be imported" in capsys.readouterr().err
