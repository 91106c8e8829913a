"""DICOM series: the classic, a file a slice, enhanced multi-frame files, and Siemens' mosaics."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.dicom_frames import (
    Frame,
    begins_as_dicom,
    first_text,
    forget,
    frames_of,
    group_values,
    read_dataset,
    read_pixels,
    values,
)
from data.dicom_writing import check_series, write_series
from data.grids import Plane, World, nearest
from data.items import Broken, Format
from data.volumes import Slice, Volume, check_only_volume
from util.errors import UserError
from util.files import printable, safe_name
from util.remote import base_name

EXTENSIONS = (".dcm", ".ima")
LISTED = 8  # series that an error names
SAME_PLACE = 1e-3  # mm between the slices of two files, at most, that show one slice


def _recognises(head: bytes, path: str) -> bool:
    return begins_as_dicom(head)


def _groups(paths: Sequence[str]) -> list[list[str]]:
    return [list(paths)]


def _items(paths: Sequence[str], options: Mapping[str, Any]) -> list:
    """The slices of a folder's series, sorted by position.

    Files without an image (DICOMDIR, reports) are passed over, but not images that lack theirs.

    Args:
        options: the task's data: `series` is the SeriesNumber or SeriesInstanceUID of the series
            to take where there are several.

    Returns:
        list of Slice, and a Broken for each file that is no DICOM, or for a series that is no
        volume of grey slices.
    """
    root, headers, broken = options["root"], {}, []
    alone = os.path.isfile(root)
    name = _stem(root) if alone else os.path.basename(os.path.abspath(root))
    label, name = printable(name), safe_name(name)
    for path in paths:
        try:
            header = read_dataset(path, stop_before_pixels=True)
            if _has_image(header, path):
                headers[path] = header
        except UserError as error:
            broken.append(Broken(safe_name(_stem(path)), printable(base_name(path)), error))
    if not headers:
        return broken
    try:
        return [*_series(headers, name, label, options), *broken]
    except UserError as error:
        return [Broken(name, label, error), *broken]


def _has_image(header, path):
    """Whether a file holds an image; UserError where it should and does not."""
    from pydicom.uid import UID

    if "Rows" in header and "Columns" in header:
        return True
    kind = UID(first_text(header, "SOPClassUID"))
    if "Image Storage" in kind.name:  # or a volume would silently have a slice less
        raise UserError(
            f"{printable(base_name(path))}: damaged, holds a header of {kind.name} and no Rows"
        )
    return False


def _stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def _series(headers, name, label, options) -> list[Slice]:
    chosen = _choose(headers, label, options.get("series"))
    frames = [
        frame
        for path, header in chosen.items()
        for frame in frames_of(path, header, f"{label}: {printable(base_name(path))}")
    ]
    volume, magnitude = options.get("volume"), options.get("magnitude", False)
    found = DicomSeries(frames, name, label, volume, magnitude)
    if options.get("exact") and not found.several:
        check_only_volume(volume, label)
    return found.slices


def _choose(headers, label, series):
    """The headers, by path, of the one series, or of the one asked for."""
    found: dict[str, dict] = {}
    for path, header in headers.items():
        found.setdefault(first_text(header, "SeriesInstanceUID"), {})[path] = header
    chosen = found
    if series is not None:
        chosen = {
            uid: files
            for uid, files in found.items()
            if str(series) in (uid, first_text(next(iter(files.values())), "SeriesNumber"))
        }
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    listed = []
    for uid, files in found.items():
        first = next(iter(files.values()))
        description = " ".join(map(str, values(first, "SeriesDescription"))) or "no description"
        number = first_text(first, "SeriesNumber", "no number")
        listed.append(f"{number} ({printable(description)}, {len(files)} files, {uid})")
    choice = "data.series: the number or the UID chooses one"
    problem = f"holds {len(found)} series" if series is None else f"not one is series {series}"
    if len(chosen) > 1 and series is not None:
        problem = f"{len(chosen)} are series {series}"
    more = f"; and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    raise UserError(f"{label}: {problem}: {'; '.join(listed[:LISTED])}{more}; {choice}")


class DicomSeries(Volume):
    """The slices of one series, in the order of their positions along their normal.

    Args:
        frames: in any order.
        name, label, magnitude: see `Volume`.
        volume: which of several slices to take at each place, where every place has as many:
            an echo, a time point.

    Attributes:
        several: whether places have several slices.

    Raises:
        UserError: the frames are no stack of slices of one size and direction.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        name: str,
        label: str,
        volume: int | None = None,
        magnitude: bool = False,
    ):
        sizes = Counter(f"{f.size[1]}×{f.size[0]}" for f in frames)
        if len(sizes) > 1:
            listed = ", ".join(f"{size} ({count} files)" for size, count in sizes.items())
            raise UserError(f"{label}: expected slices of one size, found {listed}")
        directions = np.array([f.directions for f in frames])
        if np.ptp(directions, axis=0).max() > 0.01:
            raise UserError(
                f"{label}: its slices lie in several directions (a localizer?), expected one"
            )
        scales = {f: f.scale for f in frames}
        lacking = [f for f, scale in scales.items() if scale is None]
        if lacking and set(scales.values()) - {None, (1, 0)}:
            raise UserError(
                f"{label}: {len(lacking)} of {len(frames)} slices, {lacking[0].label} for one, "
                "have no RescaleSlope, and the others have, so their values cannot be compared"
            )
        if len({f.photometric for f in frames}) > 1:
            raise UserError(f"{label}: some slices are MONOCHROME1 and some MONOCHROME2")
        normal = np.cross(directions[0][:3], directions[0][3:])
        self.frames, self.several = _one_a_place(frames, normal, volume, label)
        self.shape = frames[0].size
        inverted = frames[0].photometric == "MONOCHROME1"
        along = [float(np.dot(f.position, normal)) for f in self.frames]
        plane = _plane(self.frames[0], normal)
        super().__init__(name, label, len(self.frames), along, plane, inverted, magnitude)
        self.world = _world(self.frames, normal)
        if self.gaps:
            self.remarks.append(f"its distances are uneven ({self.gaps}); a slice may be missing")

    def load(self) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        voxels = np.empty((len(self.frames), *self.shape), np.float32)
        padding = np.zeros(voxels.shape, bool)
        try:
            for i, (pixels, outside) in enumerate(read_pixels(self.frames)):
                voxels[i], padding[i] = pixels, outside
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from None
        finally:
            forget()
        return voxels, padding if padding.any() else None

    def write(
        self,
        folder: str,
        voxels: NDArray[np.float32],
        padding: NDArray[np.bool_] | None,
        description: str,
        identity: str,
        kind: str = "",
        spacing: float | None = None,
    ) -> str:
        """Write (slices, H, W) as a series in the folder NAME, see `write_series`."""
        path = os.path.join(folder, self.name)
        frames = self.frames if spacing is None else self._respaced(len(voxels), spacing)
        names = [f"{self.name}_z{i:03d}" for i in range(len(frames))]
        text = description, identity
        write_series(path, frames, names, voxels, padding, *text, kind, spacing)
        return path

    def _respaced(self, count, spacing):
        """The frames nearest to `count` slices that lie `spacing` mm apart, moved there."""
        sources = nearest(len(self.frames), count, spacing / self.spacing)
        first, last = self.frames[0].position, self.frames[-1].position
        normal = np.cross(*self.frames[0].directions.reshape(2, 3))
        offsets = (np.arange(count) - (count - 1) / 2) * spacing
        if len(self.frames) > 1:  # oblique to the slices where a gantry is tilted
            normal = (last - first) / self.positions[-1]
        places = (first + last) / 2 + offsets[:, None] * normal
        return [replace(self.frames[j], position=p) for j, p in zip(sources, places, strict=True)]

    def try_writing(self, factor: int, spacing: float | None) -> None:
        frames = self.frames if spacing is None else self._respaced(2 * len(self.frames), spacing)
        check_series(frames, factor, spacing)


