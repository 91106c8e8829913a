"""Files of ISMRMRD: which acquisitions are lines of the image."""

import sys

import h5py
import numpy as np
import pytest

from data.dataloader import list_items
from data.kspace_files import NO_IMAGE, read_raw
from tests.kspace_scans import HEADER, head, lines, oversampled
from util.errors import UserError

EMBEDDED = HEADER.replace(
    "</encoding>",
    "<parallelImaging><accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1>"
    "<kspace_encoding_step_2>1</kspace_encoding_step_2></accelerationFactor>"
    "<calibrationMode>embedded</calibrationMode></parallelImaging></encoding>",
)


class Writer:
    """Writes acquisitions in the order in which they are given."""

    def __init__(self, path, header=HEADER):
        self.ismrmrd = pytest.importorskip("ismrmrd")
        self.path = str(path / "raw.h5")
        self.dataset = self.ismrmrd.Dataset(self.path)
        self.dataset.write_xml_header(header.encode())

    def line(self, k, line, flags=(), **idx):
        """One line of a slice's k-space (coils, rows, lines)."""
        a = self.ismrmrd.Acquisition.from_array(np.ascontiguousarray(k[:, :, line]))
        a.idx.kspace_encode_step_1 = line
        for name, value in idx.items():
            setattr(a.idx, name, value)
        for flag in flags:
            a.set_flag(getattr(self.ismrmrd, f"ACQ_IS_{flag}"))
        self.dataset.append_acquisition(a)

    def image(self, k, measured, **idx):
        for line in np.flatnonzero(measured):
            self.line(k, line, **idx)

    def read(self):
        self.dataset.close()
        return read_raw(self.path, "raw.h5", None)


@pytest.fixture
def wide():
    """(slices, coils, 96, 40), twice the rows of `head`."""
    return oversampled(head(slices=2)[0], 96)


def same(raw, k, measured=None):
    measured = lines() if measured is None else measured
    return np.array_equal(raw.mask, measured) and np.allclose(raw.kspace, k * measured, atol=1e-5)


def test_reversed_readouts_are_refused(tmp_path, wide):
    writer = Writer(tmp_path)
    writer.line(wide[0], 3)
    writer.line(wide[0], 4, ["REVERSE"])
    with pytest.raises(UserError, match="raw.h5: readouts in reverse"):
        writer.read()


def test_slices(tmp_path, wide):
    writer = Writer(tmp_path)
    for s in range(2):
        writer.image(wide[s], lines(), slice=s)
    raw = writer.read()
    assert same(raw, head(slices=2)[0]) and raw.spacing == (4.0, 5.0, 5.0)


@pytest.mark.parametrize("flag", [*NO_IMAGE, "PARALLEL_CALIBRATION"])
def test_what_is_no_line_of_the_image_is_left_out(tmp_path, wide, flag):
    """Of other values, where the image has a line and where it has none, of another slice too."""
    writer = Writer(tmp_path)
    writer.image(wide[0], lines())
    for line in (1, 20):
        writer.line(7 * wide[1], line, [flag], repetition=3)
    writer.line(wide[1], 2, [flag], slice=4)
    raw = writer.read()
    assert len(raw.kspace) == 1 and same(raw, head(slices=2)[0][:1])


def test_calibration_lines_that_are_of_the_image_are_kept(tmp_path, wide):
    writer = Writer(tmp_path)
    both = ["PARALLEL_CALIBRATION", "PARALLEL_CALIBRATION_AND_IMAGING"]
    for line in np.flatnonzero(lines()):
        writer.line(wide[0], line, both[line % 2 :] if 15 <= line < 25 else [])
    assert same(writer.read(), head(slices=2)[0][:1])


