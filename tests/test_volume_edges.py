"""Volumes at the edge of what can be restored, as a whole and slice by slice."""

import os

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import pytest

from data.dicom_frames import group_values
from data.volumes import Whole
from tests.conftest import task, write_yaml
from tests.volume_files import (
    OBLIQUE,
    ball,
    head,
    items_of,
    series_values,
    world_centre,
    write_enhanced,
    write_nifti,
    write_series,
    written_by,
)
from util.image_files import deep_png

MODES = ("volume", "slices")
OUT = "out/tiny/denoise/gaussian/0.05"
NOTHING = {"name": "clean"}  # so that ddnm gives back what it was given


def configure(root, mode=None, operator="denoise", noise=None, **data):
    config = task({"name": operator}, noise, root, {"method": "ddnm", "params": {"eta": 0}})
    config["data"] |= {"measured": True, **({"volume_mode": mode} if mode else {}), **data}
    write_yaml("task.yaml", config)


def error_of(run, capsys, *arguments):
    """The one sentence that a run ends with."""
    assert run("--save_dir", "out", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "Traceback" not in error
    return error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("kind", ["NIfTI", "DICOM"])
def test_one_or_two_slices_are_restored(tiny_run, mode, slices, kind):
    voxels = head()[..., :slices]
    if kind == "NIfTI":
        write_nifti("v.nii", voxels)
    else:
        write_series("v", voxels)
    configure("v.nii" if kind == "NIfTI" else "v", mode, noise=NOTHING)
    assert tiny_run("--save_dir", "out", "--num_samples", "2", "--batch_size", "4") == 0
    out = "out/tiny/denoise/clean/0"
    if kind == "NIfTI":
        found = nib.load(f"{out}/volumes/v.nii.gz").get_fdata()
    else:
        found = np.moveaxis(series_values(f"{out}/volumes/v"), 0, 2)
    assert found.shape == voxels.shape
    assert np.abs(found - voxels).max() < 1
    assert os.path.exists(f"{out}/report.html")


@pytest.mark.parametrize("slices", [1, 2])
def test_one_or_two_thick_slices_are_made_thin(tiny_run, slices):
    """Of one alone the thickness is known where the file says it, as DICOM does: 3 mm of 0.5."""
    write_series("v", head()[..., :slices])
    configure("v", operator="thick_slices")
    assert tiny_run("--save_dir", "out", "--batch_size", "16") == 0
    assert len(os.listdir("out/tiny/thick_slices/header/0.05/volumes/v")) == 6 * slices
    write_nifti("two.nii", head()[..., :2])
    configure("two.nii", operator="thick_slices")
    assert tiny_run("--save_dir", "nifti", "--batch_size", "16") == 0
    image = nib.load("nifti/tiny/thick_slices/header/0.05/volumes/two.nii.gz")
    assert image.shape == (32, 32, 8)


@pytest.mark.parametrize("mode", MODES)
def test_missing_slices_of_a_series_are_named_with_where(tiny_run, capsys, mode):
    write_series("s", head((32, 32, 9)))
    for missing in (6, 2):  # the fourth and the eighth
        os.remove(f"s/{missing}.dcm")
    configure("s", mode)
    says = "3 mm and, between slices 3 and 4 of 7, 6 mm; between slices 6 and 7 of 7, 6 mm"
    if mode == "volume":
        error = error_of(tiny_run, capsys)
        assert error.startswith("error: s: ") and says in error and "slice is missing" in error
        assert "data.volume_mode: slices" in error
        assert not os.path.exists("out")
        return
    assert tiny_run("--save_dir", "out") == 0
    said = capsys.readouterr().err
    assert f"note: s: its distances are uneven ({says}); a slice may be missing" in said
    assert "report.html" not in said
    sources = [pydicom.dcmread(f"s/{n}") for n in os.listdir("s")]
    written = [pydicom.dcmread(f"{OUT}/volumes/s/{n}") for n in os.listdir(f"{OUT}/volumes/s")]
    places = [sorted(tuple(map(float, d.ImagePositionPatient)) for d in some)
              for some in (sources, written)]  # fmt: skip
    assert places[0] == places[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("affine", [np.diag([-1, 1, -4, 1.0]), np.diag([1, -1, 4, 1.0]), OBLIQUE,
                                    np.diag([1, 1.7, 4, 1.0])],
                         ids=["left", "posterior", "oblique", "not square"])  # fmt: skip
def test_a_landmark_stays_in_its_voxel_and_place(tiny_run, mode, affine):
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    voxels = ball((24, 26, 5), np.array([11.3, 14.2, 2.2]), sides, 7.0)
    write_nifti("v.nii", voxels, affine)
    configure("v.nii", mode, noise=NOTHING)
    assert tiny_run("--save_dir", "out", "--batch_size", "5") == 0
    image = nib.load("out/tiny/denoise/clean/0/volumes/v.nii.gz")
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    np.testing.assert_allclose(image.header.get_zooms(), sides, rtol=1e-6)
    found = image.get_fdata()
    assert np.abs(found - voxels).max() < 10  # of 800; white is the 99.9th percentile
    before, after = world_centre(voxels, affine), world_centre(found, image.affine)
    assert np.abs(before - after).max() < 0.1 * sides.min()


def frame_centre(path):
    """The world position of the bright voxels of an enhanced file, in DICOM's axes."""
    dataset = pydicom.dcmread(path)
    total, weight, places = np.zeros(3), 0.0, []
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for number, pixels in enumerate(dataset.pixel_array):
        scale = [float(group_values(dataset, number, k)[0])
                 for k in ("RescaleSlope", "RescaleIntercept")]  # fmt: skip
        place = np.array(group_values(dataset, number, "ImagePositionPatient"), float)
        along = np.array(group_values(dataset, number, "ImageOrientationPatient"), float)
        down, right = map(float, group_values(dataset, number, "PixelSpacing"))
        weights = np.clip(pixels * scale[0] + scale[1] - 400, 0, None)
        rows, columns = np.indices(weights.shape)
        world = place + columns[..., None] * right * along[:3] + rows[..., None] * down * along[3:]
        total, weight = total + (weights[..., None] * world).sum((0, 1)), weight + weights.sum()
        places.append(place)
    assert "PlaneOrientationSequence" in shared
    return total / weight, np.array(places), dataset


def test_a_landmark_stays_where_it_is_in_an_enhanced_file_of_thick_slices(tmp_path):
    voxels = ball((24, 26, 11), np.array([11.3, 14.2, 5.4]), np.array([0.5, 0.75, 3.0]), 4.0)
    stored = np.rint((voxels + 100) / 2.5)  # the file's own scale
    path = str(tmp_path / "e.dcm")
    write_enhanced(path, stored, [3.0 * k for k in range(11)])
    volume = items_of({"root": path})[0].volume
    assert volume.spacing == pytest.approx(3) and volume.plane.thickness == 3
    [(line, failed, _)] = written_by([Whole(volume, 0.7)], 0.7, tmp_path)
    assert not failed, line
    before, _, _ = frame_centre(path)
    after, places, dataset = frame_centre(tmp_path / "volumes/e/e.dcm")
    assert np.abs(before - after).max() < 0.1 * 0.7
    assert len(places) == 48 == dataset.NumberOfFrames
    steps = np.diff(places, axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), 0.7, rtol=1e-4)
    np.testing.assert_allclose(steps / 0.7, [[-0.6, 0.8, 0]] * 47, atol=1e-4)
    for number in (0, 47):
        for keyword in ("SliceThickness", "SpacingBetweenSlices"):
            assert float(group_values(dataset, number, keyword)[0]) == 0.7
    again = items_of({"root": str(tmp_path / "volumes/e")})[0].volume  # read as it was meant
    assert again.spacing == pytest.approx(0.7, rel=1e-3) and len(again.slices) == 48


MASKS = {
    "size": ({"shape": (30, 32, 3)}, "m.nii has 30×32×3 voxels, and v.nii has 32×32×3"),
    "slices": ({"shape": (32, 32, 4)}, "theirs, found 4 in m.nii"),
    "place": ({"affine": nib.affines.from_matvec(np.diag([1, 1, 4]), [0, 5, 0])},
              "m.nii lies elsewhere than v.nii, a corner 5 mm off"),
    "voxels": ({"affine": np.diag([1.1, 1, 4, 1])}, "a corner 3.1 mm off; resample it"),
    "turned": ({"affine": np.diag([1, 1, -4, 1.0])}, "a corner 16 mm off"),
}  # fmt: skip


def write_mask(path="m.nii", shape=(32, 32, 3), affine=None):
    mask = np.zeros(shape, np.uint8)
    mask[8:24, 8:24] = 1
    write_nifti(path, mask, affine)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", MASKS)
def test_a_mask_of_another_grid_is_refused(tiny_run, capsys, mode, case):
    arguments, says = MASKS[case]
    write_nifti("v.nii", head())
    write_mask(**arguments)
    configure("v.nii", mode, mask="m.nii")
    assert says in error_of(tiny_run, capsys)
    assert not os.path.exists("out")


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_the_same_grid_stored_otherwise_is_taken(tiny_run, mode):
    """Voxels run the other way in the file, and lie in the same places; or it says no place."""
    write_nifti("v.nii", head())
    flipped = np.array([[-1, 0, 0, 31], [0, 1, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1.0]])
    write_mask(affine=flipped)
    configure("v.nii", mode, mask="m.nii")
    assert tiny_run("--save_dir", "out") == 0
    image = nib.Nifti1Image(np.uint8(np.indices((32, 32, 3))[0] > 9), None)
    image.header.set_zooms((1, 1, 4))
    nib.save(image, "m.nii")
    assert tiny_run("--save_dir", "nowhere") == 0


NAN_AT = {  # voxels that are not finite, whether data.mask is a file, what is said of it
    "outside, few": ((2, 3, 1), True, None),
    "outside, a corner": ((slice(0, 6), slice(0, 6), slice(None)), True, None),
    "outside of the mask's slices": ((slice(10, 20), slice(10, 20), 0), True, None),
    "inside, one": ((12, 13, 1), True, "1 values inside of data.mask are not finite, the first of "
                                       "them in slice 2 of 3"),
    "inside, from the edge": ((slice(0, 10), slice(0, 10), 2), True, "4 values inside of data."),
    "no mask, one": ((12, 13, 1), False, "holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", NAN_AT)
def test_nan_is_kept_outside_of_the_mask_and_refused_inside(tiny_run, capsys, mode, case):
    place, masked, says = NAN_AT[case]
    voxels = head().astype(np.float32)
    voxels[place] = np.nan
    write_nifti("v.nii", voxels)
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[8:24, 8:24, 1:] = 1  # there is no head in the first slice
    write_nifti("m.nii", mask)
    configure("v.nii", mode, **({"mask": "m.nii"} if masked else {}))
    if says is not None:
        assert tiny_run("--save_dir", "out") == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "error: v.nii: " in line]
        assert len(said) == 1 and says in said[0]
        assert not os.path.exists(f"{OUT}/volumes")
        return
    assert tiny_run("--save_dir", "out") == 0
    found = nib.load(f"{OUT}/volumes/v.nii.gz").get_fdata()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(voxels))


