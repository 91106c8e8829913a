"""Runs that are stopped, by every kind of signal, and gone on with."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml

from tests.conftest import REPOSITORY, SR, contents, task, write_yaml
from tests.volume_files import head, write_nifti

# One thread, so that sums run in one order; a pause a step, so that there is time to be killed in.
PROGRAM = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
sys.path.insert(0, {repository!r})
torch.set_num_threads(1)
import main
from guided_diffusion.condition_methods import DMPS
step = DMPS.step
def slow(self, *args):
    time.sleep(float(sys.argv[1]))
    return step(self, *args)
DMPS.step = slow
sys.exit(main.main(sys.argv[2:]))
"""


def start(out, pause):
    command = [sys.executable, "-c", PROGRAM.format(repository=REPOSITORY), str(pause)]
    command += ["--model_config", "model.yaml", "--diffusion_config", "diffusion.yaml"]
    command += ["--task_config", "task.yaml", "--precision", "fp32", "--record", "--save_dir", out]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd()
    )


def wait_for(path, process):
    for _ in range(1200):
        if os.path.exists(path):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


@pytest.fixture
def reference(tiny_run):
    with open("diffusion.yaml", encoding="utf-8") as file:
        config = yaml.safe_load(file)
    config["timestep_respacing"] = 10
    with open("diffusion.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file)
    process = start("whole", 0)
    assert process.wait(120) == 0, process.stderr.read()
    return contents("whole")


def test_a_run_killed_at_any_moment_ends_with_the_same_files(reference):
    """kill -9 before the first image, within the second and the third; then once to the end."""
    moments = ["summary.json", "recon/a1.png", "recon/a2.png"]
    for moment in moments:
        process = start("broken", 0.1)
        wait_for(f"broken/{SR}/{moment}", process)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        with open(f"broken/{SR}/summary.json", encoding="utf-8") as file:
            assert not json.load(file)["finished"]
    assert os.path.exists(f"broken/{SR}/recon/a2.png")
    process = start("broken", 0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "had been restored by an earlier run" in output
    assert contents("broken") == reference


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_polite_stop_says_how_to_go_on(tiny_run, name):
    process = start("out", 0.5)
    wait_for(f"out/{SR}/summary.json", process)
    time.sleep(0.3)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("interrupted: run the same command again")
    assert "Traceback" not in errors


def test_what_is_done_is_not_done_again(tiny_run, capsys):
    assert tiny_run("--save_dir", "out", "--limit", "2") == 0
    before = {n: os.stat(f"out/{SR}/recon/{n}.png").st_mtime_ns for n in ("a1", "a2")}
    assert tiny_run("--save_dir", "out") == 0
    assert "2 of 3 images had been restored by an earlier run" in capsys.readouterr().out
    assert before == {n: os.stat(f"out/{SR}/recon/{n}.png").st_mtime_ns for n in before}
    with open(f"out/{SR}/metrics.csv", encoding="utf-8") as file:
        assert [r["image"] for r in csv.DictReader(file)] == ["a1", "a2", "a10"]
    # a GIF that is asked for later is made
    assert tiny_run("--save_dir", "out", "--limit", "1", "--record") == 0
    assert os.listdir(f"out/{SR}/gif") == ["a1.gif"]


def test_another_image_of_the_same_name_is_restored_anew(tiny_run):
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    iio.imwrite("images/a1.png", 255 - iio.imread("images/a1.png"))
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert np.array_equal(iio.imread(f"out/{SR}/truth/a1.png"), iio.imread("images/a1.png"))


def shallow(pixels):
    """Pixels of 16 bits, of which none changes by a step of 8 bits."""
    return np.where(np.arange(pixels.shape[1]) == 3, pixels ^ 1, pixels)


@pytest.mark.parametrize("kind", ["volume", "beyond white", "16 bits"])
def test_a_change_that_no_picture_shows_is_restored_anew(tiny_run, kind):
    """Off the planes that are shown, above white, and below a grey level of 8 bits."""
    config = task({"name": "denoise"}, {"name": "gaussian", "sigma": 0.2})
    config["data"] |= {"measured": True, "root": "scan.png" if kind == "16 bits" else "scan.nii.gz"}
    write_yaml("task.yaml", config)
    if kind == "16 bits":
        pixels = np.uint16(257) * iio.imread("images/a1.png")
        iio.imwrite("scan.png", pixels)
    else:
        voxels = head((32, 32, 17)).astype(np.float32)
        write_nifti("scan.nii.gz", voxels)
    assert tiny_run("--save_dir", "out", "--method", "ddrm") == 0
    if kind == "16 bits":
        iio.imwrite("scan.png", shallow(pixels))
    else:
        place = (0, 0, 0) if kind == "beyond white" else (5, 6, 2)
        voxels[place] += 90
        write_nifti("scan.nii.gz", voxels)
    for out in ("out", "fresh"):
        assert tiny_run("--save_dir", out, "--method", "ddrm") == 0
    run = "tiny/denoise/gaussian/0.2"
    assert contents("out", run) == contents("fresh", run)


@pytest.mark.parametrize("left", ["nothing", "no settings", "[1]"])
def test_overwriting_takes_nothing_over(tiny_run, capsys, left):
    """Though what the earlier run was can no longer be read."""
    assert tiny_run("--save_dir", "out") == 0
    if left == "nothing":
        os.remove(f"out/{SR}/summary.json")
    else:
        with open(f"out/{SR}/summary.json", "w", encoding="utf-8") as file:
            file.write("{}" if left == "no settings" else '{"settings": [1]}')
    assert tiny_run("--save_dir", "out", "--method", "ddrm") == 2
    assert "holds files that no run of this program left" in capsys.readouterr().err
    command = ["--save_dir", "out", "--method", "ddrm"]
    assert tiny_run(*command, "--overwrite", "--limit", "1") == 0
    assert tiny_run(*command) == 0
    assert tiny_run("--save_dir", "fresh", "--method", "ddrm") == 0
    assert contents("out") == contents("fresh")


def test_a_stop_while_an_image_is_restored_anew_leaves_no_old_row(tiny_run, monkeypatch):
    """Stopped after the truth of the new image is written, and before its metrics are."""
    import util.results

    def stop(x, truth, mask):
        raise KeyboardInterrupt

    assert tiny_run("--save_dir", "out") == 0
    iio.imwrite("images/a1.png", 255 - iio.imread("images/a1.png"))
    with monkeypatch.context() as patched:
        patched.setattr(util.results, "image_metrics", stop)
        assert tiny_run("--save_dir", "out") == 130
    assert tiny_run("--save_dir", "out") == 0
    assert tiny_run("--save_dir", "fresh") == 0
    assert contents("out") == contents("fresh")


MORE = "; take less, and the same command resumes"
STOPPED = {  # what is raised while results are written → what is said
    "full": (OSError(errno.ENOSPC, "No space left on device", "x"),
             "--save_dir: No space left on device; make room, and the same command resumes"),
    "open elsewhere": (PermissionError(errno.EACCES, "Permission denied", "out/recon/a1.png"),
                       "out/recon/a1.png: Permission denied, and the same command resumes"),
    "memory": (MemoryError(), f"--batch_size: this machine's memory is not enough{MORE}"),
    "CPU memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
                   f"--batch_size: this machine's memory is not enough{MORE}"),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                   f"--batch_size: CUDA out of memory{MORE}"),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPED)
