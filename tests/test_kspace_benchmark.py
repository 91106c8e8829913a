"""What accelerated MRI is compared with: the classical methods reach their objectives' minima."""

import csv
import os
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from guided_diffusion.intervals import load_factor
from guided_diffusion.operators import get_operator
from tests.benchmarks import rows
from tests.benchmarks.kspace import CASES, identified, measure_factors, parse_args, plan
from tests.benchmarks.kspace import main as run_kspace
from tests.benchmarks.kspace_classical import (
    CLASSICAL,
    deepinv_tv,
    sense,
    total_variation,
    wavelet,
)
from tests.benchmarks.kspace_measured import main as measure_scan
from tests.benchmarks.kspace_rows import COLUMNS, Table
from tests.benchmarks.kspace_tables import kspace, kspace_intervals, kspace_measured
from util.errors import UserError


def rnd(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    """(AᵀA, Aᵀy, A, y) of three coils and a 16×16 image."""
    operator = get_operator(
        "mri", (1, 16, 16), dtype=torch.float64, coils=3, acceleration=2, center_fraction=0.25
    )
    y = operator.forward(rnd(1, 1, 16, 16)) + 0.1 * rnd(1, *operator.out_shape, seed=1)
    return lambda u: operator.transpose(operator.forward(u)), operator.transpose(y), operator, y


def test_too_few_slices_are_named(tmp_path):
    for i in range(3):
        iio.imwrite(tmp_path / f"{i}.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(UserError, match=r"--val: expected more than \d+ slices.*found 3"):
        run_kspace(["--val", str(tmp_path), "--plan"])


def test_sense_solves_its_normal_equations(problem):
    normal, b, *_ = problem
    u = sense(normal, b, 0.05)
    assert (normal(u) + 0.05 * u - b).norm() < 1e-4 * b.norm()


def test_total_variation_is_at_its_minimum(problem):
    normal, b, operator, y = problem
    weight = 0.05

    def objective(u):
        steps = (u.roll(-1, axis) - u for axis in (-1, -2))
        return (operator.forward(u) - y).square().sum() / 2 + weight * sum(
            s.abs().sum() for s in steps
        )

    u = total_variation(normal, b, weight, steps=4000)
    least = objective(u)
    for seed in range(20):
        for size in (1e-3, 1e-2, 0.1):
            assert objective(u + size * rnd(*u.shape, seed=seed)) > least
    assert objective(total_variation(normal, b, weight, steps=8000)) > least * (1 - 1e-4)


def test_deepinv_s_total_variation_is_at_its_minimum(problem):
    pytest.importorskip("deepinv")
    normal, b, operator, y = problem
    weight = 0.05

    def objective(u):
        down, right = torch.zeros_like(u), torch.zeros_like(u)
        down[..., :-1, :], right[..., :-1] = u.diff(dim=-2), u.diff(dim=-1)
        variation = torch.hypot(down, right).sum()
        return (operator.forward(u) - y).square().sum() / 2 + weight * variation

    u = deepinv_tv(normal, b, weight, steps=500)
    for seed in range(20):
        for size in (1e-2, 0.1):
            assert objective(u + size * rnd(*u.shape, seed=seed)) > objective(u)


def test_wavelets_of_a_complete_scan_are_soft_thresholded():
    """With AᵀA = I the minimum is known: W⁻¹ of the shrunken W b, the coarsest level as it was."""
    pywt = pytest.importorskip("pywt")
    b = rnd(1, 1, 32, 32)
    found = wavelet(lambda u: u, b, 0.3)
    levels = pywt.wavedec2(b[0, 0].numpy(), "db4", mode="periodization", level=4)
    for i, details in enumerate(levels[1:], start=1):
        levels[i] = tuple(pywt.threshold(d, 0.3, "soft") for d in details)
    expected = pywt.waverec2(levels, "db4", mode="periodization")
    assert torch.allclose(found[0, 0], torch.from_numpy(expected))


class TestRows:
    """What is kept, and what is still to be measured."""

    CASE = CASES["8x4_0.01"]

    def row(self, method="tv", weight=0.001, where="val", image="a", **more):
        key = identified(self.CASE, method, weight, where, f"{image}.png")
        rest = dict.fromkeys(COLUMNS, "")
        return {**rest, "psnr": "30", "seconds": "7", **key, **more}

    @pytest.fixture
    def table(self, tmp_path):
        table = Table(str(tmp_path / "kspace.csv"))
        table.write()
        return table

    def test_other_priors_are_left_out_and_older_columns_filled(self, table):
        for prior in ("", "new", "old"):
            table.add(self.row(image=f"by {prior}", prior=prior))
        again = Table(table.path, "new")
        assert [row["image"] for row in again.rows.values()] == ["by ", "by new"]
        with open(table.path, "w") as file:  # as it was before a column came
            file.write("coils,mask,R,sigma,method,weight,set,image,psnr,prior\n")
            file.write("8,magic,4,0.01,tv,0.001,val,a,30,\n")
        older = Table(table.path)
        older.write()
        (row,) = Table(table.path).rows.values()
        assert row["in_90"] == "" and row["psnr"] == "30" and tuple(row) == COLUMNS

    def test_rows_of_a_weight_that_is_not_the_best_any_more_go(self, table):
        for weight, where in ((0.001, "val"), (0.003, "val"), (0.003, "tuning")):
            table.add(self.row(weight=weight, where=where))
        table.add(self.row("sense", 0.003))
        table.forget_weights(identified(self.CASE, "tv", 0.001, "val", ""))
        left = [(r["method"], r["weight"], r["set"]) for r in Table(table.path).rows.values()]
        expected = [("tv", "0.001", "val"), ("tv", "0.003", "tuning"), ("sense", "0.003", "val")]
        assert left == expected

    def test_the_plan_counts_what_is_left(self, table):
        paths = [f"{letter}.png" for letter in "abcdefghij"]
        options = ["--val", "x", "--cases", "8x4_0.01", "--methods", "tv", "zero_filled"]
        args = parse_args([*options, "--images", "0", "1", "2"])
        table.add(self.row(image="b"))
        table.add(self.row(where="tuning", image="c", weight=0.02))
        found = list(plan(args, {"val": paths, "tuning": paths}, table, None))
        tuning = 2 * len(CLASSICAL["tv"][1]) - 1
        assert found[0].startswith(f"tv: {2 + tuning} images")
        assert found[0].endswith(f"about 0 h {round((2 + tuning) * 7 / 60):02d} min")
        assert found[1].startswith("zero_filled: 3 images")

    def test_single_points_of_several_coils_are_not_for_methods_that_need_an_svd(self):
        assert not CASES["8x4_0.01_poisson"].suits("deepinv_ddrm_20")
        assert CASES["1x4_0.01_poisson"].suits("deepinv_ddrm_20")

    def test_the_factor_is_the_mean_of_the_tuning_slices(self, table, tmp_path):
        for image, rescale in (("a", "1.1"), ("b", "1.4")):
            more = {"where": "tuning", "prior": "new", "rescale": rescale}
            table.add(self.row("spectral_sample_20x8", 0.0, image=image, **more))
        path = str(tmp_path / "prior.pt")
        prior = SimpleNamespace(digest="new", config=SimpleNamespace(model_path=path))
        options = ["--val", "x", "--cases", "8x4_0.01", "--methods", "spectral_sample_20x8"]
        args = parse_args([*options, "--factors", "--tuning_images", "0", "1"])
        measure_factors(args, ["a.png", "b.png"], table, prior)
        assert load_factor(prior, "spectral_sample", "mri") == 1.25

    def test_tables(self, table, monkeypatch):
        """Single samples on the slices that all have restored; several in a table of their own."""
        monkeypatch.setattr(rows, "FOLDER", os.path.dirname(table.path))
        more = {"ssim": "0.9", "haarpsi": "0.8", "true_R": "4", "seen": "0.5"}
        for image in "ab":
            table.add(self.row(image=image, **more))
        table.add(self.row("spectral_10", 0.0, image="b", **{**more, "psnr": "40"}))
        several = {**more, "in_90": "0.91", "rescale": "1.2"}
        table.add(self.row("spectral_10x8", 0.0, image="c", **several))
        assert "| spectral_10 | 40.00 / 0.900 / 0.800 | 4.00 | 0.50 | 1 |" in kspace()
        assert "| tv | 30.00 / 0.900 / 0.800 | 4.00 | 0.50 | 1 |" in kspace()
        assert "| spectral_10x8 | 0.910 | 1.20 | 30.00 | 1 |" in kspace_intervals()
        assert "x8" not in kspace() and "| tv |" not in kspace_intervals()


class TestMeasuredScans:
    """A complete scan, undersampled along either axis."""

    def scan(self, tmp_path, empty=()):
        """Three coils that see a disc of 1, whose phase is 0.7."""
        rows, columns = np.mgrid[-1:1:48j, -1:1:40j]
        maps = np.stack([1 + 0.3 * rows, 1 - 0.3 * columns, 1 + 0.2j * rows * columns])
        images = maps * (rows**2 + columns**2 < 0.6) * np.exp(0.7j)
        noise = np.random.default_rng(0).normal(size=(2, *images.shape))
        images = np.fft.ifftshift(images, (1, 2))
        kspace = np.fft.fftshift(np.fft.fft2(images, norm="ortho"), (1, 2))
        kspace += 0.01 * (noise[0] + 1j * noise[1])
        kspace[:, list(empty)] = 0
        np.savez(tmp_path / "disc.npz", kspace=kspace.astype(np.complex64))
        return ["--scan", str(tmp_path / "disc.npz"), "--out", str(tmp_path / "found.csv")]

    def test_lines_are_left_out_along_both_axes(self, tmp_path, monkeypatch):
        options = ["--methods", "L1-wavelets", "total variation", "--accelerations", "2"]
        assert measure_scan([*self.scan(tmp_path), *options]) == 0
        with open(tmp_path / "found.csv", newline="") as file:
            found = list(csv.DictReader(file))
        assert {row["axis"] for row in found} == {"columns", "rows"} and len(found) == 16
        for axis, lines in (("columns", 40), ("rows", 48)):
            kept = {round(lines / float(row["true_R"])) for row in found if row["axis"] == axis}
            assert len(kept) == 1 and abs(kept.pop() - lines / 2) <= 1
        best = {row["method"]: 0.0 for row in found}
        for row in found:
            best[row["method"]] = max(best[row["method"]], float(row["psnr"]))
        assert min(best.values()) > 30  # noise alone is 34 dB
        monkeypatch.setattr(rows, "FOLDER", str(tmp_path))
        os.rename(tmp_path / "found.csv", tmp_path / "kspace_measured.csv")
        table = kspace_measured().splitlines()
        assert len(table) == 2 + 2 * 2 and all("disc 48×40" in line for line in table[2:])
        for line in table[2:]:  # each measure at the weight that suits it
            cells = line.replace("*", "").split(" | ")
            of = [r for r in found if (r["axis"], r["method"]) == (cells[1], cells[4])]
            for at, measure in ((6, "psnr"), (7, "ssim"), (8, "haarpsi")):
                most = max(float(r[measure]) for r in of)
                assert float(cells[at]) == pytest.approx(most, abs=0.006)

    def test_a_scan_with_gaps_has_lines_along_its_own_axis_alone(self, tmp_path, capfd):
        scan = self.scan(tmp_path, empty=[0, 1])
        assert measure_scan([*scan, "--axes", "columns", "--methods", "L1-wavelets"]) == 2
        assert "--axes columns" in capfd.readouterr().err
