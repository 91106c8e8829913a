"""NIfTI headers as other tools write them: bad geometry, two files, Analyze, every type."""

import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest
from nibabel.cifti2 import cifti2_axes

from tests.volume_files import head, items_of, write_back, write_nifti
from util.errors import UserError

AFFINE = np.array([[-2, 0.1, 0, 30], [0.1, 2, 0, -20], [0, 0, 4, 10], [0, 0, 0, 1.0]])
TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


def patch(path, *changes):
    """Overwrite places of a NIfTI-1 header: (offset, struct format, values...)."""
    with open(path, "rb") as file:
        contents = bytearray(file.read())
    for offset, form, *numbers in changes:
        struct.pack_into(f"<{form}", contents, offset, *numbers)
    with open(path, "wb") as file:
        file.write(contents)


ZERO_SFORM = (280, "12f", *[0.0] * 12)
CODES = (252, "2h")  # of qform and sform
QUATERNION = (256, "3f")
USED = {  # changes → what is then taken for the geometry; None where nothing is left
    "zero sform": ([ZERO_SFORM, (*CODES, 1, 1)], "qform"),
    "zero sform alone": ([ZERO_SFORM, (*CODES, 0, 1)], "voxel sizes"),
    "NaN in the sform": ([(284, "f", np.nan), (*CODES, 1, 1)], "qform"),
    "NaN in the qform": ([(*QUATERNION, np.nan, 0, 0), (*CODES, 1, 1)], "sform"),
    "NaN in the qform alone": ([(*QUATERNION, np.nan, 0, 0), (*CODES, 1, 0)], "voxel sizes"),
    "a qform that is no rotation": ([(*QUATERNION, 3.0, 4.0, 0), (*CODES, 1, 1)], "sform"),
    "neither": ([ZERO_SFORM, (*QUATERNION, 3.0, 4.0, 0), (*CODES, 1, 1)], "voxel sizes"),
    "nothing at all": ([ZERO_SFORM, (*CODES, 0, 1), (80, "3f", np.nan, 1, 1)], None),
}


@pytest.mark.parametrize("case", USED)
@pytest.mark.parametrize("enlarge", [1, 2])
def test_a_bad_geometry_is_replaced_by_the_next_that_the_header_has(tmp_path, case, enlarge):
    changes, taken = USED[case]
    write_nifti(tmp_path / "bad.nii", head(), AFFINE)
    write_nifti(tmp_path / "good.nii", head(), AFFINE)
    forms = nib.load(tmp_path / "good.nii")
    affine = {"sform": forms.get_sform(), "qform": forms.get_qform(),
              "voxel sizes": forms.header.get_base_affine(), None: None}[taken]  # fmt: skip
    patch(tmp_path / "bad.nii", *changes)
    items = items_of({"root": str(tmp_path)})
    assert [i.name for i in items[-3:]] == ["good_z000", "good_z001", "good_z002"]
    if taken is None:
        with pytest.raises(UserError, match=r"bad\.nii: its affine is singular"):
            items[0].read()
        return
    items = items[:3]
    for item in items:
        item.check_writable(enlarge)
    assert (items[0].note is None) == (taken == "sform")
    [written] = write_back(items, tmp_path, enlarge)
    assert not written.failed, written.line
    finer = np.diag([1 / enlarge, 1 / enlarge, 1, 1])
    finer[:2, 3] = -(enlarge - 1) / (2 * enlarge)
    again = nib.load(tmp_path / "volumes/bad.nii.gz")
    np.testing.assert_allclose(again.affine, affine @ finer, atol=1e-4)
    white = np.percentile(head(), 99.9)
    voxels = np.clip(head(), 0, white).repeat(enlarge, 0).repeat(enlarge, 1)
    np.testing.assert_allclose(again.get_fdata(), voxels, rtol=1e-5)


@pytest.mark.parametrize("sform", [0, 1])
@pytest.mark.parametrize("enlarge", [1, 2])
def test_a_quaternion_too_long_by_rounding(tmp_path, sform, enlarge):
    """b² + c² + d² = 1 + 5e-7, which nibabel refuses and viewers do not: half a turn about x."""
    write_nifti(tmp_path / "a.nii", head(), np.diag([2, -2, -4, 1.0]))
    patch(tmp_path / "a.nii", (*QUATERNION, 1.0, 7e-4, 0), (*CODES, 1, sform))
    items = items_of({"root": str(tmp_path / "a.nii")})
    [written] = write_back(items, tmp_path, enlarge)
    assert not written.failed, written.line
    again = nib.load(tmp_path / "volumes/a.nii.gz")
    expected = np.diag([2 / enlarge, -2 / enlarge, -4])
    np.testing.assert_allclose(again.get_qform()[:3, :3], expected, atol=0.01)
    np.testing.assert_allclose(again.affine[:3, :3], expected, atol=0.01)


