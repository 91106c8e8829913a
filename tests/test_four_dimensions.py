"""NIfTI files with several volumes: all restored, each by itself, and joined again."""

import errno
import os

import nibabel as nib
import numpy as np
import pytest

from data.volumes import Whole, write_volumes
from tests.conftest import task, write_yaml
from tests.volume_files import head, items_of, write_back, write_nifti, write_series

OUT = "out/tiny/denoise/clean/0"
AFFINE = np.array([[-2, 0.1, 0, 30], [0.1, 2, 0, -20], [0, 0, 4, 5], [0, 0, 0, 1.0]])


def write_series_of(path, count=3):
    """`count` volumes of unlike brightness, 2.5 s apart."""
    voxels = np.stack([(k + 1) * head(seed=k).astype(np.float32) for k in range(count)], axis=3)
    write_nifti(path, voxels, AFFINE)
    image = nib.load(path)
    image.header.set_zooms((*image.header.get_zooms()[:3], 2.5))
    voxels = np.asarray(image.dataobj).copy()
    nib.Nifti1Image(voxels, image.affine, image.header).to_filename(path)
    return voxels


def configure(mode="volume", **data):
    """Nothing is wrong with the images, so that ddnm gives back what it was given."""
    config = task(
        {"name": "denoise"}, {"name": "clean"}, "s.nii.gz", {"method": "ddnm", "params": {"eta": 0}}
    )
    config["data"] |= {"measured": True, "volume_mode": mode, **data}
    write_yaml("task.yaml", config)


def test_all_volumes_are_items_of_their_own_and_come_back_as_one_file(tmp_path):
    voxels = write_series_of(tmp_path / "s.nii.gz")
    items = items_of({"root": str(tmp_path / "s.nii.gz")})
    assert len(items) == 9 and len({i.name for i in items}) == 9
    assert [i.name for i in items[::3]] == ["s_v000_z000", "s_v001_z000", "s_v002_z000"]
    np.testing.assert_allclose(items[3].read(), items_of(
        {"root": str(tmp_path / "s.nii.gz"), "volume": 1})[0].read())  # fmt: skip
    *_, last = write_back(items, tmp_path, measured=True)
    assert last.line == f"{os.path.join('volumes', 's.nii.gz')}: 3 volumes" and not last.failed
    assert os.listdir(tmp_path / "volumes") == ["s.nii.gz"]
    source, written = nib.load(tmp_path / "s.nii.gz"), nib.load(tmp_path / "volumes/s.nii.gz")
    np.testing.assert_allclose(written.get_fdata(), voxels, atol=1e-2)
    assert np.array_equal(written.affine, source.affine)
    assert written.header.get_zooms() == source.header.get_zooms()
    assert written.header.get_xyzt_units() == ("mm", "sec")
    for form in ("sform_code", "qform_code"):
        assert written.header[form] == source.header[form]


def test_a_finer_grid_keeps_the_time_between_volumes(tmp_path):
    write_series_of(tmp_path / "s.nii.gz")
    write_back(items_of({"root": str(tmp_path / "s.nii.gz")}), tmp_path, enlarge=2, measured=True)
    source, written = nib.load(tmp_path / "s.nii.gz"), nib.load(tmp_path / "volumes/s.nii.gz")
    assert written.shape == (64, 64, 3, 3)
    expected = np.array(source.header.get_zooms()) * [0.5, 0.5, 1, 1]
    np.testing.assert_allclose(written.header.get_zooms(), expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["NIfTI", "DICOM"])
def test_what_holds_one_volume_has_no_other(tiny_run, capsys, form):
    if form == "NIfTI":
        write_nifti("s.nii.gz", head())
    else:
        write_series("s.nii.gz", head())
    for volume, says in ((-1, "expected 0 or more, found -1"), (1, "no volume 1; it holds one, 0")):
        configure(volume=volume)
        assert tiny_run("--save_dir", "out") == 2
        assert f"data.volume: {says}" in capsys.readouterr().err
        assert not os.path.exists("out")
    configure(volume=0)
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0


def test_a_mask_of_one_volume_serves_any(tiny_run):
    write_series_of("s.nii.gz")
    write_nifti("mask.nii.gz", np.ones((32, 32, 3), np.int16), AFFINE)
    configure(volume=1, mask="mask.nii.gz")
    assert tiny_run("--save_dir", "out") == 0


