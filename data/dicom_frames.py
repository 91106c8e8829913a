"""DICOM files taken apart: each slice with its place, whatever way the file holds it."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.volumes import reason
from util.errors import UserError
from util.files import open_plain, printable, read_head
from util.remote import base_name

NEEDED = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
# What pydicom's decoders take for one value, though a file may have several.
SINGLE = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "NumberOfFrames",
          "SamplesPerPixel", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept",
          "RescaleType")  # fmt: skip
# What tells apart the slices of one place: echoes, time points, repetitions, in this order.
ORDER = ("EchoTime", "TemporalPositionIdentifier", "AcquisitionNumber", "InstanceNumber")
# The functional group of enhanced DICOM that holds an attribute, beside the root.
GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "FrameAcquisitionNumber": "FrameContentSequence",
}
RESCALE = ("RescaleSlope", "RescaleIntercept")
ENHANCED_ORDER = ("EffectiveEchoTime", "TemporalPositionIndex", "FrameAcquisitionNumber")

ELEMENTS = {2, 8}  # groups that a file without preamble begins with
SHORT = 256  # bytes that the first elements of such a file may hold


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice of a file.

    Attributes:
        header: of its file, without pixels.
        number: among the slices of its file, from 0; None in a file that is one slice.
        tiles: how many slices lie side by side in a row of a mosaic; 0 in none.
        size: (rows, columns). position, directions, spacing: in mm, as DICOM has them.
        order: tells it from others of the same place.
    """

    path: str
    header: Any
    number: int | None
    tiles: int
    size: tuple[int, int]
    position: NDArray[np.float64]
    directions: NDArray[np.float64]
    spacing: NDArray[np.float64]
    order: tuple

    @property
    def label(self) -> str:
        name = printable(base_name(self.path))
        return name if self.number is None else f"frame {self.number + 1} of {name}"

    @property
    def photometric(self) -> str:
        return first_text(self.header, "PhotometricInterpretation")

    @property
    def scale(self) -> tuple[float, float] | None:
        """(slope, intercept) from stored numbers to values; None where the file says nothing."""
        if self.number is not None and not self.tiles:
            found = [group_values(self.header, self.number, keyword)[:1] for keyword in RESCALE]
        else:
            found = [values(self.header, keyword)[:1] for keyword in RESCALE]
        if not found[0]:
            return None
        return float(found[0][0]), float(found[1][0]) if found[1] else 0.0


def begins_as_dicom(head: bytes) -> bool:
    """Whether a file is DICOM by its first kilobyte, also without the preamble it should have."""
    return head[128:132] == b"DICM" or _begins_with_element(head)


def _begins_with_element(head):
    """Whether the first bytes are two elements of DICOM one after the other, in any encoding."""
    for order in ("little", "big"):
        place, tags = 0, []
        for _ in range(2):
            element = head[place : place + 8]
            if len(element) < 8:
                return False
            group, number = (int.from_bytes(element[i : i + 2], order) for i in (0, 2))  # type: ignore[arg-type]
            tags.append((group, number))
            explicit = element[4:6].isalpha() and element[4:6].isupper()
            size = element[6:8] if explicit else element[4:8]
            length = int.from_bytes(size, order)  # type: ignore[arg-type]
            if group not in ELEMENTS or length > SHORT or (order == "big" and not explicit):
                break
            place += 8 + length
        else:
            return tags[0] < tags[1]
    return False


def read_dataset(path: str, stop_before_pixels: bool = False) -> Any:
    """Read a DICOM file, with or without preamble and file meta information.

    Raises:
        UserError: it cannot be read.
    """
    import pydicom

    try:
        if not (force := begins_as_dicom(read_head(path))):
            raise ValueError("it does not begin as DICOM does")
        with pydicom.config.disable_value_validation(), open_plain(path) as file:
            dataset = pydicom.dcmread(file, force=force, stop_before_pixels=stop_before_pixels)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = _guess_syntax(dataset)
        return dataset
    except Exception as error:  # noqa: BLE001 - damaged files fail in many ways
        name = printable(base_name(path))
        raise UserError(f"{name}: cannot be read as DICOM ({reason(error)})") from None


def _guess_syntax(dataset):
    """How a file without meta information is encoded, as it was found to be."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def values(dataset: Any, keyword: str) -> list:
    """The values of an element, be it one, several, none, or not there at all."""
    from pydicom import config
    from pydicom.multival import MultiValue
    from pydicom.sequence import Sequence

    with config.disable_value_validation():  # which happens when a value is first asked for
        found = dataset.get(keyword)
    if found is None or found == "":
        return []
    several = isinstance(found, (MultiValue, Sequence, list, tuple))
    return list(found) if several else [found]


def first_text(dataset: Any, keyword: str, default: str = "") -> str:
    """An element's text, its first value where there are several; `default` where none."""
    found = values(dataset, keyword)
    return str(found[0]) if found else default


