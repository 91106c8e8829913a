"""Files of raw k-space: what is read of them."""

import sys

import h5py
import numpy as np
import pytest

from data.dataloader import list_items
from data.kspace_files import read_header, read_raw
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

    def test_ismrmrd(self, tmp_path):
        ismrmrd = pytest.importorskip("ismrmrd")
        k, _ = head(slices=2)
        wide, path = oversampled(k, 96), str(tmp_path / "raw.h5")
        dataset = ismrmrd.Dataset(path)
        dataset.write_xml_header(HEADER.encode())
        for s in range(2):
            for line in np.flatnonzero(lines()):
                a = ismrmrd.Acquisition.from_array(np.ascontiguousarray(wide[s, :, :, line]))
                a.idx.slice, a.idx.kspace_encode_step_1 = s, line
                dataset.append_acquisition(a)
        dataset.close()
        raw = read_raw(path, "raw.h5", None)
        assert np.allclose(raw.kspace, k * lines(), atol=1e-5)
        assert (raw.mask == lines()).all() and raw.spacing == (4.0, 5.0, 5.0)

    def test_ismrmrd_without_its_library(self, tmp_path, monkeypatch):
        with h5py.File(tmp_path / "raw.h5", "w") as file:
            file.create_group("dataset")
        monkeypatch.setitem(sys.modules, "ismrmrd", None)
        with pytest.raises(UserError, match="pip install ismrmrd"):
            read_raw(str(tmp_path / "raw.h5"), "raw.h5", None)

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
        assert read_header(HEADER) == ((4.0, 5.0, 5.0), (48, 36))


def test_a_folder_of_scans_lists_their_slices(tmp_path):
    k, _ = head(slices=2)
    for name in ("a", "b"):
        write_fastmri(tmp_path / f"{name}.h5", k)
    items = list_items({"root": str(tmp_path), "measured": False})
    assert [i.name for i in items] == ["a_z000", "a_z001", "b_z000", "b_z001"]
