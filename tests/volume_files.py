"""Volumes to test with: NIfTI files and DICOM series, good and bad."""

import os

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from data.dataloader import list_items
from data.volumes import write_volumes
from guided_diffusion.operators import OPERATORS
from tests.conftest import task, write_yaml
from util.files import printable

OBLIQUE = np.array([[0, 0.6, 2.4, 9], [-0.8, 0.1, 0.2, 5], [0.1, 0.9, -1, -7], [0, 0, 0, 1.0]])


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
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[printable(str(path))])
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
            dataset.pop(keyword, None)
        elif isinstance(value, DataElement):
            dataset.add(value)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)


def write_series(folder, voxels, **tags):
    """(rows, columns, slices); file names run against the positions."""
    os.makedirs(folder, exist_ok=True)
    for k in range(voxels.shape[2]):
        write_dicom(f"{folder}/{9 - k}.dcm", voxels[..., k], 3.0 * k, **tags)


def items_of(data, **options):
    return list_items({"measured": False, **data}, **options)


def five_dimensions():
    write_nifti("images/bad.nii", np.stack([head()] * 8, axis=3).reshape(32, 32, 3, 4, 2))


def not_a_number():
    voxels = head().astype(np.float32)
    voxels[3, 3, 1] = np.nan
    write_nifti("images/bad.nii", voxels)


def write_enhanced(path, voxels, places, **tags):
    """An enhanced multi-frame MR file; (rows, columns, frames), a place in mm for each frame."""
    item = Dataset
    frames = []
    for number, place in enumerate(places):
        frame, content, plane, echo = item(), item(), item(), item()
        in_stack = sorted(set(places)).index(place) + 1
        content.FrameAcquisitionNumber, content.DimensionIndexValues = 1, [1, in_stack]
        content.StackID, content.InStackPositionNumber = "1", in_stack
        plane.ImagePositionPatient = [10 - 0.6 * place, 20 + 0.8 * place, 30]
        echo.EffectiveEchoTime = float(10 + 20 * (places[:number].count(place)))
        frame.FrameContentSequence, frame.PlanePositionSequence = [content], [plane]
        frame.MREchoSequence = [echo]
        frames.append(frame)
    shared, measures, direction, scale = item(), item(), item(), item()
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.75], 3
    direction.ImageOrientationPatient = [0.8, 0.6, 0, 0, 0, -1]
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = "2.5", "-100", "US"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [direction]
    shared.PixelValueTransformationSequence = [scale]
    stack, in_stack = item(), item()
    stack.DimensionIndexPointer, stack.FunctionalGroupPointer = 0x00209056, 0x00209111
    in_stack.DimensionIndexPointer, in_stack.FunctionalGroupPointer = 0x00209057, 0x00209111
    dataset = {
        "SOPClassUID": EnhancedMRImageStorage,
        "DimensionIndexSequence": [stack, in_stack],
        "NumberOfFrames": len(places),
        "PerFrameFunctionalGroupsSequence": frames,
        "SharedFunctionalGroupsSequence": [shared],
        "Rows": voxels.shape[0],
        "Columns": voxels.shape[1],
        "PixelData": np.moveaxis(voxels, 2, 0).astype("<u2").tobytes(),
        "ImagePositionPatient": None,
        "ImageOrientationPatient": None,
        "PixelSpacing": None,
    }
    write_dicom(path, voxels, 0, **{**dataset, **tags})


def write_back(items, folder, enlarge=1, measured=False):
    """Keep each slice as it was read, enlarged, and put the volume together."""
    os.makedirs(f"{folder}/slices", exist_ok=True)
    for item in items:
        image = item.read().repeat(enlarge, axis=1).repeat(enlarge, axis=2)
        np.save(f"{folder}/slices/{item.name}.npy", image)
    how = {i.name for i in items}, str(folder), "dmps test", "settings"
    return list(write_volumes(items, *how, measured=measured))


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


def dicom_values(path):
    dataset = pydicom.dcmread(path)
    slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    return dataset.pixel_array * slope + intercept


def series_values(folder):
    """(slices, H, W) of the series in a folder, by file name."""
    return np.stack([dicom_values(os.path.join(folder, n)) for n in sorted(os.listdir(folder))])


def ball(shape, centre, sides, radius=6.0):
    """A bright ball of so many mm, smooth at its edge, on grey; its centre in voxels."""
    places = np.moveaxis(np.indices(shape).astype(float), 0, -1)
    distance = np.linalg.norm((places - centre) * sides, axis=-1)
    return (200 + 600 / (1 + np.exp(2 * (distance - radius)))).astype(np.float32)


def world_centre(voxels, affine):
    """The world position of the ball's centre of mass."""
    weights = np.clip(voxels - 400, 0, None)
    centre = [(np.indices(voxels.shape)[i] * weights).sum() / weights.sum() for i in range(3)]
    return nib.affines.apply_affine(affine, centre)


def written_by(items, fine, folder):
    """What is written of cubic interpolations to `fine` mm, as if they were the restored ones."""
    for item in items:
        volume = item.volume
        spacing = volume.spacing
        lengths = {"thickness": spacing, "spacing": spacing, "target_spacing": fine}
        operator = OPERATORS["thick_slices"]
        params = operator.check(lengths)
        depth = operator.restored_depth(len(volume.slices), params)
        os.makedirs(f"{folder}/slices", exist_ok=True)
        np.save(
            f"{folder}/slices/{item.name}.npy", operator.interpolated(item.read(), depth, params)
        )
    return list(write_volumes(items, {i.name for i in items}, str(folder), "a test", "settings"))


def thick_task(root, measured=False, **params):
    operator = {"name": "thick_slices", **params}
    config = task(operator, root=root, conditioning={"method": "spectral"})
    config["data"]["measured"] = measured
    write_yaml("task.yaml", config)


def circle(shape=(32, 32, 3)):
    """Where there is no data: outside a circle in each slice."""
    rows, cols = np.mgrid[: shape[0], : shape[1]] - 15.5
    return np.repeat((np.hypot(rows, cols) > 15)[..., None], shape[2], axis=2)
