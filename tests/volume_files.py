"""Volumes to test with: NIfTI files and DICOM series, good and bad."""

import os

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from data.dataloader import list_items


def head(shape=(32, 32, 3), seed=0):
    """A smooth positive volume with a bright outlier, in whole numbers up to 900."""
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    voxels = 300 + 250 * np.sin(axes[0] / 5 + seed) * np.cos(axes[1] / 7) + 10 * axes[2]
    voxels[0, 0, 0] = 900
    return np.rint(voxels).astype(np.int16)


def write_nifti(path, voxels, affine=None, slope=None):
    image = nib.Nifti1Image(voxels, np.diag([1, 1, 4, 1.0]) if affine is None else affine)
    image.set_qform(image.affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a test"
    if slope:
        image.header.set_slope_inter(*slope)
    nib.save(image, path)


def write_dicom(path, pixels, place, series="1.2.3", **tags):
    """One slice; `place` in mm along the normal of an oblique plane."""
    dataset = Dataset()
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2", series
    dataset.PatientName, dataset.PatientID, dataset.Modality = "Doe^Jane", "7", "MR"
    dataset.SeriesDescription, dataset.SeriesNumber = "t1", 4
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    dataset.ImageOrientationPatient = [0.8, 0.6, 0, 0, 0, -1]
    dataset.ImagePositionPatient = [10 - 0.6 * place, 20 + 0.8 * place, 30]
    dataset.PixelSpacing, dataset.SliceThickness = [0.5, 0.75], 3
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = pixels.astype("<u2").tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    for keyword, value in tags.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)


def write_series(folder, voxels, **tags):
    """(rows, columns, slices); file names run against the positions."""
    os.makedirs(folder, exist_ok=True)
    for k in range(voxels.shape[2]):
        write_dicom(f"{folder}/{9 - k}.dcm", voxels[..., k], 3.0 * k, **tags)


def items_of(data):
    return list_items({"measured": False, **data})


def four_dimensions():
    write_nifti("images/bad.nii", np.stack([head()] * 4, axis=3))


def not_a_number():
    voxels = head().astype(np.float32)
    voxels[3, 3, 1] = np.nan
    write_nifti("images/bad.nii", voxels)
