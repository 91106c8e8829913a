"""A table of numbers by name, as CSV, to which a row can be added at the cost of that row alone.

A file that grew row by row may say twice what its columns are, and what a row holds; the last
word counts. A row of its name alone takes back what was said of it. Columns that this program
does not know are kept, and so is text in a cell.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from util.files import patiently, replacing_text

NAME = "image"
Row = dict[str, float | str]


@dataclass
class Table:
    """What a file says.

    Attributes:
        rows: name → dict of column → value, in the order of the file; None for a row taken back.
        columns: in the order in which they first stand there.
        unread: whether there is anything in the file that is not in `rows`, but for the row that
            was being written when the program was stopped.
    """

    rows: dict[str, Row | None] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    unread: bool = False


def _line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _text(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.6g}"


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _is_headings(cells: list[str]) -> bool:
    """Whether a line names columns; a row of an image called "image" holds numbers."""
    return (
        len(cells) > 1
        and cells[0] == NAME
        and all(c and isinstance(_value(c), str) for c in cells[1:])
    )


def read_table(path: str) -> Table:
    """Read a table; empty where there is no file."""
    table = Table()
    if not os.path.exists(path):
        return table
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    except (UnicodeDecodeError, csv.Error):
        table.unread = True
        return table
    headings: list[str] = []
    for cells in lines:
        if _is_headings(cells):
            headings = cells[1:]
            table.columns += [c for c in headings if c not in table.columns]
        elif len(cells) == 1:
            table.rows[cells[0]] = None
        elif cells and len(cells) == len(headings) + 1:
            pairs = zip(headings, cells[1:], strict=True)
            table.rows[cells[0]] = {key: _value(cell) for key, cell in pairs if cell}
        else:
            table.unread = table.unread or bool(cells)
    return table


def set_aside(path: str) -> str:
    """Keep a copy of a file under a name that is free, which is returned."""
    number = 1
    while os.path.exists(copy := f"{path}.unread{number}"):
        number += 1
    with open(path, "rb") as source, open(copy, "xb") as target:
        target.write(source.read())
    return copy


def write_rows(path: str, columns: Iterable[str], rows: Mapping[str, Row]) -> None:
    """Write a table anew; `rows` is name → dict of column → value."""
    columns = list(columns)
    with replacing_text(path) as file:
        file.write(_line([NAME, *columns]))
        for name, row in rows.items():
            file.write(_line([name, *(_text(row.get(key)) for key in columns)]))


class Journal:
    """Adds rows to a table; each is on the disk when `add` returns."""

    def __init__(self, path: str, headings: Iterable[str] = ()):
        self.path = path
        self.headings = list(headings)  # those that the file has already

    def add(self, name: str, row: Mapping[str, float | str]) -> None:
        """Add a row, column → value; an empty one takes back what was said of it."""
        lines = ""
        if row and list(row) != self.headings:
            self.headings = list(row)
            lines = _line([NAME, *row])
        lines += _line([name, *map(_text, row.values())])
        with patiently(lambda: open(self.path, "a", encoding="utf-8", newline="")) as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