def test_calibration_lines_that_are_embedded_are_lines_between_the_others(tmp_path, wide):
    writer = Writer(tmp_path, EMBEDDED)
    every_third = np.arange(40) % 3 == 0
    writer.image(wide[0], every_third)
    for line in np.flatnonzero(lines() & ~every_third):
        writer.line(wide[0], line, ["PARALLEL_CALIBRATION"])
    assert same(writer.read(), head(slices=2)[0][:1])


def test_repeated_lines_are_averaged(tmp_path, wide):
    """Some three times, of which the mean is the object; some once."""
    writer = Writer(tmp_path)
    once = np.flatnonzero(lines())[:4]
    for line in np.flatnonzero(lines()):
        shares = [1.0] if line in once else [0.5, 2.0, 0.5]
        for i, share in enumerate(shares):
            writer.line(share * wide[0], line, average=i, segment=i)
    assert same(writer.read(), head(slices=2)[0][:1])


@pytest.mark.parametrize("counter", ["contrast", "repetition", "phase", "set"])
def test_several_images_of_a_slice_are_refused(tmp_path, wide, counter):
    writer = Writer(tmp_path)
    for i in (0, 2):
        writer.image(wide[0], lines(), **{counter: i})
    with pytest.raises(UserError, match=f"raw.h5: idx.{counter} has the values 0, 2, expected one"):
        writer.read()


def test_segments_may_share_a_slice_but_not_a_line(tmp_path, wide):
    writer = Writer(tmp_path)
    for line in np.flatnonzero(lines()):
        writer.line(wide[0], line, segment=line % 2)
    assert same(writer.read(), head(slices=2)[0][:1])
    (tmp_path / "raw.h5").unlink()
    writer = Writer(tmp_path)
    writer.image(wide[0], lines())
    writer.line(wide[0], 20, segment=1)
    with pytest.raises(UserError, match="line 20 of slice 1 is in segments 0 and 1"):
        writer.read()


@pytest.mark.parametrize("lines", ["0", "-40"])
def test_an_impossible_matrix_is_named(tmp_path, wide, lines):
    writer = Writer(tmp_path, HEADER.replace("<y>40</y>", f"<y>{lines}</y>"))
    writer.line(wide[0], 20)
    says = f"encodedSpace/matrixSize/y: expected an integer from 1, found '{lines}'"
    with pytest.raises(UserError, match=f"raw.h5: ismrmrd_header: encoding/{says}"):
        writer.read()


@pytest.mark.parametrize("trajectory", ["radial", "spiral", "goldenangle", "other"])
def test_what_does_not_lie_on_a_grid_is_refused(tmp_path, wide, trajectory):
    given = f"<trajectory>{trajectory}</trajectory></encoding>"
    writer = Writer(tmp_path, HEADER.replace("</encoding>", given))
    writer.image(wide[0], lines())
    says = f"encoding/trajectory: expected cartesian or epi, found '{trajectory}'"
    with pytest.raises(UserError, match=f"raw.h5: ismrmrd_header: {says}"):
        writer.read()


def grid_header(encoded, field, recon, shown):
    """Matrices (x, y), and fields of view in mm, of 5 mm slices."""
    spaces = {"encodedSpace": (encoded, field), "reconSpace": (recon, shown)}
    return "<ismrmrdHeader><encoding><trajectory>cartesian</trajectory>" + "".join(
        f"<{space}><matrixSize><x>{n[0]}</x><y>{n[1]}</y><z>1</z></matrixSize><fieldOfView_mm>"
        f"<x>{mm[0]}</x><y>{mm[1]}</y><z>5</z></fieldOfView_mm></{space}>"
        for space, (n, mm) in spaces.items()
    ) + "</encoding></ismrmrdHeader>"  # fmt: skip


