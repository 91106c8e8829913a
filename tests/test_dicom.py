"""DICOM as scanners and archives write it: encodings, enhanced files, mosaics, odd elements."""

import gzip
import os
import shutil
import warnings

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from tests.volume_files import (
    head,
    items_of,
    series_values,
    write_back,
    write_dicom,
    write_enhanced,
    write_series,
)
from util.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that its readers are experimental
    from nibabel.nicom import dicomwrappers

SHIPPED = os.path.join(os.path.dirname(nib.__file__), "nicom", "tests", "data")
CLIPPED = np.clip(head(), 0, np.percentile(head(), 99.9))


def encode(path, syntax, meta=True):
    """Write a file anew in another transfer syntax, with or without preamble and meta."""
    dataset = pydicom.dcmread(path)
    if syntax == RLELossless:
        dataset.compress(syntax)
        dataset.save_as(path)
        return
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    if not little:
        pixels = np.frombuffer(dataset.PixelData, "<u2")
        dataset.PixelData = pixels.astype(">u2").tobytes()
    if meta:
        dataset.file_meta.TransferSyntaxUID = syntax
        fresh = pydicom.Dataset()
        fresh.update({e.tag: e for e in dataset})
        fresh.file_meta = dataset.file_meta
        fresh.save_as(path, enforce_file_format=True)
    else:
        with open(path, "wb") as file:
            io = DicomIO(file)
            io.is_little_endian, io.is_implicit_VR = little, implicit
            write_dataset(io, dataset)


SYNTAXES = [
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
]


@pytest.mark.parametrize("enlarge", [1, 2])
@pytest.mark.parametrize("suffix", [".dcm", ""])
@pytest.mark.parametrize(
    ("syntax", "meta"), [(s, True) for s in SYNTAXES] + [(s, False) for s in SYNTAXES[:3]]
)
def test_every_encoding_comes_back(tmp_path, syntax, meta, suffix, enlarge):
    write_series(tmp_path / "s", head(), EchoTime="12.5", AcquisitionMatrix=[0, 32, 32, 0])
    for k in (7, 8, 9):
        encode(tmp_path / f"s/{k}.dcm", syntax, meta)
        os.rename(tmp_path / f"s/{k}.dcm", tmp_path / f"s/{k}{suffix}")
    items = items_of({"root": str(tmp_path / "s")})
    items[0].check_writable(enlarge)
    [written] = write_back(items, tmp_path, enlarge)
    assert not written.failed, written.line
    found = np.moveaxis(series_values(tmp_path / "volumes/s"), 0, 2)
    np.testing.assert_allclose(found, CLIPPED.repeat(enlarge, 0).repeat(enlarge, 1), atol=0.02)
    source = pydicom.dcmread(tmp_path / f"s/9{suffix}", force=True)
    dataset = pydicom.dcmread(tmp_path / "volumes/s/s_z000.dcm")
    assert dataset.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    for keyword in ("PatientName", "EchoTime", "AcquisitionMatrix", "ImageOrientationPatient"):
        assert dataset[keyword].value == source[keyword].value
    assert [float(s) for s in dataset.PixelSpacing] == [0.5 / enlarge, 0.75 / enlarge]


MISSING = ["SOPInstanceUID", "SeriesInstanceUID", "SOPClassUID", "StudyInstanceUID", "ImageType",
           "SeriesDescription", "SeriesNumber", "BitsStored", "PatientName"]  # fmt: skip


@pytest.mark.parametrize("keyword", MISSING)
@pytest.mark.parametrize("empty", [True, False])
def test_elements_that_a_source_lacks(tmp_path, keyword, empty):
    write_series(tmp_path / "s", head())
    for k in (7, 8, 9):
        dataset = pydicom.dcmread(tmp_path / f"s/{k}.dcm")
        if empty and keyword != "BitsStored":
            setattr(dataset, keyword, None)
        elif keyword != "BitsStored":
            delattr(dataset, keyword)
        dataset.save_as(tmp_path / f"s/{k}.dcm")
    items = items_of({"root": str(tmp_path / "s")})
    items[0].check_writable()
    [written] = write_back(items, tmp_path)
    assert not written.failed, written.line
    found = [pydicom.dcmread(tmp_path / f"volumes/s/s_z00{k}.dcm") for k in range(3)]
    assert len({d.SOPInstanceUID for d in found}) == 3
    assert (
        len({d.SeriesInstanceUID for d in found}) == len({d.StudyInstanceUID for d in found}) == 1
    )
    assert all(d.SOPClassUID and list(d.ImageType)[:2] == ["DERIVED", "SECONDARY"] for d in found)
    assert all("dmps test" in d.SeriesDescription for d in found)


