"""What a user reads when something is wrong."""

import argparse
import errno
import sys
from collections.abc import Callable

from util import terminal

WRITING = (errno.EFBIG, errno.EIO, errno.EROFS, getattr(errno, "ESTALE", errno.EIO))


class UserError(Exception):
    """A mistake the user can mend; its text is one sentence naming what was found and expected.

    The entry points print it as ``error: <text>`` on stderr and exit with status 2.
    """


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose own errors look like every other: one sentence, exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def hindrance(error: Exception, folder: str, smaller: str) -> str | None:
    """What outside of the program stopped it, and what mends that; None of any other error.

    Args:
        folder: the flag that says where files are written.
        smaller: the flag or key with which less memory is taken.
    """
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{folder}: {error.strerror}; make room"
        if error.errno in WRITING and error.filename is None:  # an open file's writes name none
            return f"{folder}: {error.strerror}"
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else None
    text = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"{smaller}: this machine's memory is not enough; take less"
    if isinstance(error, RuntimeError) and "out of memory" in text:
        return f"{smaller}: {text.split('. ')[0]}; take less"
    return None


def status_of(work: Callable[[], object]) -> int:
    """Do a command's work; returns its exit status, 2 after a `UserError`, which is printed."""
    terminal.prepare()
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
