"""The program from Python: load_prior and restore."""

import os
import re

import numpy as np
import pytest
import torch

from guided_diffusion import Measurement, NoiseConfig, OperatorConfig, Schedule, load_prior, restore
from guided_diffusion.measurements import get_operator
from guided_diffusion.noise_estimation import estimate_sigma
from guided_diffusion.unet import UNetModel
from tests.conftest import REPOSITORY, TINY, rnd, write_yaml
from util.errors import UserError

DENOISE = Measurement(OperatorConfig("denoise"), NoiseConfig("gaussian", 0.1))
DOUBLED = Measurement(
    OperatorConfig("super_resolution", {"scale_factor": 2}), NoiseConfig("gaussian", 0.1)
)
SHORT = Schedule(steps=1000, timestep_respacing=4, model_var_type="fixed_small")


@pytest.fixture
def prior(tiny_run):
    return load_prior("model.yaml", "cpu", "fp32")


def images(count=2, seed=0):
    rows, cols = np.mgrid[:32, :32]
    waves = [0.5 * np.sin(rows / (4 + i)) * np.cos(cols / 7) for i in range(count)]
    return np.stack(waves) + 0.1 * np.random.default_rng(seed).standard_normal((count, 32, 32))


def test_arrays_and_tensors_of_every_rank_are_the_same_images(prior):
    y = images()
    found = restore(y, DENOISE, prior, "dmps", SHORT)
    assert found.samples.shape == (2, 1, 1, 32, 32) and found.mean.shape == (2, 1, 32, 32)
    assert found.std is None and found.finite.all()
    assert set(found.figures[0]) == {"residual"}
    tensor = restore(torch.from_numpy(y)[:, None], DENOISE, prior, "dmps", SHORT)
    assert np.array_equal(tensor.mean, found.mean)
    one = restore(y[0], DENOISE, prior, "dmps", SHORT)
    assert np.abs(one.mean[0] - found.mean[0]).max() < 1e-4


def test_what_is_no_data_does_not_count_in_the_residual(prior):
    y = images()
    padding = np.zeros((32, 32), bool)
    padding[:, 20:] = True
    found = restore(y, DENOISE, prior, "dmps", SHORT, padding=[padding, None])
    error = (y[:, None] - found.mean) / 0.1
    expected = [np.sqrt(np.mean(error[0, 0, :, :20] ** 2)), np.sqrt(np.mean(error[1] ** 2))]
    assert [f["residual"] for f in found.figures] == pytest.approx(expected, rel=1e-4)


def test_samples_belong_to_names_and_seed(prior):
    y = images()
    both = restore(y, DENOISE, prior, "dmps", SHORT, names=["a", "b"], num_samples=2)
    alone = restore(y[1], DENOISE, prior, "dmps", SHORT, names=["b"], num_samples=2)
    assert np.abs(both.samples[1] - alone.samples[0]).max() < 1e-4
    other = restore(y[1], DENOISE, prior, "dmps", SHORT, names=["b"], num_samples=2, seed=1)
    assert np.abs(other.samples - alone.samples).max() > 1e-2
    assert np.allclose(both.std, both.samples.std(axis=1, ddof=1))


def test_what_is_simulated_is_measured_and_what_is_measured_is_taken(prior):
    x = images()
    operator = OperatorConfig("super_resolution", {"scale_factor": 2})
    made = Measurement(operator, NoiseConfig("clean"), simulated=True)
    found = restore(x, made, prior, "dmps", SHORT)
    y = get_operator("super_resolution", (1, 32, 32), scale_factor=2).forward(
        torch.from_numpy(x[:, None]).float()
    )
    assert np.abs(found.measurements[0] - y[0].numpy()).max() < 1e-6
    again = restore(y, Measurement(operator, NoiseConfig("clean")), prior, "dmps", SHORT)
    assert again.mean.shape == (2, 1, 32, 32)
    assert np.abs(again.mean - found.mean).max() < 1e-4


