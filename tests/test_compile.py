"""--compile: the same images, from a network that torch.compile has seen."""

import os

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from guided_diffusion.devices import compile_network
from guided_diffusion.unet import create_model
from tests.conftest import TINY, rnd, write_yaml
from tests.trainings import prepare, train


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile with a backend that needs no compiler; it counts its graphs."""
    counter, original = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def tiny_network():
    torch.manual_seed(0)
    model = create_model(**TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.requires_grad_(False)


def evaluate(model, x, gradient):
    """ε at x, and with `gradient` that of its square, from within inference mode as samplers do."""
    t = torch.full((len(x),), 300)
    with torch.inference_mode():
        if not gradient:
            return [model(x, t)]
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            eps = model(x, t)
            return [eps.detach(), *torch.autograd.grad(eps.square().sum(), x)]


@pytest.mark.parametrize("gradient", [False, True])
def test_many_shapes_compile_few_times_and_give_the_same(compiled, gradient):
    plain, model = tiny_network(), tiny_network()
    compile_network(model, torch.device("cpu"))
    compiled.clear()  # the trial on which compile_network finds out whether it can
    shapes = [(2, 32, 32), (3, 24, 40), (4, 40, 24), (5, 16, 48)]
    for n, height, width in shapes[: 2 if gradient else 4]:
        x = rnd((n, 1, height, width), seed=n)
        for a, b in zip(*(evaluate(m, x, gradient) for m in (plain, model)), strict=True):
            assert torch.allclose(a, b, atol=1e-4 * b.abs().max())
    assert 1 <= compiled.frame_count <= 2


def test_a_compiled_run_restores_the_same_images(compiled, tiny_run):
    def recons(*arguments):
        assert tiny_run("--save_dir", "out", "--overwrite", *arguments) == 0
        folder = "out/tiny/super_resolution/x4/0.05/std"
        return [np.load(f"{folder}/{n}") for n in sorted(os.listdir(folder)) if n.endswith(".npy")]

    base = ("--num_samples", "2", "--batch_size", "2", "--method", "dps")
    for left, right in zip(recons(*base), recons(*base, "--compile"), strict=True):
        assert np.abs(left - right).max() < 1e-3
    assert compiled.frame_count


def test_without_a_compiler_it_is_one_sentence(tiny_run, monkeypatch, capsys):
    def broken(function, **options):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    write_yaml("sample.yaml", {"conditioning": {"method": "vanilla"}})
    assert tiny_run("--compile", "--task_config", "sample.yaml") == 2
    error = capsys.readouterr().err
    assert error == "error: --compile: torch.compile does not work here (no C++ compiler)\n"
    os.mkdir("training")
    monkeypatch.chdir("training")
    prepare()
    assert train("out", "--set", "compile=true") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: train config: compile: torch.compile does not work here (no C++"
    )
    assert not os.listdir("out")
