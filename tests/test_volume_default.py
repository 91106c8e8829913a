"""Volumes are restored as a whole where they can be, and slice by slice where they cannot."""

import os

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pytest

from data.volumes import Slice, Whole
from guided_diffusion.job import read_job
from guided_diffusion.options import parse_args
from guided_diffusion.volume_items import as_volume, note_of_planes, note_of_ranks
from tests.conftest import LINEAR, TINY, task, write_yaml
from tests.volume_files import head, write_nifti, write_series
from util.errors import UserError

CUBES, THICK = np.eye(4), np.diag([1, 1, 4, 1.0])
COILS = {"name": "mri", "coils": 4}


def job_of(root, operator=None, *arguments, **data):
    config = task(operator or {"name": "denoise"}, root=root)
    config["data"] |= data
    write_yaml("task.yaml", config)
    files = ["--model_config", "model.yaml", "--diffusion_config", "diffusion.yaml"]
    return read_job(parse_args([*files, "--task_config", "task.yaml", *arguments]))


def kinds(job):
    return [type(item) for item in job.items]


@pytest.mark.parametrize(
    ("affine", "slices", "in_turn"),
    [
        (CUBES, 20, True),
        (np.diag([1, 1.4, 1.2, 1]), 20, True),
        (np.diag([1, 1.6, 1, 1]), 20, False),
        (THICK, 20, False),
        (CUBES, 15, False),
    ],
)
def test_a_volume_is_one_image_and_seen_from_all_sides_if_it_is_made_of_cubes(
    tiny_run, affine, slices, in_turn
):
    write_nifti("v.nii", head((32, 34, slices)), affine)
    job = job_of("v.nii", axis=2)
    [item] = job.items
    assert isinstance(item, Whole) and job.task.data.volume_mode == "volume"
    way = as_volume(item, job.task.data, job.task.measurement, 8, 1)
    assert way.in_turn == in_turn
    side = pytest.approx(affine[2, 2])
    assert way.spacing == (None if in_turn else side)  # noise agrees, or planes do
    assert not job_of("v.nii", {"name": "mri"}).task.data.planes_in_turn  # no gain
    agreeing = job_of("v.nii", axis=2, correlated_noise=True)
    way = as_volume(agreeing.items[0], agreeing.task.data, agreeing.task.measurement, 8, 1)
    assert way.spacing == side and not way.in_turn
    with pytest.raises(UserError, match="exclude one another"):
        job_of("v.nii", axis=2, correlated_noise=True, planes_in_turn=True)


def test_what_counts_is_the_grid_that_is_restored(tiny_run):
    """Pixels of 4 mm and slices of 1 mm become cubes by super-resolution ×4; cubes do not."""
    operator = {"name": "super_resolution", "scale_factor": 4}
    for side, in_turn in ((4, True), (1, False)):
        write_nifti("v.nii", head((16, 16, 20)), np.diag([side, side, 1, 1.0]))
        job = job_of("v.nii", operator, axis=2, measured=True)
        way = as_volume(job.items[0], job.task.data, job.task.measurement, 8, 1)
        assert way.in_turn == in_turn


def test_slices_stay_slices_where_a_volume_cannot_be_whole(tiny_run, capsys):
    write_nifti("v.nii", head((32, 32, 3)))
    write_nifti("one.nii", head((32, 32, 1)))
    write_series("series", head((32, 32, 5)))
    os.remove("series/7.dcm")  # the third
    assert kinds(job_of("v.nii")) == [Whole]
    assert kinds(job_of("v.nii", volume_mode="slices")) == 3 * [Slice]
    assert kinds(job_of("v.nii", COILS)) == 3 * [Slice]
    assert kinds(job_of("one.nii")) == [Slice]
    assert kinds(job_of("one.nii", volume_mode="volume")) == [Whole]
    job = job_of("series", measured=True)
    assert kinds(job) == 4 * [Slice]
    job.items[0].read()
    assert "uneven" in job.items[0].note and "restored slice by slice" in job.items[0].note
    assert job_of("images").task.data.volume_mode is None
    write_yaml("model.yaml", {**TINY, "in_channels": 3, "model_path": "tiny.pt"})
    job = job_of("v.nii")
    assert kinds(job) == 3 * [Slice] and job.task.data.volume_mode == "slices"
    assert job.task.data.correlated_noise and not job.task.data.planes_in_turn


def test_coils_are_no_volumes_when_a_task_asks_for_it(tiny_run, capsys):
    write_nifti("v.nii", head((32, 32, 3)))
    config = task(COILS, root="v.nii")
    config["data"]["volume_mode"] = "volume"
    write_yaml("task.yaml", config)
    assert tiny_run("--save_dir", "out") == 2
    assert "mri with these parameters restores one slice at a time" in capsys.readouterr().err


def test_a_limit_counts_a_whole_volume_as_one(tiny_run):
    for name in ("v", "w"):
        write_nifti(f"images/{name}.nii", head((32, 32, 3)))
    job = job_of("images", None, "--limit", "4")
    assert [item.name for item in job.items] == ["a1", "a2", "a10", "v"]


@pytest.mark.parametrize("operator", ["denoise", "mri"])
def test_a_volume_of_thick_slices_is_what_its_slices_are(tiny_run, operator):
    """Beside a picture, with samples, frames, and batches of any size."""
    write_nifti("images/v.nii.gz", head((32, 32, 3)), THICK)
    for name in ("a2", "a10"):
        os.remove(f"images/{name}.png")
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 2})
    found = []
    for mode in (None, "slices"):
        config = task({"name": operator})
        config["data"] |= {"volume_mode": mode}
        write_yaml("task.yaml", config)
        flags = ["--num_samples", "2", "--batch_size", "2", "--record"]
        assert tiny_run("--save_dir", f"out{mode}", *flags) == 0
        [folder] = [root for root, folders, _ in os.walk(f"out{mode}") if "recon" in folders]
        files = [f"{folder}/{kind}/v.nii.gz" for kind in ("volumes", "std")]
        found.append([nib.load(path).get_fdata() for path in files])
        found[-1].append(iio.imread(f"{folder}/recon/a1.png") / 25)
        recorded = "v.gif" if mode is None else "v_z001.gif"
        assert os.path.exists(f"{folder}/gif/{recorded}")
        assert os.path.exists(f"{folder}/upper/v.nii.gz")
        assert not os.path.exists(f"{folder}/unfinished")
    for whole, slices in zip(*found, strict=True):
        assert np.sqrt(np.mean((whole - slices) ** 2)) < 0.1  # rounding, of 900


def test_what_users_are_told(tiny_run):
    write_nifti("v.nii", head((32, 32, 3)), THICK)
    job = job_of("v.nii", planes_in_turn=True)
    way = as_volume(job.items[0], job.task.data, job.task.measurement, 8, 1)
    assert "planes are not taken in turn" in note_of_planes(job.items[0], job.task.data, way)
    job = job_of("v.nii")
    assert note_of_planes(job.items[0], job.task.data, way) is None
    assert "shares out its slices" in note_of_ranks(job.items, 2)
    assert note_of_ranks(job.items, 1) is None
    assert note_of_ranks(job_of("images").items, 8) is None
