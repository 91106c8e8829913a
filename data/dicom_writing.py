"""Restored slices as DICOM: the source's files with other pixels, and UIDs of their own."""

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.dicom_frames import Frame, first_number, first_text, read_dataset, values
from data.slices import NO_IMAGES

TEXT = 64  # characters that a DICOM description holds
STORED = 65535  # the largest of 16 bits
# What tells of the pixels as they were stored in the source, and of theirs alone.
STALE = [
    "SmallestImagePixelValue",
    "LargestImagePixelValue",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "IconImageSequence",
    "RealWorldValueMappingSequence",
    "NumberOfFrames",
]
STALE_IN_FRAMES = ["PixelValueTransformationSequence", "RealWorldValueMappingSequence"]
PHILIPS_SCALE = [(0x2005, 0x100D), (0x2005, 0x100E)]  # private; other tools prefer it to Rescale
WINDOW = ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation")


class Stored(NamedTuple):
    """Values as 16-bit numbers: value = stored · slope + intercept."""

    numbers: NDArray[np.uint16]  # (slices, H, W)
    slope: str
    intercept: str
    padding: int | None  # the number that is no data


def write_series(
    path: str,
    frames: Sequence[Frame],
    names: Sequence[str],
    voxels: NDArray[np.float32],
    padding: NDArray[np.bool_] | None,
    description: str,
    identity: str,
    kind: str,
    spacing: float | None = None,
) -> None:
    """Write (slices, H, W) into the folder `path`: an enhanced file as one, others a file a slice.

    The files are the source's with other pixels and new UIDs, which the source's UIDs, the
    settings and the pixels decide, so that the same run writes the same bytes. Where the slices
    are finer than the source's, the pixels share out the same field of view. What of a source
    cannot be written is left out.

    Args:
        frames, names: of the slices, in the order of the voxels.
        padding: where the voxels are no data, or None; one stored value then says so, whatever
            theirs are, so that the other numbers are for the rest.
        description, identity, kind: see `data.volumes.Volume`.
        spacing: mm between the slices, where they are not the source's; the frames then have the
            positions to write, and each as much of a source's header as is true of it.
    """
    from pydicom.uid import generate_uid

    stored = _store(voxels, padding, frames[0].photometric == "MONOCHROME1")
    digest = hashlib.sha256(voxels.tobytes()).hexdigest()
    source = first_text(frames[0].header, "SeriesInstanceUID") or os.path.basename(path)
    series = generate_uid(entropy_srcs=[source, identity, digest])
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f".part-{name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    for first, members in _files(frames):
        dataset = _derived(frames, members, stored, spacing)
        uid = generate_uid(entropy_srcs=[series, str(first)])
        _set_origin(dataset, series, uid, description, 2000 if kind else 1000)
        if kind in NO_IMAGES:  # the display window is for the image's values
            _drop_windows(dataset)
        alone = len(members) > 1 and len(members) == len(frames)
        file = os.path.join(unfinished, f"{name if alone else names[first]}.dcm")
        _save(dataset, file)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(unfinished, path)


def check_series(frames: Sequence[Frame], factor: int, spacing: float | None = None) -> None:
    """Build every file of a series in memory, with no pixels to speak of; raises what fails."""
    for _, members in _files(frames):
        shape = (len(frames), *(n * factor for n in frames[0].size))
        stored = Stored(np.broadcast_to(np.uint16(0), shape), "1", "0", None)
        dataset = _derived(frames, members, stored, spacing)
        _set_origin(dataset, "1.2", "1.2.3", "", 0)
        _save(dataset, io.BytesIO())


def _files(frames):
    """(first slice, all slices) of each file to write, by their places in `frames`."""
    enhanced: dict[str, list[int]] = {}
    for i, frame in enumerate(frames):
        kept_together = frame.number is not None and not frame.tiles
        enhanced.setdefault(frame.path if kept_together else f"{i}", []).append(i)
    return [(members[0], members) for members in enhanced.values()]


def _store(voxels, padding, inverted):
    """Spread what is no padding over 16 bits, whose end at black is kept for padding.

    A viewer that does not know PixelPaddingValue then shows it black, see PS3.3 C.7.5.1.1.2.
    """
    from pydicom.valuerep import format_number_as_ds

    known = voxels if padding is None else voxels[~padding]
    low, high = float(np.nanmin(known)), float(np.nanmax(known))
    first, last, reserved = 0, STORED, None
    if padding is not None:
        reserved = STORED if inverted else 0
        first, last = (0, STORED - 1) if inverted else (1, STORED)
        voxels = np.where(padding, np.float32(low), voxels)
    slope = format_number_as_ds((high - low) / (last - first) or 1.0)
    intercept = format_number_as_ds(low - first * float(slope))
    finite = np.nan_to_num(voxels, nan=low)
    numbers = np.rint((finite - float(intercept)) / float(slope)).clip(first, last)
    numbers = numbers.astype(np.uint16)
    if reserved is not None:
        numbers[padding] = reserved
    return Stored(numbers, slope, intercept, reserved)