def test_estimated_noise_starts_each_image_where_it_suits(prior):
    y = np.concatenate([images(1, 1), images(1, 2) + 0.3 * rnd((1, 32, 32), 3).numpy()])
    auto = Measurement(OperatorConfig("denoise"), NoiseConfig("gaussian", "auto"))
    found = restore(y, auto, prior, names=["a", "b"])
    assert found.figures[0]["sigma"] < found.figures[1]["sigma"]
    alone = restore(y[1], auto, prior, names=["b"])
    assert np.array_equal(alone.mean[0], found.mean[1])


def test_the_prior_alone_draws_samples(prior):
    found = restore(np.zeros((3, 32, 32)), None, prior, schedule=SHORT)
    assert found.mean.shape == (3, 1, 32, 32) and found.measurements == [None] * 3
    assert np.abs(found.mean[0] - found.mean[1]).max() > 0.1


def test_watch_sees_every_state(prior):
    seen = []
    restore(images(), DENOISE, prior, "dmps", SHORT, watch=lambda *a: seen.append(a))
    assert [(left, steps) for left, steps, _ in seen] == [(4, 4), (3, 4), (2, 4), (1, 4), (0, 4)]
    assert all(x.shape == (2, 1, 32, 32) for *_, x in seen)


def test_an_image_without_finite_numbers_is_nan_throughout(prior, monkeypatch):
    forward = UNetModel.forward

    def broken(self, x, timesteps, y=None):
        output = forward(self, x, timesteps, y).clone()
        output[1, 0, 0, 0] = -torch.inf  # which clipping would make a grey value
        return output

    monkeypatch.setattr(UNetModel, "forward", broken)
    found = restore(images(3), DENOISE, prior, "dmps", SHORT)
    assert found.finite.tolist() == [True, False, True]
    assert np.isnan(found.samples[1]).all() and np.isfinite(found.samples[[0, 2]]).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": np.zeros((32, 32), np.uint8)}, "images: expected floats"),
        ({"images": np.zeros(32)}, "found shape"),
        ({"images": np.zeros((8, 8))}, "the least side is 16"),
        ({"method": "magic"}, "conditioning.method: expected one of"),
        ({"params": {"scal": 1}}, "unknown key 'scal'"),
        ({"schedule": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"names": ["a"]}, "names: expected one for each of 2 images, found 1"),
        ({"places": [None] * 3}, "places: expected one for each of 2 images, found 3"),
        ({"padding": []}, "padding: expected one for each of 2 images, found 0"),
        ({"sigma": torch.ones(3)}, r"sigma: expected 2 noise levels, found shape \(3,\)"),
        ({"sigma": torch.ones(3, 1, 32, 32)}, r"a map of shape \(2, 1, 32, 32\), found shape \(3"),
        ({"sigma": torch.tensor([0.1, -0.1])}, "sigma: expected finite numbers >= 0"),
        ({"sigma": torch.full((2, 1, 32, 32), torch.nan)}, "sigma: expected finite numbers >= 0"),
        ({"num_samples": 0}, "num_samples: expected an integer of at least 1, found 0"),
        ({"measurement": None, "method": None, "num_samples": -1}, "num_samples: .* found -1"),
        ({"num_samples": 1.5}, "num_samples: expected an integer of at least 1, found 1.5"),
        ({"padding": [np.eye(8, dtype=bool), None]}, r"padding: .* \(32, 32\), found \(8, 8\)"),
        ({"measurement": DOUBLED, "sigma": torch.ones(2, 1, 32, 32)}, "sigma: a map is for"),
    ],
)
def test_mistakes_are_user_errors(prior, change, says):
    arguments = {"images": images(), "measurement": DENOISE, "prior": prior, "method": "dmps"}
    with pytest.raises(UserError, match=says):
        restore(**{**arguments, "schedule": SHORT, **change})


def test_noise_of_intensities_is_none_of_kspace(prior):
    def of(noise):
        measurement = Measurement(OperatorConfig("mri"), NoiseConfig(noise, 0.1), True)
        return restore(images(), measurement, prior, "dmps", SHORT)

    for noise in ("rician", "poisson"):
        with pytest.raises(UserError, match=f"noise.name: k-space, .* mri .*, found {noise}$"):
            of(noise)
    assert of("gaussian").finite.all() and of("clean").finite.all()


