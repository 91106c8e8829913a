"""Image files as arrays, and what a run restores: pictures and the slices of volumes."""

import os
import re

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np

from data import nifti
from data.dicom import is_dicom, open_series
from data.volumes import Broken, find_scale, from_unit, to_unit
from util.errors import UserError
from util.remote import base_name, is_remote, is_web, kept_file, list_folder, local_file

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy")
OVERSHOOT = 4.0  # how far beyond [-1, 1] the noise of a measurement may go


def natural_key(name):
    """Sort key under which slice_2 precedes slice_10."""
    return [int(p) if p.isdigit() else p.lower() for p in re.split(r"(\d+)", name)], name


def list_images(root, key="data.root"):
    """Paths of the images in a folder, local or remote, in natural order; or of one on the web.

    Raises:
        UserError: the folder is missing, cannot be listed or holds no image.
    """
    paths = _listed(root, key, EXTENSIONS)
    paths = [p for p in paths if base_name(p).lower().endswith(EXTENSIONS)]
    if not paths:
        raise UserError(f"{key}: no image in {root} (looked for {' '.join(EXTENSIONS)})")
    return paths


def _listed(root, key, extensions):
    """Paths of the files in a folder, local or remote, in natural order; or of one on the web."""
    if is_web(root):
        if not base_name(root).lower().endswith(extensions):
            raise UserError(
                f"{key}: {root} names no image ({' '.join(extensions)}), and on the web folders "
                "cannot be listed; a folder may be local or at gs:// or az://"
            )
        return [root]
    try:
        paths = list_folder(root)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{key}: no folder {root}") from None
    except OSError as error:
        raise UserError(f"{key}: {root} cannot be listed ({error.strerror})") from None
    names = {base_name(p): p for p in paths if base_name(p)[:1] not in ("", ".")}
    return [names[n] for n in sorted(names, key=natural_key)]


def image_name(path):
    """The name an image's results carry: its file's, without the extension."""
    return os.path.splitext(base_name(path))[0]


class Picture:
    """One image file as an item to restore.

    Attributes:
        overshoot: see `read_picture`.
        floats: where the result is kept in the file's units, ("recon", ".tif"); None for a file
            of 8 bits, of which the PNG is a faithful copy. Known once it has been read.
    """

    def __init__(self, path, overshoot=0):
        self.path = path
        self.overshoot = overshoot
        self.name = image_name(path)
        self.label = base_name(path)
        self.floats = None

    def read(self):
        image, self._scale = read_picture(self.path, self.overshoot)
        self.floats = None if self._scale is None else ("recon", ".tif")
        return image

    def to_floats(self, x):
        """(C, H, W) in [-1, 1] → the file's units."""
        black, white = self._scale
        return from_unit(x, black, white)


def list_items(data):
    """The images to restore: pictures and the slices of volumes, in natural order.

    Args:
        data: the task's `data`: `root`, a file, or a folder of pictures, NIfTI volumes and the
            files of a DICOM series; `measured`, whether they are measurements; and where the
            task has them `axis` and `volume`, see `NiftiVolume`, and `series`, see
            `open_series`.

    Returns:
        list of items that have `name`, that of their results; `label`, the source's for
        messages; and `read()`, which gives (C, H, W) float32 in [-1, 1] or raises UserError.
        Only headers have been read: a volume's voxels are when the first of its slices is.

    Raises:
        UserError: there is no image, or two would carry one name.
    """
    root, axis = data["root"], data.get("axis")
    if axis not in (None, 0, 1, 2):
        raise UserError(f"data.axis: expected 0, 1 or 2, found {axis}")
    items, series = [], []
    for path in _files(root):
        name = base_name(path).lower()
        if name.endswith(EXTENSIONS):
            items.append(Picture(path, OVERSHOOT if data["measured"] else 0))
        elif name.endswith(nifti.EXTENSIONS):
            items += _nifti_slices(path, axis, data.get("volume"))
        elif not is_remote(path) and is_dicom(path):
            series.append(path)
    if series:
        name = image_name(root) if os.path.isfile(root) else os.path.basename(os.path.abspath(root))
        items += open_series(series, name, data.get("series"))
    if not items:
        looked_for = " ".join(EXTENSIONS + nifti.EXTENSIONS)
        raise UserError(f"data.root: no image in {root} (looked for {looked_for} and DICOM)")
    if len(items) == 1 and isinstance(items[0], Broken):
        items[0].read()
    check_names(items)
    return items