def test_cifti_is_no_volume_and_ends_nothing(tmp_path):
    axes = (
        cifti2_axes.ScalarAxis(["myelin"]),
        cifti2_axes.BrainModelAxis.from_mask(np.ones(20), name="cortex_left"),
    )
    image = nib.Cifti2Image(np.ones((1, 20), np.float32), axes)
    nib.save(image, tmp_path / "a.dscalar.nii")
    write_nifti(tmp_path / "b.nii", head())
    items = items_of({"root": str(tmp_path)})
    assert [i.name for i in items] == ["a.dscalar", "b_z000", "b_z001", "b_z002"]
    with pytest.raises(UserError, match=r"a\.dscalar\.nii: is CIFTI"):
        items[0].read()


def test_whatever_a_header_holds_is_its_own_failure(tmp_path):
    """Random bytes over a good header, many times: one sentence or slices, and the rest is read."""
    write_nifti(tmp_path / "good.nii", head((8, 8, 2)))
    contents = (tmp_path / "good.nii").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(60):
        bad = bytearray(contents)
        for place in rng.integers(4, 344, 12):
            bad[place] = rng.integers(256)
        (tmp_path / f"bad{i}.nii").write_bytes(bad)
    items = items_of({"root": str(tmp_path)})
    assert [i.name for i in items if i.name.startswith("good")] == ["good_z000", "good_z001"]
    refused = 0
    for item in items:
        try:
            assert np.isfinite(item.read()).all()
        except UserError as error:
            refused += 1
            assert str(error).startswith(item.label) and "\n" not in str(error)
    assert refused > 20


