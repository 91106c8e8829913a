"""The script of README's figures: what it keeps of the full runs."""

import os

import imageio.v2 as iio
import numpy as np
import pytest
import scipy.fft

from data.dataloader import list_images
from guided_diffusion.statistics import PriorStatistics
from tests.benchmarks import figures, prior_samples
from tests.conftest import REPOSITORY


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_only_what_readme_shows_is_kept_and_the_old_goes(tmp_path):
    work, saved = tmp_path / "work", tmp_path / "saved"
    shown = figures.SHOWN[0]
    kept = ["summary.json", "metrics.csv", f"gif/{shown}.gif", f"recon/{shown}.png"]
    for name in [*kept, "recon/other.png", f"progress/{shown}/0000.png"]:
        write(work / "mri" / "denoise" / name)
    write(saved / "mri" / "denoise" / "recon" / "stale.png")
    write(saved / "mri" / "other" / "summary.json")
    figures.keep(str(work), str(saved))
    expected = {os.path.join("mri", "denoise", *name.split("/")) for name in kept}
    assert files(saved) == expected | {os.path.join("mri", "other", "summary.json")}


def test_the_tasks_and_the_slices_exist():
    for task in figures.TASKS:
        assert os.path.exists(os.path.join(REPOSITORY, "configs", f"{task}.yaml"))
    names = {os.path.basename(p)[:-4] for p in list_images(f"{REPOSITORY}/data/mri_256_orig")}
    assert set(figures.SHOWN) <= names


def test_samples_of_the_prior_are_laid_out_in_order(tmp_path):
    for i in range(8):
        iio.imwrite(tmp_path / f"sample_{i:03d}.png", np.full((3, 5), i, np.uint8))
    tiles = prior_samples.read(str(tmp_path))
    prior_samples.lay_out(tiles, str(tmp_path / "grid.png"))
    grid = iio.imread(tmp_path / "grid.png")
    assert grid[::3, ::5].tolist() == [list(range(4)), list(range(4, 8))]


def test_the_rim_of_a_sample():
    tile = np.full((32, 48), 255, np.uint8)
    tile[8:-8, 8:-8] = 77
    assert prior_samples.air(tile) == 1
    tile[:8] = 0
    assert prior_samples.air(tile) == pytest.approx(1 - 8 * 48 / (32 * 48 - 16 * 32))


def test_the_spectrum_of_samples_beside_the_law_they_are_drawn_from():
    law = PriorStatistics(0.0, (1.0, 400.0), (40.0, 40.0 / 400**2), source="1/f²")
    rng = np.random.default_rng(0)
    std = np.sqrt(2 * law.power_spectrum(256, 256).numpy())  # twice the power
    images = [scipy.fft.idctn(std * rng.standard_normal(std.shape), norm="ortho") for _ in range(4)]
    tiles = [np.clip(np.rint((image + 1) * 127.5), 0, 255) for image in images]
    found = prior_samples.spectrum(tiles, law)
    assert 4 <= len(found) and all(2 <= f <= 64 for f, _ in found)
    assert all(ratio == pytest.approx(2, rel=0.25) for _, ratio in found)
