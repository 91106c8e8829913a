"""Image files as arrays and tensors."""

import os
import re

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np

from util.errors import UserError
from util.remote import base_name, is_web, list_folder, local_file

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy")


def natural_key(name):
    """Sort key under which slice_2 precedes slice_10."""
    return [int(p) if p.isdigit() else p.lower() for p in re.split(r"(\d+)", name)], name


def list_images(root, key="data.root"):
    """Paths of the images in a folder, local or remote, in natural order; or of one on the web.

    Raises:
        UserError: the folder is missing, cannot be listed or holds no image.
    """
    if is_web(root):
        if not base_name(root).lower().endswith(EXTENSIONS):
            raise UserError(
                f"{key}: {root} names no image ({' '.join(EXTENSIONS)}), and on the web folders "
                "cannot be listed; a folder may be local or at gs:// or az://"
            )
        return [root]
    try:
        paths = list_folder(root)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{key}: no folder {root}") from None
    except OSError as error:
        raise UserError(f"{key}: {root} cannot be listed ({error.strerror})") from None
    names = {base_name(p): p for p in paths}
    names = {n: p for n, p in names.items() if n.lower().endswith(EXTENSIONS) and n[0] != "."}
    if not names:
        raise UserError(f"{key}: no image in {root} (looked for {' '.join(EXTENSIONS)})")
    return [names[n] for n in sorted(names, key=natural_key)]


def image_name(path):
    """The name an image's results carry: its file's, without the extension."""
    return os.path.splitext(base_name(path))[0]


def check_names(paths):
    """Raise UserError when two files' results would carry one name."""
    seen = {}
    for path in paths:
        name = image_name(path).lower()  # some file systems ignore case
        if name in seen:
            raise UserError(
                f"data.root: the results of {os.path.basename(seen[name])} and "
                f"{os.path.basename(path)} would carry one name, rename one of them"
            )
        seen[name] = path


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
    """Read one image as float32 in [-1, 1].

    Integers are scaled by the range of their type, so 8- and 16-bit files keep their contrast;
    floats in a .npy file are taken as they are, in [-1, 1] already if they go below 0, else in
    [0, 1].

    Returns:
        (C, H, W) array, C = 1 or 3. An alpha channel is dropped, and a grey image saved in
        colour, whose three channels are equal, is read as grey.

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
    if image.shape[-1] in (2, 4):
        image = image[..., :-1]
    if image.shape[-1] == 3 and (image == image[..., :1]).all():
        image = image[..., :1]
    if image.dtype == np.bool_:
        image = image.astype(np.float32)
    elif image.dtype.kind == "u":
        image = image / np.float32(np.iinfo(image.dtype).max)
    elif image.dtype.kind != "f":
        raise UserError(f"{name}: expected unsigned integers or floats, found {image.dtype}")
    if not np.isfinite(image).all():
        raise UserError(f"{name}: holds values that are not finite")
    image = image.astype(np.float32)
    if image.min() < 0:
        if image.min() < -1 or image.max() > 1:
            raise UserError(
                f"{name}: floats must lie in [0, 1] or [-1, 1], found "
                f"[{image.min():g}, {image.max():g}]"
            )
    elif image.max() > 1:
        raise UserError(
            f"{name}: floats must lie in [0, 1] or [-1, 1], found up to {image.max():g}"
        )
    else:
        image = 2 * image - 1
    return np.ascontiguousarray(image.transpose(2, 0, 1))
