"""NIfTI and DICOM: what is read, shown and written back."""

import csv
import os
import shutil

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from data.dataloader import read_picture
from data.scale import find_scale
from guided_diffusion.measurements import get_operator
from tests.conftest import LINEAR, task, write_yaml
from tests.volume_files import (
    dicom_values,
    head,
    items_of,
    not_a_number,
    write_back,
    write_dicom,
    write_nifti,
    write_series,
)
from util.errors import UserError

DENOISE = "tiny/denoise/gaussian/0.1"
OBLIQUE = np.array([[0, 0.3, 4.9, 9], [-1.1, 0.1, 0.2, 5], [0.1, 1.2, -1, -7], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("affine", [np.diag([1, 2, 5, 1.0]), np.diag([-1, 1, -1, 1.0]), OBLIQUE])
def test_a_nifti_volume_comes_back_as_it_was(tmp_path, axis, affine):
    voxels = head((6, 8, 5))
    write_nifti(tmp_path / "a.nii", voxels, affine)
    items = items_of({"root": str(tmp_path / "a.nii"), "axis": axis})
    assert len(items) == (5 if axis is None else voxels.shape[axis])
    write_back(items, tmp_path)
    source, written = nib.load(tmp_path / "a.nii"), nib.load(tmp_path / "volumes/a.nii.gz")
    clipped = np.clip(voxels, 0, np.percentile(voxels, 99.9))
    np.testing.assert_allclose(written.get_fdata(), clipped, rtol=1e-5)
    assert np.array_equal(written.affine, source.affine)
    changed = {
        k for k in source.header if source.header[k].tobytes() != written.header[k].tobytes()
    }
    assert changed <= {"datatype", "bitpix", "scl_slope", "scl_inter"}
    assert written.header.get_xyzt_units() == ("mm", "sec")


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1), (8, 6, 4, 1), (1, 8, 6)])
def test_odd_shapes_come_back_in_their_shape(tmp_path, shape):
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    write_nifti(tmp_path / "a.nii.gz", voxels, slope=(2.0, 3.0))
    items = items_of({"root": str(tmp_path)})
    assert items[0].read().size == 48
    assert len(items) == voxels.size // 48
    write_back(items, tmp_path)
    written = nib.load(tmp_path / "volumes/a.nii.gz")
    assert written.shape == shape
    units = 2 * voxels + 3
    expected = np.clip(units, None, np.percentile(units, 99.9))
    np.testing.assert_allclose(written.get_fdata(), expected, rtol=1e-5)


