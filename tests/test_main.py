"""The command line: real runs of main.py with a tiny prior."""

import csv
import json
import os
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from tests.conftest import LINEAR, REPOSITORY, task, write_yaml
from tests.volume_files import head, write_nifti
from util.journal import read_table

SR = "out/tiny/super_resolution/x4/0.05"


def pixels(path):
    return iio.imread(path)


def recons(folder):
    return {n: pixels(f"{folder}/recon/{n}") for n in sorted(os.listdir(f"{folder}/recon"))}


def assert_same(left, right, tolerance=0):
    assert left.keys() == right.keys()
    for name, image in left.items():
        difference = np.abs(image.astype(int) - right[name].astype(int)).max()
        assert difference <= tolerance, name


def test_a_run_writes_every_file(tiny_run, capsys):
    assert tiny_run("--save_dir", "out", "--record", "--video") == 0
    for folder, shape in (("input", (8, 8)), ("recon", (32, 32)), ("truth", (32, 32))):
        assert sorted(os.listdir(f"{SR}/{folder}")) == ["a1.png", "a10.png", "a2.png"]
        assert pixels(f"{SR}/{folder}/a1.png").shape == shape
        assert pixels(f"{SR}/{folder}/a1.png").dtype == np.uint8
    assert pixels(f"{SR}/recon/a10.png").shape == (24, 40)
    assert np.array_equal(pixels(f"{SR}/truth/a1.png"), pixels("images/a1.png"))

    with open(f"{SR}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["image"] for r in rows] == ["a1", "a2", "a10"]  # natural order
    for row in rows:  # the metrics can be measured again from the pictures
        truth, recon = (pixels(f"{SR}/{k}/{row['image']}.png") / 255.0 for k in ("truth", "recon"))
        mse = np.mean((truth - recon) ** 2)
        assert float(row["psnr"]) == pytest.approx(-10 * np.log10(mse), abs=0.05)
        assert float(row["nmse"]) == pytest.approx(mse / np.mean(truth**2), rel=0.02)
        assert -1 <= float(row["ssim"]) <= 1 and float(row["seconds"]) > 0

    with open(f"{SR}/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    assert summary["finished"] and summary["images"] == 3 and not summary["failed"]
    assert summary["means"]["psnr"] == pytest.approx(
        np.mean([float(r["psnr"]) for r in rows]), 1e-4
    )
    assert summary["settings"]["seed"] == 0
    assert summary["settings"]["task_config"]["measurement"]["noise"]["sigma"] == 0.05

    frames = sorted(os.listdir(f"{SR}/progress/a1"))
    assert len(frames) == 7  # the noise and the state after each of six steps
    assert np.array_equal(pixels(f"{SR}/progress/a1/{frames[-1]}"), pixels(f"{SR}/recon/a1.png"))
    noise = pixels(f"{SR}/progress/a1/{frames[0]}").astype(float)
    assert noise.std() > 60  # N(0, 1) clipped to [-1, 1]
    gif = iio.imread(f"{SR}/gif/a1.gif", index=None)
    assert len(gif) == 7
    with open(f"{SR}/video/a1.mp4", "rb") as file:
        assert file.read(12)[4:8] == b"ftyp"
    assert pixels(f"{SR}/comparison.png").shape[1] > 500
    printed = capsys.readouterr()
    assert "a10: PSNR" in printed.out and "PSNR (dB)" in printed.out
    assert "images 3/3" in printed.err and "a10: step 6/6" in printed.err


def test_results_do_not_depend_on_batch_neighbours_or_recording(tiny_run):
    tiny_run("--save_dir", "out")
    tiny_run("--save_dir", "batched", "--batch_size", "2", "--record")
    reference = recons(SR)
    # Sums run in another order in a batch, which may move a value over a rounding edge.
    assert_same(reference, recons(SR.replace("out", "batched")), tolerance=1)
    os.remove("images/a1.png")
    tiny_run("--save_dir", "fewer", "--limit", "1")
    assert_same({"a2.png": reference["a2.png"]}, recons(SR.replace("out", "fewer")))
    tiny_run("--save_dir", "seeded", "--seed", "1")
    other = recons(SR.replace("out", "seeded"))
    assert not np.array_equal(other["a2.png"], reference["a2.png"])
    assert not np.array_equal(
        pixels(f"{SR}/input/a2.png"), pixels(SR.replace("out", "seeded") + "/input/a2.png")
    )


TASKS = {
    "denoise/gaussian/0.2": ({"name": "denoise"}, {"name": "gaussian", "sigma": 0.2}),
    "denoise/poisson/0.1": ({"name": "denoise"}, {"name": "poisson", "sigma": 0.1}),
    "deblur/gaussian/0": ({"name": "deblur", "type": "gaussian"}, {"name": "clean"}),
    "deblur/uniform/0.05": (
        {"name": "deblur", "type": "uniform", "kernel_size": 9, "intensity": 3.0},
        {"name": "gaussian", "sigma": 0.05},
    ),
    "deblur/aniso/0.05": (
        {"name": "deblur", "type": "aniso", "kernel_size": 9, "intensity": [3.0, 1.0]},
        {"name": "gaussian", "sigma": 0.05},
    ),
    "super_resolution/x2/0.05": (
        {"name": "super_resolution", "type": "standard", "scale_factor": 2},
        {"name": "gaussian", "sigma": 0.05},
    ),
}


@pytest.mark.parametrize("folder", TASKS)
def test_every_task_has_its_own_folder(tiny_run, folder):
    write_yaml("task.yaml", task(*TASKS[folder]))
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert os.path.exists(f"out/tiny/{folder}/recon/a1.png")


def test_a_published_task_file_loads(tiny_run):
    with open("task.yaml", "w", encoding="utf-8") as file:
        file.write(
            "conditioning:\n  method: dmps\n  params:\n    scale: 1.75\n"
            "data:\n  name: ffhq\n  root: ./images/\n"
            "measurement:\n  operator:\n    name: super_resolution\n"
            "    in_shape: !!python/tuple [1, 3, 256, 256]\n    scale_factor: 4\n"
            "  noise:\n    name: gaussian\n    sigma: 5e-2\n"
        )
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert os.path.exists(f"{SR}/recon/a1.png")


def test_a_composite_is_restored_contrast_by_contrast(tiny_run):
    """A one-channel prior, an RGB image: three contrasts, each with noise of its own."""
    grey = pixels("images/a1.png")
    for name in os.listdir("images"):
        os.remove(f"images/{name}")
    iio.imwrite("images/rgb.png", np.stack([grey, 255 - grey, grey], axis=2))
    assert tiny_run("--save_dir", "out") == 0
    recon = pixels(f"{SR}/recon/rgb.png")
    assert recon.shape == (32, 32, 3)
    assert pixels(f"{SR}/input/rgb.png").shape == (8, 8, 3)
    assert not np.array_equal(recon[..., 0], recon[..., 2])
    truth = np.stack([grey, 255 - grey, grey], axis=2).astype(float)
    closeness = [[np.corrcoef(recon[..., i].flat, truth[..., j].flat)[0, 1] for j in (0, 1)]
                 for i in (0, 1)]  # fmt: skip
    assert closeness[0][0] > closeness[0][1] and closeness[1][1] > closeness[1][0]


def test_a_grey_image_is_repeated_for_a_colour_prior(tiny_run):
    from tests.conftest import TINY

    write_yaml("model.yaml", {**TINY, "in_channels": 3, "model_path": ""})
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    folder = SR.replace("tiny", "untrained")
    assert pixels(f"{folder}/recon/a1.png").shape == (32, 32, 3)
    write_yaml("task.yaml", task({"name": "color"}))
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert pixels("out/untrained/color/gaussian/0.05/input/a1.png").shape == (32, 32)


def test_vanilla_samples_the_prior_without_data(tiny_run, capsys):
    write_yaml("task.yaml", {"conditioning": {"method": "vanilla"}})
    assert tiny_run("--save_dir", "out", "--limit", "2", "--batch_size", "2") == 0
    assert sorted(os.listdir("out/tiny/vanilla/recon")) == ["sample_000.png", "sample_001.png"]
    assert not os.path.exists("out/tiny/vanilla/truth")
    assert "PSNR" not in capsys.readouterr().out
    a, b = recons("out/tiny/vanilla").values()
    assert a.shape == (32, 32) and not np.array_equal(a, b)


def test_a_schedules_own_method_does_not_replace_vanilla(tiny_run):
    write_yaml("task.yaml", {**task(), "conditioning": {"method": "vanilla"}})
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 2, "method": "spectral"})
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert os.listdir("out/tiny") == ["vanilla"]


