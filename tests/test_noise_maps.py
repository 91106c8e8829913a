"""Restoring with maps of σ: levels and weights, images and slices whose maps differ."""

import csv
import tracemalloc
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig
from guided_diffusion.noise_maps import by_levels, levels_of
from guided_diffusion.prior import load_prior
from guided_diffusion.restoration import restore
from tests.conftest import LINEAR, rnd, task, write_yaml
from tests.volume_files import head, write_nifti

OUT = "out/tiny/denoise/gaussian/map"
DENOISE = Measurement(OperatorConfig("denoise"), NoiseConfig("gaussian", "auto"))


def weights_of(sigma, levels):
    """How much each level counts at each voxel, by what is made of parts that are 0 but for one."""
    one = np.eye(len(levels), dtype=np.float32)
    blank = np.zeros(sigma.shape, np.float32)
    found = []
    for row in one:
        parts = (SimpleNamespace(samples=blank[:, None] + v, mean=blank + v) for v in row)
        samples, mean = by_levels(sigma, levels, parts)
        assert np.array_equal(samples[:, 0], mean) and mean.dtype == np.float32
        found.append(torch.from_numpy(mean))
    return torch.stack(found)


def test_levels_span_a_map_and_weights_interpolate_in_its_logarithm():
    sigma = torch.linspace(0.05, 0.2, 1000).reshape(1, 10, 10, 10)
    levels = levels_of(sigma)
    assert levels[0] == pytest.approx(0.0515, abs=1e-3)
    assert levels[-1] == pytest.approx(0.1985, abs=1e-3)
    ratios = np.diff(np.log(levels))
    assert ratios.max() <= np.log(1.3) + 1e-9 and np.ptp(ratios) < 1e-9
    weights = weights_of(sigma, levels)
    assert ((weights > 0).sum(0) <= 2).all()
    torch.testing.assert_close(weights.sum(0), torch.ones_like(sigma))
    inside = (sigma > levels[0]) & (sigma < levels[-1])
    logs = torch.tensor(levels).log().reshape(-1, 1, 1, 1, 1)
    met = (weights * logs).sum(0)
    torch.testing.assert_close(met[inside], sigma.log()[inside], atol=1e-5, rtol=0)
    assert levels_of(torch.full((1, 2, 2, 2), 0.1)) == pytest.approx([0.1])
    (one,) = levels_of(torch.linspace(0.1, 0.108, 1000))
    assert one == pytest.approx(0.104, rel=0.005)
    assert len(levels_of(torch.linspace(0.1, 0.115, 1000))) == 2
    assert weights_of(torch.zeros(1, 1, 1, 1), [0.1, 0.12]).flatten().tolist() == [1, 0]
    assert weights_of(torch.rand(1, 1, 2, 2), [0.1]).flatten().tolist() == [1] * 4


@pytest.mark.parametrize("wide", [3, 10, 30, 100, 1e6])
def test_levels_of_a_wide_map_are_no_further_apart(wide):
    sigma = torch.logspace(0, -np.log10(wide), 4000).reshape(1, 1, 40, 100)
    levels = np.array(levels_of(sigma))
    assert (levels[1:] / levels[:-1]).max() <= 1.3 + 1e-6
    known = sigma.clamp(min=0.001).log().flatten()
    apart = (known[:, None] - torch.tensor(levels).log()).abs().min(dim=1).values
    assert (apart <= np.log(1.3) / 2 + 1e-6).float().mean() > 0.98
    assert len(levels) < 30


def test_a_map_of_hardly_any_noise_has_one_level():
    assert levels_of(torch.logspace(-9, -4, 1000)) == pytest.approx([1e-4], rel=0.2)


def test_a_map_of_many_levels_does_not_fill_the_memory():
    """Nine images' worth beside the map, a part's two among them, however many levels there are."""
    sigma = torch.linspace(0.01, 1, 40 * 50 * 50).reshape(1, 40, 50, 50)
    levels = levels_of(sigma)
    assert len(levels) == 16  # in 1.3**15 = 51 the range of all but the tails, 0.02 to 0.99

    def part():
        blank = np.zeros(sigma.shape, np.float32)
        return SimpleNamespace(samples=blank[:, None], mean=blank.copy())

    image = 4 * sigma.numel()
    tracemalloc.start()
    by_levels(sigma, levels, (part() for _ in levels))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 9.5 * image
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as of_torch:
        by_levels(sigma, levels, (part() for _ in levels))
    assert all(event.self_cpu_memory_usage <= image for event in of_torch.events())


@pytest.fixture
def prior(tiny_run):
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 3})
    return load_prior("model.yaml", "cpu", "fp32")