def first_number(dataset: Any, keyword: str, default: float = 0) -> float:
    """An element's number, its first value; `default` where there is none."""
    try:
        return float(values(dataset, keyword)[0])
    except (IndexError, ValueError, TypeError):
        return default


def frames_of(path: str, header: Any, where: str) -> list[Frame]:
    """The slices of a file.

    Raises:
        UserError: it holds no grey slices with a place in space, or is compressed in a way that
            no installed package decodes. `where` begins its text.
    """
    if first_number(header, "SamplesPerPixel", 1) != 1:
        raise UserError(
            f"{where}: holds colours ({first_text(header, 'PhotometricInterpretation')}), "
            "expected one grey value a pixel"
        )
    photometric = first_text(header, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{where}: expected MONOCHROME1 or MONOCHROME2, found {photometric}")
    if first_number(header, "BitsAllocated", 16) == 1:
        raise UserError(f"{where}: holds one bit a pixel, so it is a mask and no image")
    stored = first_number(header, "BitsStored", 16)
    if (highest := first_number(header, "HighBit", stored - 1)) != stored - 1:
        raise UserError(
            f"{where}: expected the highest bit of {stored:g} to be bit {stored - 1:g}, found "
            f"HighBit {highest:g}, a way to store pixels that DICOM has given up"
        )
    _check_decoder(header.file_meta.get("TransferSyntaxUID"), where)
    if "PerFrameFunctionalGroupsSequence" in header:
        return _enhanced(path, header, where)
    if first_number(header, "NumberOfFrames", 1) > 1:
        count = int(first_number(header, "NumberOfFrames"))
        raise UserError(f"{where}: holds {count} frames that have no place in space each")
    if "MOSAIC" in values(header, "ImageType"):
        return _mosaic(path, header, where)
    order = tuple(first_number(header, keyword) for keyword in ORDER)
    return [_frame(path, header, None, _place(header, where), order)]


def _size(header):
    return int(first_number(header, "Rows")), int(first_number(header, "Columns"))


def _frame(path, header, number, place, order, size=None, tiles=0):
    position, directions, spacing = place
    return Frame(
        path, header, number, tiles, size or _size(header), position, directions, spacing, order
    )


def _place(header, where, find=values):
    """(position, directions, spacing) in space."""
    found, missing = [], []
    for keyword, count in NEEDED.items():
        try:
            numbers = np.array([float(v) for v in find(header, keyword)])
        except (ValueError, TypeError):
            numbers = np.array([])
        if len(numbers) != count or not np.isfinite(numbers).all():
            missing.append(keyword)
        found.append(numbers)
    if missing:
        raise UserError(f"{where}: lacks {' and '.join(missing)}, so it has no place in a volume")
    if not (found[2] > 0).all() or np.linalg.norm(np.cross(found[1][:3], found[1][3:])) < 0.5:
        raise UserError(f"{where}: its PixelSpacing or ImageOrientationPatient is none")
    return found


def _enhanced(path, header, where):
    """Each frame's own functional groups, else those it shares."""
    items = header.PerFrameFunctionalGroupsSequence
    count = int(first_number(header, "NumberOfFrames", len(items)))
    if len(items) < count:
        raise UserError(f"{where}: holds {count} frames and describes {len(items)}")

    def find(number):
        return lambda _, keyword: group_values(header, number, keyword)

    frames = []
    for number in range(count):
        place = _place(header, f"{where}, frame {number + 1}", find(number))
        order = [_or_zero(find(number)(header, keyword)) for keyword in ENHANCED_ORDER]
        frames.append(_frame(path, header, number, place, (*order, number)))
    return frames


def _or_zero(found):
    return float(found[0]) if found else 0.0


def group_values(header: Any, number: int, keyword: str) -> list:
    """What enhanced DICOM says of one frame: its own group, else the shared one, else the root."""
    sequence = GROUPS[keyword]
    shared = values(header, "SharedFunctionalGroupsSequence")
    for item in (header.PerFrameFunctionalGroupsSequence[number], *shared[:1]):
        group = values(item, sequence)
        if group and values(group[0], keyword):
            return values(group[0], keyword)
    return values(header, keyword)


def _mosaic(path, header, where):
    """Siemens' slices side by side in one frame, taken apart by the vendor's own header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel's, that its readers are experimental
        from nibabel.nicom import csareader

    try:
        csa = csareader.get_csa_header(header, "image")
        count, normal = csareader.get_n_mosaic(csa), csareader.get_slice_normal(csa)
        count = int(count)
        normal = np.array(normal, float)
        first = csa["tags"].get("ProtocolSliceNumber", {}).get("items") or [0]
        backwards = int(first[0]) > 1  # what dcm2niix takes for tiles in the reverse order
    except Exception:  # noqa: BLE001 - private elements may hold anything
        count, normal, backwards = 0, np.zeros(0), False
    gap = first_number(header, "SpacingBetweenSlices")
    tiles = math.ceil(math.sqrt(max(count, 0)))
    rows, columns = _size(header)
    position, directions, spacing = _place(header, where)
    along_row, along_column = directions[:3], directions[3:]
    sure = count > 1 and normal.shape == (3,) and gap > 0
    sure = sure and not backwards and rows % tiles == 0 and columns % tiles == 0
    if not sure or abs(np.dot(normal, np.cross(along_row, along_column))) < 0.99:
        raise UserError(
            f"{where}: is a mosaic of many slices whose places Siemens' header (CSA) does not "
            "tell; export it as enhanced DICOM, or convert it to NIfTI with dcm2niix"
        )
    size = (rows // tiles, columns // tiles)
    # The position is given as if the whole mosaic were centred where a slice is.
    down, right = spacing
    corner = position + along_column * down * (rows - size[0]) / 2
    corner = corner + along_row * right * (columns - size[1]) / 2
    order = tuple(first_number(header, keyword) for keyword in ORDER)
    return [
        _frame(
            path, header, i, (corner + i * gap * normal, directions, spacing), order, size, tiles
        )
        for i in range(count)
    ]


def read_pixels(frames: Iterable[Frame]) -> Iterable[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """The values of slices in their file's units, (H, W), and where they are declared padding.

    Raises:
        UserError: pixels that cannot be read.
    """
    for frame in frames:
        try:
            dataset, stored = _decoded(frame.path)
            yield (
                _modality(frame, dataset, _cut(frame, stored)),
                _padding(dataset, _cut(frame, stored)),
            )
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - each decoder has exceptions of its own
            raise UserError(
                f"{printable(base_name(frame.path))}: its pixels cannot be read ({reason(error)})"
            ) from None


@lru_cache(maxsize=1)  # the slices of one file are read one after the other
def _decoded(path):
    dataset = read_dataset(path)
    for keyword in SINGLE:
        if len(found := values(dataset, keyword)) > 1:
            dataset[keyword].value = found[0]
    return dataset, dataset.pixel_array


def forget() -> None:
    """Let go of the file read last."""
    _decoded.cache_clear()


def _cut(frame, stored):
    if frame.tiles:
        rows, columns = frame.size
        row, column = divmod(frame.number, frame.tiles)
        top, left = row * rows, column * columns
        return stored[top : top + rows, left : left + columns]
    if frame.number is None or stored.ndim == 2:
        return stored
    return stored[frame.number]


def _modality(frame, dataset, stored):
    from pydicom.pixels import apply_modality_lut

    if frame.number is None or frame.tiles:
        return apply_modality_lut(stored, dataset).astype(np.float32)
    slope, intercept = frame.scale or (1, 0)
    return (stored * slope + intercept).astype(np.float32)


def _padding(dataset, stored):
    """Where stored values are in the range that the file declares to be no data."""
    ends = [*values(dataset, "PixelPaddingValue")[:1], *values(dataset, "PixelPaddingRangeLimit")]
    if not ends or "PixelPaddingValue" not in dataset:
        return np.zeros(stored.shape, bool)
    signed = first_number(dataset, "PixelRepresentation") == 1
    bits = int(first_number(dataset, "BitsAllocated", 16))
    numbers = [_as_stored(end, signed, bits) for end in ends[:2]]
    return (stored >= min(numbers)) & (stored <= max(numbers))


def _as_stored(value, signed, bits):
    """A padding value in the sign of the pixels; writers often give it in the other."""
    if isinstance(value, bytes):  # of unknown VR
        value = int.from_bytes(value[:2], "little")
    value = int(value)
    if signed and value >= 2 ** (bits - 1):
        return value - 2**bits
    if not signed and value < 0:
        return value + 2**bits
    return value


def _check_decoder(syntax, where):
    from pydicom.pixels import get_decoder

    try:
        if syntax is None or not syntax.is_encapsulated:
            return
        decoder = get_decoder(syntax)
    except (NotImplementedError, ValueError):
        raise UserError(
            f"{where}: stored as {getattr(syntax, 'name', syntax)}, which is not read"
        ) from None
    if not decoder.is_available:
        needs = " or ".join(text.split(" requires ")[-1] for text in decoder.missing_dependencies)
        raise UserError(
            f"{where}: compressed as {syntax.name}, and no decoder is installed (install {needs})"
        )