@pytest.mark.parametrize("mode", ["volume", "slices"])
def test_a_run_writes_one_file_of_each_kind(tiny_run, mode):
    voxels = write_series_of("s.nii.gz")
    configure(mode)
    arguments = ("--save_dir", "out", "--num_samples", "2", "--output", "restored.nii.gz")
    for again in (), ("--overwrite",):  # the second time from what was kept of the volumes
        assert tiny_run(*arguments, *again) == 0
        for path in ("restored.nii.gz", f"{OUT}/volumes/s.nii.gz", f"{OUT}/samples/1/s.nii.gz"):
            found = nib.load(path)
            np.testing.assert_allclose(found.get_fdata(), voxels, atol=3)
            assert found.header.get_zooms()[3] == 2.5
        for kind in ("std", "residual", "lower", "upper", "samples/0"):
            assert os.listdir(f"{OUT}/{kind}").count("s.nii.gz") == 1
            assert not any(
                n.startswith("s_v") and n.endswith("gz") for n in os.listdir(f"{OUT}/{kind}")
            )
        assert nib.load(f"{OUT}/std/s.nii.gz").shape == voxels.shape


def test_some_of_the_volumes_stay_files_of_their_own(tiny_run, capsys):
    write_series_of("s.nii.gz")
    configure()
    assert tiny_run("--save_dir", "out", "--limit", "2") == 0
    assert "s: 2 of 3 volumes written, each as its own file" in capsys.readouterr().out
    names = sorted(os.listdir(f"{OUT}/volumes"))
    assert len(names) == 2 and all(n.startswith("s_v00") for n in names)
    output = ("--output", "restored.nii.gz")
    assert tiny_run("--save_dir", "out", "--limit", "2", *output) == 2
    assert "--limit leaves some out" in capsys.readouterr().err
    assert tiny_run("--save_dir", "out", *output) == 0  # the rest, later
    assert "2 of 3 images had been restored by an earlier run" in capsys.readouterr().out
    assert os.listdir(f"{OUT}/volumes") == ["s.nii.gz"]


def test_one_bad_volume_leaves_the_others_as_files_of_their_own(tiny_run, capsys):
    voxels = write_series_of("s.nii.gz")
    voxels[..., 1] = 7
    image = nib.load("s.nii.gz")
    nib.Nifti1Image(voxels, image.affine, image.header).to_filename("s.nii.gz")
    configure()
    assert tiny_run("--save_dir", "out", "--output", "restored.nii.gz") == 2
    assert "s.nii.gz, volume 1: every value is 7" in capsys.readouterr().err
    assert sorted(os.listdir(f"{OUT}/volumes")) == ["s_v000.nii.gz", "s_v002.nii.gz"]
    assert not os.path.exists("restored.nii.gz")


@pytest.mark.parametrize("given", [("broken",), (errno.ENOSPC, "no space left")])
def test_volumes_that_cannot_be_joined_stay(tmp_path, monkeypatch, given):
    write_series_of(tmp_path / "s.nii.gz")
    items = items_of({"root": str(tmp_path / "s.nii.gz")})

    def fail(self, parts, path):
        raise OSError(*given)

    monkeypatch.setattr(type(items[0].volume), "join", fail)
    if len(given) > 1:  # the run ends with it, as where a volume is written
        with pytest.raises(OSError, match="no space left"):
            write_back(items, tmp_path)
    else:
        *_, last = write_back(items, tmp_path)
        assert last.failed and "its volumes cannot be joined (broken)" in last.line
    assert len(os.listdir(tmp_path / "volumes")) == 3


def test_they_are_no_anatomical_image(tiny_run, capsys):
    write_series_of("sub-01_T1w.nii.gz")
    configure(root="sub-01_T1w.nii.gz")
    assert tiny_run("--save_dir", "out", "--bids") == 2
    assert "expected an anatomical image of one volume, found 3" in capsys.readouterr().err


def test_a_volume_of_thick_slices_is_restored_of_each(tmp_path):
    write_series_of(tmp_path / "s.nii.gz")
    volumes = dict.fromkeys(i.volume for i in items_of({"root": str(tmp_path / "s.nii.gz")}))
    for volume in volumes:
        os.makedirs(tmp_path / "slices", exist_ok=True)
        np.save(tmp_path / f"slices/{volume.name}.npy", np.zeros((12, 32, 32), np.float32))
    items = [Whole(volume, spacing=1.0) for volume in volumes]
    done = {volume.name for volume in volumes}
    *_, last = write_volumes(items, done, str(tmp_path), "a test", "settings")
    assert not last.failed
    assert nib.load(tmp_path / "volumes/s.nii.gz").shape == (32, 32, 12, 3)
