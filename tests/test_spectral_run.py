"""main.py with a schedule that names its own method, the few-step one."""

import json
import os

import imageio.v3 as iio
import numpy as np
import pytest

from tests.conftest import LINEAR, SR, task, write_yaml

FAST = {**LINEAR, "timestep_respacing": "logsnr3", "start": "auto", "method": "spectral"}


def recon(out, name, folder=SR):
    return iio.imread(f"{out}/{folder}/recon/{name}.png")


class TestRun:
    """main.py with a schedule that names its own method."""

    def test_the_schedule_s_method_replaces_the_task_s_and_the_flag_both(self, tiny_run):
        write_yaml("diffusion.yaml", FAST)
        for out, arguments, method in (("a", (), "spectral"), ("b", ("--method", "ddrm"), "ddrm")):
            assert tiny_run("--save_dir", out, "--record", *arguments) == 0
            with open(f"{out}/{SR}/summary.json", encoding="utf-8") as file:
                assert (
                    json.load(file)["settings"]["task_config"]["conditioning"]["method"] == method
                )
        assert not np.array_equal(recon("a", "a1"), recon("b", "a1"))

    def test_batches_and_samples_change_nothing(self, tiny_run, capsys):
        write_yaml("diffusion.yaml", FAST)
        assert tiny_run("--save_dir", "one") == 0
        assert tiny_run("--save_dir", "two", "--batch_size", "2", "--num_samples", "2") == 0
        assert "spectral lie closer together" in capsys.readouterr().err
        for name in ("a1", "a2", "a10"):
            first = iio.imread(f"two/{SR}/samples/{name}_0.png").astype(int)
            assert np.abs(first - recon("one", name)).max() <= 1

    def test_samples_of_the_posterior_differ_in_denoising_too(self, tiny_run, capsys):
        """Where one evaluation would do for the mean."""
        write_yaml("task.yaml", task({"name": "denoise"}))
        write_yaml("diffusion.yaml", {**FAST, "method": "spectral_sample"})
        assert tiny_run("--save_dir", "out", "--num_samples", "3", "--limit", "1") == 0
        printed = capsys.readouterr().err
        assert "closer together" not in printed
        assert printed.count("no statistics of the prior's images") == 1
        (folder,) = (f for f, _, files in os.walk("out") if "summary.json" in files)
        std = np.load(f"{folder}/std/a1.npy")
        assert std.mean() > 0.01

    def test_estimated_noise_of_one_image_is_not_its_neighbour_s(self, tiny_run):
        """The estimates decide where each image starts."""
        write_yaml("diffusion.yaml", FAST)
        noise = {"name": "gaussian", "sigma": "auto"}
        config = task({"name": "denoise"}, noise)
        write_yaml("task.yaml", {**config, "data": {**config["data"], "measured": True}})
        rng = np.random.default_rng(0)
        for name, sigma in (("a1", 5), ("a2", 40)):
            pixels = iio.imread(f"images/{name}.png") + sigma * rng.standard_normal((32, 32))
            iio.imwrite(f"images/{name}.png", np.uint8(np.clip(pixels, 0, 255)))
        assert tiny_run("--save_dir", "alone", "--limit", "1") == 0
        assert tiny_run("--save_dir", "all", "--batch_size", "3", "--limit", "2") == 0
        folder = "tiny/denoise/gaussian/auto"
        assert np.array_equal(recon("alone", "a1", folder), recon("all", "a1", folder))

    @pytest.mark.parametrize("respacing", [100, "60,40", "ddim25", "quad40"])
    def test_a_quiet_image_has_fewer_steps_than_are_counted(self, tiny_run, respacing):
        """It starts where fewer are left, with all of them."""
        write_yaml("diffusion.yaml", {**FAST, "timestep_respacing": respacing, "method": "dmps"})
        noise = {"name": "gaussian", "sigma": "auto"}
        config = task({"name": "denoise"}, noise)
        write_yaml("task.yaml", {**config, "data": {**config["data"], "measured": True}})
        pixels = iio.imread("images/a1.png") + np.random.default_rng(0).normal(0, 1, (32, 32))
        iio.imwrite("images/a1.png", np.uint8(np.clip(pixels, 0, 255)))
        assert tiny_run("--save_dir", "out", "--limit", "1") == 0

    @pytest.mark.parametrize("start", ["auto", 400])
    def test_the_prior_alone_has_nothing_to_start_from(self, tiny_run, capsys, start):
        write_yaml("diffusion.yaml", {**FAST, "start": start})
        assert tiny_run("--save_dir", "out", "--method", "vanilla") == 2
        assert f"start: {start} needs a measurement" in capsys.readouterr().err
