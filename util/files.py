"""Writing files so that none is ever seen half-written."""

import contextlib
import os
import tempfile


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; it takes path's place when the block succeeds."""
    folder, name = os.path.split(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix="-" + name)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def replacing_text(path):
    """Like `replacing`, but yield an open UTF-8 text file."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        yield file
