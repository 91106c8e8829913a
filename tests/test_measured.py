"""Runs whose images are the measurements."""

import csv
import json
import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml

from guided_diffusion import batches
from guided_diffusion.condition_methods import get_conditioning_method
from guided_diffusion.measurements import get_operator
from tests.conftest import task, write_yaml
from util.random import ImageRandom, image_generator

SR = "tiny/super_resolution/x4"
OPERATORS = {
    "super_resolution/x4": {"name": "super_resolution", "scale_factor": 4},
    "deblur/uniform": {"name": "deblur", "type": "uniform", "kernel_size": 9},
}


def table(folder):
    with open(f"{folder}/metrics.csv", encoding="utf-8") as file:
        return {row.pop("image"): row for row in csv.DictReader(file)}


def picture(height, width):
    rows, cols = np.mgrid[:height, :width]
    return (0.7 * np.sin(rows / 5) * np.cos(cols / 7)).astype(np.float32)[None]


def measure(name, operator, sigma, seed=0):
    """y of images/NAME.png as a simulated run draws it, (1, h, w)."""
    pixels = iio.imread(f"images/{name}.png").astype(np.float32)
    x = torch.from_numpy(2 * (pixels / 255) - 1)[None, None]
    y = get_operator(in_shape=x.shape, **operator).forward(x)
    random = ImageRandom([image_generator(name, "measurement", seed)])
    return (y + sigma * random.randn_like(y))[0].numpy()


@pytest.mark.parametrize("variant", OPERATORS)
def test_a_measurement_read_from_a_file_is_restored_as_the_one_simulated(tiny_run, variant):
    operator = OPERATORS[variant]
    write_yaml("task.yaml", task(operator))
    assert tiny_run("--save_dir", "simulated") == 0
    os.mkdir("measured")
    for name in ("a1", "a10"):
        iio.imwrite(f"measured/{name}.tif", measure(name, operator, 0.05)[0])
    write_yaml("task.yaml", task(operator, root="measured"))
    assert tiny_run("--save_dir", "out", "--measured", "--batch_size", "2") == 0

    simulated, out = (f"{root}/tiny/{variant}/0.05" for root in ("simulated", "out"))
    assert not os.path.exists(f"{out}/truth")
    assert os.path.exists(f"{out}/comparison.png")
    rows, expected = table(out), table(simulated)
    assert list(rows["a1"]) == ["residual", "seconds", "digest"]
    for name in ("a1", "a10"):
        for kind in ("input", "recon"):
            pair = [iio.imread(f"{f}/{kind}/{name}.png").astype(int) for f in (simulated, out)]
            assert np.abs(pair[0] - pair[1]).max() <= 1, kind
        assert float(rows[name]["residual"]) == pytest.approx(
            float(expected[name]["residual"]), rel=1e-3
        )


def test_a_measured_picture_keeps_what_is_above_white(tiny_run):
    """Hot pixels that set no scale are in the result as they are in the file, σ being next to 0."""
    os.mkdir("measured")
    values = 500 + 400 * picture(64, 64)[0]
    values[10, 12:14], values[40, 40] = 5000, 3000
    iio.imwrite("measured/a.tif", values)
    noise = {"name": "gaussian", "sigma": 1e-4}
    config = task({"name": "denoise"}, noise, "measured", {"method": "spectral"})
    write_yaml("task.yaml", config)
    assert tiny_run("--save_dir", "out", "--measured") == 0
    found = iio.imread("out/tiny/denoise/gaussian/0.0001/recon/a.tif")
    white = np.percentile(values, 99.9)
    hot = values > white
    assert hot.sum() < 6 and values.max() > 4 * white
    np.testing.assert_allclose(found[hot], values[hot], atol=0.05 * white)
    assert found[~hot].max() <= white


def test_the_residual_is_that_of_the_files(tiny_run):
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    operator = get_operator("super_resolution", (1, 32, 32))
    recon = iio.imread(f"out/{SR}/0.05/recon/a1.png").astype(np.float32) / 127.5 - 1
    y = measure("a1", OPERATORS["super_resolution/x4"], 0.05)
    error = y - operator.forward(torch.from_numpy(recon)[None, None])[0].numpy()
    expected = np.linalg.norm(error) / (0.05 * np.sqrt(error.size))
    with open(f"out/{SR}/0.05/summary.json", encoding="utf-8") as file:
        means = json.load(file)["means"]
    assert means["residual"] == pytest.approx(expected, rel=0.02)


