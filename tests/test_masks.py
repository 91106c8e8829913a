"""Metrics of the head alone."""

import glob
import json
import os

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest

from data.dataloader import list_items
from data.masks import head_mask, limit_volumes, open_masks
from data.volumes import Whole
from guided_diffusion.volume_items import counted_in
from tests.conftest import REPOSITORY, SR, TINY, task, write_yaml
from tests.volume_files import head, items_of, write_nifti
from util.errors import UserError
from util.journal import read_table
from util.metrics import image_metrics


def rows(folder=f"out/{SR}"):
    return read_table(f"{folder}/metrics.csv").rows


def masked_task(mask, root="images", **data):
    found = task(root=root)
    found["data"] |= {"mask": mask, **data}
    write_yaml("task.yaml", found)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_head_of_a_shipped_slice_is_found(noise):
    """Nearly all that is bright lies in it, nearly all of the corners outside."""
    paths = sorted(glob.glob(os.path.join(REPOSITORY, "data/mri_256_orig/*.png")))
    assert len(paths) == 10
    for path in paths:
        image = iio.imread(path) / 127.5 - 1
        air = np.hypot(noise, noise) * np.abs(np.random.default_rng(0).standard_normal(image.shape))
        mask = head_mask((image + air)[None])
        assert mask[image > -0.6].mean() > 0.99
        assert not mask[:8].any() and not mask[-8:].any()
        assert mask.mean() < 0.6


def test_a_ball_is_found_with_its_hole_and_a_rim_of_two_pixels():
    rows, cols = np.mgrid[:96, :96]
    radius = np.hypot(rows - 48, cols - 50)
    ball = np.where((radius < 30) & (radius > 8), 0.2, -1.0)[None]
    ball[0, 5, 5] = 1.0  # a speck that is no head
    found = head_mask(ball)
    assert found[radius < 30].all() and not found[radius > 33].any()
    assert head_mask(np.zeros((1, 32, 32))).all()


def test_metrics_of_a_mask_from_a_file(tiny_run, capsys):
    for name in ("a10",):
        os.remove(f"images/{name}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 4:28] = 1
    iio.imwrite("mask.png", mask)
    masked_task("mask.png")
    assert tiny_run("--save_dir", "out") == 0
    for name, row in rows().items():
        both = [iio.imread(f"out/{SR}/{k}/{name}.png") / 255 for k in ("truth", "recon")]
        both = [image[8:24, 4:28] for image in both]
        mse = np.mean((both[0] - both[1]) ** 2)
        assert row["psnr"] == pytest.approx(-10 * np.log10(mse), abs=0.05)
    with open(f"out/{SR}/summary.json", encoding="utf-8") as file:
        assert json.load(file)["settings"]["task_config"]["data"]["mask"] == "mask.png"
    masked_task("auto")
    assert tiny_run("--save_dir", "out") == 2  # other metrics, so another run
    iio.imwrite("mask.png", mask[:16])
    masked_task("mask.png")
    assert tiny_run("--save_dir", "other") == 2
    assert "data.mask: mask.png has 32×16 pixels" in capsys.readouterr().err
    masked_task("images")
    assert tiny_run("--save_dir", "whole") == 0
    masked_task("nowhere")
    assert tiny_run("--save_dir", "other") == 2


def test_a_volume_of_masks_goes_slice_by_slice(tiny_run):
    voxels = head((32, 32, 3))
    write_nifti("v.nii.gz", voxels)
    mask = np.zeros(voxels.shape, np.uint8)
    for k in range(3):
        mask[4 : 12 + 4 * k, 6:26, k] = 1
    nibabel.save(nibabel.Nifti1Image(mask, nibabel.load("v.nii.gz").affine), "mask.nii.gz")
    masked_task("mask.nii.gz", "v.nii.gz", volume_mode="slices")
    assert tiny_run("--save_dir", "out") == 0
    folder = f"out/{SR}"
    for k, (name, row) in enumerate(rows().items()):
        both = [iio.imread(f"{folder}/{kind}/{name}.png") / 255 for kind in ("truth", "recon")]
        # shown with anterior up and the patient's right on the left
        seen = np.rot90(mask[..., k])[:, ::1] > 0
        candidates = [np.mean(((both[0] - both[1]) ** 2)[m]) for m in (seen, seen[:, ::-1])]
        psnr = -10 * np.log10(np.array(candidates))
        assert np.abs(psnr - row["psnr"]).min() < 0.05


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("images", ["one of four dimensions", "two"])
def test_one_volume_of_masks_is_for_all_volumes(tmp_path, images, turned):
    """Also where its slices come in the opposite order: what counts is where it lies."""
    affine, mask = np.diag([1, 1, 4, 1.0]), np.zeros((16, 16, 3), np.uint8)
    for k in range(3):
        mask[4 : 6 + 4 * k, 5, k] = 1
    os.mkdir(tmp_path / "v")
    if images == "two":
        for name in "ab":
            write_nifti(tmp_path / f"v/{name}.nii", head((16, 16, 3)))
    else:
        write_nifti(tmp_path / "v/a.nii", np.stack([head((16, 16, 3))] * 2, axis=3))
    around = affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 2], [0, 0, 0, 1.0]])
    write_nifti(tmp_path / "m.nii", *((mask[..., ::-1], around) if turned else (mask, affine)))
    items = items_of({"root": str(tmp_path / "v")})
    find = open_masks(str(tmp_path / "m.nii"), {}, items)
    assert [find(item, item.read()).sum() for item in items] == [2, 6, 10, 2, 6, 10]
    write_nifti(tmp_path / "m.nii", mask[..., :2])
    with pytest.raises(UserError, match="one volume of as many slices as each of theirs, found 2"):
        open_masks(str(tmp_path / "m.nii"), {}, items)