@pytest.mark.parametrize("affine", [np.diag([1, 1, 1, 1.0]), np.diag([-1, 1, -1, 1.0]), OBLIQUE])
@pytest.mark.parametrize(("direction", "rows", "cols"), [(2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_slices_are_shown_as_radiologists_look_at_them(tmp_path, affine, direction, rows, cols):
    """Voxels that hold one of their world coordinates (right, anterior, superior), which falls
    along rows or columns."""
    axis = int(np.argmax(np.abs(affine[direction, :3] / np.linalg.norm(affine[:3, :3], axis=0))))
    world = nib.affines.apply_affine(affine, np.moveaxis(np.indices((6, 7, 8)), 0, -1))
    for shown, along in ((rows, 1), (cols, 2)):
        write_nifti(tmp_path / "a.nii", world[..., shown].astype(np.float32), affine)
        image = items_of({"root": str(tmp_path / "a.nii"), "axis": axis})[2].read()
        step = np.diff(image, axis=along).mean(), np.diff(image, axis=3 - along).mean()
        assert step[0] < 0 and abs(step[0]) > abs(step[1])


def test_the_slice_axis_is_the_thickest_else_the_axial_one(tmp_path):
    voxels = head((6, 8, 5))

    def count(affine):
        write_nifti(tmp_path / "a.nii", voxels, affine)
        return len(items_of({"root": str(tmp_path)}))

    assert count(np.diag([3, 1, 1, 1.0])) == 6
    assert count(np.diag([1, 1, 2, 1.0])) == 5
    coronal_first = np.eye(4)[[0, 2, 1, 3]]  # the second voxel axis runs upwards
    assert count(coronal_first) == 8


@pytest.mark.parametrize(("kind", "factor"), [("bicubic", 2), ("bicubic", 4), ("standard", 4)])
@pytest.mark.parametrize("form", ["nifti", "dicom"])
def test_a_finer_grid_lies_where_the_operator_looks(tmp_path, form, kind, factor):
    """A linear function of world position, on the fine grid, is the same one after A."""
    coarse = head((8, 10, 3))
    if form == "nifti":
        write_nifti(tmp_path / "a.nii", coarse, OBLIQUE)
        write_back(items_of({"root": str(tmp_path / "a.nii")}), tmp_path, enlarge=factor)
        image = nib.load(tmp_path / "volumes/a.nii.gz")
        fine, before = image.affine, nib.load(tmp_path / "a.nii").affine
        shape = image.shape
        sides = np.linalg.norm(before[:3, :3], axis=0) / [factor, factor, 1]
        np.testing.assert_allclose(image.header.get_zooms(), sides, rtol=1e-5)
        np.testing.assert_allclose(image.get_qform(), fine, atol=0.2)  # OBLIQUE has some shear
    else:
        write_series(tmp_path / "s", coarse)
        write_back(items_of({"root": str(tmp_path / "s")}), tmp_path, enlarge=factor)
        before, fine = (
            affine_of(pydicom.dcmread(path))
            for path in (tmp_path / "s/9.dcm", tmp_path / "volumes/s/s_z000.dcm")
        )
        shape = (8 * factor, 10 * factor, 3)
    weights = np.array([0.3, -0.7, 0.5])
    values = nib.affines.apply_affine(fine, np.moveaxis(np.indices(shape), 0, -1)) @ weights
    operator = get_operator(
        "super_resolution",
        (1, *shape[:2]),
        type=kind,
        scale_factor=factor,
        dtype=torch.float64,
        singular_value_threshold=0.0,
    )
    seen = operator.forward(torch.from_numpy(values[None, None, ..., 0]))[0, 0].numpy()
    grid = np.moveaxis(np.indices((8, 10, 1)), 0, -1)
    expected = (nib.affines.apply_affine(before, grid) @ weights)[..., 0]
    inside = slice(2, -2)  # the edges are reflected
    np.testing.assert_allclose(seen[inside, inside], expected[inside, inside], atol=1e-5)


def affine_of(dataset):
    """Voxel (row, column, slice) to patient coordinates."""
    along_row, along_column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    down, right = (float(s) for s in dataset.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = down * along_column, right * along_row
    affine[:3, 3] = np.array(dataset.ImagePositionPatient, float)
    return affine


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_dicom_series_comes_back_in_its_units(tmp_path, photometric):
    voxels = head((16, 12, 4))
    write_series(tmp_path / "s", voxels, RescaleSlope=2.5, RescaleIntercept=-100,
                 PhotometricInterpretation=photometric, WindowCenter=5, WindowWidth=9)  # fmt: skip
    os.rename(tmp_path / "s/9.dcm", tmp_path / "s/IM.0001")  # known by its contents
    (tmp_path / "s/readme.txt").write_text("no image")
    (tmp_path / "s/DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    items = items_of({"root": str(tmp_path / "s")})
    assert [i.name for i in items] == [f"s_z00{k}" for k in range(4)]
    units = voxels * 2.5 - 100
    low, high = np.percentile(units, (0.1, 99.9))
    bright = int(np.argmax(voxels[..., 1]))  # low values are bright in MONOCHROME1
    assert (items[1].read().flat[bright] > 0) == (photometric == "MONOCHROME2")
    write_back(items, tmp_path)
    assert len(os.listdir(tmp_path / "volumes/s")) == 4
    for k in range(4):
        path = tmp_path / f"volumes/s/s_z{k:03d}.dcm"
        expected = np.clip(units[..., k], low, high)
        np.testing.assert_allclose(dicom_values(path), expected, atol=(high - low) / 65535)
        source = tmp_path / f"s/{'IM.0001' if k == 0 else f'{9 - k}.dcm'}"
        before, after = pydicom.dcmread(source), pydicom.dcmread(path)
        assert after.BitsAllocated == after.BitsStored == 16
        assert after.ImageType == ["DERIVED", "SECONDARY", "M"]
        assert after.SeriesDescription == "t1 dmps test"
        assert after.PhotometricInterpretation == photometric
        for keyword in (
            "PatientName",
            "PatientID",
            "StudyInstanceUID",
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
            "SOPClassUID",
            "WindowCenter",
        ):
            assert after[keyword].value == before[keyword].value
        for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber"):
            assert after[keyword].value != before[keyword].value
        assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID
        assert after.SourceImageSequence[0].ReferencedSOPInstanceUID == before.SOPInstanceUID
    names = os.listdir(tmp_path / "volumes/s")
    uids = [pydicom.dcmread(tmp_path / "volumes/s" / n).SOPInstanceUID for n in names]
    assert len(set(uids)) == 4


def test_a_series_is_chosen_by_number_or_uid(tmp_path):
    write_series(tmp_path, head((8, 8, 2)))
    write_dicom(tmp_path / "other", head((8, 8, 1))[..., 0], 0, series="1.2.9", SeriesNumber=12)
    with pytest.raises(UserError, match=r"holds 2 series: .*4 \(t1, 2 files, 1\.2\.3\).*12 \(t1"):
        items_of({"root": str(tmp_path)})
    assert len(items_of({"root": str(tmp_path), "series": 4})) == 2
    assert len(items_of({"root": str(tmp_path), "series": "1.2.9"})) == 1
    with pytest.raises(UserError, match="not one is series 5"):
        items_of({"root": str(tmp_path), "series": 5})


def test_one_scale_for_the_whole_volume(tmp_path):
    """A slice keeps its brightness among the others; outliers do not set the scale."""
    voxels = np.zeros((16, 16, 8), np.float32)
    voxels[4:12, 4:12] = 100 * np.arange(1, 9)
    voxels[0, 0, 0] = 1e6
    write_nifti(tmp_path / "a.nii", voxels)
    items = items_of({"root": str(tmp_path)})
    np.testing.assert_allclose([i.read().max() for i in items[1:]], np.arange(2, 9) / 4 - 1)
    assert items[0].read().max() == 1  # clipped


@pytest.mark.parametrize(
    ("values", "inverted", "black", "white"),
    [
        (np.linspace(50, 1050, 1001), False, 0, 1049),
        (np.linspace(-500, 500, 1001), False, -499, 499),
        (np.linspace(0, 1000, 1001), True, 999, 1),
        (np.eye(1, 5000).ravel() * 7, False, 0, 7),
    ],
)
def test_scale(values, inverted, black, white):
    found = find_scale(values, inverted, "x")
    np.testing.assert_allclose(found[:2], (black, white), atol=1e-9)
    assert found[2] == np.mean((values < min(found[:2])) | (values > max(found[:2])))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.uint32])
def test_pictures_of_any_range_are_scaled_by_percentiles(tmp_path, dtype):
    image = np.linspace(0, 4000, 1024).reshape(32, 32).astype(dtype)
    iio.imwrite(tmp_path / "x.tif", image)
    x, scale = read_picture(str(tmp_path / "x.tif"))
    white = np.percentile(image, 99.9)
    assert scale == (0, pytest.approx(white))
    np.testing.assert_allclose(x[0], np.clip(image / white, 0, 1) * 2 - 1, atol=1e-5)


def test_a_deep_picture_is_also_written_in_its_units(tiny_run):
    image = iio.imread("images/a1.png").astype(np.uint16) * 4  # 10 of 16 bits
    shutil.rmtree("images")
    os.mkdir("images")
    iio.imwrite("images/deep.png", image)
    np.save("images/signed.npy", image.astype(np.int16) * 8 - 2000)
    assert tiny_run("--save_dir", "out") == 0
    recon = "out/tiny/super_resolution/x4/0.05/recon"
    assert sorted(os.listdir(recon)) == ["deep.png", "deep.tif", "signed.png", "signed.tif"]
    for name in ("deep", "signed"):
        _, (black, white) = read_picture(f"images/{name}.{'png' if name == 'deep' else 'npy'}")
        values = iio.imread(f"{recon}/{name}.tif")
        assert values.dtype == np.float32 and values.shape == (32, 32)
        preview = iio.imread(f"{recon}/{name}.png") / 255
        np.testing.assert_allclose((values - black) / (white - black), preview, atol=0.51 / 255)
    os.remove(f"{recon}/deep.tif")
    assert tiny_run("--save_dir", "out") == 0
    assert os.path.exists(f"{recon}/deep.tif")


def denoise_slices():
    config = task({"name": "denoise"}, {"name": "gaussian", "sigma": 0.1})
    config["data"]["volume_mode"] = "slices"
    write_yaml("task.yaml", config)


@pytest.fixture
def mixed_run(tiny_run):
    """tiny_run on a picture and a volume of three slices, to be denoised one by one."""
    for name in ("a2", "a10"):
        os.remove(f"images/{name}.png")
    write_nifti("images/v.nii.gz", head())
    denoise_slices()
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 2})
    return tiny_run


def volume_files(out):
    """Every file's bytes but for the durations in the tables."""
    found = {}
    for root, _, files in os.walk(out):
        for name in files:
            if name not in ("metrics.csv", "summary.json"):
                with open(os.path.join(root, name), "rb") as file:
                    found[os.path.relpath(os.path.join(root, name), out)] = file.read()
    return found


def test_a_run_goes_on_by_slice_and_ends_with_the_same_bytes(mixed_run, capsys):
    assert mixed_run("--save_dir", "whole", "--num_samples", "2") == 0
    whole = volume_files(f"whole/{DENOISE}")
    assert "v.nii.gz: 3 slices" in capsys.readouterr().out
    with open(f"whole/{DENOISE}/metrics.csv", encoding="utf-8") as file:
        assert [r["image"] for r in csv.DictReader(file)] == ["a1", "v_z000", "v_z001", "v_z002"]

    assert mixed_run("--save_dir", "broken", "--num_samples", "2", "--limit", "2") == 0
    assert "v.nii.gz: 1 of 3 slices restored, no volume written" in capsys.readouterr().out
    assert not os.path.exists(f"broken/{DENOISE}/volumes")
    before = os.stat(f"broken/{DENOISE}/recon/v_z000.png").st_mtime_ns
    assert mixed_run("--save_dir", "broken", "--num_samples", "2") == 0
    assert "2 of 4 images had been restored" in capsys.readouterr().out
    assert os.stat(f"broken/{DENOISE}/recon/v_z000.png").st_mtime_ns == before
    assert volume_files(f"broken/{DENOISE}") == whole
    os.remove(f"broken/{DENOISE}/slices/v_z001.npy")
    assert mixed_run("--save_dir", "broken", "--num_samples", "2") == 0
    assert "3 of 4 images had been restored" in capsys.readouterr().out
    assert volume_files(f"broken/{DENOISE}") == whole

    # the volumes hold what the slices' own files do, in the input's units
    volume = nib.load(f"whole/{DENOISE}/volumes/v.nii.gz")
    std = nib.load(f"whole/{DENOISE}/std/v.nii.gz")
    assert np.array_equal(volume.affine, std.affine) and volume.shape == std.shape == (32, 32, 3)
    white = np.percentile(head(), 99.9)
    shown = np.flip(volume.get_fdata()[..., 1].T) / white * 255
    assert np.abs(shown - iio.imread(f"whole/{DENOISE}/recon/v_z001.png")).max() <= 0.51
    spread = np.load(f"whole/{DENOISE}/std/v_z001.npy")[0] * white / 2
    np.testing.assert_allclose(np.flip(std.get_fdata()[..., 1].T), spread, rtol=1e-5)


@pytest.mark.parametrize("form", ["nifti", "dicom"])
def test_a_measured_volume_is_restored_on_a_finer_grid(tiny_run, form):
    """Slices of an odd size, one of them empty, and noise that nobody knows."""
    shutil.rmtree("images")
    voxels = head((18, 22, 3)) + np.random.default_rng(0).normal(0, 30, (18, 22, 3))
    voxels = np.abs(np.rint(voxels)).astype(np.int16)
    voxels[..., 2] = 0
    if form == "nifti":
        os.mkdir("images")
        write_nifti("images/v.nii.gz", voxels)
    else:
        write_series("images", voxels)
    write_yaml(
        "task.yaml",
        task({"name": "super_resolution", "scale_factor": 2}, {"name": "rician", "sigma": "auto"}),
    )
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 2})
    assert tiny_run("--save_dir", "out", "--measured") == 0
    folder = "out/tiny/super_resolution/x2/auto"
    with open(f"{folder}/metrics.csv", encoding="utf-8") as file:
        sigmas = [float(row["sigma"]) for row in csv.DictReader(file)]
    white = np.percentile(voxels, 99.9)
    np.testing.assert_allclose(sigmas, 60 / white, rtol=0.2)  # the volume's, also where it is empty
    if form == "nifti":
        assert nib.load(f"{folder}/volumes/v.nii.gz").shape == (36, 44, 3)
    else:
        dataset = pydicom.dcmread(f"{folder}/volumes/images/images_z000.dcm")
        assert dataset.pixel_array.shape == (36, 44)
        assert [float(s) for s in dataset.PixelSpacing] == [0.25, 0.375]


