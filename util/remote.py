"""Files named by gs://, az:// and http(s):// as well as by local paths."""

import contextlib
import errno
import functools
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

import blobfile as bf

from util.errors import UserError

TIMEOUT = 60  # seconds without an answer
ATTEMPTS = 5  # of blobfile, which would otherwise try for ever

_kept = contextlib.ExitStack()
bf.configure(retry_limit=ATTEMPTS, connect_timeout=TIMEOUT, log_callback=lambda text: None)


def is_remote(path: str) -> bool:
    """Whether this is an address rather than a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None  # and not C://


def is_web(path: str) -> bool:
    """Whether this is an address that blobfile does not read, so that no folder can be listed."""
    url = _split(path)
    stores = url.scheme in ("gs", "az") or url.netloc.endswith(".blob.core.windows.net")
    return is_remote(path) and not stores


def base_name(path: str) -> str:
    """The last part of a path; of an address without what follows its "?"."""
    path = _split(path).path if is_remote(path) else path
    return os.path.basename(path)


def _split(path):
    try:
        return urllib.parse.urlsplit(path)
    except ValueError as error:
        raise UserError(f"{path}: is no address ({error})") from None


@contextlib.contextmanager
def local_file(path: str) -> Iterator[str]:
    """Yield a local path to a file's contents: its own, or that of a copy for as long as needed.

    Raises:
        FileNotFoundError, PermissionError, OSError: with a `strerror` that says what is wrong.
    """
    if not is_remote(path):
        if os.path.isdir(path) or not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dmps-") as folder:
        copy = os.path.join(folder, base_name(path) or "file")
        _download(path, copy)
        yield copy


def kept_file(path: str) -> str:
    """Like `local_file`, for a file that is needed again: a copy is kept to the program's end."""
    if is_remote(path):
        return _kept_copy(path)
    with local_file(path) as local:
        return local


@functools.cache
def _kept_copy(path: str) -> str:
    return _kept.enter_context(local_file(path))


def list_folder(path: str) -> list[str]:
    """Paths of the files in a local or remote folder; raises OSError, as `local_file` does."""
    if not is_remote(path):
        return [os.path.join(path, name) for name in os.listdir(path)]
    with _as_os_error(path):
        return [bf.join(path, name) for name in bf.listdir(path)]


def _download(path, copy):
    with _as_os_error(path), open(copy, "wb") as target:
        if is_web(path):
            with urllib.request.urlopen(path, timeout=TIMEOUT) as source:
                shutil.copyfileobj(source, target)
                if getattr(source, "length", None):  # bytes that were promised and did not come
                    raise ValueError("the answer ended early")
        else:
            with bf.BlobFile(path, "rb") as source:
                shutil.copyfileobj(source, target)


@contextlib.contextmanager
def _as_os_error(path):
    """Whatever a library raises for a remote path, as the OSError that a local path would raise."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such file", path) from None
    except urllib.error.HTTPError as error:
        raise _of_status(error.code, error.reason, path) from None
    except bf.RequestFailure as error:
        raise _of_status(error.response_status, error.message, path) from None
    except (OSError, bf.Error, HTTPException, ValueError) as error:
        if getattr(error, "strerror", None):
            raise  # of this machine: its disk may be full
        raise _unreadable(getattr(error, "reason", None) or error, path) from None


def _of_status(status, reason, path):
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "no such file", path)
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"access refused, status {status}", path)
    return _unreadable(f"status {status}, {reason}" if status else reason, path)


def _unreadable(reason, path):
    reason = getattr(reason, "strerror", None) or reason
    return OSError(errno.EIO, str(reason).strip().splitlines()[0][:200], path)