ODD = {  # an element with more or fewer values than it should have
    "one image type": ("ImageType", "ORIGINAL"),
    "no image type": ("ImageType", ""),
    "several descriptions": ("SeriesDescription", ["t1", "axial"]),
    "several numbers": ("SeriesNumber", ["4", "5"]),
    "several photometrics": ("PhotometricInterpretation", ["MONOCHROME2", "MONOCHROME2"]),
    "several slopes": ("RescaleSlope", ["1", "1"]),
    "several rows": ("Rows", [32, 32]),
    "several names": ("PatientName", ["Doe^Jane", "Doe^J"]),
    "several windows": ("WindowCenter", ["40", "400"]),
    "several series": ("SeriesInstanceUID", ["1.2.3", "1.2.4"]),
    "no echo time": ("EchoTime", ""),
}


@pytest.mark.parametrize("case", ODD)
def test_elements_of_one_or_of_several_values(tmp_path, case):
    keyword, value = ODD[case]
    write_series(tmp_path / "s", head(), **{keyword: value})
    items = items_of({"root": str(tmp_path / "s")})
    if keyword == "RescaleSlope" or keyword == "Rows":
        try:
            items[0].read()
        except UserError as error:
            assert "\n" not in str(error)
            return
    [written] = write_back(items, tmp_path)
    assert not written.failed, written.line
    dataset = pydicom.dcmread(tmp_path / "volumes/s/s_z000.dcm")
    assert list(dataset.ImageType)[:2] == ["DERIVED", "SECONDARY"]
    expected = {"several descriptions": "t1 axial dmps test"}.get(case, "t1 dmps test")
    assert dataset.SeriesDescription == expected
    assert dataset.SeriesNumber == 1004


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagePositionPatient", "Rows"])
@pytest.mark.parametrize("value", [b"1 ", b"a\\b ", b"0\\0 ", b""])
def test_geometry_that_is_none_is_one_sentence(tmp_path, keyword, value):
    write_series(tmp_path, head())
    vr, tag = ("DS", pydicom.datadict.tag_for_keyword(keyword))
    dataset = pydicom.dcmread(tmp_path / "9.dcm")
    if keyword == "Rows":
        vr, value = "US", b"\0\0"
    dataset[tag] = pydicom.dataelem.RawDataElement(
        pydicom.tag.Tag(tag), vr, len(value), value, 0, False, True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(tmp_path / "9.dcm")
    with pytest.raises(UserError) as error:
        [item.read() for item in items_of({"root": str(tmp_path)})]
    assert "\n" not in str(error.value)


def test_what_cannot_be_written_is_left_out(tmp_path):
    """A private element that holds a text for a number, as anonymisers leave; and in a name."""
    write_series(tmp_path / "s", head())
    dataset = pydicom.dcmread(tmp_path / "s/9.dcm")
    dataset.add(DataElement(0x00181314, "DS", "90"))
    raw = pydicom.dataelem.RawDataElement(
        pydicom.tag.Tag(0x00200013), "IS", 4, b"1A  ", 0, False, True
    )
    dataset[0x00200013] = raw
    dataset.save_as(tmp_path / "s/9.dcm")
    items = items_of({"root": str(tmp_path / "s")})
    items[0].check_writable()
    [written] = write_back(items, tmp_path)
    assert not written.failed, written.line
    assert pydicom.dcmread(tmp_path / "volumes/s/s_z000.dcm").FlipAngle == 90


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


def test_a_mosaic_without_the_vendors_header_is_refused(tmp_path):
    path = unpack_mosaic(tmp_path / "m")
    dataset = pydicom.dcmread(path)
    dataset.remove_private_tags()
    dataset.save_as(path)
    with pytest.raises(UserError, match=r"m\.dcm: is a mosaic .*dcm2niix"):
        items_of({"root": str(tmp_path / "m")})


def test_a_private_scale_of_the_source_is_not_left(tmp_path):
    """dcm2niix prefers Philips' own scale to Rescale; of other pixels it would be wrong."""
    scale = DataElement(0x2005100E, "FL", 0.01), DataElement(0x20051410, "UL", 7)
    write_series(tmp_path / "s", head(), RealWorldValueMappingSequence=[pydicom.Dataset()],
                 a=scale[0], b=scale[1])  # fmt: skip
    write_back(items_of({"root": str(tmp_path / "s")}), tmp_path)
    dataset = pydicom.dcmread(tmp_path / "volumes/s/s_z000.dcm")
    assert 0x2005100E not in dataset and "RealWorldValueMappingSequence" not in dataset
    assert dataset[0x20051410].value in (7, b"\x07\0\0\0")


def test_slices_of_which_some_say_no_scale(tmp_path):
    """As in archives that dropped it from some files: a step in brightness from slice to slice."""
    write_series(tmp_path, head())
    for name, slope in (("8.dcm", 10), ("9.dcm", 10)):
        dataset = pydicom.dcmread(tmp_path / name)
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, 0
        dataset.save_as(tmp_path / name)
    with pytest.raises(UserError, match=r"1 of 3 slices, 7\.dcm for one, have no RescaleSlope"):
        items_of({"root": str(tmp_path)})


def test_each_slice_has_its_own_scale(tmp_path):
    write_series(tmp_path / "s", head())
    for k, slope in ((7, 4), (8, 2), (9, 1)):
        dataset = pydicom.dcmread(tmp_path / f"s/{k}.dcm")
        dataset.PixelData = (dataset.pixel_array // slope).astype("<u2").tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, 0
        dataset.save_as(tmp_path / f"s/{k}.dcm")
    write_back(items_of({"root": str(tmp_path / "s")}), tmp_path)
    found = np.moveaxis(series_values(tmp_path / "volumes/s"), 0, 2)
    assert np.abs(found - CLIPPED).max() < 4.1


def test_a_copy_of_a_slice_is_no_second_volume(tmp_path):
    write_series(tmp_path, head())
    shutil.copy(tmp_path / "8.dcm", tmp_path / "8 (copy).dcm")
    assert len([i.read() for i in items_of({"root": str(tmp_path)})]) == 3


def test_a_damaged_slice_is_not_passed_over(tmp_path):
    """A volume must not silently have one slice less."""
    write_series(tmp_path, head())
    dataset = pydicom.dcmread(tmp_path / "8.dcm")
    del dataset.Rows
    dataset.save_as(tmp_path / "8.dcm")
    items = {i.name: i for i in items_of({"root": str(tmp_path)})}
    with pytest.raises(UserError, match=r"8\.dcm: damaged, holds a header of MR Image Storage"):
        items["8"].read()


@pytest.mark.parametrize("signed", [True, False])
def test_bits_that_are_not_of_the_pixels_do_not_count(tmp_path, signed):
    """12 bits of 16, the rest holding an old overlay, or not carrying the sign on."""
    values = head() // 2 - (200 if signed else 0)
    extra = 0 if signed else (head() % 3 == 0) * 0x1000 + 0x8000
    write_series(tmp_path, (values & 0x0FFF) | extra, BitsStored=12, HighBit=11,
                 PixelRepresentation=int(signed))  # fmt: skip
    items = items_of({"root": str(tmp_path)})
    low, high = np.percentile(values, (0.1, 99.9))
    expected = (low if signed else 0, high)
    assert items[0].volume.scale[:2] == pytest.approx(expected)


def test_a_volume_that_cannot_be_written_keeps_its_slices_and_says_where(tmp_path, monkeypatch):
    write_series(tmp_path / "a", head())
    items = items_of({"root": str(tmp_path / "a")})

    def fail(*args, **kwargs):
        raise ValueError("the library objects")

    monkeypatch.setattr(type(items[0].volume), "write", fail)
    [written] = write_back(items, tmp_path / "out")
    assert written.failed and "the library objects" in written.line
    assert str(tmp_path / "out/slices/a_z*.npy") in written.line
    assert len(os.listdir(tmp_path / "out/slices")) == 3
    monkeypatch.setattr(type(items[0].volume), "try_writing", fail)
    for item in items:
        with pytest.raises(UserError, match="a: the restored volume could not be written .the lib"):
            item.check_writable()


def test_a_volume_that_cannot_be_written_fails_before_the_work(tiny_run, monkeypatch, capsys):
    """The network is not asked, the other images are restored, and the status says so."""
    from data.nifti import NiftiVolume
    from tests.volume_files import write_nifti

    write_nifti("images/v.nii", head())

    def fail(*args):
        raise ValueError("the library objects")

    monkeypatch.setattr(NiftiVolume, "try_writing", fail)
    assert tiny_run("--save_dir", "out") == 2
    heard = capsys.readouterr().err
    assert heard.count("could not be written (the library objects)") == 1
    results = os.listdir("out/tiny/super_resolution/x4/0.05/recon")
    assert sorted(results) == ["a1.png", "a10.png", "a2.png"]
    monkeypatch.undo()
    shutil.rmtree("out", ignore_errors=True)
