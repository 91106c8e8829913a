"""Every file that pydicom and nibabel ship for their own tests: it comes back, or one sentence."""

import glob
import os
import warnings

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel.testing import data_path
from pydicom.pixels import apply_modality_lut

from tests.volume_files import items_of, write_back
from util.errors import UserError
from util.files import open_plain

FOLDERS = [
    os.path.join(os.path.dirname(pydicom.__file__), "data", "test_files"),
    os.path.join(os.path.dirname(pydicom.__file__), "data", "charset_files"),
    os.path.join(os.path.dirname(nib.__file__), "nicom", "tests", "data"),
    str(data_path),
]
# Those that must come back, and not by a sentence; other versions ship others besides.
READ = {"CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm",
        "MR_small_implicit.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "693_J2KI.dcm",
        "examples_overlay.dcm", "anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii",
        "functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz"}  # fmt: skip
FILES = sorted(p for folder in FOLDERS for p in glob.glob(f"{folder}/**", recursive=True)
               if os.path.isfile(p) and not p.endswith((".py", ".pyc", ".pyi")))  # fmt: skip


def source_values(path, label):
    """(values, affine or None) as pydicom or nibabel give them."""
    if label.endswith((".nii", ".nii.gz")):
        image = nib.load(path)
        voxels = np.asarray(image.dataobj[..., 0] if image.ndim == 4 else image.dataobj)
        return voxels.astype(float), image.affine
    with open_plain(path) as file:
        dataset = pydicom.dcmread(file)
    return apply_modality_lut(dataset.pixel_array, dataset).astype(float), None


def written_values(folder):
    [name] = os.listdir(folder)
    path = os.path.join(folder, name)
    if os.path.isdir(path):
        [name] = os.listdir(path)
        path = os.path.join(path, name)
        dataset = pydicom.dcmread(path)
        return apply_modality_lut(dataset.pixel_array, dataset).astype(float), None, dataset
    image = nib.load(path)
    return image.get_fdata(), image.affine, None


@pytest.mark.parametrize("path", FILES, ids=os.path.basename)
def test_a_shipped_file_comes_back_or_is_one_sentence(tmp_path, path):
    label = os.path.basename(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydicom, on what is odd in its files
        try:
            items = items_of({"root": path, "volume": 0})
            for item in items:
                item.read()
        except UserError as error:
            assert "\n" not in str(error) and label not in READ
            return
        items[0].check_writable()
        [written] = write_back(items, tmp_path)
        assert not written.failed, written.line
        values, affine = source_values(path, label)
        found, found_affine, dataset = written_values(tmp_path / "volumes")
        with open_plain(path) as file:
            source = pydicom.dcmread(file) if dataset is not None else None
    volume = items[0].volume
    black, white, clipped = volume.scale
    padding = np.zeros(values.shape, bool)
    if volume.note:
        mask = np.stack([item.padding() for item in items])
        padding = mask[0] if dataset is not None else np.transpose(
            mask[volume.flips], np.argsort(volume.order)).reshape(values.shape)  # fmt: skip
    expected = np.where(padding, values, np.clip(values, black, white))
    assert clipped <= 0.01 and found.shape == values.shape
    step = np.nanmax(np.abs(expected)) * 1e-5 + (np.ptp(found) / 65535 if dataset else 0)
    if dataset is not None and padding.any():  # one stored number stands for all of it
        assert np.array_equal(dataset.pixel_array == dataset.PixelPaddingValue, padding)
        expected = np.where(padding, found, expected)
    np.testing.assert_allclose(found, expected, atol=step)
    if dataset is None:
        np.testing.assert_allclose(found_affine, affine, atol=1e-5)
        return
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "PatientID"):
        assert dataset.get(keyword) == source.get(keyword)


def test_all_of_a_folder_at_once(tmp_path):
    """One listing of everything: what is bad takes nothing else with it."""
    for folder in FOLDERS[3:]:
        items = items_of({"root": folder, "volume": 0})
        assert {"anatomical_z000", "standard_z000", "functional_z000"} <= {i.name for i in items}
