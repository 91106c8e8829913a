"""Writing files so that none is ever seen half-written."""

import contextlib
import os


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; it takes path's place when the block succeeds."""
    folder, name = os.path.split(os.path.abspath(path))
    # One name a file, so that what a killed run leaves is written over by the next.
    temporary = os.path.join(folder, f".part-{name}")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _to_disk(path):
    """Wait until a file's bytes are on the disk, lest a power cut leave its name without them."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing_text(path):
    """Like `replacing`, but yield an open UTF-8 text file."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        yield file
