"""NIfTI and DICOM files that are no use: one sentence, and the others are read."""

import gzip
import os

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.conftest import task, write_yaml
from tests.volume_files import (
    five_dimensions,
    head,
    items_of,
    not_a_number,
    write_dicom,
    write_nifti,
    write_series,
)
from util.errors import UserError


def lying_header():
    write_nifti("images/bad.nii", head())
    with open("images/bad.nii", "r+b") as file:
        file.seek(42)
        file.write(np.array([30000, 30000, 30000], "<i2").tobytes())


def truncated():
    write_nifti("whole.nii", head())
    with open("whole.nii", "rb") as file, gzip.open("images/bad.nii.gz", "wb") as out:
        out.write(file.read()[:4000])


def cut_off():
    write_nifti("images/bad.nii.gz", np.random.default_rng(0).random((32, 32, 9)))
    os.truncate("images/bad.nii.gz", 40000)


def colours():
    voxels = np.zeros((8, 8, 3), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), "images/bad.nii")


def text():
    with open("images/bad.nii.gz", "w", encoding="utf-8") as file:
        file.write("no volume")


def series(**tags):
    def write():
        write_series("images", head())
        write_dicom("images/5.dcm", **{"pixels": head()[..., 0], "place": 30, **tags})

    return write


def no_dicom():
    with open("images/bad.dcm", "w", encoding="utf-8") as file:
        file.write("no image")


RGB = np.zeros((32, 32, 3), np.uint8)
BAD = {
    "NaN": (not_a_number, r"bad\.nii: holds values that are not finite"),
    "constant": (
        lambda: write_nifti("images/bad.nii", np.full((32, 32, 3), 7, np.int16)),
        r"bad\.nii: every value is 7",
    ),
    "lying header": (lying_header, r"bad\.nii: truncated or damaged"),
    "truncated": (truncated, r"bad\.nii\.gz: truncated or damaged"),
    "cut off": (cut_off, r"bad\.nii\.gz: truncated or damaged"),
    "RGB NIfTI": (colours, r"bad\.nii: holds RGB colours"),
    "complex": (
        lambda: write_nifti("images/bad.nii", np.zeros((8, 8, 3), np.complex64)),
        r"bad\.nii: expected real numbers, found complex64",
    ),
    "5-D": (
        lambda: write_nifti("images/bad.nii", np.zeros((8, 8, 3, 2, 3), np.int16)),
        r"bad\.nii: .*5 axes, 8×8×3×2×3",
    ),
    "no NIfTI": (text, r"bad\.nii\.gz: cannot be read as NIfTI"),
    "two series": (
        series(series="1.2.9"),
        r"images: holds 2 series: 4 \(t1, 1 files, 1\.2\.9\); 4 \(t1, 3",
    ),
    "sizes": (series(pixels=head((32, 64, 1))[..., 0]), r"32×32 \(3 files\)"),
    "RGB": (
        series(pixels=RGB, SamplesPerPixel=3, PhotometricInterpretation="RGB", BitsAllocated=8),
        r"5\.dcm: holds colours \(RGB\)",
    ),
    "no position": (series(ImagePositionPatient=None), r"5\.dcm: lacks ImagePositionPatient"),
    "same position": (series(place=3.0), r"show the same slice"),
    "directions": (
        series(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        r"lie in several directions",
    ),
    "frames": (series(NumberOfFrames=2), r"5\.dcm: holds 2 frames"),
    "no pixels": (series(PixelData=None), r"5\.dcm: its pixels cannot be read"),
    "broken RLE": (
        series(PixelData=encapsulate([b"broken"]), syntax=RLELossless),
        r"5\.dcm: its pixels cannot be read \(.* plugins: .*64 bytes.*\)$",
    ),
    "broken JPEG 2000": (
        series(PixelData=encapsulate([b"broken"]), syntax=JPEG2000Lossless),
        r"5\.dcm: its pixels cannot be read \(.* plugins: \w+: [^<>]+\)$",
    ),
    "few pixels": (series(PixelData=b"\0\0"), r"5\.dcm: its pixels cannot be read"),
    "no DICOM": (no_dicom, r"bad\.dcm: cannot be read as DICOM"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_volumes_are_one_sentence(tmp_path, monkeypatch, case):
    """A picture beside them is still read."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("images")
    iio.imwrite("images/a_good.png", np.zeros((32, 32), np.uint8))
    prepare, says = BAD[case]
    prepare()
    items = items_of({"root": "images"})
    assert items[0].name == "a_good" and items[0].read().shape == (1, 32, 32)
    bad = items[-1] if case == "no DICOM" else items[1]
    for _ in range(2):
        with pytest.raises(UserError, match=says) as error:
            bad.read()
        assert "\n" not in str(error.value)


def test_a_compressed_series_without_a_decoder_says_what_to_install(tmp_path, monkeypatch):
    from pydicom.pixels import get_decoder

    monkeypatch.setattr(type(get_decoder(JPEGLSLossless)), "is_available", False)
    write_dicom(tmp_path / "a.dcm", head()[..., 0], 0, syntax=JPEGLSLossless,
                PixelData=encapsulate([b"\xff\xd8\xff\xd9"]))  # fmt: skip
    with pytest.raises(UserError, match="compressed as JPEG-LS .*install .*pyjpegls"):
        items_of({"root": str(tmp_path)})


def test_one_file_as_data_root(tiny_run, capsys):
    write_yaml("task.yaml", task(root="images/a2.png"))
    assert tiny_run("--save_dir", "out") == 0
    assert os.listdir("out/tiny/super_resolution/x4/0.05/recon") == ["a2.png"]
    five_dimensions()
    write_yaml("task.yaml", task(root="images/bad.nii"))
    assert tiny_run("--save_dir", "other") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: bad.nii: expected a 3-D image, found 5 axes")
    assert not os.path.exists("other")


def test_volumes_and_pictures_may_not_share_names(tmp_path):
    write_nifti(tmp_path / "a.nii", head())
    iio.imwrite(tmp_path / "a_z001.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError, match=r"a\.nii and a_z001\.png would carry one name"):
        items_of({"root": str(tmp_path)})
    os.rename(tmp_path / "a_z001.png", tmp_path / "a.png")  # the volume as a whole
    with pytest.raises(UserError, match=r"a\.png and a\.nii would carry one name"):
        items_of({"root": str(tmp_path)})
    os.rename(tmp_path / "a.png", tmp_path / "c.png")
    assert len(items_of({"root": str(tmp_path)})) == 4


def test_files_of_one_and_of_several_volumes_may_not_share_names(tmp_path):
    write_nifti(tmp_path / "a.nii", head())
    write_nifti(tmp_path / "a.nii.gz", np.stack([head(), head()], axis=3))
    with pytest.raises(UserError, match=r"a\.nii and a\.nii\.gz, volume 0 would carry one name"):
        items_of({"root": str(tmp_path)})
