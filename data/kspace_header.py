"""What the ISMRMRD header of a file of k-space says of its grid."""

import math
import xml.etree.ElementTree as ElementTree
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from util.errors import UserError

CARTESIAN = ("cartesian", "epi")  # trajectories whose lines are rows of a grid


class Grid(NamedTuple):
    """The grid of k-space, and of its image.

    Attributes:
        samples, lines: of the encoded matrix, along the readout and the phase encoding.
        centre: which of the lines that is.
        spacing: mm between rows, columns and slices of the image.
        size: (H, W) of the reconstruction's field of view, in pixels of these sides.
    """

    samples: int
    lines: int
    centre: int
    spacing: tuple[float, float, float]
    size: tuple[int, int]


def read_header(xml: bytes | str, label: str) -> tuple[tuple[float, float, float], tuple[int, int]]:
    """Spacing in mm (rows, columns, slices) and (H, W) that an ISMRMRD header asks for.

    Raises:
        UserError: it lacks the matrix, or has one without pixels or a field of view below 0.
    """
    root, space = root_of(xml, label), "encoding/reconSpace"
    if root.find(space) is None:
        raise UserError(f"{label}: ismrmrd_header: no {space} in it")
    size = [_number(root, f"{space}/matrixSize/{a}", int(a != "z"), label) for a in "xyz"]
    field = [_number(root, f"{space}/fieldOfView_mm/{a}", 0.0, label) for a in "xyz"]
    rows, columns, slices = (f / n if n and f else 1.0 for f, n in zip(field, size, strict=True))
    return (rows, columns, slices), (size[0], size[1])


def read_grid(xml: bytes | str, label: str, samples: int) -> Grid:
    """The grid that a header describes; one without an encoded matrix has readouts of `samples`.

    The pixels are those that were encoded: a reconstruction with more of them is interpolated.

    Raises:
        UserError: see `read_header`; or lines that lie on no grid.
    """
    root = root_of(xml, label)
    trajectory = root.findtext("encoding/trajectory", CARTESIAN[0]).strip()
    if trajectory.lower() not in CARTESIAN:
        raise UserError(
            f"{label}: ismrmrd_header: encoding/trajectory: expected {' or '.join(CARTESIAN)}, "
            f"found {trajectory!r}"
        )
    (rows, columns, slices), (height, width) = read_header(xml, label)
    encoded = "encoding/encodedSpace/matrixSize"
    readout = _number(root, f"{encoded}/x", 0, label) or samples
    lines = _number(root, f"{encoded}/y", 1, label)
    rows, height = _encoded(root, "x", readout, (rows, height), label)
    columns, width = _encoded(root, "y", lines, (columns, width), label)
    key = "encoding/encodingLimits/kspace_encoding_step_1/center"
    centre = lines // 2 if root.find(key) is None else _number(root, key, 0, label)
    return Grid(readout, lines, centre, (rows, columns, slices), (height, width))


def _encoded(
    root: Element, axis: str, count: int, interpolated: tuple[float, int], label: str
) -> tuple[float, int]:
    """(mm of an encoded pixel, how many the reconstruction has), `interpolated` without fields."""
    fields = (f"encoding/{space}Space/fieldOfView_mm/{axis}" for space in ("encoded", "recon"))
    whole, shown = (_number(root, field, 0.0, label) for field in fields)
    if not (whole and shown):
        return interpolated
    side = whole / count
    return side, min(max(round(shown / side), 1), count)


def root_of(xml: bytes | str, label: str) -> Element:
    """The root element of a header, all names without their namespace; UserError for no XML."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise UserError(f"{label}: ismrmrd_header: not valid XML ({error})") from None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _number(root: Element, key: str, least: Any, label: str) -> Any:
    """What a header has at `key`, a number of least's type and no lower; 0 where it has none."""
    found, kind = root.findtext(key, "0"), type(least)
    try:
        number = kind(found)
    except ValueError:
        number = None
    if number is None or not least <= number < math.inf:
        what = "an integer" if kind is int else "a number"
        raise UserError(
            f"{label}: ismrmrd_header: {key}: expected {what} from {least:g}, found {found!r}"
        )
    return number
