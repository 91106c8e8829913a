"""Headers of NIfTI and Analyze files: read with what other tools forgive, and refined."""

import logging
import logging.handlers
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.volumes import reason
from util.errors import UserError
from util.files import open_plain, printable, read_head

HEADERS, VOXELS = (".hdr", ".hdr.gz"), (".img", ".img.gz")  # of a volume in two files
CIFTI = range(3000, 3100)  # intent codes
CIFTI_EXTENSION = 32
LAST_CODE, ALIGNED = 5, 2  # of sform and qform: the last that is defined; "aligned"
IN_MM = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # lengths, by their code
LONG_QUATERNION = 1.01  # a rotation whose quaternion is longer is no rounding error
SINGULAR = 1e-6  # the least volume of a voxel, of that of a box with its sides


class Found(NamedTuple):
    header: Any  # nibabel's, whose sform and qform, where it has them, are valid
    affine: NDArray[np.float64]  # (4, 4), voxel to world in mm
    remarks: list[str]  # what a user is to be told of it


def read_header(path: str, label: str) -> Found:
    """Read a header, whatever the file is called; an sform or qform that is no use is dropped.

    Of the geometries that a header may give, the first that is valid counts: sform, qform,
    voxel sizes alone.

    Raises:
        UserError: no header of a volume, or one without a valid geometry.
    """
    name = printable(label)
    try:
        with open_plain(path) as file:
            head = file.read(1024)
            file.seek(0)
            header = _header_class(head).from_fileobj(file, check=False)
        remarks = _check(header) + _to_mm(header)
    except Exception as error:  # noqa: BLE001 - damaged headers fail in many ways
        raise UserError(f"{name}: cannot be read as NIfTI ({reason(error)})") from None
    if _is_cifti(header):
        raise UserError(f"{name}: is CIFTI, which holds surfaces and no volume")
    try:
        found = _with_geometry(header, path, name)
        return found._replace(remarks=[*remarks, *found.remarks])
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - nibabel's checks of single fields
        raise UserError(f"{name}: its geometry cannot be read ({reason(error)})") from None


def _check(header):
    """Let nibabel mend what it can; returns what it says of it, which it would print."""
    for form in ("sform_code", "qform_code") if _is_nifti(header) else ():
        if int(header[form]) > LAST_CODE:  # which nibabel would take for no geometry
            header[form] = ALIGNED
    said, handler = logging.getLogger(__name__), logging.handlers.BufferingHandler(100)
    said.propagate = False
    said.addHandler(handler)
    try:
        header.check_fix(said)
    finally:
        said.removeHandler(handler)
    remarks = [r.getMessage() for r in handler.buffer if r.levelno >= logging.WARNING]
    least = getattr(header, "single_vox_offset", 0) if getattr(header, "is_single", False) else 0
    if int(header["vox_offset"]) < least:  # the header itself would be read as voxels
        header["vox_offset"] = least
    return remarks


def _to_mm(header):
    """Give a NIfTI header, which may be in other units, its lengths in mm; returns remarks."""
    if not _is_nifti(header) or (code := int(header["xyzt_units"]) & 7) not in IN_MM:
        return []
    unit, mm = IN_MM[code]
    header["pixdim"][1:4] *= mm
    for letter in "xyz":
        header[f"srow_{letter}"] = header[f"srow_{letter}"] * mm
        header[f"qoffset_{letter}"] = header[f"qoffset_{letter}"] * mm
    header["xyzt_units"] = int(header["xyzt_units"]) - code + 2
    return [f"its header gives lengths in {unit}, which became mm"]


def _header_class(head):
    import nibabel as nib

    if head[344:348] == b"n+1\0":
        return nib.nifti1.Nifti1Header
    if head[344:348] == b"ni1\0":
        return nib.nifti1.Nifti1PairHeader
    if head[4:8] == b"n+2\0":
        return nib.nifti2.Nifti2Header
    if head[4:8] == b"ni2\0":
        return nib.nifti2.Nifti2PairHeader
    if len(head) < 348 or head[:4] not in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        raise ValueError("it does not begin as NIfTI does")
    return nib.spm2analyze.Spm2AnalyzeHeader


def _is_nifti(header):
    return "sform_code" in header.keys()  # noqa: SIM118 - nibabel's headers do not iterate


def _is_cifti(header):
    if not _is_nifti(header):
        return False
    codes = [extension.get_code() for extension in header.extensions]
    return int(header["intent_code"]) in CIFTI or CIFTI_EXTENSION in codes


def _with_geometry(header, path, name):
    if not _is_nifti(header):
        affine = _analyze_affine(path)
        if not _is_valid(affine):
            raise UserError(f"{name}: its voxel sizes are no sizes, so it has no place in space")
        remark = "Analyze 7.5 does not say which side is left; it was taken as SPM and nibabel do"
        return Found(header, affine, [remark])
    dropped, usable = [], []
    for form, affine in (("sform", header.get_sform()), ("qform", _qform(header))):
        if int(header[f"{form}_code"]) <= 0:
            continue
        if affine is not None and _is_valid(affine):
            usable.append((form, affine))
        else:
            header[f"{form}_code"] = 0
            dropped.append(form)
    if usable:
        taken, affine = usable[0]
    else:
        taken, affine = "voxel sizes", header.get_base_affine()
    if not _is_valid(affine):
        raise UserError(f"{name}: its affine is singular, so it has no orientation")
    if taken == "sform":  # which readers prefer, so nothing is lost with the qform
        dropped = []
    if dropped:
        dropped = [f"its {' and '.join(dropped)} cannot be used, its {taken} was taken"]
    return Found(header, np.asarray(affine, np.float64), dropped)


