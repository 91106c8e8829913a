"""What files of k-space hold, brought to one order of axes."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.kspace_header import read_grid, read_header, root_of
from data.volumes import reason
from util.errors import UserError

NAMES = ("slice", "coil", "ky", "kx")
ORDERS = {2: "ky kx", 3: "coil ky kx", 4: "slice coil ky kx"}
WHOLE = 0.9  # share of a line's points from which on it is one: echoes may be partial
ALIKE = 0.99  # share of all slices' points that each has: a value may be 0 by chance
# Of ISMRMRD: flags of acquisitions that are no lines of the image, counters of several images.
NO_IMAGE = (
    "NOISE_MEASUREMENT",
    "PHASECORR_DATA",
    "NAVIGATION_DATA",
    "DUMMYSCAN_DATA",
    "RTFEEDBACK_DATA",
    "HPFEEDBACK_DATA",
    "SURFACECOILCORRECTIONSCAN_DATA",
    "PHASE_STABILIZATION",
    "PHASE_STABILIZATION_REFERENCE",
)
IMAGES = ("contrast", "repetition", "phase", "set")
DATASETS = ("kspace", "ksp", "k_space", "data")  # names that k-space goes by, the likelier first


@dataclass(frozen=True)
class Raw:
    """A file of k-space.

    Attributes:
        kspace: (slices, coils, H, W) complex64, centred; its axes are those of the image.
        mask: what was measured, (N,) bool, lines along the phase encoding, or (H, W) bool, points.
        axis: along which phase is encoded: "columns", or "rows".
        spacing: mm between rows, columns and slices.
        size: (H, W) of the reconstruction, the centre of the image; None: all of it.
        reference: (slices, *size), the file's own reconstruction, if it has one.
    """

    kspace: NDArray[np.complex64]
    mask: NDArray[np.bool_]
    axis: str
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    size: tuple[int, int] | None = None
    reference: NDArray[np.float32] | None = None


def read_raw(path: str, label: str, order: str | None, count_only: bool = False) -> Any:
    """Read a file of k-space.

    Args:
        order: names of an array's axes, see `ORDERS`; None: by their number.
        count_only: return the number of slices instead, from the header where that is possible.

    Returns:
        `Raw`.

    Raises:
        UserError: the file cannot be read, or holds no k-space.
    """
    try:
        with open(path, "rb") as file:
            hdf5 = file.read(4) == b"\x89HDF"
        read = _read_h5 if hdf5 and not path.lower().endswith(".mat") else _read_array
        return read(path, label, order, count_only)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged files fail in many ways
        raise UserError(f"{label}: cannot be read as k-space ({reason(error)})") from None


def _read_h5(path, label, order, count_only):
    import h5py

    with h5py.File(path, "r", locking=False) as file:  # not every file server has locks
        if "kspace" in file:
            stored = file["kspace"]
            if stored.ndim not in (3, 4) or stored.dtype.kind != "c":
                raise UserError(
                    f"{label}: kspace: expected complex (slices, coils, rows, columns), found "
                    f"{stored.dtype} {stored.shape}"
                )
            _check_not_empty(stored, label)
            if count_only:
                return stored.shape[0]
            header = file["ismrmrd_header"][()] if "ismrmrd_header" in file else None
            found = [k for k in ("reconstruction_rss", "reconstruction_esc") if k in file]
            reference = file[found[0]][()].astype(np.float32) if found else None
            mask = file["mask"][()] if "mask" in file else None
            return _fastmri(stored[()], header, mask, reference, label)
        held = list(file)
    if "dataset" in held:
        return _read_ismrmrd(path, label, count_only)
    names = ", ".join(held[:6]) or "nothing"
    raise UserError(f"{label}: no dataset 'kspace' in it (it holds {names})")


def _fastmri(kspace, header, mask, reference, label):
    kspace = kspace if kspace.ndim == 4 else kspace[:, None]
    spacing, size = (1.0, 1.0, 1.0), None
    if header is not None:
        spacing, size = read_header(header, label)
    elif reference is not None:
        size = reference.shape[-2:]
    if size is not None and size[0] < kspace.shape[-2]:
        kspace = crop_readout(kspace, size[0])
    return _checked(kspace, "columns", label, mask, spacing=spacing, size=size, reference=reference)


def crop_readout(kspace: NDArray, size: int) -> NDArray[np.complex64]:
    """Take the readout oversampling away: the central `size` rows of the image, again in k-space.

    Both transforms are orthonormal, so the noise stays what it was.
    """
    rows = _transform(np.fft.ifft, kspace)
    top = (kspace.shape[-2] - size) // 2
    return _transform(np.fft.fft, rows[..., top : top + size, :]).astype(np.complex64)


def _transform(function, x):
    shifted = np.fft.ifftshift(x, axes=-2)
    return np.fft.fftshift(function(shifted, axis=-2, norm="ortho"), axes=-2)


def _read_ismrmrd(path, label, count_only):
    try:
        import ismrmrd
    except ImportError:
        raise UserError(f"{label}: an ISMRMRD file, which needs pip install ismrmrd") from None
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # not every file server has locks
    dataset = ismrmrd.Dataset(path, create_if_needed=False)
    try:
        header = dataset.read_xml_header()
        lines = [dataset.read_acquisition(i) for i in range(dataset.number_of_acquisitions())]
    finally:
        dataset.close()
    lines = _image_lines(lines, root_of(header, label), ismrmrd)
    if not lines:
        raise UserError(f"{label}: no acquisition of an image in it")
    slices = 1 + max(a.idx.slice for a in lines)
    if count_only:
        return slices
    if any(a.idx.kspace_encode_step_2 for a in lines):
        raise UserError(f"{label}: 3-D encoding (kspace_encode_step_2), expected slices")
    if any(a.is_flag_set(ismrmrd.ACQ_IS_REVERSE) for a in lines):
        raise UserError(
            f"{label}: readouts in reverse (ACQ_IS_REVERSE), expected them all in one direction"
        )
    _check_one_image(lines, label)
    coils, samples = lines[0].data.shape
    grid = read_grid(header, label, samples)
    kspace = np.zeros((slices, coils, grid.samples, grid.lines), np.complex64)
    times = np.zeros((slices, 1, grid.samples, grid.lines), np.float32)
    for a in lines:
        at = grid.lines // 2 + a.idx.kspace_encode_step_1 - grid.centre
        if a.data.shape != (coils, samples) or not 0 <= at < grid.lines:
            raise UserError(f"{label}: acquisitions of different sizes, or beyond the matrix")
        readout = a.data[:, a.discard_pre : samples - a.discard_post]
        place = _place(a, readout.shape[1], grid.samples, label)
        kspace[a.idx.slice, :, place, at] += readout
        times[a.idx.slice, :, place, at] += 1
    measured = times.max(axis=(0, 1)) > 0
    whole = measured[:, measured.any(axis=0)].mean() >= WHOLE
    kspace /= times.clip(min=1)  # what was averaged was measured several times
    # Cut in the image, a partial echo would no longer be 0 where it was not measured.
    if whole and grid.size[0] < grid.samples:
        kspace = crop_readout(kspace, grid.size[0])
    return _checked(kspace, "columns", label, None, spacing=grid.spacing, size=grid.size)


def _image_lines(acquisitions, root, ismrmrd):
    """Those that are lines of the image.

    Lines for calibration alone are where the header calls them embedded: of the same sequence,
    between the others. Separate ones may have another contrast.
    """
    mode = root.findtext("encoding/parallelImaging/calibrationMode")
    flags = [getattr(ismrmrd, f"ACQ_IS_{name}") for name in NO_IMAGE]
    lines = [a for a in acquisitions if not any(map(a.is_flag_set, flags))]
    if mode == "embedded":
        return lines
    calibration = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION
    both = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
    return [a for a in lines if a.is_flag_set(both) or not a.is_flag_set(calibration)]


def _check_one_image(lines, label):
    """Refuse lines of several images, or that differ in their segment alone."""
    for name in IMAGES:
        found = sorted({getattr(a.idx, name) for a in lines})
        if len(found) > 1:
            raise UserError(
                f"{label}: idx.{name} has the values {', '.join(map(str, found))}, expected one "
                "image of each slice; write each to a file of its own"
            )
    segments: dict[tuple[int, int, int], int] = {}
    for a in lines:
        line = a.idx.slice, a.idx.kspace_encode_step_1, a.idx.average
        if segments.setdefault(line, a.idx.segment) != a.idx.segment:
            raise UserError(
                f"{label}: line {line[1]} of slice {line[0] + 1} is in segments {segments[line]} "
                f"and {a.idx.segment}, expected it in one; write each to a file of its own"
            )


def _place(acquisition, count, samples, label):
    """Where a readout of `count` samples lies among the `samples` of the matrix, a slice."""
    if count == samples:
        return slice(0, samples)
    start = samples // 2 - acquisition.center_sample + acquisition.discard_pre
    if not 0 <= start <= samples - count:
        raise UserError(
            f"{label}: a readout of {count} samples with center_sample "
            f"{acquisition.center_sample} does not fit into encodedSpace/matrixSize/x, {samples}"
        )
    return slice(start, start + count)


def _read_array(path, label, order, count_only):
    array = _complex_array(path, label)
    order = ORDERS.get(array.ndim, "") if order is None else order
    names = order.replace(",", " ").split()
    if len(names) != array.ndim or sorted(names) != sorted(set(names) & set(NAMES)):
        raise UserError(
            f"data.order: expected the names of {label}'s {array.ndim} axes among "
            f"{', '.join(NAMES)}, found {order!r}"
        )
    if not {"ky", "kx"} <= set(names):
        raise UserError(f"data.order: ky (phase encoding) and kx (readout) are needed in {order!r}")
    axis = "rows" if names.index("ky") < names.index("kx") else "columns"
    spatial = [n for n in names if n in ("ky", "kx")]
    full = [n for n in ("slice", "coil") if n in names] + spatial
    array = array.transpose([names.index(n) for n in full])
    if "coil" not in names:
        array = array[..., None, :, :]
    array = array if array.ndim == 4 else array[None]
    _check_not_empty(array, label)
    return len(array) if count_only else _checked(array, axis, label, None)


def _complex_array(path, label):
    ending = os.path.splitext(path)[1].lower()
    if ending == ".npy":
        return np.load(path, allow_pickle=False)
    if ending == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    else:
        from scipy.io import loadmat

        arrays = {k: v for k, v in loadmat(path).items() if isinstance(v, np.ndarray)}
    arrays = {k: v for k, v in arrays.items() if v.dtype.kind == "c" and v.ndim in ORDERS}
    named = [k for wanted in DATASETS for k in arrays if k.lower() == wanted]
    if not arrays or (len(arrays) > 1 and not named):
        held = ", ".join(arrays) or "none"
        raise UserError(
            f"{label}: expected one complex array of 2 to 4 axes, or one named kspace; found {held}"
        )
    return arrays[named[0] if named else next(iter(arrays))]


def _check_not_empty(kspace, label):
    if 0 in kspace.shape:
        raise UserError(
            f"{label}: k-space of shape {'×'.join(map(str, kspace.shape))}, expected at least one "
            "slice, coil, row and column"
        )


def _checked(kspace, axis, label, mask, **more):
    """`Raw`, its mask that of the file and of what is not empty."""
    kspace = np.ascontiguousarray(kspace, dtype=np.complex64)
    if not np.isfinite(kspace).all():
        raise UserError(f"{label}: holds values that are not finite")
    of_slices = (kspace != 0).any(axis=1)
    if mask is not None:
        mask = _broadcast(np.asarray(mask).squeeze(), kspace.shape[-2:], axis, label)
        of_slices = of_slices & mask
    samples = of_slices.any(axis=0)
    if not samples.any():
        raise UserError(f"{label}: every value is 0, so there is no image in it")
    _check_alike(of_slices, samples, axis, label)
    lines = samples.any(axis=-2 if axis == "columns" else -1)
    if (samples[:, lines] if axis == "columns" else samples[lines]).mean() < WHOLE:
        return Raw(kspace * samples, samples, axis, **more)
    kspace = kspace * (lines if axis == "columns" else lines[:, None])
    return Raw(kspace, lines, axis, **more)


def _check_alike(of_slices, samples, axis, label):
    """Refuse slices that were not sampled alike; empty ones, as at the ends of a scan, may be.

    A line is missing if all of it is. Single values may be 0 by chance, which `ALIKE` allows for.

    Args:
        of_slices: (slices, H, W) bool, what each has; samples: (H, W), what any has.
    """
    readout = -2 if axis == "columns" else -1
    for i, found in enumerate(of_slices):
        if not found.any():
            continue
        missing = np.count_nonzero(samples.any(axis=readout) & ~found.any(axis=readout))
        what = "lines"
        if not missing and found[samples].mean() < ALIKE:
            missing, what = np.count_nonzero(samples & ~found), "points"
        if missing:
            raise UserError(
                f"{label}: slice {i + 1} of {len(of_slices)} lacks {missing} {what} of k-space "
                "that other slices have, and one mask is for all; restore slices that were "
                "sampled differently as files of their own"
            )


def _broadcast(mask, shape, axis, label):
    """A file's own mask, of lines or of points, as one of points."""
    lines = shape[-1 if axis == "columns" else -2]
    if mask.ndim != 2 and mask.size != lines:
        raise UserError(f"{label}: mask: {mask.size} lines, and k-space has {lines}")
    if mask.ndim == 2 and mask.shape != shape:
        found, expected = ("×".join(map(str, s)) for s in (mask.shape, shape))
        raise UserError(f"{label}: mask: {found} points, and k-space has {expected}")
    mask = mask.astype(bool)
    return mask if mask.ndim == 2 else mask.reshape((1, -1) if axis == "columns" else (-1, 1))
