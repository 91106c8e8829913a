"""What a run restores and what training reads: the files of a folder as items, or as arrays."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data.formats import FORMATS, by_content, by_suffix, extensions
from data.items import Broken, Format, Item
from data.pictures import EXTENSIONS, Picture, read_image, read_picture
from data.volumes import Slice, reason
from util.errors import UserError
from util.files import is_lfs_pointer, printable, read_head, safe_name
from util.remote import base_name, is_remote, is_web, list_folder

__all__ = [
    "EXTENSIONS",
    "Picture",
    "check_names",
    "list_images",
    "list_items",
    "natural_key",
    "read_image",
    "read_picture",
]


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key under which slice_2 precedes slice_10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(p) if i % 2 else p.lower() for i, p in enumerate(parts)], name


def list_images(root: str, key: str = "data.root") -> list[str]:
    """Paths of the images in a folder, local or remote, in natural order; or of one on the web.

    Raises:
        UserError: the folder is missing, cannot be listed or holds no image.
    """
    paths = _listed(root, key, EXTENSIONS)
    paths = [p for p in paths if base_name(p).lower().endswith(EXTENSIONS)]
    if not paths:
        raise UserError(f"{key}: no image in {root} (looked for {' '.join(EXTENSIONS)})")
    return paths


def _listed(root, key, known):
    """Paths of the files in a folder, local or remote, in natural order; or of one on the web."""
    if is_web(root):
        if not base_name(root).lower().endswith(known):
            raise UserError(
                f"{key}: {root} names no image ({' '.join(known)}), and on the web folders "
                "cannot be listed; a folder may be local or at gs:// or az://"
            )
        return [root]
    try:
        paths = list_folder(root)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{key}: no folder {root}") from None
    except OSError as error:
        raise UserError(f"{key}: {root} cannot be listed ({error.strerror})") from None
    names = {base_name(p): p for p in paths if base_name(p)[:1] not in ("", ".")}
    return [names[n] for n in sorted(names, key=natural_key)]


def list_items(
    data: Mapping[str, Any],
    magnitude: bool = False,
    exact: bool = False,
    key: str = "data.root",
) -> list[Item]:
    """The images to restore: pictures and the slices of volumes, in natural order.

    What takes several files, as a DICOM series, comes after what takes one.

    What a file is, its contents say. A file that is no image and is not named as one is passed
    over; one that cannot be read is a `Broken` item and takes no other with it.

    Args:
        data: the task's `data`: `root`, a file, or a folder of pictures, NIfTI volumes and the
            files of a DICOM series; `measured`, whether they are measurements; and where the
            task has them `axis` and `volume`, see `NiftiVolume` and `DicomSeries`, and
            `series`, see `data.dicom`.
        magnitude: the noise is that of magnitude images (rician), so -1 must be magnitude 0.
        exact: a file of one volume must be the `volume` asked for, 0; otherwise it is taken for
            any, as a mask is that serves all volumes of another file.
        key: what names them in the task, for error messages.

    Returns:
        list of `Item`. Only headers have been read: a volume's voxels are when the first of its
        slices is.

    Raises:
        UserError: there is no image, or two would carry one name.
    """
    root, axis = data["root"], data.get("axis")
    if axis not in (None, 0, 1, 2):
        raise UserError(f"data.axis: expected 0, 1 or 2, found {axis}")
    if (volume := data.get("volume")) is not None and volume < 0:
        raise UserError(f"data.volume: expected 0 or more, found {volume}")
    options = {**data, "magnitude": magnitude, "exact": exact}
    paths = _files(root, key)
    places = {path: i for i, path in enumerate(paths)}
    formats: dict[str, list[str]] = {name: [] for name in FORMATS}
    found: list[tuple[int, list]] = []
    for path, position in places.items():
        kind = _format(path)
        if isinstance(kind, Broken):
            found.append((position, [kind]))
        elif kind is not None:
            formats[kind.name].append(path)
    for name, members in formats.items():
        for group in FORMATS[name].groups(members) if members else []:
            position = places.get(group[0], len(paths)) if len(group) == 1 else len(paths)
            found.append((position, _items(FORMATS[name], group, options)))
    items = [item for _, some in sorted(found, key=lambda f: f[0]) for item in some]
    if not items:
        known = [f for f in FORMATS.values() if f.remote or not is_remote(root)]
        endings = " ".join(e for f in known for e in f.extensions)
        names = ", ".join(f.name for f in known)
        raise UserError(f"{key}: no image in {root} (looked for {names}: {endings})")
    if len(items) == 1 and isinstance(items[0], Broken):
        items[0].read()
    check_names(items, key)
    return items


def _files(root, key):
    """The file, or the files of the folder, in natural order."""
    if os.path.isfile(root):
        return [root]
    if not is_remote(root) and not os.path.isdir(root):
        raise UserError(f"{key}: no file or folder {root}")
    paths = _listed(root, key, extensions())
    return [p for p in paths if is_remote(p) or not os.path.isdir(p)]


def _format(path) -> Format | Broken | None:
    """The format of a file, why it is of none, or None where it is not named as an image."""
    named = by_suffix(path)
    if is_remote(path):
        return named if named is not None and named.remote else None
    problem = None
    if not os.path.exists(path):
        problem = "a link to a file that is not there (git annex get fetches those of a dataset)"
    elif os.path.isfile(path):
        head = read_head(path)
        if is_lfs_pointer(head):
            problem = "a Git LFS pointer, not the file itself (git lfs pull fetches it)"
        elif (kind := by_content(head, path)) is not None:
            return kind
    else:  # a socket or a device
        return None
    if named is None or problem is None:
        return named
    return _broken([path], UserError(f"{printable(base_name(path))}: {problem}"))


def _items(kind: Format, group: Sequence[str], options) -> list:
    """The items of one group of files; whatever is wrong with them is their own failure."""
    try:
        return kind.items(group, options)
    except UserError as error:
        return [_broken(group, error)]
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except Exception as error:  # noqa: BLE001 - readers of damaged files fail in many ways
        problem = f"cannot be read as {kind.name} ({reason(error)})"
    return [_broken(group, UserError(f"{printable(base_name(group[0]))}: {problem}"))]


def _broken(group, error):
    label = base_name(group[0])
    ending = next((e for e in extensions() if label.lower().endswith(e)), "")
    stem = label[: len(label) - len(ending)] if ending else os.path.splitext(label)[0]
    return Broken(safe_name(stem), printable(label), error)


def check_names(items: Sequence[Item], key: str = "data.root") -> None:
    """Raise UserError when two items' results would carry one name."""
    seen: dict[str, str] = {}
    volumes = dict.fromkeys(item.volume for item in items if isinstance(item, Slice))
    named = [(item.name, item.label) for item in items]
    named += [(v.name, v.label) for v in volumes]  # restored as a whole it is an item as well
    named += [(v.part.whole, v.label) for v in volumes if v.part and v.part.index == 0]
    for name, label in named:
        other = seen.get(name.lower())  # some file systems ignore case
        if other is not None:
            raise UserError(
                f"{key}: the results of {other} and {label} would carry one name, rename one of "
                "them"
            )
        seen[name.lower()] = label