def _derived(frames, members, stored, spacing):
    """A file like the source's, that has these of the slices as its pixels."""
    frame = frames[members[0]]
    dataset = _writable(read_dataset(frame.path, stop_before_pixels=True))
    shape = stored.numbers.shape[1:]
    factor = shape[0] // frame.size[0], shape[1] // frame.size[1]
    if frame.tiles:
        _leave_mosaic(dataset, frame)
    enhanced = frame.number is not None and not frame.tiles
    if spacing is not None and not enhanced:
        _respace(dataset, dataset, frame, spacing)
        dataset.InstanceNumber = members[0] + 1
        _drop(dataset, "SliceLocation")
    if max(factor) > 1:
        if not enhanced:
            _refine(dataset, dataset, frame, factor)
        _drop_overlays(dataset)
    for keyword in STALE:
        _drop(dataset, keyword)
    _drop_private_scale(dataset)
    if enhanced:
        _set_frames(dataset, [frames[i] for i in members], factor, stored, spacing)
    else:
        dataset.RescaleSlope, dataset.RescaleIntercept = stored.slope, stored.intercept
        if not values(dataset, "RescaleType"):
            dataset.RescaleType = "US"
    _set_pixels(dataset, stored.numbers[members], stored.padding)
    return dataset


def _writable(source):
    """A copy without the elements that cannot be written, and without a memory of the encoding."""
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import correct_ambiguous_vr_element, write_data_element

    copy = Dataset()
    encodings = getattr(source, "_character_set", None) or ["iso8859"]
    with pydicom.config.disable_value_validation():
        for tag in list(source.keys()):
            if tag.group <= 2 or tag.element == 0:
                continue
            try:
                element = source[tag]  # may be raw until now
                trial = DicomBytesIO()
                trial.is_little_endian, trial.is_implicit_VR = True, False
                correct_ambiguous_vr_element(element, source, True)  # in place
                write_data_element(trial, element, encodings)
            except Exception:  # noqa: BLE001, S112 - viewers pass over what they cannot read
                continue
            copy.add(element)
    return copy


def _set_pixels(dataset, numbers, padding):
    dataset.Rows, dataset.Columns = numbers.shape[1:]
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    dataset.SamplesPerPixel = 1
    if padding is not None:
        from pydicom.dataelem import DataElement

        dataset.add(DataElement(0x00280120, "US", padding))  # PixelPaddingValue
    for keyword in ("FloatPixelData", "DoubleFloatPixelData"):
        _drop(dataset, keyword)
    dataset.PixelData = numbers.astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"


def _save(dataset, file):
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset.file_meta = FileMetaDataset()  # of this writer, not of the source's
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with pydicom.config.disable_value_validation():
        dataset.save_as(file, enforce_file_format=True)


def _drop(dataset, keyword):
    if keyword in dataset:
        delattr(dataset, keyword)


def _drop_private_scale(dataset):
    for tag in PHILIPS_SCALE:
        if tag in dataset:
            del dataset[tag]
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _drop_private_scale(item)


def _drop_windows(dataset):
    for keyword in (*WINDOW, "FrameVOILUTSequence"):
        _drop(dataset, keyword)
    for sequence in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for item in values(dataset, sequence):
            _drop(item, "FrameVOILUTSequence")


def _drop_overlays(dataset):
    """What is drawn on the source's pixels."""
    for group in range(0x6000, 0x6020, 2):
        for element in list(dataset.group_dataset(group)):
            del dataset[element.tag]


def _refine(measures, plane, frame, factor):
    """Divide the pixels; the first one's centre moves as in a NIfTI affine, see data.nifti."""
    from pydicom.valuerep import format_number_as_ds

    rows, cols = factor
    down, right = (float(s) for s in frame.spacing)
    along_row, along_column = frame.directions.reshape(2, 3)
    position = frame.position - (rows - 1) / (2 * rows) * down * along_column
    position = position - (cols - 1) / (2 * cols) * right * along_row
    measures.PixelSpacing = [format_number_as_ds(down / rows), format_number_as_ds(right / cols)]
    plane.ImagePositionPatient = [format_number_as_ds(float(p)) for p in position]


def _respace(measures, plane, frame, spacing):
    """Give a slice its position, and the thickness and distance of its neighbours."""
    from pydicom.valuerep import format_number_as_ds

    plane.ImagePositionPatient = [format_number_as_ds(float(p)) for p in frame.position]
    measures.SliceThickness = measures.SpacingBetweenSlices = format_number_as_ds(float(spacing))


