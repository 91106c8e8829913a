"""What a user reads when something is wrong."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend; its text is one sentence naming what was found and expected.

    The entry points print it as ``error: <text>`` on stderr and exit with status 2.
    """


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose own errors look like every other: one sentence, exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def status_of(work: Callable[[], object]) -> int:
    """Do a command's work; returns its exit status, 2 after a `UserError`, which is printed."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
