"""Denoising of volumes: the filter of blocks, noise maps, what is written beside the result."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.fft import dctn, idctn

from guided_diffusion.config import Measurement, NoiseConfig, OperatorConfig
from guided_diffusion.intervals import case_of, save_factors
from guided_diffusion.noise import get_noise
from guided_diffusion.prior import load_prior
from guided_diffusion.restoration import restore
from guided_diffusion.volume_denoising import block_wiener, group_wiener, refined
from guided_diffusion.volumes import AsVolume
from tests.conftest import LINEAR, task, write_yaml
from tests.volume_files import head, write_nifti
from util.errors import UserError
from util.metrics import half_width

OUT = "out/tiny/denoise/gaussian"
FAST = {**LINEAR, "start": "auto", "timestep_respacing": "logsnr10"}


def smooth(shape=(18, 20, 22)):
    """A volume of low frequencies, in [-1, 1]."""
    z, y, x = np.indices(shape) / 5.0
    return (0.6 * np.sin(z) * np.cos(y) * np.sin(x + 1)).astype(np.float32)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_one_block_is_the_wiener_filter_of_its_transform():
    clean = smooth((6, 7, 8))
    noisy = clean + 0.2 * normal(clean.shape)
    power = dctn(clean, norm="ortho") ** 2
    gain = power / (power + 0.2**2)
    gain[0, 0, 0] = 1
    expected = idctn(gain * dctn(noisy, norm="ortho"), norm="ortho")
    np.testing.assert_allclose(block_wiener(noisy, clean, 0.2, 12, 4), expected, atol=1e-5)


@pytest.mark.parametrize("block", [(8, 3), (8, 5), (12, 4)])
def test_overlapping_blocks_cover_every_voxel_and_take_the_noise_away(block):
    clean = smooth()
    noisy = clean + 0.2 * normal(clean.shape)
    found = block_wiener(noisy, clean, 0.2, *block)
    assert np.isfinite(found).all()
    assert np.mean((found - clean) ** 2) < 0.03 * 0.2**2
    exact = block_wiener(noisy, noisy, 1e-6, *block)  # nothing to take away
    np.testing.assert_allclose(exact, noisy, atol=1e-4)


def test_a_better_pilot_makes_rice_noise_gaussian_again():
    """Given the signal, what is left is standard normal, by its moments and its quantiles."""
    signal = torch.full((1, 8, 60, 60), 0.2 - 1)
    model = get_noise("rician", 0.1)
    torch.manual_seed(0)
    y = model(signal)
    z = ((model.to_gaussian(y, 0.1, signal=signal) - signal) / 0.1).numpy().ravel()
    assert stats.kstest(z, "norm").pvalue > 0.01
    assert stats.kstest(((y - signal) / 0.1).numpy().ravel(), "norm").pvalue < 1e-6


def test_groups_are_the_blocks_most_alike_wherever_they_lie(monkeypatch):
    """Against every block compared with every other, one by one."""
    from guided_diffusion import volume_denoising

    monkeypatch.setattr(volume_denoising, "SLAB", 5)
    pilot = normal((11, 9, 10))
    strides = np.array([90, 10, 1])
    groups = np.concatenate(list(volume_denoising._groups(pilot, (4, 4, 4), strides)))
    first = groups[:, 0]
    blocks = np.lib.stride_tricks.sliding_window_view(pilot, (4, 4, 4))
    corner = {tuple(c): c @ strides for c in np.ndindex(blocks.shape[:3]) for c in [np.array(c)]}
    for own, group in zip(first[::7], groups[::7], strict=True):
        [at] = [c for c, flat in corner.items() if flat == own]
        distance = {
            flat: np.mean((blocks[c] - blocks[at]) ** 2)
            for c, flat in corner.items()
            if max(abs(np.subtract(c, at))) <= 4
        }
        assert set(group) == set(sorted(distance, key=distance.get)[: len(group)])
        assert len(set(group)) == len(group) == volume_denoising.ALIKE
    assert len(groups) == 4 * 3 * 3  # every third block, and the last


def test_a_group_of_equal_blocks_averages_their_noise():
    """A volume that repeats every voxel: 20 noisy copies of each block are one block's mean."""
    noisy = 0.3 + 0.2 * normal((12, 12, 12))
    found = group_wiener(noisy, np.full_like(noisy, 0.3), 0.2)
    assert abs(found.mean() - 0.3) < 0.01
    assert found.std() < 0.2 / np.sqrt(20 * 64) * 3


