"""The throughput benchmark."""

import pytest
import torch

from tests.benchmarks import accelerator
from tests.conftest import TINY, write_yaml


class OneConvolution(torch.nn.Module):
    in_channels = 3

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


def test_flops_are_two_a_multiply_add():
    flops = accelerator.count_flops(OneConvolution(), 16, torch.device("cpu"))
    assert flops == 2 * (3 * 5 * 3 * 3) * 16 * 16


def test_table_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(accelerator.MATRIX, "cpu", 64)
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "model.yaml", {**TINY, "model_path": "not read"})
    arguments = ["--model_configs", str(tmp_path / "model.yaml"), "--gpu", "-1", "--repeats", "1"]
    small = [*arguments, "--precisions", "fp32", "bf16", "--batch_sizes", "1", "2"]
    assert accelerator.main([*small, "--size", "32"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "GFLOP" in line]
    assert [(r[2].strip(), r[3].strip()) for r in rows] == [
        ("fp32", "1"), ("fp32", "2"), ("bf16", "1"), ("bf16", "2"),
    ]  # fmt: skip
    for row in rows:  # images/s is batch over time
        assert float(row[5]) == pytest.approx(1000 * int(row[3]) / float(row[4]), rel=0.05)
    assert accelerator.main([*arguments, "--size", "33"]) == 2
    assert "--size: expected a multiple of 2" in capsys.readouterr().err