def test_what_stops_a_run_from_outside_is_one_sentence(tiny_run, capsys, monkeypatch, case):
    import util.results

    raised, said = STOPPED[case]

    def stop(path, image):
        raise raised

    monkeypatch.setattr(util.results, "write_png", stop)
    assert tiny_run("--save_dir", "out") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {said}")


def test_a_fault_of_the_program_is_not_taken_for_one(tiny_run, monkeypatch):
    import util.results

    def stop(path, image):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(util.results, "write_png", stop)
    with pytest.raises(RuntimeError, match="shapes differ"):
        tiny_run("--save_dir", "out")


def of_estimated_noise(sigma):
    """A task whose images are denoised by what is found of their noise."""
    config = task({"name": "denoise"}, {"name": "gaussian", "sigma": sigma})
    write_yaml("task.yaml", {**config, "data": {**config["data"], "measured": True}})
    random = np.random.default_rng(0)
    for name in ("a1", "a2"):
        pixels = iio.imread(f"images/{name}.png") + 20 * random.standard_normal((32, 32))
        iio.imwrite(f"images/{name}.png", np.uint8(pixels.clip(0, 255)))


@pytest.mark.parametrize("sigma", ["auto", "local"])
def test_the_noise_of_images_that_are_restored_is_not_estimated_again(tiny_run, monkeypatch, sigma):
    from guided_diffusion import noise

    estimated = []
    for name in ("estimate_sigma", "estimate_sigma_map"):
        estimate = getattr(noise, name)

        def counted(y, *arguments, estimate=estimate, **options):
            estimated.append(len(y))
            return estimate(y, *arguments, **options)

        monkeypatch.setattr(noise, name, counted)
    of_estimated_noise(sigma)
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert len(estimated) == 1
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert len(estimated) == 1
    assert tiny_run("--save_dir", "out", "--limit", "2") == 0
    assert len(estimated) == 2


def test_an_image_that_is_restored_again_with_its_neighbour_has_its_noise(tiny_run):
    of_estimated_noise("auto")
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    for folder in ("out", "fresh"):
        assert tiny_run("--save_dir", folder, "--limit", "2", "--batch_size", "2") == 0
    found = []
    for folder in ("out", "fresh"):
        with open(f"{folder}/tiny/denoise/gaussian/auto/metrics.csv", encoding="utf-8") as file:
            found.append([(r["image"], r["sigma"], r["residual"]) for r in csv.DictReader(file)])
    assert found[0] == found[1] and len(found[0]) == 2
