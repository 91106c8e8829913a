"""The regression network of tests/benchmarks/regression_limit.py."""

import csv

import torch

from tests.benchmarks import regression_limit
from tests.conftest import rnd


def test_a_network_that_tells_what_a_magnified_image_lacks_restores_it():
    truth, z, alpha_bar = rnd((2, 1, 8, 8), 1), rnd((2, 1, 8, 8), 2), 0.9

    def network(x_t, t):
        torch.testing.assert_close(x_t, 0.9**0.5 * z)
        assert (t == regression_limit.TIMESTEP).all()
        lacking = (z - truth) / (1 / 9) ** 0.5  # √r = √(0.1 / 0.9)
        return torch.cat([lacking, torch.full_like(lacking, 7.0)], dim=1)

    class Network(torch.nn.Module):
        forward = staticmethod(network)

    regression = regression_limit.Regression(Network(), alpha_bar)
    torch.testing.assert_close(regression(z), truth)


def test_a_line_takes_the_place_of_that_of_its_name(tmp_path, monkeypatch):
    path = str(tmp_path / "table.csv")
    monkeypatch.setattr(regression_limit, "TABLE", path)
    for name, updates in (("a", 1), ("b", 2), ("a", 3)):
        regression_limit.write(name, {"updates": updates})
    with open(path, encoding="utf-8", newline="") as file:
        assert [(r["what"], r["updates"]) for r in csv.DictReader(file)] == [("a", "3"), ("b", "2")]