def test_refining_is_better_than_its_pilot_and_knows_each_volume_s_noise():
    clean = torch.from_numpy(smooth())[None].repeat(2, 1, 1, 1)
    sigma = torch.tensor([0.05, 0.2]).reshape(2, 1, 1, 1)
    noisy = clean + sigma * torch.from_numpy(normal(clean.shape))
    pilot = clean + 0.3 * sigma * torch.from_numpy(normal(clean.shape, 1))
    told = []

    def look(x, level):
        told.append((tuple(x.shape), level))
        return x

    found = refined(pilot, noisy, sigma, get_noise("gaussian", 0.1), look)
    assert [shape for shape, _ in told] == [(1, 18, 20, 22)] * 4
    assert [level for _, level in told] == pytest.approx([0.015, 0.0075, 0.06, 0.03])
    error = (found - clean).square().mean(dim=(1, 2, 3)).sqrt() / sigma.flatten()
    assert (error < 0.25).all()  # the pilot: 0.3


@pytest.fixture
def tiny(tiny_run):
    write_yaml("fast.yaml", FAST)
    return load_prior("model.yaml", "cpu", "fp32")


def measured(sigma, noise="gaussian"):
    return Measurement(OperatorConfig("denoise", {}), NoiseConfig(noise, sigma), False)


@pytest.mark.parametrize("noise", ["gaussian", "rician"])
def test_a_constant_map_is_a_number_and_halves_are_restored_at_their_own_level(tiny, noise):
    y = np.clip(smooth((2, 32, 32)) + 0.1 * normal((2, 32, 32)), -1, 1)[None]
    how = {"method": "ddrm", "schedule": "diffusion.yaml", "names": ["v"]}
    way = {"volume": AsVolume(chunk=2, spacing=1.0)}

    def at(sigma):
        return restore(y, measured(sigma, noise), tiny, **how, **way)

    def mapped(values):
        return restore(y, measured("auto", noise), tiny, sigma=values, **how, **way)

    constant = mapped(torch.full((1, 2, 32, 32), 0.1))
    np.testing.assert_allclose(constant.mean, at(0.1).mean, atol=1e-6)
    assert constant.figures[0]["sigma"] == pytest.approx(0.1)
    halves = torch.full((1, 2, 32, 32), 0.1)
    halves[..., 16:] = 0.12
    found = mapped(halves)
    if noise == "gaussian":  # of Rice noise the signal about a pixel is taken from both halves
        np.testing.assert_allclose(found.mean[..., :16], at(0.1).mean[..., :16], atol=1e-6)
        np.testing.assert_allclose(found.mean[..., 16:], at(0.12).mean[..., 16:], atol=1e-6)
    expected = np.sqrt(np.mean(((y - found.mean) / halves.numpy()) ** 2))
    if noise == "gaussian":
        assert found.figures[0]["residual"] == pytest.approx(expected, rel=1e-4)


def test_filters_count_in_the_progress(tiny):
    """One step of three planes, then two filters and two looks, the second filter twice."""
    y = np.clip(smooth((18, 32, 32)) + 0.1 * normal((18, 32, 32)), -1, 1)[None]
    seen = []
    restore(
        *(y, measured(0.1), tiny, "spectral", "fast.yaml"),
        names=["v"],
        volume=AsVolume(chunk=6, in_turn=True),
        watch=lambda left, steps, x: seen.append((left, steps, tuple(x.shape))),
    )
    assert seen == [(left, 6, (1, 18, 32, 32)) for left in range(6, -1, -1)]


def denoising(sigma, mode="volume", noise="gaussian", **data):
    config = task({"name": "denoise"}, {"name": noise, "sigma": sigma}, "v.nii.gz")
    config["data"] |= {"measured": True, "volume_mode": mode, **data}
    write_yaml("task.yaml", config)


def values(path):
    return nib.load(path).get_fdata()


def test_residual_and_sigma_are_written_in_the_file_s_units_and_grid(tiny_run):
    voxels = head((32, 34, 3))
    write_nifti("v.nii.gz", voxels)
    denoising(0.1)
    assert tiny_run("--save_dir", "out") == 0
    folder = f"{OUT}/0.1"
    restored = values(f"{folder}/volumes/v.nii.gz")
    np.testing.assert_allclose(values(f"{folder}/residual/v.nii.gz"), voxels - restored, atol=1e-3)
    white = np.percentile(voxels, 99.9)
    np.testing.assert_allclose(values(f"{folder}/sigma/v.nii.gz"), 0.1 * white / 2, rtol=1e-5)
    source, written = nib.load("v.nii.gz"), nib.load(f"{folder}/residual/v.nii.gz")
    assert np.array_equal(source.affine, written.affine) and source.shape == written.shape