def _plane(frame, normal):
    """The plane of a series' slices; DICOM's axes point left and posterior."""
    rows, cols = frame.directions[3:], frame.directions[:3]  # down a column, along a row
    world = [int(np.argmax(np.abs(axis))) for axis in (normal, rows, cols)]
    enhanced = frame.number is not None and not frame.tiles
    if enhanced:
        thickness = group_values(frame.header, frame.number, "SliceThickness")
    else:
        thickness = values(frame.header, "SliceThickness")
    found = float(thickness[0]) if thickness else 0.0
    towards = np.array([-1, -1, 1]) * normal
    return Plane(
        pixel=float(min(frame.spacing)),
        longer=float(max(frame.spacing)),
        thickness=found if found > 0 else None,
        world=(world[0], world[1], world[2]),
        upward=bool(towards[world[0]] > 0),
    )


def _world(frames, normal):
    """Where the slices lie, at even distances between the first and the last."""
    first, last = frames[0], frames[-1]
    along_row, along_column = first.directions.reshape(2, 3)
    step = (last.position - first.position) / (len(frames) - 1) if len(frames) > 1 else normal
    affine = np.eye(4)
    down, right = first.spacing
    affine[:3] = np.stack([step, down * along_column, right * along_row, first.position], axis=1)
    affine[:2] *= -1  # from left and posterior
    return World((len(frames), *first.size), affine)


def _one_a_place(frames, normal, volume, label):
    """(the frames sorted by place, of those at one place the volume-th; whether there are such)."""
    ordered = sorted(frames, key=lambda f: (float(np.dot(f.position, normal)), f.order))
    along = [float(np.dot(f.position, normal)) for f in ordered]
    places: list[list[Frame]] = []
    for i, frame in enumerate(ordered):
        if i and along[i] - along[i - 1] < SAME_PLACE:
            places[-1].append(frame)
        else:
            places.append([frame])
    places = [_without_copies(sorted(place, key=lambda f: f.order)) for place in places]
    most = max(map(len, places))
    if most == 1:
        return [place[0] for place in places], False
    pair = " and ".join(f.label for f in next(p for p in places if len(p) > 1)[:2])
    if {len(place) for place in places} != {most}:
        raise UserError(
            f"{label}: {pair} show the same slice; the echoes or time points of a series "
            "must be restored from folders of their own"
        )
    choice = f"data.volume: 0 to {most - 1} chooses one of {most} volumes (echoes, time points)"
    if volume is None:
        raise UserError(f"{label}: {pair} show the same slice; {choice}")
    if not 0 <= volume < most:
        raise UserError(f"{label}: data.volume: no volume {volume}; {choice}")
    return [place[volume] for place in places], True


def _without_copies(place):
    """The frames of one place, of which one may have been exported twice."""
    kept: dict[tuple, Frame] = {}
    for i, frame in enumerate(place):
        identity = first_text(frame.header, "SOPInstanceUID") or str(i)
        kept.setdefault((identity, frame.number, frame.order), frame)
    return list(kept.values())


FORMAT = Format("DICOM", EXTENSIONS, _recognises, _items, _groups, remote=False)
