"""Files: written so that none is ever seen half-written, opened by content, safely named."""

import bz2
import contextlib
import gzip
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, BinaryIO, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
ATTEMPTS = 20 if os.name == "nt" else 0  # at a file that is in use
WAIT = 0.25  # seconds between them
LONGEST_NAME = 255  # bytes of one name on the usual file systems
LONGEST_STEM = 200  # of them for a result's name: _z000, _12, .part- and .nii.gz come on top
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PART = ".part-"  # begins the name of a file that is being written
UNSAFE = frozenset('/\\:*?"<>|')  # in names on one of the usual file systems
# Names of Windows' devices, whatever follows after a dot.
RESERVED = re.compile(r"(?i)(con|conin\$|conout\$|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\.|$)")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield a temporary path beside `path`; it takes path's place when the block succeeds."""
    folder, name = os.path.split(os.path.abspath(path))
    # One name a file, so that what a killed run leaves is written over by the next.
    temporary = f"{PART}{name}"
    if len(os.fsencode(temporary)) > LONGEST_NAME:
        temporary = f"{PART}{_digest(name)}"
    temporary = os.path.join(folder, temporary)
    try:
        yield temporary
        _to_disk(temporary)
        patiently(lambda: os.replace(temporary, path))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def patiently(work: Callable[[], T]) -> T:
    """Do it, again if need be: Windows refuses files that another program has open for a moment."""
    for _ in range(ATTEMPTS):
        try:
            return work()
        except PermissionError:
            time.sleep(WAIT)
    return work()


def _to_disk(path):
    """Wait until a file's bytes are on the disk, lest a power cut leave its name without them."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing_text(path: str) -> Iterator[IO[str]]:
    """Like `replacing`, but yield an open UTF-8 text file."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        yield file


def open_plain(path: str) -> BinaryIO:
    """Open a file for reading, decompressed where its contents are gzip or bzip2.

    The name plays no part: scanners' exports and downloads are often named wrongly.
    """
    with open(path, "rb") as file:
        start = file.read(3)
    if start[:2] == b"\x1f\x8b":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if start == b"BZh":
        return cast(BinaryIO, bz2.open(path, "rb"))
    return open(path, "rb")


def read_head(path: str, count: int = 1024) -> bytes:
    """Up to the first `count` bytes of a file, decompressed; b"" where they cannot be read."""
    try:
        with open_plain(path) as file:
            return file.read(count)
    except (OSError, EOFError, ValueError):  # no file, no permission, no gzip file after all
        return b""


def is_lfs_pointer(head: bytes) -> bool:
    """Whether these first bytes are the text that Git LFS keeps in place of a file."""
    return head.startswith(LFS_POINTER)


def printable(name: str) -> str:
    """A file's name as one line of valid Unicode: other bytes and control characters escaped."""
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def safe_name(stem: str) -> str:
    """The name of a source's results: its own, if every usual file system takes it.

    Otherwise what is unsafe in it becomes "_", and a digest of the whole name keeps it unique;
    the same source always gets the same name.
    """
    safe = "".join("_" if c in UNSAFE or not c.isprintable() else c for c in stem)
    safe = safe.rstrip(" .")
    safe = "_" + safe[1:] if safe[:1] in ("", ".", " ") else safe
    safe = "_" + safe if RESERVED.match(safe) else safe
    if safe == stem and len(stem.encode()) <= LONGEST_STEM:
        return stem
    digest = _digest(stem)
    cut = safe.encode()[: LONGEST_STEM - len(digest) - 1].decode("utf-8", "ignore")
    return f"{cut}-{digest}"


def files_digest(paths: Sequence[str]) -> str:
    """SHA-256 of files in hexadecimal: of one its bytes, of several the names and bytes."""
    if len(paths) == 1:
        return file_digest(paths[0])
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(os.path.basename(path)) + b"\0" + file_digest(path).encode())
    return digest.hexdigest()


def file_digest(path: str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def values_digest(*values: NDArray) -> str:
    """SHA-256 of arrays, of their types and shapes and values; never a number's spelling."""
    digest = hashlib.sha256()
    for array in values:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return f"sha256:{digest.hexdigest()}"


def digests_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Key → `file_digest` of each value that is the path of a file."""
    paths = {k: v for k, v in values.items() if isinstance(v, str) and os.path.isfile(v)}
    return {k: file_digest(v) for k, v in paths.items()}


def _digest(name):
    return hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