def slopes(count):
    """Noisy images (N, 1, 32, 32), and maps of which each is twice as strong as the last."""
    sigma = torch.linspace(0.03, 0.06, 32).expand(count, 1, 32, 32)
    sigma = sigma * 2.0 ** torch.arange(count).reshape(-1, 1, 1, 1)
    return 0.3 + sigma * rnd(sigma.shape, 0), sigma


def test_each_image_of_a_batch_is_restored_by_its_own_map(prior):
    y, sigma = slopes(3)
    how = {"method": "ddrm", "schedule": "diffusion.yaml", "num_samples": 2}
    seen = []
    padding = [None, np.eye(32, dtype=bool), None]
    found = restore(y, DENOISE, prior, sigma=sigma, names=["a", "b", "c"], padding=padding,
                    watch=lambda *a: seen.append(a[:2]), **how)  # fmt: skip
    alone = [
        restore(y[i], DENOISE, prior, sigma=sigma[i : i + 1], names=[name],
                padding=padding[i : i + 1], **how)
        for i, name in enumerate("abc")
    ]  # fmt: skip
    assert np.array_equal(found.samples, np.concatenate([one.samples for one in alone]))
    assert np.array_equal(found.mean, np.concatenate([one.mean for one in alone]))
    assert found.figures == [one.figures[0] for one in alone]
    assert np.array_equal(found.residuals[1], alone[1].residuals[0])
    total = seen[0][1]
    assert seen == [(left, total) for left in range(total, -1, -1)]


def test_an_image_of_whose_noise_nothing_is_known_stays_as_it_was_measured(prior):
    y, sigma = slopes(3)
    y[1, 0, 0, 0] = 1.5
    sigma[1] = 0
    seen = []
    how = {"method": "ddrm", "schedule": "diffusion.yaml", "num_samples": 2}
    found = restore(y, DENOISE, prior, sigma=sigma, watch=lambda *a: seen.append(a[:2]), **how)
    assert np.array_equal(found.mean[1], y[1].clamp(-1, 1))
    assert np.array_equal(found.samples[1], y[[1, 1]].clamp(-1, 1))
    assert found.figures[1] == {} and found.residuals[1] is None
    assert all(np.isfinite(list(f.values())).all() and f for f in found.figures[::2])
    total = seen[0][1]
    assert seen == [(left, total) for left in range(total, -1, -1)]


def test_where_only_padding_has_a_known_sigma_there_are_no_figures(prior):
    y, sigma = slopes(1)
    sigma[..., :20] = 0
    padding = (sigma[0, 0] > 0).numpy()
    how = {"method": "ddrm", "schedule": "diffusion.yaml", "padding": [padding]}
    found = restore(y, DENOISE, prior, sigma=sigma, **how)
    assert found.figures == [{}] and found.finite.all()


def denoising(sigma, **data):
    write_nifti("v.nii.gz", head((32, 34, 3)))
    write_nifti("s.nii.gz", sigma.astype(np.float32))
    config = task({"name": "denoise"}, {"name": "gaussian", "sigma": "s.nii.gz"}, "v.nii.gz")
    config["data"] |= {"measured": True, "volume_mode": "slices", **data}
    write_yaml("task.yaml", config)


def values(path):
    return nib.load(path).get_fdata()


def test_slices_with_maps_do_not_depend_on_the_batch_size(tiny_run):
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 3})
    sigma = np.linspace(20, 60, 32)[:, None, None] * np.array([1, 2, 4]) * np.ones((32, 34, 3))
    denoising(sigma)
    assert tiny_run("--save_dir", "out") == 0
    one = values(f"{OUT}/volumes/v.nii.gz")
    assert tiny_run("--save_dir", "four", "--batch_size", "4", "--record") == 0
    assert np.array_equal(one, values(f"four{OUT[3:]}/volumes/v.nii.gz"))


@pytest.mark.parametrize("record", [(), ("--record",)])
def test_a_slice_outside_the_head_does_not_end_a_run(tiny_run, capsys, record):
    sigma = np.full((32, 34, 3), 40.0)
    sigma[..., 0] = 0
    denoising(sigma)
    assert tiny_run("--save_dir", "out", *record) == 0
    restored = values(f"{OUT}/volumes/v.nii.gz")
    assert np.abs(restored - head((32, 34, 3)))[..., 0].max() < 0.5  # rounding
    assert np.abs(restored - head((32, 34, 3)))[..., 1:].max() > 10
    with open(f"{OUT}/metrics.csv", encoding="utf-8", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert rows["v_z000"]["residual"] == rows["v_z000"]["sigma"] == ""
    assert float(rows["v_z001"]["sigma"]) > 0
    capsys.readouterr()
    assert tiny_run("--save_dir", "out", *record) == 0
    assert "3 of 3 images had been restored" in capsys.readouterr().out
