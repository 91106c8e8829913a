"""Lines and a progress bar on a terminal, or on what stands in its place and may be closed."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

FORMAT = "{desc} |{bar}| {percentage:3.0f}%{postfix} [{elapsed}<{remaining}]"


def prepare() -> None:
    """Let no character be an error: one that the terminal lacks is written as its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, error: bool = False) -> None:
    """Print a line, above the progress bar if there is one."""
    stream = sys.stderr if error else sys.stdout
    if stream is not None:
        with _open_or_not(stream):
            tqdm.write(text, file=stream)
            stream.flush()  # which is no terminal under mpiexec


def finish() -> None:
    """Write what is still to be written, so that Python need not at its end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with _open_or_not(stream):
                stream.flush()


@contextlib.contextmanager
def _open_or_not(stream: TextIO) -> Iterator[None]:
    """What is written is lost if the reader has closed the pipe, as ``| head`` does."""
    try:
        yield
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout:
            say("note: standard output was closed; the run goes on", error=True)


class Bar:
    """The progress of a whole run, images and, beside them, the steps of the current one."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self._bar = tqdm(disable=True)
        with _open_or_not(sys.stderr):
            self._bar = tqdm(
                total=total,
                bar_format=FORMAT,
                dynamic_ncols=True,
                smoothing=0,  # the time left is by the mean speed
                disable=sys.stderr is None,
                desc=self._description(),
            )

    def _description(self) -> str:
        return f"images {self.done}/{self.total}"

    def show(self, done: int, work: float, found: int, now: str) -> None:
        """Draw it anew.

        Args:
            done: images that are dealt with.
            work: the same, with the parts of those in work.
            found: how many an earlier run had restored, which took no time.
            now: what is in work.
        """
        if self._bar.disable:
            return
        self.done = done
        with _open_or_not(sys.stderr):
            self._bar.initial = found
            self._bar.set_description_str(self._description(), refresh=False)
            self._bar.set_postfix_str(now, refresh=False)
            self._bar.update(min(work, self.total) - self._bar.n)
            if done == self.total:
                self._bar.refresh()

    def close(self) -> None:
        with _open_or_not(sys.stderr):
            self._bar.close()