def test_samples_their_mean_and_their_spread(tiny_run, capsys):
    tiny_run("--save_dir", "single", "--limit", "2")
    assert tiny_run("--save_dir", "out", "--limit", "2", "--num_samples", "3") == 0
    samples = np.stack([pixels(f"{SR}/samples/a2_{k}.png") for k in range(3)]).astype(float)
    # sample 0 is the one that a run with one sample draws
    single = pixels(SR.replace("out", "single") + "/recon/a2.png").astype(float)
    assert np.abs(samples[0] - single).max() <= 1
    assert np.abs(samples.mean(0) - pixels(f"{SR}/recon/a2.png")).max() <= 1
    std = np.load(f"{SR}/std/a2.npy")
    assert std.shape == (1, 32, 32)
    assert np.abs(std[0] * 127.5 - samples.std(0, ddof=1)).max() < 1
    assert pixels(f"{SR}/std/a2.png").ndim == 3
    with open(f"{SR}/metrics.csv", encoding="utf-8") as file:
        row = list(csv.DictReader(file))[1]
    assert float(row["psnr"]) > float(row["sample_psnr"])  # the mean is closer than a sample
    assert "PSNR of one sample" in capsys.readouterr().out


def test_the_mean_is_of_samples_that_are_not_yet_cut_to_the_range(tiny_run, monkeypatch):
    def loop(self, model, x_T, *rest):
        return torch.tensor([-1.4, -0.8]).reshape(2, 1, 1, 1).expand_as(x_T)

    monkeypatch.setattr(GaussianDiffusion, "p_sample_loop", loop)
    assert tiny_run("--save_dir", "out", "--limit", "1", "--num_samples", "2") == 0
    assert (pixels(f"{SR}/samples/a1_0.png") == 0).all()
    assert (pixels(f"{SR}/samples/a1_1.png") == 25).all()
    assert (pixels(f"{SR}/recon/a1.png") == 0).all()  # -1.1, not -0.9