def _is_valid(affine):
    """Whether an affine is finite and maps a voxel to a box that has a volume."""
    if not np.isfinite(affine).all():
        return False
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(abs(np.linalg.det(affine[:3, :3])) > SINGULAR * np.prod(sides) > 0)


def _qform(header):
    """The qform; a quaternion too long by rounding is cut, as viewers do; None where it is none."""
    quaternion = np.array([header[f"quatern_{c}"] for c in "bcd"], np.float64)
    length = np.linalg.norm(quaternion)
    if 1 < length <= LONG_QUATERNION:
        # A little below 1: the header's float32 must not round it up again.
        for letter, value in zip("bcd", quaternion / (length * (1 + 1e-7)), strict=True):
            header[f"quatern_{letter}"] = value
    try:
        return header.get_qform()
    except Exception:  # noqa: BLE001 - nibabel's HeaderDataError, NumPy's LinAlgError
        return None


def _analyze_affine(path):
    import nibabel as nib

    return nib.spm2analyze.Spm2AnalyzeImage.from_filename(path).affine  # by its .mat, if any


def voxel_file(path: str) -> str:
    """The file that holds the voxels of a header's file: itself, or the .img beside it."""
    head = read_head(path)
    if head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0":
        return path
    return _beside(path, HEADERS, VOXELS)


def header_file(path: str) -> str:
    """The file that holds the header of an .img."""
    return _beside(path, VOXELS, HEADERS)


def files_of(path: str) -> list[str]:
    """The file of a volume, and of a pair the other one as well, where that is there."""
    other = path
    if path.lower().endswith(VOXELS):
        other = header_file(path)
    elif path.lower().endswith(HEADERS):
        other = voxel_file(path)
    return [p for p in dict.fromkeys((path, other)) if os.path.isfile(p)]


def _beside(path, endings, others):
    """The file of a pair that goes with `path`, which has one of the endings."""
    ending = next(e for e in (*reversed(endings), "") if path.lower().endswith(e))
    stem = path[: len(path) - len(ending)]
    names = [stem + o for other in others for o in (other, other.upper())]
    return next((n for n in names if os.path.exists(n)), names[0])


def written_header(header: Any, affine: NDArray) -> tuple[Any, type]:
    """A copy of a header, for a NIfTI volume in one file, and nibabel's class of such a volume."""
    import nibabel as nib

    if not _is_nifti(header):
        fresh = nib.nifti1.Nifti1Header()
        fresh.set_data_shape(header.get_data_shape())
        fresh.set_zooms(header.get_zooms())
        fresh.set_xyzt_units("mm")
        fresh.set_sform(affine, "scanner")
        fresh["descrip"] = header["descrip"]
        return fresh, nib.Nifti1Image
    first = int(header["sizeof_hdr"]) == 348
    single, image = (
        (nib.nifti1.Nifti1Header, nib.Nifti1Image)
        if first
        else (nib.nifti2.Nifti2Header, nib.Nifti2Image)
    )
    if isinstance(header, single):
        return header.copy(), image
    fresh = single(header.binaryblock, header.endianness, check=False)
    fresh["magic"] = single.single_magic
    fresh["vox_offset"] = single.single_vox_offset
    fresh.extensions = type(header.extensions)(header.extensions)
    return fresh, image


def refine(
    header: Any,
    affine: NDArray,
    steps: NDArray[np.float64],
    before: Sequence[int],
    shape: Sequence[int],
) -> NDArray[np.float64]:
    """Give a header voxels of another size, about the same centre; returns the affine alike.

    The operators' grids have no other offset: where voxels are divided by f, input voxel i is
    centred between fine voxels f·i and f·i + f - 1, that is, at f·i + (f-1)/2. The bicubic kernel
    has an even number of taps, so its centre of mass lies half a pixel before the index f//2 it is
    said to be centred on, and a block mean's lies there too.

    Args:
        steps: (3,) from voxel to voxel, in the old voxels.
        before, shape: (3,) of the old grid and the new.
    """
    finer = np.diag([*steps, 1.0])
    finer[:3, 3] = (np.array(before) - 1) / 2 - (np.array(shape) - 1) / 2 * steps
    qform, qcode = header.get_qform(coded=True)
    sform, scode = header.get_sform(coded=True)
    zooms = header.get_zooms()
    header.set_zooms([*(np.array(zooms[:3]) * steps[: len(zooms)]), *zooms[3:]])
    if qcode:
        header.set_qform(qform @ finer, qcode)
    if scode:
        header.set_sform(sform @ finer, scode)
    return affine @ finer
