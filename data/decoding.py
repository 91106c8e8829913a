"""The pixels of image files as they are looked at: decoded, in their colours, upright."""

import os
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from util.files import is_lfs_pointer, open_plain, read_head

NUMPY = b"\x93NUMPY"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
ORIENTATION = 274  # tag of TIFF and EXIF
PLAIN = ("MINISBLACK", "MINISWHITE", "RGB")  # photometric interpretations whose numbers are light
PALETTES = ("P", "PA")  # Pillow's modes
DEPTHS = (8, 16, 32, 64)  # bits of a sample that are a NumPy type's own
# EXIF's orientation → (whether rows and columns are swapped, then which axes run backwards)
UPRIGHT = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


class Pixels(NamedTuple):
    """(H, W[, C]) as stored; `top` is the largest value that unsigned ones could have."""

    values: NDArray
    top: int | None
    inverted: bool = False  # whether low values are shown bright


def decode(path: str) -> Pixels:
    """The pixels of a local file, whose contents say what it is, whatever its name.

    Raises:
        Exception: of the decoder, of whatever type.
    """
    head = read_head(path, 32)
    if is_lfs_pointer(head):
        raise ValueError("a Git LFS pointer, not the image itself; git lfs pull fetches it")
    if head.startswith(NUMPY):
        with open_plain(path) as file:
            return _of_type(np.load(file, allow_pickle=False))
    if head.startswith(TIFF):
        return _read_tiff(path)
    if head.startswith(PNG) and len(head) > 25 and head[24] == 16 and head[25] in (2, 4, 6):
        with Image.open(path) as image:  # depth, and a colour type of several channels
            orientation = image.getexif().get(ORIENTATION, 1)
        return _of_type(_read_deep_colours(path, orientation))
    return _read_pillow(path)


def _of_type(values):
    return Pixels(values, np.iinfo(values.dtype).max if values.dtype.kind == "u" else None)


def _read_deep_colours(path, orientation):
    """(H, W, 3) uint16; Pillow would drop 8 of the 16 bits."""
    frames = imageio_ffmpeg.read_frames(
        os.path.abspath(path),
        pix_fmt="rgb48le",
        bits_per_pixel=48,
        input_params=["-noautorotate"],  # turned, they would not be of `source_size`
    )
    width, height = next(frames)["source_size"]
    pixels = np.frombuffer(next(frames), "<u2").reshape(height, width, 3)
    frames.close()
    return _upright(pixels, orientation)


def _read_tiff(path):
    """A TIFF of any kind that Pillow reads; by tifffile where that keeps more of the numbers."""
    with open_plain(path) as file, tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        shape = tiff.series[0].shape if tiff.series else page.shape
        if np.prod(shape) != np.prod(page.shape):
            raise ValueError(f"it holds several images, of shape {'×'.join(map(str, shape))}")
        photometric = getattr(page.photometric, "name", "")
        if photometric not in PLAIN or page.bitspersample not in DEPTHS:
            return _read_pillow(path)
        tag = page.tags.get(ORIENTATION)
        orientation = tag.value if tag else 1
        try:
            values = page.asarray()
        except Exception:  # noqa: BLE001 - a compression that needs a package which is not there
            if page.bitspersample == 16 and photometric == "RGB":
                return _of_type(_read_deep_colours(path, orientation))
            return _read_pillow(path)
        if getattr(page.planarconfig, "name", "") == "SEPARATE" and values.ndim == 3:
            values = np.moveaxis(values, 0, -1)
        values = _upright(values, orientation)
        return _of_type(values)._replace(inverted=photometric == "MINISWHITE")


def _read_pillow(path):
    with open_plain(path) as file, Image.open(file) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        depth = image.tag_v2.get(258, (8,))[0] if image.format == "TIFF" else 16
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
        mode = image.mode
        if mode in PALETTES and "transparency" in image.info:
            image = image.convert("RGBA")
        elif mode not in ("1", "L", "LA", "RGB", "RGBA", "F") and not mode.startswith("I"):
            image = image.convert("RGB")  # palettes, CMYK, YCbCr, Lab
        values = np.asarray(image)
        if mode == "I" and image.format != "TIFF":
            values = values.astype(np.uint16)  # a PNG of 16 bits, or an old Pillow's
    pixels = _of_type(_upright(values, orientation))
    if mode[0] in "IF":  # Pillow turns WhiteIsZero round at 8 bits, and not beyond
        pixels = pixels._replace(inverted=white_is_zero)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2 and depth < 16:
        pixels = pixels._replace(top=2**depth - 1)
    return pixels


def _upright(values, orientation):
    """Turn (H, W[, C]) as EXIF says."""
    swapped, backwards = UPRIGHT.get(orientation, (False, ()))
    if swapped:
        values = values.swapaxes(0, 1)
    return np.flip(values, backwards) if backwards else values


def recognises(head: bytes, path: str) -> bool:
    """Whether a file's first bytes are those of a PNG, JPEG, TIFF, BMP or NumPy file."""
    if head.startswith((PNG, b"\xff\xd8\xff", NUMPY, *TIFF)):
        return True
    return head.startswith(b"BM") and os.path.splitext(path)[1].lower() == ".bmp"