def _files(root):
    """The file, or the files of the folder, in natural order."""
    if os.path.isfile(root):
        return [root]
    if not is_remote(root) and not os.path.isdir(root):
        raise UserError(f"data.root: no file or folder {root}")
    paths = _listed(root, "data.root", EXTENSIONS + nifti.EXTENSIONS)
    return [p for p in paths if is_remote(p) or os.path.isfile(p)]


def _nifti_slices(path, axis, volume):
    try:
        return nifti.NiftiVolume(kept_file(path), axis, volume).slices
    except OSError as error:
        error = UserError(f"{base_name(path)}: cannot be read ({error.strerror})")
    except UserError as found:
        error = found
    return [Broken(nifti.volume_name(base_name(path)), base_name(path), error)]


def check_names(items):
    """Raise UserError when two items' results would carry one name."""
    seen = {}
    for item in items:
        name = item.name.lower()  # some file systems ignore case
        if name in seen:
            raise UserError(
                f"data.root: the results of {seen[name]} and {item.label} would carry one name, "
                "rename one of them"
            )
        seen[name] = item.label


def _is_deep_colour_png(path):
    """Whether a file is a PNG of 16 bits and more than one channel."""
    with open(path, "rb") as file:
        head = file.read(26)  # signature, then the header chunk: depth at 24, colour type at 25
    return head.startswith(b"\x89PNG") and len(head) == 26 and head[24] == 16 and head[25] != 0


def _read_deep_colour_png(path):
    """(H, W, 3) uint16; Pillow, which imageio reads PNGs with, would drop 8 of the 16 bits."""
    frames = imageio_ffmpeg.read_frames(path, pix_fmt="rgb48le", bits_per_pixel=48)
    width, height = next(frames)["source_size"]
    pixels = np.frombuffer(next(frames), "<u2").reshape(height, width, 3)
    frames.close()
    return pixels


def _decode(path):
    if path.lower().endswith(".npy"):
        return np.load(path, allow_pickle=False)
    if _is_deep_colour_png(path):
        return _read_deep_colour_png(path)
    return iio.imread(path)


def read_image(path):
    """Read one image as float32 (C, H, W) in [-1, 1], see `read_picture`."""
    return read_picture(path)[0]


def read_picture(path, overshoot=0):
    """Read one image file.

    Unsigned integers of 8 or 16 bits are scaled by the range of their type, so they keep their
    contrast; floats are taken as they are, in [0, 1], or in [-1, 1] if they go below 0. Other
    integers, and floats beyond, are scaled by their own percentiles, see `find_scale`.

    Args:
        overshoot: how far floats may leave [-1, 1], by the noise of a measured image.

    Returns:
        image: (C, H, W) float32 in [-1, 1], C = 1 or 3. An alpha channel is dropped, and a grey
            image saved in colour, whose three channels are equal, is read as grey.
        scale: (black, white), the values that became -1 and 1; None for a file of 8 bits.

    Raises:
        UserError: the file cannot be decoded, or is no grey or colour image.
    """
    name = base_name(path)
    try:
        with local_file(path) as local:
            image = _decode(local)
    except Exception as error:  # noqa: BLE001 - each decoder has exceptions of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise UserError(f"{name}: cannot be read as an image ({reason})") from None
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 2, 3, 4) or 0 in image.shape:
        raise UserError(f"{name}: expected a grey or colour image, found shape {image.shape}")
    if image.dtype.kind not in "buif":
        raise UserError(f"{name}: expected integers or floats, found {image.dtype}")
    if image.shape[-1] in (2, 4):
        image = image[..., :-1]
    if image.shape[-1] == 3 and (image == image[..., :1]).all():
        image = image[..., :1]
    image, scale = _scaled(image, name, overshoot)
    return np.ascontiguousarray(image.transpose(2, 0, 1)), scale


def _scaled(image, name, overshoot):
    """The image as float32 in [-1, 1], and its scale, see `read_picture`."""
    if image.dtype == np.bool_:
        return 2 * image.astype(np.float32) - 1, None
    if image.dtype in (np.uint8, np.uint16):
        top = np.iinfo(image.dtype).max
        image = (image / np.float32(top)).astype(np.float32)
        return 2 * image - 1, None if top == 255 else (0.0, float(top))
    if not np.isfinite(image).all():
        raise UserError(f"{name}: holds values that are not finite")
    floats = image.dtype.kind == "f"
    image = image.astype(np.float32)
    low, high = image.min(), image.max()
    if floats and low >= 0 and high <= 1 + overshoot / 2:
        return 2 * image - 1, (0.0, 1.0)
    if floats and -1 - overshoot <= low < 0 and high <= 1 + overshoot:
        return image, (-1.0, 1.0)
    black, white, _ = find_scale(image, False, name)
    return to_unit(image, black, white), (black, white)
