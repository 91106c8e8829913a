"""Checkpoints as training programs and downloads leave them."""

import errno
import os

import pytest
import torch

from guided_diffusion.checkpoints import load_checkpoint, read_checkpoint, save_tensors
from guided_diffusion.unet import create_model
from tests.conftest import TINY, largest_file
from util.errors import UserError


class Holder(torch.nn.Module):
    """As DistributedDataParallel holds its model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled(model):
    return {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}


FORMS = {
    "bare": lambda m: m.state_dict(),
    "DistributedDataParallel": lambda m: Holder(m).state_dict(),
    "torch.compile": compiled,
    "both": lambda m: {f"module.{k}": v for k, v in compiled(m).items()},
    "a part compiled": lambda m: {
        k.replace("input_blocks.", "input_blocks._orig_mod."): v for k, v in m.state_dict().items()
    },
    "a lone state_dict": lambda m: {"state_dict": m.state_dict()},
    "a state_dict beside others": lambda m: {
        "epoch": 3, "state_dict": compiled(m), "optimizer": {"lr": 1e-4, "state": {}}
    },
    "average of weights": lambda m: {**Holder(m).state_dict(), "n_averaged": torch.tensor(7)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_under_their_wrappers(tmp_path, form):
    torch.manual_seed(0)
    model = create_model(**TINY, model_path="")
    path = str(tmp_path / "weights.pt")
    torch.save(FORMS[form](model), path)
    other = create_model(**TINY, model_path="")
    load_checkpoint(other, path)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


NOT_WEIGHTS = {
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 72\n",
        "is a Git LFS pointer, not the weights",
    ),
    "a web page": (b"\n<!DOCTYPE html>\n<html>", "is a web page, not the weights"),
    "nothing": (b"", "truncated or damaged|not a PyTorch checkpoint"),
}


@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_what_lies_in_place_of_weights_is_named(tmp_path, case):
    contents, says = NOT_WEIGHTS[case]
    (tmp_path / "x.pt").write_bytes(contents)
    with pytest.raises(UserError, match=says) as error:
        read_checkpoint(str(tmp_path / "x.pt"))
    assert str(error.value).startswith(f"model_path: {os.path.join(tmp_path, 'x.pt')}")


def test_more_than_weights_names_what(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}, "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"holds more than weights \(model, epoch\)"):
        read_checkpoint(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_a_disk_that_takes_no_more_is_what_is_said(tmp_path, limit):
    """Not what torch says of its archive afterwards; and the file that was there stays."""
    path = tmp_path / "x.pt"
    save_tensors({"w": torch.zeros(3)}, str(path))
    with largest_file(limit), pytest.raises(OSError, match="File too large") as error:
        save_tensors({"w": torch.zeros(50_000), "v": torch.ones(50_000)}, str(path))
    assert error.value.errno == errno.EFBIG
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.zeros(3))
    assert os.listdir(tmp_path) == ["x.pt"]