@pytest.mark.parametrize("method", ["dps", "ddrm", "pigdm", "ddnm", "diffpir"])
def test_relatives_run_from_the_command_line(tiny_run, method):
    assert tiny_run("--save_dir", "out", "--limit", "2", "--method", method) == 0
    with open(f"{SR}/summary.json", encoding="utf-8") as file:
        conditioning = json.load(file)["settings"]["task_config"]["conditioning"]
    assert conditioning["method"] == method
    assert conditioning["params"].get("scale") != 1.75  # λ of the file's own method
    assert len(recons(SR)) == 2


def test_the_same_run_again_changes_nothing_and_another_is_refused(tiny_run, capsys):
    assert tiny_run("--save_dir", "out") == 0
    before = recons(SR)
    assert tiny_run("--save_dir", "out") == 0
    assert_same(before, recons(SR))
    capsys.readouterr()
    assert tiny_run("--save_dir", "out", "--seed", "3") == 2
    message = capsys.readouterr().err
    assert "another seed" in message and "--overwrite" in message
    assert_same(before, recons(SR))
    assert tiny_run("--save_dir", "out", "--seed", "3", "--overwrite", "--limit", "1") == 0
    assert os.listdir(f"{SR}/recon") == ["a1.png"]


def test_other_weights_under_the_same_name_are_other_settings(tiny_run, capsys):
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    state = torch.load("tiny.pt", weights_only=True)
    torch.save({k: 0.9 * v for k, v in state.items()}, "tiny.pt")
    assert tiny_run("--save_dir", "out", "--limit", "1") == 2
    assert "another checkpoint_sha256" in capsys.readouterr().err