def _leave_mosaic(dataset, frame):
    """One slice of a mosaic as a file of its own."""
    from pydicom.valuerep import format_number_as_ds

    dataset.remove_private_tags()  # the vendor's header still says that it is a mosaic
    dataset.ImageType = [v for v in values(dataset, "ImageType") if v != "MOSAIC"]
    dataset.ImagePositionPatient = [format_number_as_ds(float(p)) for p in frame.position]
    dataset.InstanceNumber = frame.number + 1
    _drop(dataset, "SliceLocation")


def _set_frames(dataset, frames, factor, stored, spacing):
    """Keep the functional groups of these frames, in this order, and refine their geometry."""
    from copy import deepcopy

    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    items = []
    for i, frame in enumerate(frames):
        item = dataset.PerFrameFunctionalGroupsSequence[frame.number]
        if spacing is not None:
            item = deepcopy(item)  # several slices may have it
            measures = _own(item, dataset, "PixelMeasuresSequence")
            _respace(measures, _own(item, dataset, "PlanePositionSequence"), frame, spacing)
            for content in values(item, "FrameContentSequence"):
                _drop(content, "DimensionIndexValues")
                content.InStackPositionNumber = i + 1
        for keyword in STALE_IN_FRAMES:
            _drop(item, keyword)
        if max(factor) > 1:
            measures = _own(item, dataset, "PixelMeasuresSequence")
            plane = _own(item, dataset, "PlanePositionSequence")
            _refine(measures, plane, frame, factor)
        for kind in values(item, "MRImageFrameTypeSequence"):
            _set_derived(kind, "FrameType")
        items.append(item)
    if not values(dataset, "SharedFunctionalGroupsSequence"):
        dataset.SharedFunctionalGroupsSequence = Items([Dataset()])
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for keyword in STALE_IN_FRAMES:
        _drop(shared, keyword)
    for kind in values(shared, "MRImageFrameTypeSequence"):
        _set_derived(kind, "FrameType")
    scale = Dataset()
    scale.RescaleIntercept, scale.RescaleSlope = stored.intercept, stored.slope
    scale.RescaleType = "US"
    shared.PixelValueTransformationSequence = Items([scale])
    if spacing is not None:  # places that the source's dimensions do not know
        _drop(dataset, "DimensionIndexSequence")
    if (max(factor) > 1 or spacing) and values(shared, "PixelMeasuresSequence"):
        del shared.PixelMeasuresSequence  # each frame has its own now
    dataset.PerFrameFunctionalGroupsSequence = Items(items)
    dataset.NumberOfFrames = len(items)
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        _drop(dataset, keyword)


def _own(item, dataset, sequence):
    """A frame's own functional group, copied from the shared one where it has none."""
    from copy import deepcopy

    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    if not values(item, sequence):
        shared = values(dataset, "SharedFunctionalGroupsSequence")[:1]
        group = values(shared[0], sequence) if shared else []
        setattr(item, sequence, Items([deepcopy(group[0]) if group else Dataset()]))
    return getattr(item, sequence)[0]


def _set_derived(dataset, keyword):
    setattr(dataset, keyword, ["DERIVED", "SECONDARY", *map(str, values(dataset, keyword)[2:])])


def _set_origin(dataset, series, uid, description, number):
    """New UIDs, and what the image is derived from and how; what a source lacks is made up."""
    from pydicom.dataset import Dataset
    from pydicom.uid import MRImageStorage, generate_uid

    if not first_text(dataset, "SOPClassUID"):
        dataset.SOPClassUID = MRImageStorage
    if not first_text(dataset, "StudyInstanceUID"):
        dataset.StudyInstanceUID = generate_uid(entropy_srcs=[series, "study"])
    if first_text(dataset, "SOPInstanceUID"):
        source = Dataset()
        source.ReferencedSOPClassUID = dataset.SOPClassUID
        source.ReferencedSOPInstanceUID = first_text(dataset, "SOPInstanceUID")
        dataset.SourceImageSequence = [source]
    _set_derived(dataset, "ImageType")
    dataset.DerivationDescription = f"DMPS-MRI: {description}; for research, not for diagnosis"
    description = description[:TEXT]
    before = " ".join(map(str, values(dataset, "SeriesDescription")))
    before = before[: max(0, TEXT - 1 - len(description))]
    dataset.SeriesDescription = f"{before} {description}".strip()
    dataset.SeriesNumber = int(first_number(dataset, "SeriesNumber")) + number
    dataset.SeriesInstanceUID = series
    dataset.SOPInstanceUID = uid