def test_each_image_has_the_noise_that_is_estimated_of_it(tiny_run, capsys):
    os.mkdir("measured")
    rng = np.random.default_rng(0)
    sigmas = {"low": 0.05, "high": 0.3}
    for name, sigma in sigmas.items():
        y = picture(64, 64) + sigma * rng.standard_normal((1, 64, 64))
        iio.imwrite(f"measured/{name}.tif", y[0].astype(np.float32))
    both = [0.1 * rng.standard_normal((64, 64)) + picture(64, 64)[0] for _ in range(3)]
    iio.imwrite("measured/rgb.png", np.uint8(127.5 * (np.clip(np.stack(both, 2), -1, 1) + 1)))
    iio.imwrite("measured/flat.png", np.full((64, 64), 90, np.uint8))
    operator, noise = {"name": "denoise"}, {"name": "gaussian", "sigma": "auto"}
    write_yaml("task.yaml", task(operator, noise, "measured"))
    assert tiny_run("--save_dir", "out", "--measured") == 2
    printed = capsys.readouterr()
    assert "flat.png: measurement.noise.sigma: an estimate needs" in printed.err
    folder = "out/tiny/denoise/gaussian/auto"
    rows = table(folder)
    assert set(rows) == {"low", "high", "rgb"}
    for name, sigma in {**sigmas, "rgb": 0.1}.items():
        assert float(rows[name]["sigma"]) == pytest.approx(sigma, rel=0.1)
        assert f"{name}: residual" in printed.out
    tiny_run("--save_dir", "batched", "--measured", "--batch_size", "2", "--num_samples", "2")
    for name in rows:
        single = iio.imread(f"{folder}/recon/{name}.png").astype(int)
        sample = f"batched/tiny/denoise/gaussian/auto/samples/{name}_0.png"
        assert np.abs(single - iio.imread(sample)).max() <= 1


def test_a_measured_run_goes_on_where_it_stopped(tiny_run, capsys):
    write_yaml("task.yaml", task({"name": "denoise"}))
    arguments, folder = ("--save_dir", "out", "--measured"), "out/tiny/denoise/gaussian/0.05"
    assert tiny_run(*arguments, "--limit", "2") == 0
    iio.imwrite("images/a1.png", 255 - iio.imread("images/a1.png"))
    capsys.readouterr()
    assert tiny_run(*arguments, "--limit", "2") == 0
    assert "1 of 2 images had been restored" in capsys.readouterr().out
    shown = iio.imread(f"{folder}/input/a1.png")
    assert np.array_equal(shown, iio.imread("images/a1.png"))


def test_a_magnitude_image_is_corrected_before_it_is_restored(tiny_run, monkeypatch):
    seen = []

    def method(name, operator, y, *others, **params):
        seen.append(y)
        return get_conditioning_method(name, operator, y, *others, **params)

    monkeypatch.setattr(batches, "get_conditioning_method", method)
    noise = {"name": "rician", "sigma": 0.3}
    write_yaml("task.yaml", task({"name": "denoise"}, noise))
    for name in os.listdir("images"):
        os.remove(f"images/{name}")
    iio.imwrite("images/black.png", np.zeros((64, 64), np.uint8))
    assert tiny_run("--save_dir", "out") == 0
    folder = "out/tiny/denoise/rician/0.3"
    shown = iio.imread(f"{folder}/input/black.png").astype(float) / 127.5
    assert shown.mean() == pytest.approx(0.3 * np.sqrt(np.pi / 2), rel=0.05)  # Rayleigh
    # The method sees it without that bias, and with the noise of a real image.
    assert abs((seen[0] + 1).mean().item()) < 0.1 * shown.mean()
    assert seen[0].std().item() == pytest.approx(0.3, rel=0.05)
    row = table(folder)["black"]
    assert np.isnan(float(row["nmse"])) and float(row["residual"]) > 0