def test_channels_that_a_colour_prior_cannot_take_are_a_user_error(tiny_run):
    torch.manual_seed(0)
    write_yaml("colour.yaml", {**TINY, "in_channels": 3, "model_path": ""})
    prior = load_prior("colour.yaml", "cpu", "fp32")
    for simulated in (True, False):
        measurement = Measurement(
            OperatorConfig("denoise"), NoiseConfig("gaussian", 0.1), simulated
        )
        for channels in (2, 4):
            with pytest.raises(UserError, match=f"{channels} channels, .* images of 1 or 3$"):
                restore(np.zeros((1, channels, 32, 32)), measurement, prior, "dmps", SHORT)
    grey = restore(images(1), DENOISE, prior, "dmps", SHORT)
    assert grey.mean.shape == (1, 3, 32, 32)
    sloped = torch.linspace(0.1, 0.2, 32).expand(1, 1, 32, 32)
    auto = Measurement(OperatorConfig("denoise"), NoiseConfig("gaussian", "auto"))
    found = restore(images(1), auto, prior, "dmps", SHORT, sigma=sloped)
    assert found.figures[0]["sigma"] == pytest.approx(sloped.square().mean().sqrt().item())


def test_the_lines_in_the_manual_run(tmp_path, monkeypatch):
    with open(os.path.join(REPOSITORY, "README.md"), encoding="utf-8") as file:
        part = file.read().split("## From Python\n")[1]
    lines = re.search(r"```python\n(.*?)```", part, re.DOTALL).group(1)
    assert len(lines.splitlines()) <= 12
    monkeypatch.chdir(REPOSITORY)
    found: dict = {}
    exec(lines, found)  # noqa: S102 - our own manual
    assert found["restored"].mean.shape == (1, 1, 256, 256)
    error = np.abs(found["restored"].mean[0, 0] - found["x"]).mean()
    assert error < 0.5 * np.abs(found["y"] - found["x"]).mean()


def halves_of_noise(strength, seed):
    """A wave of which the right half is no data, which looks far noisier; and where that is."""
    y = images(1, seed) + strength * rnd((1, 32, 32), seed).numpy()
    padding = np.zeros((32, 32), bool)
    padding[:, 16:] = True
    y[:, padding] += np.random.default_rng(seed).standard_normal(padding.sum())
    return y, padding


@pytest.mark.parametrize("count", [1, 2])
def test_padding_counts_neither_in_an_estimate_of_the_noise_nor_in_a_residual(prior, count):
    """Also of images that start where their own noise suits, one after the other."""
    parts = [halves_of_noise(strength, 5) for strength in (0.1, 0.3)[:count]]
    y, padding = np.concatenate([y for y, _ in parts]), [p for _, p in parts]
    auto = Measurement(OperatorConfig("denoise"), NoiseConfig("gaussian", "auto"))
    found = restore(y, auto, prior, padding=padding)
    for image, figures, mean in zip(y, found.figures, found.mean[:, 0], strict=True):
        sigma = estimate_sigma(image[None], padding=padding[0])
        assert estimate_sigma(image[None]) > 1.3 * sigma
        assert figures["sigma"] == pytest.approx(sigma, rel=1e-5)
        error = (image - mean)[:, :16] / sigma
        assert figures["residual"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-4)


def test_watch_sees_one_progress_of_images_that_start_where_they_suit(prior):
    """Quiet and noisy images take different numbers of steps."""
    y = np.concatenate([images(1, 1), images(1, 1) + rnd((1, 32, 32), 3).numpy()])
    auto = Measurement(OperatorConfig("denoise"), NoiseConfig("gaussian", "auto"))
    schedule = Schedule(steps=1000, timestep_respacing="logsnr20", start="auto")

    def seen(*chosen):
        steps = []
        how = prior, "spectral_sample", schedule
        restore(y[list(chosen)], auto, *how, watch=lambda *a: steps.append(a[:2]))
        return steps

    counts = [seen(i)[0][1] for i in (0, 1)]
    assert counts[0] != counts[1]
    total = sum(counts)
    assert seen(0, 1) == [(left, total) for left in range(total, -1, -1)]
