"""The formats that are read and written back. A new one: a module that has a FORMAT, and a row."""

from data import dicom, kspace, nifti, pictures
from data.items import Format
from util.remote import base_name

# In the order in which they are asked: the preamble of a DICOM file may be that of a TIFF, too.
FORMATS: dict[str, Format] = {
    f.name: f for f in (kspace.FORMAT, dicom.FORMAT, nifti.FORMAT, pictures.FORMAT)
}


def extensions() -> tuple[str, ...]:
    """Of all formats."""
    return tuple(e for f in FORMATS.values() for e in f.extensions)


def by_content(head: bytes, path: str) -> Format | None:
    """The format of a file's first kilobyte."""
    return next((f for f in FORMATS.values() if f.recognises(head, path)), None)


def by_suffix(path: str) -> Format | None:
    """The format that a file's name claims."""
    name = base_name(path).lower()
    return next((f for f in FORMATS.values() if name.endswith(f.extensions)), None)