def test_a_dicom_run_is_repeatable(tiny_run):
    shutil.rmtree("images")
    write_series("images", head((32, 32, 2)))
    denoise_slices()
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 2})
    for out in ("one", "two"):
        assert tiny_run("--save_dir", out, "--num_samples", "2") == 0
    assert volume_files("one") == volume_files("two")
    assert sorted(os.listdir(f"one/{DENOISE}/volumes/images")) == [
        "images_z000.dcm",
        "images_z001.dcm",
    ]
    std = f"one/{DENOISE}/std/images/images_z001.dcm"
    spread = np.load(f"one/{DENOISE}/std/images_z001.npy")[0]
    scale = np.percentile(head((32, 32, 2)), 99.9) / 2
    np.testing.assert_allclose(dicom_values(std), spread * scale, atol=0.01)
    mean = pydicom.dcmread(f"one/{DENOISE}/volumes/images/images_z001.dcm")
    assert mean.SeriesInstanceUID != pydicom.dcmread(std).SeriesInstanceUID
    assert tiny_run("--save_dir", "two", "--num_samples", "2", "--seed", "1", "--overwrite") == 0
    other = pydicom.dcmread(f"two/{DENOISE}/volumes/images/images_z001.dcm")
    assert mean.SeriesInstanceUID != other.SeriesInstanceUID