def test_a_mask_is_turned_like_its_image(tmp_path):
    """What is masked is what lies there, whichever way the files run."""
    write_nifti(tmp_path / "v.nii", head())
    flipped = np.array([[-1, 0, 0, 31], [0, 1, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1.0]])
    write_nifti(tmp_path / "f.nii", head()[::-1], flipped)
    straight, turned = (items_of({"root": str(tmp_path / n)})[0].volume for n in ("v.nii", "f.nii"))
    assert straight.world.apart(turned.world) == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(straight.read(1), turned.read(1), atol=1e-6)


def test_a_series_and_the_nifti_made_of_it_lie_in_one_place(tmp_path):
    write_series(tmp_path / "s", head((32, 34, 4)))
    series = items_of({"root": str(tmp_path / "s")})[0].volume
    first = pydicom.dcmread(tmp_path / "s/9.dcm")  # at 0 mm
    corner = np.array(first.ImagePositionPatient, float) * [-1, -1, 1]
    along = np.array(first.ImageOrientationPatient, float).reshape(2, 3) * [-1, -1, 1]
    step = np.array([0.6, -0.8, 0]) * 3
    down, right = (float(v) for v in first.PixelSpacing)
    for index in ((0, 0, 0), (3, 31, 33)):
        expected = corner + index[0] * step + index[1] * down * along[1]
        expected = expected + index[2] * right * along[0]
        found = nib.affines.apply_affine(series.world.affine, index)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_16_bit_colour_picture_goes_out_as_it_came(tiny_run):
    rows, columns = np.mgrid[:32, :32]
    waves = [np.sin(rows / 5 + c) * np.cos(columns / 7) for c in range(3)]
    pixels = np.uint16(30000 + 29000 * np.stack(waves, axis=2))
    with open("c.png", "wb") as file:
        file.write(deep_png(pixels))
    configure("c.png", noise=NOTHING)
    assert tiny_run("--save_dir", "out", "--output", "r.png") == 0
    import imageio_ffmpeg

    with open("r.png", "rb") as file:
        assert file.read()[24:26] == b"\x10\x02"  # 16 bits, RGB
    frames = imageio_ffmpeg.read_frames("r.png", pix_fmt="rgb48le", bits_per_pixel=48)
    assert next(frames)["source_size"] == (32, 32)
    found = np.frombuffer(next(frames), "<u2").reshape(32, 32, 3)
    frames.close()
    assert np.abs(found.astype(int) - pixels).max() <= 2
    assert iio.imread("r.png").dtype == np.uint8  # a reader that cuts 8 bits off still shows it