def test_a_mask_that_is_nowhere_is_said(tiny_run, capsys):
    write_nifti("v.nii", head((32, 32, 3)))
    write_nifti("m.nii", np.zeros((32, 32, 3), np.uint8))
    masked_task("m.nii", "v.nii")
    assert tiny_run("--save_dir", "out") == 2
    assert "data.mask: m.nii is 0 everywhere on the grid of v.nii" in capsys.readouterr().err


def test_slices_with_a_mask_under_a_prior_of_three_channels(tiny_run):
    write_yaml("model.yaml", {**TINY, "in_channels": 3, "model_path": ""})
    write_nifti("v.nii.gz", head((32, 34, 3)))
    write_nifti("m.nii.gz", np.ones((32, 34, 3), np.float32))
    config = task({"name": "denoise"}, root="v.nii.gz")
    config["data"] |= {"measured": True, "volume_mode": "slices", "mask": "m.nii.gz"}
    write_yaml("task.yaml", config)
    assert tiny_run("--save_dir", "out") == 0
    found = rows("out/untrained/denoise/gaussian/0.05")
    assert len(found) == 3 and all(row["residual"] > 0 for row in found.values())


def whole_volume(folder, mask=None):
    """A volume of 20×18 voxels in 5 slices, black at both ends, and the mask's finder."""
    voxels = np.zeros((20, 18, 5), np.int16)
    voxels[..., 1:4] = head((20, 18, 3))
    write_nifti(folder / "v.nii.gz", voxels)
    if mask is not None:
        affine = nibabel.load(folder / "v.nii.gz").affine
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / "mask.nii.gz")
    items = list_items({"root": str(folder / "v.nii.gz"), "measured": False})
    find = open_masks("auto" if mask is None else str(folder / "mask.nii.gz"), {}, items)
    whole = Whole(items[0].volume, None)
    return whole, whole.read(), find


def test_slices_of_a_whole_volume_that_the_mask_does_not_reach_do_not_count(tmp_path):
    mask = np.zeros((20, 18, 5), np.uint8)
    mask[4:9, 3:11, 1] = mask[6:15, 5:9, 2] = 1
    whole, truth, find = whole_volume(tmp_path, mask)
    counted = counted_in(whole, truth, find)
    assert counted.sum(axis=(1, 2)).tolist() == [0, 40, 36, 0, 0]
    x = np.clip(truth + np.random.default_rng(0).normal(0, 0.1, truth.shape), -1, 1)
    x[[0, 3, 4]] = truth[[0, 3, 4]]
    error = np.concatenate([(x - truth)[i][counted[i]] / 2 for i in (1, 2)])
    found = image_metrics(x, truth, counted)
    assert found["psnr"] == pytest.approx(-10 * np.log10(np.mean(error**2)))
    pair = [np.where(counted, v, -1)[1:3] for v in (x, truth)]
    assert found["haarpsi"] == pytest.approx(image_metrics(*pair)["haarpsi"]) and found["ssim"] < 1
    whole, truth, find = whole_volume(tmp_path, np.zeros_like(mask))
    assert counted_in(whole, truth, find) is None  # nothing is inside, so all is


def test_black_slices_of_a_whole_volume_are_no_head(tmp_path):
    whole, truth, find = whole_volume(tmp_path)
    counted = counted_in(whole, truth, find).any(axis=(1, 2))
    assert counted.tolist() == [False, True, True, True, False]
    assert find(whole.volume.slices[0], truth[:1]).all()  # of a slice by itself


def test_of_a_volume_without_a_head_all_counts(tmp_path):
    voxels = np.full((32, 32, 3), 7, np.int16)
    voxels[..., 1] = 8  # or there would be no image in it
    write_nifti(tmp_path / "v.nii", voxels)
    items = items_of({"root": str(tmp_path / "v.nii")})
    limit_volumes(items, "auto", open_masks("auto", {}, items))
    assert items[0].volume.head.all()


@pytest.mark.parametrize("change", ["contents", "name"])
def test_other_masks_in_the_folder_are_another_run(tiny_run, capsys, change):
    os.mkdir("masks")
    for k in range(3):
        mask = np.ones((24, 40) if k == 2 else (32, 32), np.uint8)
        iio.imwrite(f"masks/{k}.png", mask)
    masked_task("masks")
    assert tiny_run("--save_dir", "out") == 0
    open("masks/.hidden", "w", encoding="utf-8").close()
    assert tiny_run("--save_dir", "out") == 0
    if change == "contents":
        mask[:12] = 0
        iio.imwrite("masks/2.png", mask)
    else:  # the first image takes the second's mask
        os.rename("masks/0.png", "masks/1a.png")
    capsys.readouterr()
    assert tiny_run("--save_dir", "out") == 2
    assert "another files_sha256" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["mask.hdr", "mask.img"])
def test_other_voxels_beside_a_header_are_another_run(tiny_run, capsys, named):
    write_nifti("v.nii.gz", head((32, 32, 3)))
    mask, affine = np.ones((32, 32, 3), np.uint8), nibabel.load("v.nii.gz").affine
    nibabel.save(nibabel.Nifti1Pair(mask, affine), "mask.img")
    masked_task(named, "v.nii.gz", volume_mode="slices")
    assert tiny_run("--save_dir", "out") == 0
    mask[:16] = 0
    nibabel.save(nibabel.Nifti1Pair(mask, affine), "mask.img")
    capsys.readouterr()
    assert tiny_run("--save_dir", "out") == 2
    assert "another files_sha256" in capsys.readouterr().err