def test_one_volume_of_a_4d_file(tmp_path):
    voxels = np.stack([head(), 2 * head()], axis=3)
    write_nifti(tmp_path / "a.nii.gz", voxels)
    items = items_of({"root": str(tmp_path), "volume": 1})
    write_back(items, tmp_path)
    written = nib.load(tmp_path / "volumes/a.nii.gz")
    assert written.shape == (32, 32, 3)
    expected = np.clip(voxels[..., 1], 0, np.percentile(voxels[..., 1], 99.9))
    np.testing.assert_allclose(written.get_fdata(), expected, rtol=1e-5)
    with pytest.raises(UserError, match="no volume 2; data.volume: 0 to 1"):
        items_of({"root": str(tmp_path), "volume": 2})
    with pytest.raises(UserError, match=r"data\.axis: expected 0, 1 or 2, found 3"):
        items_of({"root": str(tmp_path), "axis": 3})


def test_a_bad_volume_among_good_ones_in_a_run(mixed_run, capsys):
    not_a_number()
    write_nifti("images/c.nii", np.stack([head()] * 4, axis=3).reshape(32, 32, 3, 2, 2))
    assert mixed_run("--save_dir", "out") == 2
    errors = capsys.readouterr().err
    assert errors.count("error: bad.nii: holds values that are not finite\n") == 1
    assert errors.count("error: c.nii: expected a 3-D image, found 5 axes") == 1
    assert "4 of 8 images could not be restored: bad_z000, bad_z001, bad_z002, c" in errors
    assert os.listdir(f"out/{DENOISE}/volumes") == ["v.nii.gz"]
