"""DICOM as scanners and archives write it: encodings, elements that are missing or odd."""

import os
import shutil
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from tests.volume_files import (
    encode,
    head,
    items_of,
    series_values,
    write_back,
    write_series,
)
from util.errors import UserError

CLIPPED = np.clip(head(), 0, np.percentile(head(), 99.9))


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
