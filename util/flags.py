"""Types of flags, for argparse."""

import argparse
import math
import os

MOST = 1_000_000


def positive(text: str) -> int:
    """A count, from 1 to `MOST`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"expected {MOST} or less, found {value}")
    return value


def local_path(text: str) -> str:
    """A path, with a home folder filled in for "~", which shells leave alone in --flag=~/x."""
    return os.path.expanduser(text)


def noise_level(text: str) -> float | str:
    """A standard deviation, "auto", "local", or the path of a file that holds a map of it."""
    if text in ("auto", "local") or os.path.isfile(os.path.expanduser(text)):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(
            f"expected 0 or more, auto, local, or the file of a map, found {text}"
        )
    return value


def minutes(text: str) -> float:
    """A length of time, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {text}")
    return value
