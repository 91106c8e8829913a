"""DICOM files of many frames: enhanced ones, and mosaics."""

import gzip
import os
import warnings

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
)

from tests.volume_files import (
    encode,
    head,
    items_of,
    write_back,
    write_dicom,
    write_enhanced,
)
from util.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that its readers are experimental
    from nibabel.nicom import dicomwrappers

SHIPPED = os.path.join(os.path.dirname(nib.__file__), "nicom", "tests", "data")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("enlarge", [1, 2])
def test_enhanced_multi_frame_comes_back(tmp_path, syntax, enlarge):
    """Frames out of order, with a scale and a geometry of their own functional groups."""
    voxels = np.stack([head(seed=k)[..., 0] for k in range(4)], axis=2)
    places = [6.0, 0.0, 9.0, 3.0]
    os.mkdir(tmp_path / "s")
    path = tmp_path / "s/e.dcm"
    write_enhanced(path, voxels, places, WindowCenter=3)
    if syntax != ExplicitVRLittleEndian:
        encode(path, syntax)
    (tmp_path / "s/copy").write_bytes(gzip.compress(path.read_bytes()))
    os.remove(path)
    items = items_of({"root": str(tmp_path / "s")})
    assert [i.name for i in items] == [f"s_z00{k}" for k in range(4)]
    order = np.argsort(places)
    units = 2.5 * voxels[..., order] - 100.0
    low, high = np.percentile(units, (0.1, 99.9))
    black = 0 if units.min() >= 0 else low
    shown = np.clip(2 * (units - black) / (high - black) - 1, -1, 1)
    for k, item in enumerate(items):
        np.testing.assert_allclose(item.read()[0], shown[..., k], atol=1e-5)
    items[0].check_writable(enlarge)
    [written] = write_back(items, tmp_path, enlarge)
    assert not written.failed, written.line
    assert os.listdir(tmp_path / "volumes/s") == ["s.dcm"]
    dataset = pydicom.dcmread(tmp_path / "volumes/s/s.dcm")
    assert dataset.SOPClassUID == EnhancedMRImageStorage and dataset.NumberOfFrames == 4
    # read by nibabel, which knows nothing of this program
    wrapper = dicomwrappers.wrapper_from_data(dataset)
    assert wrapper.image_shape == (32 * enlarge, 32 * enlarge, 4)
    [scale] = dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    found = dataset.pixel_array * float(scale.RescaleSlope) + float(scale.RescaleIntercept)
    fine = np.clip(units, black, high).repeat(enlarge, 0).repeat(enlarge, 1)
    np.testing.assert_allclose(np.moveaxis(found, 0, 2), fine, atol=0.05)
    again = items_of({"root": str(tmp_path / "volumes/s")})[0].volume
    for frame, place in zip(again.frames, sorted(places), strict=True):
        shift = (enlarge - 1) / (2 * enlarge)
        corner = np.array([10 - 0.6 * place, 20 + 0.8 * place, 30])
        corner -= shift * (0.5 * np.array([0, 0, -1]) + 0.75 * np.array([0.8, 0.6, 0]))
        np.testing.assert_allclose(frame.position, corner, atol=1e-4)
        np.testing.assert_allclose(frame.spacing, np.array([0.5, 0.75]) / enlarge)


def test_one_echo_of_an_enhanced_file(tmp_path):
    voxels = np.stack([head(seed=k)[..., 0] for k in range(4)], axis=2)
    write_enhanced(tmp_path / "e.dcm", voxels, [0.0, 0.0, 3.0, 3.0])
    with pytest.raises(UserError, match=r"e\.dcm show the same slice; data\.volume: 0 to 1"):
        items_of({"root": str(tmp_path / "e.dcm")})
    items = items_of({"root": str(tmp_path / "e.dcm"), "volume": 1})
    write_back(items, tmp_path / "out")
    dataset = pydicom.dcmread(tmp_path / "out/volumes/e/e.dcm")
    echoes = [
        f.MREchoSequence[0].EffectiveEchoTime for f in dataset.PerFrameFunctionalGroupsSequence
    ]
    assert echoes == [30, 30] and dataset.NumberOfFrames == 2
    [scale] = dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    found = dataset.pixel_array * float(scale.RescaleSlope) + float(scale.RescaleIntercept)
    units = 2.5 * np.moveaxis(voxels[..., [1, 3]], 2, 0) - 100
    assert np.mean(np.abs(found - units) < 0.05) > 0.99


