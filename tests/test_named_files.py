"""Files that a task names beside its images: maps of σ and masks."""

import os

import nibabel as nib
import numpy as np
import pytest

from guided_diffusion.config import read_task_config
from guided_diffusion.item_noise import open_map
from tests.conftest import task, write_yaml
from tests.volume_files import head, items_of, write_nifti
from util.errors import UserError

TURNED = np.array([[0, -1, 0, 32], [1, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1.0]])
FLIPPED = np.array([[-1, 0, 0, 31], [0, 1, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1.0]])
PLACES = {
    "shifted": (nib.affines.from_matvec(np.diag([1, 1, 4]), [0, 0, 50]), "a corner 50 mm off"),
    "turned": (TURNED, "s.nii.gz lies elsewhere than v.nii.gz, a corner"),
    "stored otherwise": (FLIPPED, None),
    "nowhere": (None, None),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_map_of_sigma_must_lie_where_the_volume_does(tmp_path, case):
    affine, says = PLACES[case]
    write_nifti(tmp_path / "v.nii.gz", head())
    sigma = np.full((32, 32, 3), 40, np.float32)
    write_nifti(tmp_path / "s.nii.gz", sigma, affine)
    if affine is None:
        image = nib.Nifti1Image(sigma, None)
        image.header.set_zooms((1, 1, 4))
        nib.save(image, tmp_path / "s.nii.gz")
    item = items_of({"root": str(tmp_path / "v.nii.gz")})[1]
    sigma_of = open_map(str(tmp_path / "s.nii.gz"), {})
    if says is None:
        expected = 40 * 2 / np.percentile(head(), 99.9)  # in the [-1, 1] image
        np.testing.assert_allclose(sigma_of(item), np.full((1, 32, 32), expected), rtol=1e-5)
        return
    with pytest.raises(UserError, match=f"measurement.noise.sigma: .*{says}.*; resample it"):
        sigma_of(item)


def test_a_mask_of_kspace_is_found_as_other_paths_are(tmp_path, monkeypatch):
    """From here, else beside the task file, else in the program's folder; ~ is the home folder."""
    for folder in ("work", "task", "home", "program"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / f"{folder}.npy", np.arange(32) % 2)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("util.config.REPOSITORY", str(tmp_path / "program"))
    path = str(tmp_path / "task" / "t.yaml")

    def read(mask):
        write_yaml(path, task({"name": "mri", "mask": mask}, root=str(tmp_path)))
        return read_task_config(path)

    for folder, mask in (("task", "task.npy"), ("home", "~/home.npy"), ("program", "program.npy")):
        found = read(mask)
        assert found.measurement.operator.params["mask"] == str(tmp_path / folder / f"{folder}.npy")
        recorded = found.settings()["measurement"]["operator"]["mask"]
        assert os.path.basename(recorded) == f"{folder}.npy"
        assert (recorded == "program.npy") == (folder == "program")
    for mask in ("work.npy", "magic", "nowhere.npy"):
        assert read(mask).measurement.operator.params["mask"] == mask


NAMED_WRONGLY = {
    "mask": ("nope.nii", 0.1, "task.yaml: data.mask: expected auto, or a file or folder of masks, "
                              "found 'nope.nii'"),
    "folder of masks": ("empty", 0.1, "data.mask: no image in empty"),
    "sigma": (None, "aut", "task.yaml: measurement.noise.sigma: expected a number, auto, local, or "
                           "the file of a map, found 'aut'"),
    "map": (None, "empty", "measurement.noise.sigma: no image in empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED_WRONGLY)
def test_a_file_that_is_not_there_is_missed_under_its_own_key(tiny_run, capsys, case):
    mask, sigma, says = NAMED_WRONGLY[case]
    os.mkdir("empty")
    write_nifti("v.nii.gz", head())
    config = task({"name": "denoise"}, {"name": "gaussian", "sigma": sigma}, "v.nii.gz")
    config["data"] |= {"measured": True, "mask": mask}
    write_yaml("task.yaml", config)
    assert tiny_run("--save_dir", "out") == 2
    assert f"error: {says}" in capsys.readouterr().err.replace(f"{os.getcwd()}/", "")
