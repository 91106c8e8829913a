"""--output: which of the results goes there."""

import bz2
import os
import shutil

import imageio.v3 as iio
import numpy as np
import pytest

from data.dataloader import list_items
from data.output import check_output, write_output
from tests.conftest import task, write_yaml
from tests.kspace_scans import head as scanned
from tests.kspace_scans import write_fastmri
from tests.volume_files import head, write_nifti, write_series
from util.errors import UserError


@pytest.mark.parametrize("last_first", [False, True])  # folders are listed in any order
def test_the_result_of_a_longer_name_is_another_s(tmp_path, monkeypatch, last_first):
    monkeypatch.chdir(tmp_path)
    os.mkdir("volumes")
    for name in ("a", "a.z"):
        write_nifti(f"{name}.nii.gz", np.ones((8, 8, 2), np.float32))
        with open(f"volumes/{name}.nii.gz", "w", encoding="utf-8") as file:
            file.write(f"of {name}")
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listed(path), reverse=last_first))
    items = list_items({"root": "a.nii.gz", "measured": True})
    write_output("r.nii.gz", items, ".")
    with open("r.nii.gz", encoding="utf-8") as file:
        assert file.read() == "of a"


@pytest.mark.parametrize("path", ["v.nii", "sigma.nii", "mask.nii", "link.nii"])
def test_what_the_run_reads_is_never_overwritten(tiny_run, capsys, path):
    voxels = head((32, 32, 2))
    write_nifti("v.nii", voxels)
    write_nifti("sigma.nii", np.ones_like(voxels))
    write_nifti("mask.nii", np.ones(voxels.shape, np.uint8))
    config = task({"name": "denoise"})
    config["data"] |= {"mask": "mask.nii"}
    write_yaml("task.yaml", config)
    os.symlink("mask.nii", "link.nii")
    before = {n: open(n, "rb").read() for n in os.listdir() if os.path.isfile(n)}
    flags = ("--input", "v.nii", "--measured", "--sigma", "sigma.nii", "--overwrite")
    assert tiny_run("--save_dir", "out", *flags, "--output", path) == 2
    assert f"--output: {path} is what the run reads" in capsys.readouterr().err
    assert before == {n: open(n, "rb").read() for n in os.listdir() if os.path.isfile(n)}
    assert not os.path.exists("out")


def test_a_mask_of_kspace_is_read_too(tiny_run, capsys):
    np.save("x.npy", np.random.default_rng(0).random((32, 32), np.float32))
    np.save("lines.npy", np.arange(32) % 2)
    write_yaml("task.yaml", task({"name": "mri", "mask": "lines.npy"}))
    flags = ("--input", "x.npy", "--overwrite", "--output", "lines.npy")
    assert tiny_run("--save_dir", "out", *flags) == 2
    assert "--output: lines.npy is what the run reads" in capsys.readouterr().err
    assert np.load("lines.npy").shape == (32,)


def test_a_file_that_exists_is_replaced_only_where_that_is_asked_for(tiny_run, capsys):
    iio.imwrite("x.png", np.zeros((32, 32), np.uint8))
    flags = ("--save_dir", "out", "--input", "images/a1.png", "--output", "x.png")
    assert tiny_run(*flags) == 2
    assert "--output: x.png exists; name another, or --overwrite" in capsys.readouterr().err
    assert not iio.imread("x.png").any() and not os.path.exists("out")
    assert tiny_run(*flags, "--overwrite") == 0
    assert iio.imread("x.png").any()
    items = list_items({"root": "images/a1.png", "measured": False})
    with pytest.raises(UserError, match="is what the run reads"):
        check_output("images/a1.png", items, overwrite=True)


def test_a_series_goes_to_a_folder_of_its_own_which_may_have_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_series("series", head((16, 16, 3)))
    items = list_items({"root": "series", "measured": True})
    check_output("restored_0.05", items)
    with pytest.raises(UserError, match="expected a folder"):
        check_output("restored.nii.gz", items)
    with pytest.raises(UserError, match="is what the run reads|holds other files"):
        check_output("series", items, overwrite=True)


def test_the_format_of_a_volume_is_nifti_however_its_file_is_packed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_nifti("v.nii", head((16, 16, 3)))
    with open("v.nii", "rb") as file, bz2.open("v.nii.bz2", "wb") as packed:
        packed.write(file.read())
    shutil.copy("v.nii", "unnamed")
    for name in ("v.nii.bz2", "unnamed"):
        items = list_items({"root": name, "measured": True})
        check_output("r.nii.gz", items)
        for other in ("r.nii.bz2", "r"):
            with pytest.raises(UserError, match=r"expected \.nii or \.nii\.gz"):
                check_output(other, items)


LEFT = ("r.dcm", "r_z000.dcm r_z001.dcm r_z002.dcm", ".part-r_z000.dcm")


@pytest.mark.parametrize("before", LEFT)
def test_a_series_that_is_replaced_leaves_nothing_of_the_one_before(tmp_path, monkeypatch, before):
    """Which was in one file, had more slices, or was not yet written."""
    monkeypatch.chdir(tmp_path)
    write_series("r", head((16, 16, 2)))
    items = list_items({"root": "r", "measured": True})
    assert items[0].volume.name == "r"
    for folder, names in (("there", before.split()), ("volumes/r", ["r_z000.dcm", "r_z001.dcm"])):
        os.makedirs(folder)
        for name in names:
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(folder)
    with pytest.raises(UserError, match="--overwrite to replace it"):
        check_output("there", items)
    check_output("there", items, overwrite=True)
    write_output("there", items, ".")
    assert sorted(os.listdir("there")) == ["r_z000.dcm", "r_z001.dcm"]
    with open("there/r_z000.dcm", encoding="utf-8") as file:
        assert file.read() == "volumes/r"
    os.rename("there/r_z000.dcm", "there/other.dcm")
    with pytest.raises(UserError, match=r"holds other files \(other.dcm\)"):
        check_output("there", items, overwrite=True)


def test_of_kspace_the_result_is_h5_or_nifti(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kspace, _ = scanned()
    write_fastmri("s.h5", kspace)
    np.savez("s.npz", kspace=kspace)
    items = list_items({"root": "s.h5", "measured": True})
    for folder in ("recon", "volumes"):
        os.mkdir(folder)
    for path in ("recon/s.h5", "volumes/s.nii.gz"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(path)
    for end, result in ((".h5", "recon/s.h5"), (".nii.gz", "volumes/s.nii.gz")):
        check_output(f"r{end}", items)
        write_output(f"r{end}", items, ".")
        with open(f"r{end}", encoding="utf-8") as file:
            assert file.read() == result
    for path, source in (("r.npz", "s.npz"), ("r.npy", "s.h5"), ("q.h5", "s.npz")):
        with pytest.raises(UserError, match="expected .*.nii or .nii.gz"):
            check_output(path, list_items({"root": source, "measured": True}))
