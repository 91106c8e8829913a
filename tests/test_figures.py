"""The script of README's figures: what it keeps of the full runs."""

import os

import imageio.v2 as iio
import numpy as np

from data.dataloader import list_images
from tests.benchmarks import figures
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
    for i in range(2 * figures.COLUMNS):
        tile = np.full((3, 5), i, np.uint8)
        iio.imwrite(tmp_path / f"sample_{i:03d}.png", tile)
    figures.lay_out(str(tmp_path), str(tmp_path / "grid.png"))
    grid = iio.imread(tmp_path / "grid.png")
    assert grid[::3, ::5].tolist() == [list(range(4)), list(range(4, 8))]
