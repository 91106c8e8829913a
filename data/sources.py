"""Where training images come from: several sources, each with a share of the crops."""

import os
from collections.abc import Mapping

import numpy as np

from data.dataloader import EXTENSIONS, list_images, natural_key
from util.errors import UserError
from util.remote import base_name, is_remote


def find_sources(folders: list[str], key: str) -> dict[str, list[str]]:
    """List the images of every source.

    Args:
        folders: each a folder of images, which is one source, or a local folder without images
            whose subfolders are the sources. A source has its folder's name; "NAME=PATH" gives a
            folder of images another.
        key: the flag, for error messages.

    Returns:
        name → paths in natural order; sources in the order given, subfolders in natural order.

    Raises:
        UserError: a folder is missing or without images, or two sources have one name.
    """
    sources: dict[str, list[str]] = {}
    for folder in folders:
        for name, path in sources_of(folder):
            if name in sources:
                raise UserError(
                    f"{key}: two sources are named {name!r}; name one of them, as in "
                    f"{key} other={path}"
                )
            sources[name] = list_images(path, key)
    return sources


def sources_of(folder: str) -> list[tuple[str, str]]:
    """(name, folder) of each source that one argument stands for."""
    name, separator, path = folder.partition("=")
    if separator and name and "/" not in name and not os.path.isdir(folder):
        return [(name, path)]
    if os.path.isdir(folder):
        names = sorted((n for n in os.listdir(folder) if n[:1] != "."), key=natural_key)
        if not any(n.lower().endswith(EXTENSIONS) for n in names):
            inside = [(n, os.path.join(folder, n)) for n in names]
            inside = [(n, path) for n, path in inside if os.path.isdir(path)]
            if inside:
                return inside
    trimmed = folder.rstrip("/")
    own_name = trimmed if is_remote(folder) else os.path.abspath(trimmed)
    return [(base_name(own_name), folder)]


def find_shares(sizes: Mapping[str, int], named: Mapping[str, float], where: str) -> list[float]:
    """The part of all crops that each source gets.

    Args:
        sizes: source → its number of images.
        named: source → its share, for some or all of them. The others divide what is left in
            proportion to the square roots of their sizes: a small source is seen more often than
            its size alone would have it, but less often than if all sources were equal.
        where: file and key, for error messages.

    Returns:
        Shares in the order of `sizes`, of sum 1.

    Raises:
        UserError: a name that is no source, a share that is not in [0, 1], or shares that leave
            nothing or too much.
    """
    for name, share in named.items():
        if name not in sizes:
            raise UserError(f"{where}: no source {name!r} (found: {', '.join(sizes)})")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise UserError(f"{where}: {name}: expected a number from 0 to 1, found {share!r}")
    left = 1 - sum(named.values())
    roots = {name: size**0.5 for name, size in sizes.items() if name not in named}
    if roots and left < 1e-6:
        raise UserError(f"{where}: the shares named leave nothing for {', '.join(roots)}")
    if not roots and abs(left) > 1e-3:
        raise UserError(f"{where}: the shares of all sources sum to {1 - left:g}, expected 1")
    total = sum(roots.values())
    shares = [named[n] if n in named else left * roots[n] / total for n in sizes]
    return [share / sum(shares) for share in shares]


class Interleaving:
    """Which source, and which draw from it, an item is: decided by the item's index alone.

    Items come in blocks of `BLOCK`, or of `SEATS` for each source where these would not find room
    in one. Every block holds each source in exact proportion to its share, in an order of its own;
    so what item n is follows from n, without a count kept.
    """

    BLOCK = 1000
    SEATS = 4

    def __init__(self, shares: list[float], seed: int):
        drawn = sum(share > 0 for share in shares)
        seats = self.BLOCK if drawn <= self.BLOCK else self.SEATS * drawn
        self.counts = _apportion(shares, seats if len(shares) > 1 else 1)
        self.slots = np.repeat(np.arange(len(shares)), self.counts)
        self.seed = seed

    def __getitem__(self, n: int) -> tuple[int, int]:
        """(source, how many items before this one are of the same source)."""
        block, position = divmod(n, len(self.slots))
        order = np.random.default_rng([self.seed, 2, block]).permutation(self.slots)
        source = int(order[position])
        before = int(np.count_nonzero(order[:position] == source))
        return source, block * self.counts[source] + before


def _apportion(shares: list[float], seats: int) -> list[int]:
    """Whole numbers of sum `seats` in proportion to the shares, by largest remainder.

    A share above 0 gets one at least, so there are no more of them than seats.
    """
    exact = [share * seats for share in shares]
    counts = [max(int(e), 1 if e > 0 else 0) for e in exact]
    while sum(counts) != seats:
        step = 1 if sum(counts) < seats else -1
        # The source whose count is furthest behind its share, or furthest ahead of it.
        gap = [step * (e - c) if c + step > 0 and e > 0 else -np.inf
               for e, c in zip(exact, counts, strict=True)]  # fmt: skip
        counts[int(np.argmax(gap))] += step
    return counts