def test_files_that_no_run_wrote_are_not_overwritten(tiny_run, capsys):
    os.makedirs(f"{SR}/recon")
    with open(f"{SR}/recon/a1.png", "wb") as file:
        file.write(b"mine")
    assert tiny_run("--save_dir", "out") == 2
    assert "--overwrite" in capsys.readouterr().err
    with open(f"{SR}/recon/a1.png", "rb") as file:
        assert file.read() == b"mine"


READ = {  # in the results folder a file, and what of the task leads to it
    "image": ("recon/a.npy", "{}/recon/a.npy", {}, None),
    "folder": ("recon/a.npy", "{}/recon", {}, None),
    "link": ("recon/a.npy", "links", {}, None),
    "mask": ("recon/a.npy", "images/a1.png", {"mask": "{}/recon/a.npy"}, None),
    "volume": ("volumes/a.nii.gz", "{}/volumes/a.nii.gz", {}, None),
    "map": ("sigma/a.nii.gz", "v.nii.gz", {"measured": True}, "{}/sigma/a.nii.gz"),
}


@pytest.mark.parametrize("case", READ)
def test_overwrite_keeps_what_the_run_reads(tiny_run, capsys, case):
    name, root, data, sigma = READ[case]
    folder = f"out/tiny/denoise/gaussian/{'map' if sigma else '0.05'}"
    inside = f"{folder}/{name}"
    os.makedirs(os.path.dirname(inside))
    write_nifti("v.nii.gz", head((32, 32, 2)))
    if name.endswith(".npy"):
        np.save(inside, np.full((32, 32), 0.1, np.float32))
    else:
        write_nifti(inside, head((32, 32, 2)))
    with open(f"{folder}/metrics.csv", "w", encoding="utf-8") as file:
        file.write("image,psnr\n")
    os.mkdir("links")
    os.symlink(os.path.abspath(inside), f"links/{os.path.basename(name)}")
    noise = {"name": "gaussian", "sigma": sigma.format(folder) if sigma else 0.05}
    config = task({"name": "denoise"}, noise, root.format(folder))
    config["data"] |= {k: v.format(folder) if k == "mask" else v for k, v in data.items()}
    write_yaml("task.yaml", config)
    with open(inside, "rb") as file:
        before = file.read()
    assert tiny_run("--save_dir", "out", "--overwrite") == 2
    says = f"error: --overwrite: {folder} holds what the run reads ("
    assert says in capsys.readouterr().err
    with open(inside, "rb") as file:
        assert file.read() == before


def test_a_run_killed_at_its_first_file_is_begun_again(tiny_run):
    os.makedirs(SR)
    with open(f"{SR}/.part-summary.json", "w", encoding="utf-8") as file:
        file.write("{")
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert ".part-summary.json" not in os.listdir(SR)


