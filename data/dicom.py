"""DICOM series."""

import hashlib
import os
import shutil
from collections import Counter

import numpy as np

from data.volumes import Broken, Volume
from util.errors import UserError

SUFFIXES = (".dcm", ".ima")
SAME_PLACE = 1e-3  # mm between the slices of two files, at most, that show one slice
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
    "NumberOfFrames",
]


def is_dicom(path):
    """Whether a file is DICOM by its suffix or its contents."""
    if path.lower().endswith(SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:  # a file beside the images that this user may not read
        return False


def open_series(paths, name, series=None):
    """The items of a folder's DICOM files: the slices of their one series, sorted by position.

    Files without an image (DICOMDIR, reports) are passed over.

    Args:
        name: of the results.
        series: SeriesNumber or SeriesInstanceUID of the series to take where there are several.

    Returns:
        list of Slice, and a Broken for each file that is no DICOM, or for a series that is no
        volume of grey slices.
    """
    headers, broken = {}, []
    for path in paths:
        try:
            header = _read(path, stop_before_pixels=True)
        except UserError as error:
            broken.append(Broken(_stem(path), os.path.basename(path), error))
            continue
        if "Rows" in header and "Columns" in header:
            headers[path] = header
    if not headers:
        return broken
    try:
        return DicomSeries(_choose(headers, name, series), name).slices + broken
    except UserError as error:
        return [Broken(name, name, error), *broken]


def _stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def _read(path, **options):
    import pydicom

    try:
        return pydicom.dcmread(path, **options)
    except Exception as error:  # noqa: BLE001 - damaged files fail in many ways
        raise UserError(
            f"{os.path.basename(path)}: cannot be read as DICOM ({_reason(error)})"
        ) from None


def _reason(error):
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _choose(headers, name, series):
    """The headers, by path, of the one series, or of the one asked for."""
    found = {}
    for path, header in headers.items():
        found.setdefault(str(header.get("SeriesInstanceUID", "")), {})[path] = header
    chosen = found
    if series is not None:
        chosen = {
            uid: files
            for uid, files in found.items()
            if str(series) in (uid, str(next(iter(files.values())).get("SeriesNumber")))
        }
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    listed = []
    for uid, files in found.items():
        first = next(iter(files.values()))
        text = f"{first.get('SeriesDescription', 'no description')}, {len(files)} files, {uid}"
        listed.append(f"{first.get('SeriesNumber', 'no number')} ({text})")
    choice = "data.series: the number or the UID chooses one"
    problem = f"holds {len(found)} series" if series is None else f"not one is series {series}"
    if len(chosen) > 1 and series is not None:
        problem = f"{len(chosen)} are series {series}"
    raise UserError(f"{name}: {problem}: {'; '.join(listed)}; {choice}")


class DicomSeries(Volume):
    """The files of one series, in the order of their positions along the slices' normal.

    Args:
        headers: path → dataset, which may lack the pixels.

    Raises:
        UserError: the files are no stack of grey slices of one size and direction, or are
            compressed in a way that no installed package decodes.
    """

    def __init__(self, headers, name):
        for path, header in headers.items():
            _check(header, f"{name}: {os.path.basename(path)}")
        sizes = Counter(f"{h.Columns}×{h.Rows}" for h in headers.values())
        if len(sizes) > 1:
            listed = ", ".join(f"{size} ({count} files)" for size, count in sizes.items())
            raise UserError(f"{name}: expected slices of one size, found {listed}")
        directions = np.array([h.ImageOrientationPatient for h in headers.values()], float)
        if np.ptp(directions, axis=0).max() > 0.01:
            raise UserError(
                f"{name}: its slices lie in several directions (a localizer?), expected one"
            )
        if len({h.PhotometricInterpretation for h in headers.values()}) > 1:
            raise UserError(f"{name}: some slices are MONOCHROME1 and some MONOCHROME2")
        normal = np.cross(directions[0][:3], directions[0][3:])
        places = {
            path: float(np.dot(np.array(h.ImagePositionPatient, float), normal))
            for path, h in headers.items()
        }
        self.paths = sorted(places, key=places.get)
        gaps = np.diff([places[path] for path in self.paths])
        if (gaps < SAME_PLACE).any():
            again = int(np.argmax(gaps < SAME_PLACE))
            pair = " and ".join(os.path.basename(p) for p in self.paths[again : again + 2])
            raise UserError(
                f"{name}: {pair} show the same slice; the echoes or time points of a series "
                "must be restored from folders of their own"
            )
        first = headers[self.paths[0]]
        self.shape = (int(first.Rows), int(first.Columns))
        inverted = first.PhotometricInterpretation == "MONOCHROME1"
        super().__init__(name, name, len(self.paths), inverted)

    def load(self):
        from pydicom.pixels import apply_modality_lut

        voxels = np.empty((len(self.paths), *self.shape), np.float32)
        for voxel, path in zip(voxels, self.paths, strict=True):
            try:
                dataset = _read(path)
                voxel[:] = apply_modality_lut(dataset.pixel_array, dataset)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - each decoder has exceptions of its own
                raise UserError(
                    f"{self.name}: {os.path.basename(path)}: its pixels cannot be read "
                    f"({_reason(error)})"
                ) from None
        return voxels

    def write(self, folder, voxels, description, identity, std=False):
        """Write (slices, H, W) as a series in the folder NAME, a file a slice.

        The files are the source's with other pixels and new UIDs, which the source's UIDs, the
        settings and the pixels decide, so that the same run writes the same bytes. Where the
        slices are finer than the source's, the pixels share out the same field of view.
        """
        from pydicom.uid import generate_uid
        from pydicom.valuerep import format_number_as_ds

        low, high = float(voxels.min()), float(voxels.max())
        intercept = format_number_as_ds(low)
        slope = format_number_as_ds((high - low) / STORED or 1.0)
        source = _read(self.paths[0], stop_before_pixels=True)
        digest = hashlib.sha256(np.ascontiguousarray(voxels)).hexdigest()
        series = generate_uid(entropy_srcs=[str(source.SeriesInstanceUID), identity, digest])
        path = os.path.join(folder, self.name)
        unfinished = os.path.join(folder, f".part-{self.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        for piece, source_path, pixels in zip(self.slices, self.paths, voxels, strict=True):
            dataset = _read(source_path, stop_before_pixels=True)
            stored = np.rint((pixels - float(intercept)) / float(slope)).clip(0, STORED)
            _set_pixels(dataset, stored.astype("<u2"), slope, intercept)
            uid = generate_uid(entropy_srcs=[series, str(piece.index)])
            _set_origin(dataset, series, uid, description, 2000 if std else 1000)
            if std:  # the display window is for the image's values
                for keyword in ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation"):
                    if keyword in dataset:
                        delattr(dataset, keyword)
            dataset.save_as(os.path.join(unfinished, f"{piece.name}.dcm"), enforce_file_format=True)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(unfinished, path)
        return path


def _check(header, where):
    """Raise UserError unless a file is one grey slice with a place in space, and decodable."""
    if header.get("SamplesPerPixel", 1) != 1:
        raise UserError(
            f"{where}: holds colours ({header.get('PhotometricInterpretation')}), "
            "expected one grey value a pixel"
        )
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise UserError(
            f"{where}: holds {header.NumberOfFrames} frames in one file (enhanced DICOM), which "
            "is not read; convert it to NIfTI, with dcm2niix for instance"
        )
    needed = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    missing = [k for k, count in needed.items() if len(header.get(k) or ()) != count]
    if missing:
        raise UserError(f"{where}: lacks {' and '.join(missing)}, so it has no place in a volume")
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(
            f"{where}: expected MONOCHROME1 or MONOCHROME2, found "
            f"{header.get('PhotometricInterpretation')}"
        )
    _check_decoder(header.file_meta.get("TransferSyntaxUID"), where)


def _check_decoder(syntax, where):
    from pydicom.pixels import get_decoder

    try:
        if syntax is None or not syntax.is_encapsulated:
            return
        decoder = get_decoder(syntax)
    except (NotImplementedError, ValueError):
        raise UserError(f"{where}: stored as {syntax.name}, which is not read") from None
    if not decoder.is_available:
        needs = " or ".join(text.split(" requires ")[-1] for text in decoder.missing_dependencies)
        raise UserError(
            f"{where}: compressed as {syntax.name}, and no decoder is installed (install {needs})"
        )


def _set_pixels(dataset, stored, slope, intercept):
    """Replace the pixels by (H, W) of 16 bits, at the position the source's have."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    rows = stored.shape[0] // dataset.Rows
    cols = stored.shape[1] // dataset.Columns
    if rows > 1 or cols > 1:
        _refine(dataset, rows, cols)
    for keyword in STALE:
        if keyword in dataset:
            delattr(dataset, keyword)
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    dataset.SamplesPerPixel = 1
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    if "RescaleType" not in dataset:
        dataset.RescaleType = "US"
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()  # of this writer, not of the source's
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _refine(dataset, rows, cols):
    """Divide the pixels; the first one's centre moves as in a NIfTI affine, see data.nifti."""
    from pydicom.valuerep import format_number_as_ds

    down, right = (float(s) for s in dataset.PixelSpacing)
    along_row, along_column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    position = np.array(dataset.ImagePositionPatient, float)
    position -= (rows - 1) / (2 * rows) * down * along_column
    position -= (cols - 1) / (2 * cols) * right * along_row
    dataset.PixelSpacing = [format_number_as_ds(down / rows), format_number_as_ds(right / cols)]
    dataset.ImagePositionPatient = [format_number_as_ds(float(p)) for p in position]
    for group in range(0x6000, 0x6020, 2):  # overlays, drawn on the source's pixels
        for element in list(dataset.group_dataset(group)):
            del dataset[element.tag]


def _set_origin(dataset, series, uid, description, number):
    """New UIDs, and what the image is derived from and how."""
    from pydicom.dataset import Dataset

    source = Dataset()
    source.ReferencedSOPClassUID = dataset.SOPClassUID
    source.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SourceImageSequence = [source]
    dataset.ImageType = ["DERIVED", "SECONDARY", *list(dataset.get("ImageType", []))[2:]]
    dataset.DerivationDescription = f"DMPS-MRI: {description}; for research, not for diagnosis"
    description = description[:TEXT]
    before = str(dataset.get("SeriesDescription", ""))[: max(0, TEXT - 1 - len(description))]
    dataset.SeriesDescription = f"{before} {description}".strip()
    dataset.SeriesNumber = int(dataset.get("SeriesNumber") or 0) + number
    dataset.SeriesInstanceUID = series
    dataset.SOPInstanceUID = uid
