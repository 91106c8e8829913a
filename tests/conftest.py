"""Shared fixtures: numbers of the published implementation, tiny networks, tiny runs."""

import contextlib
import csv
import json
import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(HERE)

torch.set_num_threads(1)  # faster for networks this small
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the programs that tests start

TINY = {
    "image_size": 32,
    "in_channels": 1,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "learn_sigma": True,
    "attention_resolutions": "16",
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
LINEAR = {
    "sampler": "ddpm",
    "steps": 1000,
    "noise_schedule": "linear",
    "model_mean_type": "epsilon",
    "model_var_type": "learned_range",
    "dynamic_threshold": False,
    "clip_denoised": True,
    "rescale_timesteps": False,
}


def rnd(shape, seed):
    """The way the golden inputs were drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def golden():
    """Numbers measured on the published implementation, see fixtures/README.md."""
    return np.load(os.path.join(HERE, "fixtures", "published.npz"))


@pytest.fixture
def assert_golden(golden):
    def check(name, tensor, tolerance=1e-5):
        flat = tensor.flatten().double()
        values = flat[torch.from_numpy(golden[f"{name}/idx"])].numpy()
        expected = golden[f"{name}/val"]
        assert flat.numel() == golden[f"{name}/numel"]
        assert np.abs(values - expected).max() <= tolerance * np.abs(expected).max()
        assert flat.norm().item() == pytest.approx(float(golden[f"{name}/norm"]), rel=tolerance)

    return check


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """A folder with a tiny prior, three grey slices and the configs of a ×4 task; cwd is there.

    Returns a function that runs main.py's main with extra arguments.
    """
    import imageio.v3 as iio

    import main
    from guided_diffusion.checkpoints import save_checkpoint
    from guided_diffusion.unet import create_model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = create_model(**TINY)
    with torch.no_grad():
        for p in model.parameters():  # the zero-initialised layers too, or it predicts nothing
            p.add_(0.02 * torch.randn_like(p))
    save_checkpoint(model, "tiny.pt")
    os.mkdir("images")
    for name, (height, width) in {"a1": (32, 32), "a2": (32, 32), "a10": (24, 40)}.items():
        rows, cols = np.mgrid[:height, :width]
        wave = np.sin(rows / 5 + len(name)) * np.cos(cols / 7)
        iio.imwrite(f"images/{name}.png", np.uint8(127.5 + 100 * wave))
    write_yaml("model.yaml", {**TINY, "model_path": "tiny.pt"})
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 6})
    write_yaml("task.yaml", task())

    def run(*arguments):
        return main.main(
            ["--model_config", "model.yaml", "--diffusion_config", "diffusion.yaml"]
            + ["--task_config", "task.yaml", "--precision", "fp32", *arguments]
        )

    return run


def task(operator=None, noise=None, root="images", conditioning=None):
    return {
        "conditioning": conditioning or {"method": "dmps", "params": {"scale": 1.75}},
        "data": {"name": "test", "root": root},
        "measurement": {
            "operator": operator or {"name": "super_resolution", "scale_factor": 4},
            "noise": noise or {"name": "gaussian", "sigma": 0.05},
        },
    }


def write_training_images():
    """Seven images of 24×32 in train/."""
    os.mkdir("train")
    rows, cols = np.mgrid[:24, :32]
    for i in range(7):
        image = 127 + 100 * np.sin(rows / (2 + i)) * np.cos(cols / 5)
        iio.imwrite(f"train/{i}.png", image.astype(np.uint8))


def write_yaml(path, config):
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file)


def golden_json(golden, key):
    return json.loads(str(golden[key]))


@contextlib.contextmanager
def largest_file(size):
    """No file grows beyond so many bytes; to what writes one it is as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SR = "tiny/super_resolution/x4/0.05"  # where tiny_run's task has its results


def contents(out, run=SR):
    """Every file's bytes; durations, which no two runs share, are left out."""
    found = {}
    for root, _, files in os.walk(out):
        for name in files:
            path = os.path.join(root, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, out)] = file.read()
    with open(f"{out}/{run}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    found[f"{run}/metrics.csv"] = rows
    summary = json.loads(found[f"{run}/summary.json"])
    del summary["means"]["seconds"]
    found[f"{run}/summary.json"] = summary
    return found
