"""What a run restores: items, and the formats that give them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from util.errors import UserError


class Item(Protocol):
    """One image to restore.

    Attributes:
        name: of its results; safe on every file system, unique, and always the same.
        label: what messages and tables call its source.
        floats: where the result is kept besides the 8-bit PNG, (folder, ending), for
            `util.image_files.write_floats` of `to_floats`; None where the PNG says it all. Known
            once it has been read.
        digest: of the file's values and all else that the image is made of, "" where nothing is
            read; known once it has been read. All slices of a volume have the same.
        note: what a user is to be told of how it was read, None for nothing. Known once it has
            been read; all slices of a volume have the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def floats(self) -> tuple[str, str] | None: ...

    @property
    def note(self) -> str | None: ...

    @property
    def digest(self) -> str: ...

    def read(self) -> NDArray:
        """(C, H, W) float32 in [-1, 1], black where `padding` is; raises UserError."""

    def padding(self) -> NDArray | None:
        """(H, W), of a whole volume (D, H, W), booleans: what is no data; None where all is.

        They count for no statistics, no σ and no metrics.
        """

    def to_floats(self, x: NDArray) -> NDArray:
        """What is kept of a result (C, H, W) in [-1, 1], for the file of `floats`."""

    def picture(self, x: NDArray) -> NDArray:
        """What of (C, H, W) in [-1, 1] is shown: itself, or of a volume three planes, (1, h, w)."""

    def check_writable(self, factor: int = 1) -> None:
        """Try what writing the result will need, before the work.

        Args:
            factor: how many times more rows and columns the result has.

        Raises:
            UserError: it could not be written.
        """


@dataclass(frozen=True)
class Broken:
    """A file or series that gives no image; its error is raised when it is read."""

    name: str
    label: str
    error: UserError
    floats = None
    note = None
    digest = ""

    def read(self):
        raise self.error

    def padding(self):
        return None

    def to_floats(self, x):
        raise self.error

    def picture(self, x):
        raise self.error

    def check_writable(self, factor=1):
        raise self.error


def one_by_one(paths: Sequence[str]) -> list[list[str]]:
    """Each file gives items by itself."""
    return [[path] for path in paths]


@dataclass(frozen=True)
class Format:
    """A kind of file; a row of `data.formats.FORMATS` adds one.

    Attributes:
        name: for messages.
        extensions: in lower case, with the dot. They decide where the contents cannot be seen
            (remote files) or tell nothing (damaged files); otherwise the contents decide.
        recognises: whether a file is of this format, by its first kilobyte, decompressed, and
            its path.
        items: the items of one group of files; `options` are the task's `data`.
        groups: which of a folder's files of this format belong together, in natural order.
        remote: whether files at an address may be of this format.
    """

    name: str
    extensions: tuple[str, ...]
    recognises: Callable[[bytes, str], bool]
    items: Callable[[Sequence[str], Mapping[str, Any]], list]
    groups: Callable[[Sequence[str]], list[list[str]]] = one_by_one
    remote: bool = True
