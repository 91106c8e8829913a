"""--output: the one restored picture, volume or series, written where the user wants it."""

import gzip
import os
import re
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import imageio.v3 as iio
import numpy as np

from data.decoding import decode
from data.formats import extensions
from data.kspace import KSpaceVolume
from data.nifti import NiftiVolume
from data.nifti_header import files_of
from data.volumes import Slice, Whole
from util.errors import UserError
from util.files import replacing
from util.image_files import deep_png
from util.remote import kept_file

SAME = {".jpeg": ".jpg", ".tiff": ".tif"}
ANY_PICTURE = (".tif", ".npy")  # formats that hold every kind of pixel
NIFTI = (".nii", ".nii.gz")


def suffix(path: str) -> str:
    """The end of a name that tells its format, in one spelling; "" for a folder's."""
    name = os.path.basename(path).lower()
    end = ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]
    return SAME.get(end, end)


def check_output(
    path: str | None, items: Sequence[Any], overwrite: bool = False, read: Sequence[str] = ()
) -> None:
    """Find out before the work whether the result can go to `path`.

    Args:
        path: the value of --output, None if it is not given.
        items: what the run restores.
        overwrite: whether a file that is there may be replaced; what the run reads never is.
        read: files that the run reads beside its images.

    Raises:
        UserError: there is not one input, it is of another format than `path` is named, nothing
            can be written there, or something would be overwritten.
    """
    if path is None:
        return
    sources = dict.fromkeys(_name_of(i) for i in items)
    if len(sources) != 1:
        raise UserError(
            f"--output: expected one picture, volume or series to restore, found {len(sources)}"
            f"{_listed(list(sources))}; --save_dir keeps the results of any number"
        )
    source = items[0].volume if isinstance(items[0], (Slice, Whole)) else items[0]
    part = getattr(source, "part", None)
    pieces = len(source.slices) if isinstance(items[0], Slice) else 1
    if len(items) < pieces * (part.count if part else 1):
        raise UserError(
            "--output: needs all slices and volumes of a file, and --limit leaves some out"
        )
    wanted, end = _formats(source), suffix(path)
    if end not in extensions() and "" in wanted:
        end = ""  # a folder's name with a dot in it
    if end not in wanted:
        names = " or ".join(w or "a folder" for w in wanted)
        raise UserError(
            f"--output: {path}: expected {names}, the format of {source.label}, found "
            f"{end or 'no suffix'}"
        )
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"--output: {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output: {path}: {folder} cannot be written to")
    inputs = {os.path.realpath(p) for p in (*_sources(source), *read)}
    _check_nothing_is_lost(path, _name_of(items[0]), end, overwrite, inputs)


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:2])}{', …' if names[2:] else ''})" if names else ""


def _check_nothing_is_lost(
    path: str, name: str, end: str, overwrite: bool, inputs: Collection[str]
) -> None:
    """Refuse a `path` that the run reads, or that is there and may not be replaced.

    Args:
        name: of the result; end: of the path; inputs: real paths of what the run reads.
    """
    there = [path]
    if os.path.isdir(path):
        if end:
            raise UserError(f"--output: {path} is a folder, expected the name of a file")
        names, own = sorted(os.listdir(path)), _own_files(name)
        if others := [n for n in names if not own.fullmatch(n)]:
            raise UserError(f"--output: {path} holds other files ({others[0]}); name a new folder")
        there = [os.path.join(path, n) for n in names]
    there = [p for p in there if os.path.lexists(p)]
    for one in there:
        if os.path.realpath(one) in inputs:
            raise UserError(f"--output: {one} is what the run reads; name another")
    if there and not overwrite:
        raise UserError(f"--output: {path} exists; name another, or --overwrite to replace it")


def _sources(source: Any) -> list[str]:
    """The local files that an image or volume is read from."""
    pieces = getattr(source, "frames", [source])
    return [f for piece in pieces for f in files_of(piece.path)]


def _name_of(item: Any) -> str:
    """The name of the one result that an item belongs to."""
    if not isinstance(item, (Slice, Whole)):
        return item.name
    return item.volume.part.whole if item.volume.part else item.volume.name


def _formats(source: Any) -> tuple[str, ...]:
    """Suffixes that a result of this source may have; "" is a folder."""
    if not hasattr(source, "slices"):
        own = suffix(source.label)
        return (own, *(s for s in ANY_PICTURE if s != own))
    if isinstance(source, NiftiVolume):
        return NIFTI
    own = suffix(getattr(source, "path", ""))
    if isinstance(source, KSpaceVolume):
        return (*((own,) if own == ".h5" else ()), *NIFTI)
    return (own,)


def _own_files(name: str) -> re.Pattern[str]:
    """Files that a restored series of this name writes: one, or one a slice; also unfinished."""
    return re.compile(rf"(\.part-)?{re.escape(name)}(_z\d+)?\.dcm")


def write_output(path: str, items: Sequence[Any], folder: str) -> str:
    """Write the run's one result to `path`; returns a line that says so.

    Args:
        items: what the run restored; `folder`: its results.

    Raises:
        UserError: it cannot be written.
    """
    item = items[0]
    try:
        if isinstance(item, (Slice, Whole)):
            name = _name_of(item)
            if suffix(path) == ".h5":
                result = os.path.join(folder, "recon", f"{name}.h5")
            else:
                result = _result_of(name, os.path.join(folder, "volumes"))
            _copy_volume(result, path)
        else:
            _write_picture(item, folder, path)
    except OSError as error:
        raise UserError(
            f"--output: {path} cannot be written ({error.strerror or error}); the results are in "
            f"{folder}"
        ) from None
    return f"restored: {path}"


def _result_of(name: str, folder: str) -> str:
    """The folder or the NIfTI file that a volume was written to."""
    path = os.path.join(folder, name)
    return path if os.path.isdir(path) else f"{path}.nii.gz"


def _copy_volume(result: str, path: str) -> None:
    if os.path.isdir(result):
        os.makedirs(path, exist_ok=True)
        names = sorted(os.listdir(result))
        for name in names:
            with replacing(os.path.join(path, name)) as temporary:
                shutil.copyfile(os.path.join(result, name), temporary)
        own = _own_files(os.path.basename(result))
        for name in set(os.listdir(path)).difference(names):
            if own.fullmatch(name):  # of a result of more slices, or of a run that was stopped
                os.remove(os.path.join(path, name))
        return
    with replacing(path) as temporary, open(temporary, "wb") as target:
        packed = result.endswith(".gz") and not path.lower().endswith(".gz")
        with gzip.open(result) if packed else open(result, "rb") as source:
            shutil.copyfileobj(source, target)


def _write_picture(item: Any, folder: str, path: str) -> None:
    """The result in the file's units and, if `path` is of the same format, its type of pixels."""
    end = suffix(path)
    if item.floats is None:
        pixels = iio.imread(os.path.join(folder, "recon", f"{item.name}.png"))
    else:
        pixels = iio.imread(os.path.join(folder, item.floats[0], item.name + item.floats[1]))
        dtype = decode(kept_file(item.path)).values.dtype.newbyteorder("=")
        if dtype.kind in "iu" and end == suffix(item.label):
            limits = np.iinfo(dtype)
            pixels = np.rint(pixels).clip(limits.min, limits.max).astype(dtype)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if end == ".npy":
            np.save(file, pixels)
        elif end == ".png" and pixels.dtype == np.uint16 and pixels.ndim == 3:
            file.write(deep_png(pixels))
        else:
            how: dict[str, Any] = {"quality": 98} if end == ".jpg" else {}
            iio.imwrite(file, pixels, extension=end, **how)