@pytest.mark.parametrize("mode", ["volume", "slices"])
def test_a_map_of_sigma_is_used_and_written(tiny_run, mode):
    voxels = head((32, 34, 3))
    write_nifti("v.nii.gz", voxels)
    sigma = np.full(voxels.shape, 40.0, np.float32)
    sigma[:16] = 60
    write_nifti("s.nii.gz", sigma)
    denoising("s.nii.gz", mode)
    assert tiny_run("--save_dir", "out") == 0
    np.testing.assert_allclose(values(f"{OUT}/map/sigma/v.nii.gz"), sigma, rtol=1e-5)
    denoising("auto", mode)
    assert tiny_run("--save_dir", "flag", "--sigma", "s.nii.gz") == 0
    both = [values(f"{f}/tiny/denoise/gaussian/map/volumes/v.nii.gz") for f in ("out", "flag")]
    assert np.array_equal(*both)


@pytest.mark.parametrize("mode", ["volume", "slices"])
def test_a_map_is_estimated_where_noise_varies(tiny_run, mode):
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 1})
    sigma = np.linspace(30, 90, 64)[:, None, None]  # along the file's first axis
    voxels = head((64, 50, 4)) + sigma * normal((64, 50, 4))
    write_nifti("v.nii.gz", voxels.astype(np.float32))
    denoising("local", mode)
    assert tiny_run("--save_dir", "out") == 0
    found = values(f"{OUT}/local/sigma/v.nii.gz")
    assert found.shape == voxels.shape
    inside = np.broadcast_to(sigma, voxels.shape)[12:52, 12:52]
    np.testing.assert_allclose(found[12:52, 12:52], inside, rtol=0.25)
    assert found[48:52].mean() > 1.35 * found[12:16].mean()
    restored, residual = (values(f"{OUT}/local/{k}/v.nii.gz") for k in ("volumes", "residual"))
    np.testing.assert_allclose(restored + residual, voxels, atol=0.1)


@pytest.mark.parametrize(("strongest", "told"), [(90, True), (30, False)])
def test_a_user_is_told_where_one_sigma_stands_for_noise_that_varies(
    tiny_run, capsys, strongest, told
):
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 1})
    sigma = np.linspace(30, strongest, 96)[:, None, None]
    voxels = head((96, 64, 4)) + sigma * normal((96, 64, 4))
    write_nifti("v.nii.gz", voxels.astype(np.float32))
    denoising("auto")
    assert tiny_run("--save_dir", "out") == 0
    assert ("--sigma local takes a map" in capsys.readouterr().err) == told


def test_a_map_of_a_picture_is_estimated(tiny_run):
    noise = normal((64, 64)) * np.linspace(0.05, 0.15, 64)
    np.save("p.npy", (0.5 * np.cos(np.arange(64) / 9) + noise).astype(np.float32))
    config = task({"name": "denoise"}, {"name": "gaussian", "sigma": 0.1}, "p.npy")
    write_yaml("task.yaml", config)
    assert tiny_run("--measured", "--sigma", "local", "--save_dir", "out") == 0
    with open(f"{OUT}/local/metrics.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["sigma"]) == pytest.approx(np.sqrt(np.mean(noise**2)), rel=0.2)


@pytest.mark.parametrize("named", ["sigma", "mask"])
def test_another_file_under_the_name_of_a_map_or_mask_is_another_run(tiny_run, capsys, named):
    voxels = head((32, 34, 3))
    write_nifti("v.nii.gz", voxels)
    write_nifti("s.nii.gz", np.full(voxels.shape, 40.0, np.float32))
    write_nifti("m.nii.gz", np.ones(voxels.shape, np.float32))  # everything is a mask, too
    denoising("s.nii.gz", "slices", mask="m.nii.gz")
    assert tiny_run("--save_dir", "out") == 0
    capsys.readouterr()
    changed = np.full(voxels.shape, 60.0, np.float32)
    changed[:16] = 30 if named == "sigma" else 0
    write_nifti(f"{named[0]}.nii.gz", changed)
    assert tiny_run("--save_dir", "out") == 2
    assert "another files_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:, :30], "s.nii.gz has 3 slices of"),
        (lambda s: -s, "s.nii.gz: expected standard deviations"),
        (lambda s: np.where(s > 50, np.nan, s), "s.nii.gz: expected standard deviations"),
        (lambda s: None, "a number, auto, local, or the file of a map, found 's.nii.gz'"),
    ],
)
def test_maps_that_fit_nothing_are_refused(tiny_run, capsys, change, message):
    voxels = head((32, 34, 3))
    write_nifti("v.nii.gz", voxels)
    sigma = np.full(voxels.shape, 40.0, np.float32)
    sigma[:16] = 60
    changed = change(sigma)
    if changed is not None:
        write_nifti("s.nii.gz", changed.astype(np.float32))
    denoising("s.nii.gz")
    assert tiny_run("--save_dir", "out") == 2
    assert message in capsys.readouterr().err


def test_a_map_is_for_measured_images_that_are_denoised(tiny_run, capsys):
    write_yaml("task.yaml", task(noise={"name": "gaussian", "sigma": "s.nii.gz"}))
    assert tiny_run("--save_dir", "out") == 2
    expected = "a map, given or local, is for measured images, operator denoise"
    assert expected in capsys.readouterr().err
    assert tiny_run("--save_dir", "out", "--sigma", "local") == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("factor", [None, 1.5])
