"""The benchmarks of volumes: what they measure, and that they run."""

import csv
import os

import imageio.v3 as iio
import numpy as np
import pytest

from guided_diffusion.restoration import Restored
from tests.benchmarks import (
    noise_estimates,
    noise_maps,
    volume_denoising,
    volume_real,
    volume_samples,
)
from tests.benchmarks.thick_slices import cut
from tests.volume_files import head, write_nifti


def table(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_part_of_a_volume_is_cut_about_its_middle_or_another_slice():
    volume = np.arange(20)[:, None, None] * np.ones((20, 8, 9), np.float32)
    assert cut(volume, 4, 6)[:, 0, 0].tolist() == [8, 9, 10, 11]
    assert cut(volume, 4, 6).shape == (4, 6, 6)
    assert cut(volume, 4, 6, middle=5)[:, 0, 0].tolist() == [3, 4, 5, 6]
    assert cut(volume, 4, 6, middle=19)[:, 0, 0].tolist() == [16, 17, 18, 19]


def test_what_is_drawn_and_what_all_samples_share_are_told_apart():
    """Errors of one share of noise that is drawn, and one that is the measurement's."""
    random = np.random.default_rng(0)
    truth = np.zeros((12, 40, 40), np.float32)
    fixed, drawn = 0.1 * random.standard_normal((2, *truth.shape)), []
    for _ in range(2):
        noise = 0.1 * random.standard_normal(truth.shape)
        drawn += [noise, -noise]  # antithetic
    samples = np.float32([fixed[0] + d for d in drawn])[None]
    restored = Restored(samples, samples.mean(axis=1), [None], [{}], [None])
    found = volume_samples.figures(restored, truth, np.ones(truth.shape, bool))
    assert found["drawn"] == pytest.approx(0.5, abs=0.02)
    # mean |x_{i+1} - x_i| of noise: 2/√π σ; of samples σ = 0.1 √2, of their mean 0.1
    assert found["delta"] == pytest.approx(50 * 0.1 * np.sqrt(2) * 2 / np.sqrt(np.pi), rel=0.03)
    assert found["delta_mean"] == pytest.approx(50 * 0.1 * 2 / np.sqrt(np.pi), rel=0.03)


def test_samples_are_measured_once_and_drawn_from_the_side(tiny_run):
    write_nifti("v.nii", head((32, 32, 20)), np.eye(4))
    arguments = ["--volume", "v.nii", "--model_config", "model.yaml", "--methods", "spectral"]
    arguments += ["--tasks", "super_resolution", "--slices", "4", "--crop", "16"]
    arguments += ["--num_samples", "2", "--out", "s.csv", "--figure", "s.png", "--factors"]
    assert volume_samples.main(arguments) == 0
    rows = table("s.csv")
    assert [row["way"] for row in rows] == list(volume_samples.WAYS)
    assert os.path.getsize("s.png") < 200_000 and os.path.exists("tiny.intervals.json")
    stamps = [os.stat(path).st_mtime_ns for path in ("s.csv", "s.png")]
    assert volume_samples.main(arguments) == 0
    assert stamps == [os.stat(path).st_mtime_ns for path in ("s.csv", "s.png")]


def test_edges_that_were_taken_out_are_seen_in_the_residual():
    random = np.random.default_rng(0)
    truth = np.full((4, 60, 60), -0.5, np.float32)
    truth[:, 20:40, 20:40] = 0.5
    y = truth + np.float32(0.05 * random.standard_normal(truth.shape))
    case = volume_real.Case(y, 0.05, np.ones(truth.shape, bool))
    perfect = case.judged(truth, 0.05)
    assert perfect["removed"] == pytest.approx(1, abs=0.03)
    assert perfect["edges"] == pytest.approx(1, abs=0.06)
    assert abs(perfect["in_plane"]) < 0.03 and abs(perfect["across"]) < 0.03
    blurred = truth.copy()
    blurred[:, 20:40, [19, 20, 39, 40]] = 0
    blunt = case.judged(blurred, 0.05)
    assert blunt["edges"] > 2 and blunt["across"] > 0.3
    coarse = np.kron(random.standard_normal((4, 20, 20)), np.ones((1, 3, 3)))
    assert case.judged(y - np.float32(0.05 * coarse), 0.05)["in_plane"] > 0.3
    doubled = case.judged(truth, np.full(y.shape, 0.1, np.float32))
    assert doubled["removed"] == pytest.approx(perfect["removed"] / 2)


def test_real_scans_are_denoised_by_all_methods(tiny_run, monkeypatch):
    """Those that are not installed everywhere are stood in for."""
    for name in ("nl_means", "bm4d"):
        monkeypatch.setattr(volume_denoising, name, lambda M, sigma, kind="": 0.9 * M)
    monkeypatch.setattr(volume_real, "ours", lambda prior, M, sigma, way: M - sigma)
    voxels = head((40, 40, 16)) + np.random.default_rng(0).normal(0, 30, (40, 40, 16))
    write_nifti("v.nii", np.abs(voxels), np.eye(4))
    write_nifti("w.nii", np.abs(voxels), np.diag([1, 1, 4, 1.0]))
    arguments = ["--scans", "v.nii", "w.nii", "--model_config", "model.yaml"]
    arguments += ["--slices", "5", "--crop", "24", "--out", "r.csv", "--figure", "r.png"]
    assert volume_real.main(arguments) == 0
    rows = table("r.csv")
    assert [r["method"] for r in rows if r["scan"] == "v"] == [
        *("NL-means (dipy, blockwise)", "NL-means (dipy, classic)", "BM4D"),
        *("BM4D, bias removed", "BM4D of Gaussian noise"),
        *("ours, slices", "ours, volume", "ours, map of σ"),
    ]
    last = [r["method"] for r in rows if r["scan"] == "w"][-2:]
    assert last == ["ours, slices", "ours, map of σ"]
    mapped = [float(r["removed"]) for r in rows if r["method"] == "ours, map of σ"]
    assert mapped == pytest.approx([1, 1], rel=1e-4)  # in units of the map
    white = np.percentile(np.abs(voxels), 99.9)
    assert float(rows[0]["sigma_percent"]) == pytest.approx(100 * 30 / white, rel=0.2)
    assert os.path.getsize("r.png") < 300_000


def test_maps_of_noise_that_varies_are_compared_with_one_sigma(tiny_run, monkeypatch):
    monkeypatch.setattr(noise_maps, "ours", lambda prior, M, sigma, way: M)
    write_nifti("v.nii", head((80, 80, 18)), np.eye(4))
    arguments = ["--volume", "v.nii", "--model_config", "model.yaml", "--slices", "4"]
    arguments += ["--crop", "72", "--out", "n.csv"]
    assert noise_maps.main(arguments) == 0
    rows = {(r["noise"], r["noise_percent"], r["method"]): r for r in table("n.csv")}
    assert len(rows) == 12
    errors = {key: float(row["sigma_error"]) for key, row in rows.items()}
    for percent in ("2", "4"):
        one, estimated, known = (
            errors["varies", percent, f"ours, {way}"]
            for way in ("one σ", "map estimated", "map known")
        )
        assert known == 0 and estimated < 0.18 < 0.21 < one
    changed = os.stat("n.csv").st_mtime_ns
    assert noise_maps.main(arguments) == 0 and os.stat("n.csv").st_mtime_ns == changed


def test_estimates_are_compared_with_the_noise_that_was_drawn(tiny_run):
    os.makedirs("slices")
    for i in range(3):
        picture = np.pad(np.full((40, 40), 120 + 40 * i, np.uint8), 12)
        iio.imwrite(f"slices/{i}.png", picture)
    arguments = ["--slices", "slices", "--each", "2", "--model_config", "model.yaml"]
    assert noise_estimates.main([*arguments, "--out", "e.csv"]) == 0
    rows = table("e.csv")
    assert len(rows) == 2 * 2 * 3 * 3 and {r["images"] for r in rows} == {"2"}
    errors = {(r["air"], r["method"]): [] for r in rows}
    for row in rows:
        errors[row["air"], row["method"]].append(float(row["sigma_error"]))
    for air in noise_estimates.AIRS:
        assert errors[air, "ours, σ known"] == [0] * 6
        assert max(errors[air, "ours, without the prior"]) < 0.2
    x, y = noise_estimates.measured(np.ones((1, 9, 8), np.float32), 0.1, 2, "has noise", 0)
    assert x.shape == y.shape == (1, 4, 4) and 0.03 < np.std(y - x) < 0.2
    changed = os.stat("e.csv").st_mtime_ns
    assert noise_estimates.main([*arguments, "--out", "e.csv"]) == 0
    assert os.stat("e.csv").st_mtime_ns == changed


def test_other_noise_and_another_part_are_other_rows(tiny_run):
    write_nifti("v.nii", head((32, 32, 24)), np.eye(4))
    shared = ["--volume", "v.nii", "--model_config", "model.yaml", "--slices", "4", "--crop", "24"]
    truth = np.zeros((2, 4, 4), np.float32)
    assert not np.array_equal(*(volume_denoising.noisy(truth, 5, seed) for seed in (0, 1)))
    args = volume_denoising.parse_args([*shared, "--middle", "3", "--seed", "1"])
    assert (args.middle, args.seed) == (3, 1)
    assert volume_denoising.part_of(args, truth) == "v 2×4×4 about slice 3, seed 1"