GRIDS = {  # matrices and fields of view; readouts from and to; discarded at both ends
    "whole": (((128, 64), (256, 128), (64, 64), (128, 128)), (0, 128), (0, 0)),
    "asymmetric echo": (((128, 64), (256, 128), (64, 64), (128, 128)), (32, 128), (0, 0)),
    "cut at its end": (((128, 64), (256, 128), (64, 64), (128, 128)), (0, 96), (0, 0)),
    "discarded samples": (((128, 64), (256, 128), (64, 64), (128, 128)), (32, 128), (5, 2)),
    "interpolated lines": (((128, 32), (256, 128), (64, 64), (128, 128)), (0, 128), (0, 0)),
    "interpolated": (((64, 32), (256, 128), (128, 128), (128, 128)), (0, 64), (0, 0)),
    "not oversampled": (((64, 80), (128, 160), (64, 64), (128, 128)), (0, 64), (0, 0)),
}


@pytest.mark.parametrize("case", GRIDS)
def test_a_rectangle_has_its_place_and_size_in_mm(tmp_path, case):
    """Of 60×40 mm at (12, -16) mm, by the Fourier transform of a rectangle."""
    (encoded, field, recon, shown), (first, last), discarded = GRIDS[case]
    sides, middle = (60, 40), (12, -16)
    waves = [
        np.sinc(side * f) * np.exp(-2j * np.pi * f * at)
        for n, mm, side, at in zip(encoded, field, sides, middle, strict=True)
        for f in [(np.arange(n) - n // 2) / mm]  # cycles per mm
    ]
    writer = Writer(tmp_path, grid_header(encoded, field, recon, shown))
    for line in range(encoded[1]):
        readout = np.pad(waves[0][first:last] * waves[1][line], discarded, constant_values=9)
        a = writer.ismrmrd.Acquisition.from_array(readout[None].astype(np.complex64))
        a.idx.kspace_encode_step_1 = line
        a.center_sample = encoded[0] // 2 - first + discarded[0]
        a.discard_pre, a.discard_post = discarded
        writer.dataset.append_acquisition(a)
    writer.dataset.close()
    volume = list_items({"root": writer.path, "measured": True})[0].volume
    pixel = [mm / n for n, mm in zip(encoded, field, strict=True)]
    assert volume.raw().spacing == (*pixel, 5.0)
    image = volume.cropped(volume.load()[0])[0]
    assert image.shape == tuple(round(mm / p) for mm, p in zip(shown, pixel, strict=True))
    bright = image > image.max() / 3
    for axis in (0, 1):
        inside = np.flatnonzero(bright.mean(axis=1 - axis) > 0.5 * bright.mean(axis=1 - axis).max())
        assert abs(len(inside) * pixel[axis] - sides[axis]) <= 1.5 * pixel[axis]
        place = (inside.mean() - image.shape[axis] // 2) * pixel[axis]
        assert abs(place - middle[axis]) <= pixel[axis]
    partial = last - first < encoded[0]
    assert volume.raw().mask.ndim == (2 if partial else 1)
    if partial:
        rows = np.arange(encoded[0])
        assert np.array_equal(volume.raw().mask.any(axis=1), (first <= rows) & (rows < last))


def test_a_readout_that_does_not_fit_is_refused(tmp_path):
    writer = Writer(tmp_path, grid_header((64, 4), (64, 4), (64, 4), (64, 4)))
    a = writer.ismrmrd.Acquisition.from_array(np.ones((1, 40), np.complex64))
    a.center_sample = 4
    writer.dataset.append_acquisition(a)
    says = "a readout of 40 samples with center_sample 4 does not fit into encodedSpace/matrixSize"
    with pytest.raises(UserError, match=says):
        writer.read()


def test_nothing_of_an_image(tmp_path, wide):
    writer = Writer(tmp_path)
    writer.line(wide[0], 20, ["NOISE_MEASUREMENT"])
    with pytest.raises(UserError, match="no acquisition of an image in it"):
        writer.read()


def test_without_its_library(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_group("dataset")
    monkeypatch.setitem(sys.modules, "ismrmrd", None)
    with pytest.raises(UserError, match="pip install ismrmrd"):
        read_raw(str(tmp_path / "raw.h5"), "raw.h5", None)