def test_bad_images_are_named_and_the_others_restored(tiny_run, capsys):
    with open("images/a3.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n no picture")
    iio.imwrite("images/a4.png", np.zeros((32, 3), np.uint8))
    np.save("images/a5.npy", np.full((32, 32), np.nan, np.float32))
    holes = np.full((32, 32), 0.5, np.float32)
    holes[4, 5] = np.nan
    iio.imwrite("images/a6.tif", holes)
    assert tiny_run("--save_dir", "out") == 2
    errors = capsys.readouterr().err
    assert "a3.png: cannot be read" in errors
    assert "a4.png: 3×32 pixels" in errors and "the least side is 16" in errors
    assert "a5.npy: holds values that are not finite" in errors
    assert "a6.tif: holds values that are not finite" in errors
    assert "4 of 7 images could not be restored: a3, a4, a5, a6" in errors
    assert sorted(recons(SR)) == ["a1.png", "a10.png", "a2.png"]


def test_images_of_any_size_in_one_folder(tiny_run):
    """Sides that neither the network (2) nor the factor (8) divides, and a constant image."""
    write_yaml("task.yaml", task({"name": "super_resolution", "scale_factor": 8}))
    rows, cols = np.mgrid[:37, :21]
    iio.imwrite("images/a3.png", np.uint8(127 + 100 * np.sin(rows / 5) * np.cos(cols / 7)))
    iio.imwrite("images/a4.png", np.zeros((16, 70), np.uint8))
    assert tiny_run("--save_dir", "out", "--batch_size", "2") == 0
    folder = "out/tiny/super_resolution/x8/0.05"
    assert pixels(f"{folder}/recon/a3.png").shape == (37, 21)
    assert pixels(f"{folder}/input/a3.png").shape == (5, 3)
    assert pixels(f"{folder}/recon/a4.png").shape == (16, 70)
    with open(f"{folder}/summary.json", encoding="utf-8") as file:
        means = json.load(file)["means"]
    assert np.isfinite(means["nmse"])  # which a black truth does not have


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_means_are_of_what_is_finite(tiny_run, capsys):
    """Restored exactly, PSNR is infinite; a black truth has no NMSE."""
    for name in ("a2", "a10"):
        os.remove(f"images/{name}.png")
    iio.imwrite("images/black.png", np.zeros((32, 32), np.uint8))
    conditioning = {"method": "ddnm"}
    exact = task({"name": "denoise"}, {"name": "clean"}, conditioning=conditioning)
    write_yaml("task.yaml", exact)
    assert tiny_run("--save_dir", "out") == 0
    folder = "out/tiny/denoise/clean/0"
    table, said = read_table(f"{folder}/metrics.csv").rows, capsys.readouterr().out
    assert table["black"]["psnr"] == np.inf and table["black"]["haarpsi"] == 1
    with open(f"{folder}/summary.json", encoding="utf-8") as file:
        means = json.load(file, parse_constant=lambda name: pytest.fail(name))["means"]
    finite = [row["psnr"] for row in table.values() if np.isfinite(row["psnr"])]
    assert means["psnr"] == (pytest.approx(np.mean(finite)) if finite else None)
    assert means["nmse"] == table["a1"]["nmse"] and means["haarpsi"] > 0.99
    [line] = [line for line in said.splitlines() if "PSNR (dB)" in line]
    assert f"({2 - len(finite)} left out, not finite)" in line and "inf" not in line
    [line] = [line for line in said.splitlines() if "NMSE" in line and "left out" in line]
    assert "± 0.0000 (1 left out, not finite)" in line
    with open(f"{folder}/report.html", encoding="utf-8") as file:
        assert "left out, not finite</th>" in file.read()


def test_help_and_exit_status_of_the_real_program():
    def run(*arguments):
        command = [sys.executable, "main.py", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    shown = run("--help")
    assert shown.returncode == 0
    for flag in ("model_config", "diffusion_config", "task_config", "save_dir", "seed", "gpu"):
        assert f"--{flag}" in shown.stdout
    for flag in ("record", "video", "batch_size", "limit", "precision", "overwrite"):
        assert f"--{flag}" in shown.stdout
    assert "default: results" in " ".join(shown.stdout.split())
    wrong = run("--task_config", "nowhere.yaml")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: nowhere.yaml: no such file\n"