def test_one_time_point_of_a_classic_series(tmp_path):
    for time in range(2):
        for k in range(3):
            write_dicom(tmp_path / f"{time}_{k}.dcm", head(seed=time)[..., k], 3.0 * k,
                        TemporalPositionIdentifier=time + 1)  # fmt: skip
    with pytest.raises(UserError, match=r"data\.volume: 0 to 1 chooses one of 2 volumes"):
        items_of({"root": str(tmp_path)})
    items = items_of({"root": str(tmp_path), "volume": 1})
    paths = [os.path.basename(f.path) for f in items[0].volume.frames]
    assert paths == ["1_0.dcm", "1_1.dcm", "1_2.dcm"]
    with pytest.raises(UserError, match="no volume 2"):
        items_of({"root": str(tmp_path), "volume": 2})


BAD_FRAMES = {
    "no groups": ({"PerFrameFunctionalGroupsSequence": None}, "no place in space"),
    "too few groups": ({"NumberOfFrames": 9}, "holds 9 frames and describes 3"),
    "no spacing": ({"SharedFunctionalGroupsSequence": []}, "lacks .*PixelSpacing"),
    "colours": ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "colours"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_frames_without_a_place_are_one_sentence(tmp_path, case):
    tags, says = BAD_FRAMES[case]
    write_enhanced(tmp_path / "e.dcm", head(), [0.0, 3.0, 6.0], **tags)
    with pytest.raises(UserError, match=says):
        items_of({"root": str(tmp_path / "e.dcm")})


def unpack_mosaic(folder):
    """nibabel's own diffusion-weighted mosaic of a Siemens scanner, with other pixels."""
    os.makedirs(folder)
    with gzip.open(os.path.join(SHIPPED, "siemens_dwi_1000.dcm.gz")) as file:
        dataset = pydicom.dcmread(file)
    pixels = np.random.default_rng(0).integers(0, 900, (dataset.Rows, dataset.Columns), np.uint16)
    dataset.PixelData = pixels.tobytes()  # which are all 0 in it
    dataset.save_as(folder / "m.dcm")
    return folder / "m.dcm"


@pytest.mark.parametrize("enlarge", [1, 2])
def test_a_mosaic_is_split_as_nibabel_splits_it(tmp_path, enlarge):
    path = unpack_mosaic(tmp_path / "m")
    wrapper = dicomwrappers.wrapper_from_file(path)
    items = items_of({"root": str(tmp_path / "m")})
    volume = items[0].volume
    assert len(items) == wrapper.image_shape[2] == 48 and volume.shape == wrapper.image_shape[:2]
    voxels = wrapper.get_data().astype(float)
    white = np.percentile(voxels, 99.9)
    # the program's slices run along the normal of rows and columns, nibabel's as the tiles do
    places = [f.number for f in volume.frames]
    for k in (0, 20, 47):
        shown = np.clip(2 * voxels[..., places[k]] / white - 1, -1, 1)
        np.testing.assert_allclose(items[k].read()[0], shown, atol=1e-5)
        place = wrapper.affine @ [0, 0, places[k], 1]  # nibabel's axes run left and posterior, too
        np.testing.assert_allclose(volume.frames[k].position, place[:3], atol=1e-3)
    items[0].check_writable(enlarge)
    [written] = write_back(items, tmp_path, enlarge)
    assert not written.failed, written.line
    dataset = pydicom.dcmread(tmp_path / "volumes/m/m_z020.dcm")
    assert "MOSAIC" not in dataset.ImageType and not any(e.tag.is_private for e in dataset)
    assert (dataset.Rows, dataset.Columns) == (128 * enlarge, 128 * enlarge)
    again = items_of({"root": str(tmp_path / "volumes/m")})
    assert len(again) == 48
    np.testing.assert_allclose(
        again[20].read()[0], items[20].read()[0].repeat(enlarge, 0).repeat(enlarge, 1), atol=0.01
    )


def test_pixels_in_the_upper_bits_are_refused(tmp_path):
    write_dicom(tmp_path / "a.dcm", head()[..., 0] << 4, 0, BitsStored=12, HighBit=15)
    with pytest.raises(UserError, match="expected the highest bit of 12 to be bit 11, found"):
        items_of({"root": str(tmp_path)})[0].read()


def test_a_mosaic_without_the_vendors_header_is_refused(tmp_path):
    path = unpack_mosaic(tmp_path / "m")
    dataset = pydicom.dcmread(path)
    dataset.remove_private_tags()
    dataset.save_as(path)
    with pytest.raises(UserError, match=r"m\.dcm: is a mosaic .*dcm2niix"):
        items_of({"root": str(tmp_path / "m")})