def test_samples_that_would_all_be_the_same_are_refused(tiny_run, capsys):
    """Denoising from where the noise is, by one evaluation, draws nothing."""
    write_yaml("task.yaml", task({"name": "denoise"}, {"name": "gaussian", "sigma": 0.1}))
    with open("diffusion.yaml", encoding="utf-8") as file:
        schedule = yaml.safe_load(file)
    write_yaml("diffusion.yaml", {**schedule, "start": "auto", "timestep_respacing": "logsnr6"})
    command = ("--save_dir", "out", "--num_samples", "2", "--limit", "1")
    assert tiny_run(*command, "--method", "ddrm") == 2
    assert "its samples are all the same" in capsys.readouterr().err
    assert not os.path.exists("out")
    assert tiny_run(*command, "--method", "spectral_sample") == 0
    assert np.load("out/tiny/denoise/gaussian/0.1/std/a1.npy").mean() > 0.001


def test_an_input_that_is_taken_for_the_truth_is_said_to_be(tiny_run, capsys):
    said = "the input is taken for the truth"
    assert tiny_run("--save_dir", "out", "--input", "images/a1.png") == 0
    assert said in capsys.readouterr().err
    assert tiny_run("--save_dir", "other", "--input", "images/a1.png", "--measured") == 0
    assert tiny_run("--save_dir", "third", "--limit", "1") == 0
    assert said not in capsys.readouterr().err


def test_another_input_into_the_same_results_is_named(tiny_run, capsys):
    assert tiny_run("--save_dir", "out", "--input", "images/a1.png") == 0
    assert tiny_run("--save_dir", "out", "--input", "images/a2.png") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds a run with another task_config.data.root; choose another --save_dir" in error


def test_a_scanners_12_bits_in_16_are_said_to_be_dark(tiny_run, capsys):
    pixels = np.uint16(iio.imread("images/a1.png")) * 16
    for name, scale in (("dark", 1), ("full", 16)):
        iio.imwrite(f"{name}.png", pixels * np.uint16(scale))
        assert tiny_run("--save_dir", name, "--measured", "--input", f"{name}.png") == 0
        said = f"its values end at {pixels.max()} of 65535, so it is dark"
        assert (said in capsys.readouterr().err) is (name == "dark")


def test_k_space_among_pictures_takes_none_with_it(tiny_run, capsys):
    np.save("images/k.npy", np.ones((2, 32, 32), np.complex64))
    assert tiny_run("--save_dir", "out") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error[0].startswith("error: k.npy: holds k-space, which measurement.operator.name: mri")
    for name in ("a1", "a2", "a10"):
        assert os.path.exists(f"out/tiny/super_resolution/x4/0.05/recon/{name}.png")


def test_keys_of_the_task_are_set_on_the_command_line(tiny_run):
    changes = ("--set", "measurement.operator.scale_factor=2", "measurement.noise.sigma=1e-1")
    assert tiny_run("--save_dir", "out", "--limit", "1", *changes) == 0
    with open("task.yaml", encoding="utf-8") as file:
        config = yaml.safe_load(file)
    config["measurement"]["operator"]["scale_factor"] = 2
    config["measurement"]["noise"]["sigma"] = 0.1
    write_yaml("task.yaml", config)
    assert tiny_run("--save_dir", "other", "--limit", "1") == 0
    recon = "tiny/super_resolution/x2/0.1/recon/a1.png"
    with open(f"out/{recon}", "rb") as one, open(f"other/{recon}", "rb") as two:
        assert one.read() == two.read()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.rot=x", "unknown key 'rot'"),
        ("data.root", "--set: expected KEY=VALUE, found 'data.root'"),
        ("data..root=x", "--set: expected KEY=VALUE"),
        ("measurement.noise.sigma=[", "--set measurement.noise.sigma: '[' is not valid YAML"),
        ("diffusion_config=x", "--set diffusion_config: expected --diffusion_config"),
    ],
)
def test_keys_that_cannot_be_set(tiny_run, capsys, change, says):
    assert tiny_run("--save_dir", "out", "--set", change) == 2
    assert says in capsys.readouterr().err
    assert not os.path.exists("out")