def test_bounds_are_as_far_from_the_mean_as_the_samples_and_the_factor_say(
    tiny_run, capsys, factor
):
    write_nifti("v.nii.gz", head((32, 34, 3)))
    denoising(0.1)
    if factor:
        prior = load_prior("model.yaml", "cpu", "fp32")
        save_factors(prior, {"dmps": {"denoise": factor}}, "a test", "tiny.intervals.json")
    assert tiny_run("--save_dir", "out", "--num_samples", "3") == 0
    assert ("it was not measured how often" in capsys.readouterr().err) == (factor is None)
    found = {k: values(f"{OUT}/0.1/{k}/v.nii.gz") for k in ("volumes", "std", "lower", "upper")}
    # Three samples: Student's t of two degrees of freedom at 95 %, 2.920 in every table.
    half = (factor or 1) * 2.920 * np.sqrt(4 / 3) * found["std"]
    np.testing.assert_allclose(found["upper"], found["volumes"] + half, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(
        found["lower"], np.maximum(found["volumes"] - half, 0), rtol=1e-3, atol=1e-2
    )
    samples = np.stack([values(f"{OUT}/0.1/samples/{k}/v.nii.gz") for k in range(3)])
    np.testing.assert_allclose(samples.std(axis=0, ddof=1), found["std"], rtol=1e-3, atol=1e-2)


def test_a_factor_is_that_of_these_weights(tiny_run):
    prior = load_prior("model.yaml", "cpu", "fp32")
    from guided_diffusion.intervals import load_factor

    save_factors(prior, {"dmps": {"denoise": 1.5}}, "a test", "tiny.intervals.json")
    assert load_factor(prior, "dmps", "denoise") == 1.5
    assert load_factor(prior, "dmps", "deblur") is None
    assert load_factor(prior, "dmps", "denoise", in_turn=True) is None
    turned = {"dmps": {case_of("denoise", True): 2.0}}
    save_factors(prior, turned, "a test", "tiny.intervals.json")
    assert load_factor(prior, "dmps", "denoise", in_turn=True) == 2
    assert load_factor(prior, "dmps", "denoise") == 1.5  # as it was
    save_factors(prior, {"dmps": {"denoise": 1.7}}, "another", "tiny.intervals.json")
    assert load_factor(prior, "dmps", "denoise") == 1.7
    with open("tiny.intervals.json", encoding="utf-8") as file:
        other = json.load(file) | {"checkpoint_sha256": "0"}
    with open("tiny.intervals.json", "w", encoding="utf-8") as file:
        json.dump(other, file)
    assert load_factor(prior, "dmps", "denoise") is None
    save_factors(prior, {"dmps": {"deblur": 2.0}}, "a test", "tiny.intervals.json")
    assert load_factor(prior, "dmps", "denoise") is None  # of other weights
    with open("tiny.intervals.json", "w", encoding="utf-8") as file:
        file.write("[]")
    with pytest.raises(UserError, match="expected factors"):
        load_factor(prior, "dmps", "denoise")


def test_an_interval_holds_a_further_draw_as_often_as_it_says():
    draws = np.random.default_rng(0).standard_normal((5, 100_000))
    *samples, truth = draws
    mean, std = np.mean(samples, axis=0), np.std(samples, axis=0, ddof=1)
    held = np.abs(truth - mean) <= half_width(4) * std
    assert held.mean() == pytest.approx(0.9, abs=0.005)


def test_a_mask_limits_white_and_the_noise_s_estimate_to_the_head(tiny_run):
    """Outside of it lie a bright spot, which would be white, and far more noise."""
    random = np.random.default_rng(0)
    voxels = np.full((40, 40, 3), 500.0) + 20 * random.standard_normal((40, 40, 3))
    voxels[:20] += 150 * random.standard_normal((20, 40, 3))
    voxels[:4, :4] = 5000
    write_nifti("v.nii.gz", voxels.clip(0).astype(np.float32))
    mask = np.zeros((40, 40, 3), np.uint8)
    mask[22:] = 1
    write_nifti("mask.nii.gz", mask)
    denoising("auto", mask="mask.nii.gz")
    assert tiny_run("--save_dir", "out") == 0
    sigma = values(f"{OUT}/auto/sigma/v.nii.gz")
    assert sigma.std() < 1e-4 and sigma.mean() == pytest.approx(20, rel=0.1)
    restored = values(f"{OUT}/auto/volumes/v.nii.gz")
    white = np.percentile(voxels[22:], 99.9)
    kept = np.clip(voxels - white, 0, None)  # what the file has beyond
    assert (restored - kept).max() == pytest.approx(white, rel=0.02)
