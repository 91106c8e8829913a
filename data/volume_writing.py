"""Restored volumes put together from their results and written like their files."""

import errno
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.slices import NO_IMAGES, Slice, Whole

ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>")  # of an object in memory


class Written(NamedTuple):
    line: str  # for the terminal
    failed: bool
    paths: tuple[str, ...] = ()


# (volume, restored, std or None) → (folder, values), more volumes of the same grid and units
MoreOf = Callable[
    [Any, NDArray[np.float32], NDArray[np.float32] | None],
    Iterable[tuple[str, NDArray[np.float32]]],
]


def write_volumes(
    items: Iterable[Any],
    done: set[str],
    folder: str,
    description: str,
    identity: str,
    more_of: MoreOf | None = None,
    measured: bool = False,
) -> Iterator[Written]:
    """Put the volumes together that have been restored, or whose slices all have.

    Reads slices/NAME.npy, and std/NAME.npy and samples/NAME_K.npy where there are any, of each
    slice, (C, H, W) in the units of the [-1, 1] image; writes volumes/, std/, samples/K/ and what
    `more_of` gives, in the units of the volumes' files. A volume that cannot be written keeps its
    slices, and the others are still written. Where all volumes of a file were, they are joined.

    Args:
        items: of the run; those that are no slices are passed over.
        done: names of the items that are restored.
        folder: of the run's results.
        description: how the volumes came about, a few words.
        identity: text that tells this run's settings from others'.
        more_of: what else to write of a volume.
        measured: whether the volumes were restored as the files are, see `Volume.put_together`.

    Yields:
        One line for each volume, and for each file of several, and whether writing it failed.
    """
    shared = folder, description, identity, more_of, measured
    parts: dict[str, dict[Any, Written]] = {}
    for volume, names, spacing in _restored(items, done):
        if names:
            written = _try_writing(volume, names, spacing, *shared)
            if volume.part is not None:
                parts.setdefault(volume.part.whole, {})[volume] = written
        else:
            count, restored = len(volume.slices), sum(s.name in done for s in volume.slices)
            line = f"{volume.label}: {restored} of {count} slices restored, no volume written"
            written = Written(line, False)
        yield written
    for whole, of_volumes in parts.items():
        yield _try_joining(whole, of_volumes, folder)


def _restored(items, done):
    """(volume, names of its results, none where some are missing, spacing) of each volume."""
    for item in items:
        if isinstance(item, Whole) and item.name in done:
            yield item.volume, [item.name], item.spacing
    for volume in dict.fromkeys(item.volume for item in items if isinstance(item, Slice)):
        names = [piece.name for piece in volume.slices]
        yield volume, names if done.issuperset(names) else [], None


def _try_writing(volume, names, spacing, folder, *how) -> Written:
    try:
        return _write_volume(volume, names, spacing, folder, *how)
    except Exception as error:  # noqa: BLE001 - whatever a writing library objects to
        if _is_full(error):
            raise
        return Written(_failure(volume, names, folder, error), True)


def _is_full(error):
    """Whether the disk is, so that no other volume can be written either."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _failure(volume, names, folder, error):
    files = f"{volume.name}_z*.npy" if len(names) > 1 else f"{names[0]}.npy"
    where = os.path.join(folder, "slices", files)
    return (
        f"{volume.label}: the restored volume cannot be written ({reason(error)}); its slices, "
        f"in [-1, 1], are kept in {where}"
    )


def _write_volume(volume, names, spacing, folder, description, identity, more_of, measured):
    black, white, outside = volume.scale
    whole = names == [volume.name]
    x = _stack(names, os.path.join(folder, "slices"), whole)
    mean, padding = volume.put_together(x, spacing, measured)
    text = description, identity
    path = volume.write(os.path.join(folder, "volumes"), mean, padding, *text, spacing=spacing)
    paths, more, std = [path], [], None
    if os.path.exists(os.path.join(folder, "std", f"{names[0]}.npy")):
        std = _stack(names, os.path.join(folder, "std"), whole) * (abs(white - black) / 2)
        if padding is not None:
            std[padding] = 0
        std = std.astype(np.float32)
        more.append(("std", std))
    samples = _samples(volume, names, os.path.join(folder, "samples"), whole, spacing, measured)
    for kind, values in [*more, *(more_of(volume, mean, std) if more_of else ()), *samples]:
        text = f"{description} {kind}", identity
        where = os.path.join(folder, kind)
        hidden = None if kind in NO_IMAGES else padding
        paths.append(volume.write(where, values, hidden, *text, kind, spacing))
    kept = measured or not volume.clipped
    line = (
        f"{os.path.relpath(path, folder)}: {len(mean)} slices; {black:g} to {white:g} were -1 to "
        f"1, the {outside:.2%} of voxels outside were {'kept there' if kept else 'clipped'}"
    )
    return Written(line, False, tuple(paths))


def _try_joining(whole, written, folder) -> Written:
    """Make one file of the volumes of one, in each folder that holds them."""
    volume = next(iter(written))
    done = [w.paths for w in written.values() if not w.failed]
    if len(done) < volume.part.count:
        line = f"{whole}: {len(done)} of {volume.part.count} volumes written, each as its own file"
        return Written(line, False)
    folders: dict[str, list[str]] = {}
    for path in itertools.chain.from_iterable(done):
        folders.setdefault(os.path.dirname(path), []).append(path)
    ending = done[0][0][len(os.path.join(folder, "volumes", volume.name)) :]
    try:
        for where, parts in folders.items():
            volume.join(parts, os.path.join(where, whole + ending))
    except Exception as error:  # noqa: BLE001 - whatever a writing library objects to
        if _is_full(error):
            raise
        line = f"{whole}: its volumes cannot be joined ({reason(error)}); each is a file of its own"
        return Written(line, True)
    return Written(f"{os.path.join('volumes', whole + ending)}: {len(done)} volumes", False)


def _samples(volume, names, folder, whole, spacing, measured) -> Iterator[tuple[str, NDArray]]:
    """Yield (where to, voxels in the file's units) of each posterior sample that was kept."""
    for k in itertools.count():
        numbered = [f"{name}_{k}" for name in names]
        if not os.path.exists(os.path.join(folder, f"{numbered[0]}.npy")):
            return
        voxels, _ = volume.put_together(_stack(numbered, folder, whole), spacing, measured)
        yield os.path.join("samples", str(k)), voxels


def _stack(names, folder, whole):
    """(count, H, W) of the volume's one file, or of its slices', several channels averaged."""
    paths = [os.path.join(folder, f"{name}.npy") for name in names]
    return np.load(paths[0]) if whole else np.stack([np.load(p).mean(axis=0) for p in paths])


def reason(error: BaseException) -> str:
    """What a library's exception says, in one line: its first, and what that announces."""
    lines = [line.strip() for line in ADDRESS.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    first, *others = lines
    return f"{first} {'; '.join(others)}".rstrip(": ") if first[-1] == ":" else first.rstrip(".")
