"""A table of numbers by name, as CSV, to which a row can be added at the cost of that row alone.

A file that grew row by row may say twice what its columns are, and what a row holds; the last
word counts. A row of its name alone takes back what was said of it.
"""

import csv
import io
import os

from util.files import replacing_text

NAME = "image"


def _line(cells):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _number(value):
    return "" if value is None else f"{value:.6g}"


def read_rows(path, columns):
    """Read a table; what a stop amid a row left of it is skipped.

    Args:
        columns: the names that columns may have, by which a line of headings is known.

    Returns:
        name → dict of column → number, in the order of the file; or → None for a row taken back.
        Empty where there is no file.
    """
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    rows, headings = {}, []
    for cells in csv.reader(io.StringIO(text[: text.rfind("\n") + 1])):
        if cells[0] == NAME and set(cells[1:]) <= set(columns):
            headings = cells[1:]
        elif len(cells) == 1:
            rows[cells[0]] = None
        elif len(cells) == len(headings) + 1:
            rows[cells[0]] = {k: float(v) for k, v in zip(headings, cells[1:], strict=True) if v}
    return rows


def write_rows(path, columns, rows):
    """Write a table anew; `rows` is name → dict of column → number."""
    with replacing_text(path) as file:
        file.write(_line([NAME, *columns]))
        for name, row in rows.items():
            file.write(_line([name, *(_number(row.get(key)) for key in columns)]))


class Journal:
    """Adds rows to a table; each is on the disk when `add` returns."""

    def __init__(self, path, headings=()):
        self.path = path
        self.headings = list(headings)  # those that the file has already

    def add(self, name, row):
        """Add a row, a dict of column → number; an empty one takes back what was said of it."""
        lines = ""
        if row and list(row) != self.headings:
            self.headings = list(row)
            lines = _line([NAME, *row])
        lines += _line([name, *map(_number, row.values())])
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
