"""Files of raw k-space: what is read of them."""

import weakref

import numpy as np
import pytest

from data import kspace
from data.dataloader import list_items
from data.kspace_files import read_raw
from data.kspace_header import read_header
from tests.kspace_scans import HEADER, head, lines, oversampled, write_fastmri
from util.errors import UserError


class TestFiles:
    def test_fastmri_is_cropped_to_the_headers_size(self, tmp_path):
        k, u = head()
        path = tmp_path / "scan.h5"
        write_fastmri(path, oversampled(k, 96), HEADER, lines())
        raw = read_raw(str(path), "scan.h5", None)
        assert raw.kspace.shape == (1, 4, 48, 40) and raw.axis == "columns"
        assert np.allclose(raw.kspace, k * lines(), atol=1e-5)
        assert (raw.mask == lines()).all()
        assert raw.size == (48, 36) and raw.spacing == (4.0, 5.0, 5.0)

    def test_single_coil_files_have_no_axis_of_coils(self, tmp_path):
        k, _ = head(coils=1)
        write_fastmri(tmp_path / "scan.h5", k[:, 0])
        raw = read_raw(str(tmp_path / "scan.h5"), "scan.h5", None)
        assert raw.kspace.shape == (1, 1, 48, 40) and raw.mask.all()

    @pytest.mark.parametrize("ending", ["npy", "npz", "mat"])
    @pytest.mark.parametrize("order, axis", [("kx ky coil", "columns"), ("coil, ky, kx", "rows")])
    def test_arrays(self, tmp_path, ending, order, axis):
        from scipy.io import savemat

        k, _ = head()
        array = k[0].transpose(1, 2, 0) if order.startswith("kx") else k[0]
        path = str(tmp_path / f"scan.{ending}")
        if ending == "npy":
            np.save(path, array)
        elif ending == "npz":
            np.savez(path, ksp=array, other=np.ones(3))
        else:
            savemat(path, {"DATA": array})
        raw = read_raw(path, "scan", order)
        assert np.array_equal(raw.kspace, k) and raw.axis == axis

    def test_header(self):
        assert read_header(HEADER, "scan.h5") == ((4.0, 5.0, 5.0), (48, 36))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("<x>48</x>", "<x>0</x>", "reconSpace/matrixSize/x: expected an integer from 1, found '0'"),
        ("<y>36</y>", "<y>-36</y>", "reconSpace/matrixSize/y: expected an integer from 1"),
        ("<x>48</x>", "<x>many</x>", "matrixSize/x: expected an integer from 1, found 'many'"),
        ("<x>192</x>", "<x>-192</x>", "fieldOfView_mm/x: expected a number from 0, found '-192'"),
        ("reconSpace", "space", "no encoding/reconSpace in it"),
        ("</encoding>", "", "not valid XML"),
    ],
)
def test_a_headers_impossible_numbers_are_named(tmp_path, before, after, says):
    write_fastmri(tmp_path / "scan.h5", head()[0], HEADER.replace(before, after))
    [item] = list_items({"root": str(tmp_path / "scan.h5"), "measured": True})
    with pytest.raises(UserError, match=f"^scan.h5: ismrmrd_header: .*{says}"):
        item.read()


@pytest.mark.parametrize("name", ["scan.h5", "scan.npy"])
def test_a_file_without_slices(tmp_path, name):
    path, none = tmp_path / name, np.zeros((0, 4, 48, 40), np.complex64)
    write_fastmri(path, none) if name.endswith("h5") else np.save(path, none)
    with pytest.raises(UserError, match=f"{name}: k-space of shape 0×4×48×40, expected at least"):
        list_items({"root": str(path), "measured": True})


def test_a_folder_of_scans_lists_their_slices(tmp_path):
    k, _ = head(slices=2)
    for name in ("a", "b"):
        write_fastmri(tmp_path / f"{name}.h5", k)
    items = list_items({"root": str(tmp_path), "measured": False})
    assert [i.name for i in items] == ["a_z000", "a_z001", "b_z000", "b_z001"]


def test_one_file_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """Each is read once while its slices come one after the other, and then let go."""
    k, _ = head(slices=2)
    for name in ("a", "b"):
        write_fastmri(tmp_path / f"{name}.h5", k)
    items = list_items({"root": str(tmp_path), "measured": False})
    read = []
    monkeypatch.setattr(
        kspace, "read_raw", lambda path, *rest: read.append(path) or read_raw(path, *rest)
    )
    kept = []
    for item in items:
        item.read()
        assert np.array_equal(item.acquisition().kspace, k[item.index])
        kept.append(weakref.ref(item.volume.raw().kspace))
    assert len(read) == 2
    assert [array() is None for array in kept] == [True, True, False, False]


class TestSlicesSampledDifferently:
    """Lines or points that a slice lacks were not measured there: they are not 0."""

    def read(self, path, k, **more):
        write_fastmri(path, k, **more)
        return read_raw(str(path), "scan.h5", None)

    def test_lines(self, tmp_path):
        k, _ = head(slices=3)
        k[1] *= np.arange(40) % 4 != 1
        with pytest.raises(UserError, match="scan.h5: slice 2 of 3 lacks 10 lines .* of their own"):
            self.read(tmp_path / "scan.h5", k)

    def test_lines_along_rows(self, tmp_path):
        k, _ = head(slices=2)
        k[0, :, ::3] = 0
        np.save(tmp_path / "scan.npy", k)
        with pytest.raises(UserError, match="slice 1 of 2 lacks 16 lines"):
            read_raw(str(tmp_path / "scan.npy"), "scan.npy", "slice coil ky kx")
        k[1, :, ::3] = 0
        np.save(tmp_path / "scan.npy", k)
        raw = read_raw(str(tmp_path / "scan.npy"), "scan.npy", "slice coil ky kx")
        assert np.array_equal(raw.mask, np.arange(48) % 3 != 0)

    @pytest.mark.parametrize("share", [0.5, 0.9])
    def test_points(self, tmp_path, share):
        """Also where all slices together have nearly all points of every line."""
        k, _ = head(slices=2)
        points = np.random.default_rng(0).random((2, 1, 48, 40)) < share
        lacking = np.count_nonzero(points[1] & ~points[0])
        with pytest.raises(UserError, match=f"slice 1 of 2 lacks {lacking} points"):
            self.read(tmp_path / "scan.h5", k * points)

    def test_what_the_files_own_mask_leaves_out_does_not_count(self, tmp_path):
        k, _ = head(slices=2)
        k[0] *= lines()
        assert np.array_equal(self.read(tmp_path / "scan.h5", k, mask=lines()).mask, lines())

    def test_empty_slices_and_single_zeros_are_let_through(self, tmp_path):
        """Beside a partial echo, and lines that were filled up at the sides."""
        k, _ = head(slices=4)
        k[:, :, :3] = 0
        k[..., :4] = k[..., -3:] = 0
        k[0] = k[3] = 0
        k[1, :, 10, 20] = k[2, :, 30, 4] = 0
        expected = (np.arange(40) >= 4) & (np.arange(40) < 37)
        assert np.array_equal(self.read(tmp_path / "scan.h5", k).mask, expected)