PAIRS = {
    "NIfTI-1": (nib.Nifti1Pair, ""),
    "NIfTI-2": (nib.Nifti2Pair, ""),
    "compressed": (nib.Nifti1Pair, ".gz"),
    "Analyze": (nib.AnalyzeImage, ""),
    "SPM": (nib.Spm99AnalyzeImage, ""),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("root", [".", "v.img", "v.hdr"])
def test_a_volume_in_two_files(tmp_path, monkeypatch, case, order, root):
    kind, ending = PAIRS[case]
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    # Analyze has no rotation; SPM and nibabel take its first axis to run leftwards.
    affine = np.diag([-1, 2, 4, 1.0]) if "Nifti" not in kind.__name__ else AFFINE
    image = kind(head(), affine, kind.header_class(endianness=order))
    image.set_data_dtype(np.int16)
    image.to_filename(f"in/v.img{ending}")
    for name in os.listdir("in"):
        if name.endswith(".mat"):
            os.remove(f"in/{name}")
    expected = nib.load(f"in/v.img{ending}")
    items = items_of({"root": "in" if root == "." else f"in/{root}{ending}"})
    assert [i.name for i in items] == ["v_z000", "v_z001", "v_z002"]
    assert (items[0].note is None) == ("Nifti" in kind.__name__)
    [written] = write_back(items, tmp_path)
    assert not written.failed, written.line
    again = nib.load("volumes/v.nii.gz")
    np.testing.assert_allclose(again.affine, expected.affine, atol=1e-5)
    white = np.percentile(head(), 99.9)
    np.testing.assert_allclose(again.get_fdata(), np.clip(head(), 0, white), rtol=1e-5)


def test_half_of_two_files(tmp_path):
    image = nib.Nifti1Pair(head(), AFFINE)
    image.to_filename(tmp_path / "a.img")
    image.to_filename(tmp_path / "b.img")
    image.to_filename(tmp_path / "c.img")
    os.remove(tmp_path / "a.img")
    os.remove(tmp_path / "b.hdr")
    (tmp_path / "envi.hdr").write_text("ENVI\nsamples = 3")
    items = items_of({"root": str(tmp_path)})
    assert [i.name for i in items] == ["a", "c_z000", "c_z001", "c_z002"]
    with pytest.raises(UserError, match=r"a\.hdr: its voxels, a\.img, are missing"):
        items[0].read()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_type_in_either_byte_order(tmp_path, order, kind):
    """Types, scale factors and extensions: values and geometry come back."""
    for dtype in TYPES:
        voxels = (head() // 8).astype(dtype)
        header = kind.header_class(endianness=order)
        header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
        image = kind(voxels, AFFINE, header)
        image.header.set_slope_inter(0.5, 3)
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept"))
        path = tmp_path / f"{dtype}.nii.gz"
        image.to_filename(path)
        source = nib.load(path)
        write_back(items_of({"root": str(path)}), tmp_path)
        again = nib.load(tmp_path / f"volumes/{dtype}.nii.gz")
        values = source.get_fdata()
        np.testing.assert_allclose(
            again.get_fdata(), np.clip(values, 0, np.percentile(values, 99.9)), rtol=1e-5
        )
        assert np.array_equal(again.affine, source.affine) and type(again) is kind
        assert again.header.extensions[0].get_content() == b"kept"


def test_a_damaged_archive_fails_when_it_is_read(tmp_path):
    """Errors of zlib are none of the system's."""
    write_nifti(tmp_path / "a.nii", np.random.default_rng(0).random((32, 32, 9)))
    contents = bytearray(gzip.compress((tmp_path / "a.nii").read_bytes()))
    contents[20000:20100] = bytes(100)
    (tmp_path / "a.nii").unlink()
    (tmp_path / "b.nii.gz").write_bytes(contents)
    write_nifti(tmp_path / "c.nii", head())
    items = items_of({"root": str(tmp_path)})
    assert items[-1].read().shape == (1, 32, 32)
    with pytest.raises(UserError, match=r"b\.nii\.gz: (truncated or damaged|cannot be read)"):
        items[0].read()


def test_voxels_are_not_read_from_the_header(tmp_path):
    """vox_offset 0, as some programs leave it, is that of the standard."""
    write_nifti(tmp_path / "a.nii", head(), AFFINE)
    write_nifti(tmp_path / "b.nii", head(), AFFINE)
    patch(tmp_path / "b.nii", (108, "f", 0.0))
    first, second = ([i.read() for i in items_of({"root": str(tmp_path / n)})]
                     for n in ("a.nii", "b.nii"))  # fmt: skip
    np.testing.assert_array_equal(first, second)


def test_unknown_codes_still_have_their_geometry(tmp_path):
    write_nifti(tmp_path / "a.nii", head(), AFFINE)
    patch(tmp_path / "a.nii", (*CODES, 77, 99))
    write_back(items_of({"root": str(tmp_path / "a.nii")}), tmp_path)
    np.testing.assert_allclose(nib.load(tmp_path / "volumes/a.nii.gz").affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("rest", [b"\0" * 300, b"junk", gzip.compress(b"more", mtime=0)])
def test_what_follows_a_gzip_file_does_not_matter(tmp_path, rest):
    write_nifti(tmp_path / "a.nii.gz", head(), AFFINE)
    with open(tmp_path / "a.nii.gz", "ab") as file:
        file.write(rest)
    assert len([i.read() for i in items_of({"root": str(tmp_path)})]) == 3


def test_a_map_has_its_own_range_and_thinner_slices_no_times(tmp_path):
    write_nifti(tmp_path / "a.nii", head())
    image = nib.load(tmp_path / "a.nii")
    kept = {"cal_min": 10, "cal_max": 150, "slice_end": 2, "slice_code": 1, "slice_duration": 0.5}
    for field, value in kept.items():
        image.header[field] = value
    nib.save(image, tmp_path / "b.nii")
    volume = items_of({"root": str(tmp_path / "b.nii")})[0].volume

    def header(count, **how):
        path = volume.write(str(tmp_path), np.zeros((count, 32, 32)), None, "", "", **how)
        return {field: float(nib.load(path).header[field]) for field in kept}

    assert header(3) == header(3, kind="lower") == kept
    assert header(3, kind="std") == kept | {"cal_min": 0, "cal_max": 0}
    times = {"slice_end": 0, "slice_code": 0, "slice_duration": 0}
    assert header(12, spacing=1.0) == kept | times


def test_what_a_header_says_wrong_is_said_by_the_items(tmp_path, capfd):
    write_nifti(tmp_path / "a.nii", head(), AFFINE)
    patch(tmp_path / "a.nii", (80, "3f", -1, 2, 4))
    items = items_of({"root": str(tmp_path)})
    [written] = write_back(items, tmp_path)
    assert "pixdim" in items[0].note and not written.failed
    assert "pixdim" not in capfd.readouterr().err


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000), ("micron", 0.001), ("mm", 1)])
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_lengths_in_other_units_become_mm(tmp_path, unit, mm, codes):
    """The same scan; sform, qform or voxel sizes alone, as the codes say."""
    write_nifti(tmp_path / "mm.nii", head(), AFFINE)
    image = nib.load(tmp_path / "mm.nii", mmap=False)
    image.get_fdata()
    sizes = image.header.get_zooms()
    changed = np.diag([1 / mm, 1 / mm, 1 / mm, 1]) @ AFFINE
    other = nib.Nifti1Image(np.asarray(image.dataobj), changed)
    other.set_qform(changed, codes[0])
    other.set_sform(changed, codes[1])
    other.header.set_xyzt_units(unit, "sec")
    nib.save(other, tmp_path / "other.nii")
    image.set_qform(image.affine, codes[0])
    image.set_sform(image.affine, codes[1])
    nib.save(image, tmp_path / "mm.nii")
    first, second = (items_of({"root": str(tmp_path / f"{n}.nii")}) for n in ("mm", "other"))
    sides = [(v.plane.pixel, v.plane.longer) for v in (first[0].volume, second[0].volume)]
    assert sides[0] == pytest.approx(sides[1])
    assert second[0].volume.spacing == pytest.approx(4)
    assert (second[0].note is None) == (mm == 1)
    for items in (first, second):
        [written] = write_back(items, tmp_path, 2)
        assert not written.failed, written.line
    found, expected = (nib.load(tmp_path / f"volumes/{n}.nii.gz") for n in ("other", "mm"))
    np.testing.assert_allclose(found.affine, expected.affine, rtol=1e-5, atol=1e-5)
    assert found.header.get_xyzt_units() == ("mm", "sec")
    assert found.header.get_zooms() == pytest.approx((sizes[0] / 2, sizes[1] / 2, sizes[2]))
