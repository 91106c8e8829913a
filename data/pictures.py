"""Pictures: image files and NumPy arrays of one image."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.decoding import Pixels, decode, recognises
from data.grids import enlarge, interpolate
from data.items import Format
from data.scale import (
    TOO_MANY,
    beyond,
    find_padding,
    find_scale,
    from_unit,
    shares_beyond,
    to_unit,
    white_noise,
)
from data.volumes import padding_note
from util.errors import UserError
from util.files import printable, safe_name, values_digest
from util.remote import base_name, local_file

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy")
DARK = 0.26  # of the range of 16 bits: 14 bits in it and less are a scanner's numbers
FARTHEST = 6.0  # standard deviations from black that noise takes a pixel, of as many as there are
OVERSHOOT = 6.0  # how far beyond [-1, 1] the noise of a measurement may go


def image_name(path: str) -> str:
    """The name an image's results carry: its file's, without the extension, made safe."""
    return safe_name(os.path.splitext(base_name(path))[0])


class Read(NamedTuple):
    """A picture read: (C, H, W) float32 in [-1, 1]; see `read_picture`."""

    image: NDArray[np.float32]
    scale: tuple[float, float] | None
    padding: NDArray[np.bool_] | None  # (H, W)
    raw: NDArray  # (C, H, W), the file's values
    padding_is: str  # in words, for a user
    clipped: bool = False  # what lies outside of `scale`
    remark: str = ""  # of the scale, to a user


class Picture:
    """One image file as an `Item`.

    Args:
        path: local or remote.
        overshoot: see `read_picture`.
        magnitude: whether -1 must be magnitude 0, see `find_scale`.
    """

    def __init__(self, path: str, overshoot: float = 0, magnitude: bool = False):
        self.path = path
        self.overshoot = overshoot
        self.magnitude = magnitude
        self.name = image_name(path)
        self.label = printable(base_name(path))
        self.floats: tuple[str, str] | None = None
        self.note: str | None = None
        self.digest = ""
        self._scale: tuple[float, float] | None = None
        self._clipped = self._padded = False

    def read(self) -> NDArray[np.float32]:
        found = self._read()
        self._scale, self._clipped = found.scale, found.clipped
        self._padded = found.padding is not None
        self.digest = values_digest(found.raw, found.image)
        self.floats = None if found.scale is None else ("recon", ".tif")
        remarks = "; ".join(filter(None, (found.padding_is, found.remark)))
        self.note = f"{self.label}: {remarks}" if remarks else None
        return found.image

    def _read(self):
        return _read(self.path, self.overshoot, self.magnitude)

    def padding(self) -> NDArray[np.bool_] | None:
        # Read anew rather than kept: a run may have as many pictures as fit on a disk.
        return self._read().padding if self._padded else None

    def to_floats(self, x: NDArray) -> NDArray[np.float32]:
        """(C, H, W) in [-1, 1] → the file's units, with the file's padding.

        What a measured file has beyond black and white is put back on top.
        """
        if self._scale is None:
            raise ValueError(f"{self.label}: the PNG says it all")
        values = from_unit(x, *self._scale)
        on_top = self._clipped and self.overshoot > 0
        if not self._padded and not on_top:
            return values
        found = self._read()
        if on_top:
            left_out = beyond(found.raw, *self._scale)
            if found.padding is not None:
                left_out[:, found.padding] = 0
            values += interpolate(left_out, (len(left_out), *values.shape[1:]))
        if self._padded:
            where = enlarge(found.padding, values.shape[1:])
            raw = enlarge(found.raw, (len(found.raw), *values.shape[1:])).mean(axis=0)
            values[:, where] = raw[where]
        return values

    def picture(self, x: NDArray) -> NDArray:
        return x

    def check_writable(self, factor: int = 1) -> None:
        """A picture's result is a plain TIFF, which needs nothing of the source."""


def read_image(path: str) -> NDArray[np.float32]:
    """Read one image as float32 (C, H, W) in [-1, 1], see `read_picture`."""
    return read_picture(path)[0]


def read_picture(
    path: str, overshoot: float = 0
) -> tuple[NDArray[np.float32], tuple[float, float] | None]:
    """Read one image file.

    Unsigned integers of up to 16 bits are scaled by the range of their type, so they keep their
    contrast; floats are taken as they are, in [0, 1], or in [-1, 1] if they go further below 0
    than noise does. Other integers, and floats beyond by more than noise (see `shares_beyond`),
    are scaled by their own percentiles, see `find_scale`. In floats and other integers, padding
    (see `find_padding`) is black and counts for nothing.

    Args:
        path: local or remote.
        overshoot: how far floats may leave [-1, 1], by the noise of a measured image.

    Returns:
        image: (C, H, W) float32 in [-1, 1], C = 1 or 3, upright. An alpha channel is dropped,
            and a grey image saved in colour, whose three channels are equal, is read as grey.
        scale: (black, white), the values that became -1 and 1; None for a file of 8 bits.

    Raises:
        UserError: the file cannot be decoded, or is no grey or colour image.
    """
    found = _read(path, overshoot, False)
    return found.image, found.scale


def _read(path, overshoot, magnitude):
    name = printable(base_name(path))
    try:
        with local_file(path) as local:
            pixels = decode(local)
    except Exception as error:  # noqa: BLE001 - each decoder has exceptions of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0].replace(path, name)
        raise UserError(f"{name}: cannot be read as an image ({reason})") from None
    image = pixels.values
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
    image = np.ascontiguousarray(image.transpose(2, 0, 1))
    return _scaled(pixels._replace(values=image), name, overshoot, magnitude)


def _scaled(pixels: Pixels, name, overshoot, magnitude):
    """The image (C, H, W) as float32 in [-1, 1], with its scale and padding."""
    raw, top = pixels.values, pixels.top
    if raw.dtype.kind == "b":
        return Read(2 * raw.astype(np.float32) - 1, None, None, raw, "")
    if top is not None and raw.dtype.itemsize <= 2:
        shown = top - raw if pixels.inverted else raw
        image = 2 * (shown / np.float32(top)).astype(np.float32) - 1
        remark, most = "", int(raw.max())
        if top > 255 and most < DARK * top and not pixels.inverted:
            remark = (
                f"its values end at {most} of {top}, so it is dark, and σ counts in all of {top}; "
                "as .tif or .npy of floats it is scaled by its own percentiles"
            )
        ends = None if top <= 255 else (0.0, float(top))  # what is written is as it is shown
        return Read(image, ends, None, raw, "", remark=remark)
    with np.errstate(over="ignore"):  # what is infinite then is refused
        image = raw.astype(np.float32)
    found, what = find_padding(image)
    padding, note, values = None, "", image.ravel()
    if found is not None:
        padding = np.asarray(found.any(axis=0))
        note = padding_note(padding, f"{what}, taken for padding")
        values = image[:, ~padding].ravel()
        image = np.where(padding, np.float32(0), image)
    scale: tuple[float, float] | None = None
    remark = ""
    if raw.dtype.kind == "f" and not pixels.inverted:
        known = image if padding is None else np.where(padding, np.float32(np.nan), image)
        scale, remark = _scale_as_it_is(known, values, overshoot)
    clipped = scale is None
    if scale is not None:
        image = 2 * image - 1 if scale == (0.0, 1.0) else image
    else:
        scale = find_scale(values, pixels.inverted, name, magnitude)[:2]
        image = to_unit(image, *scale)
        remark = remark and f"{remark}: black is {scale[0]:.4g}, white {scale[1]:.4g}"
    if padding is not None:
        image[:, padding] = -1
    return Read(image, scale, padding, raw, note, clipped, remark)


def _scale_as_it_is(image, values, overshoot):
    """(0, 1) or (-1, 1) where floats, but for noise, lie within, otherwise None; and a remark.

    Args:
        image: (C, H, W), NaN where it is no data.
        values: those of it that are data.
    """
    if not values.size or not np.isfinite(values).all():
        return None, ""
    low, high = values.min(), values.max()
    from_0 = low >= 0 or _is_noise_about_black(image, low, overshoot)
    if from_0 and high <= 1 + overshoot / 2:
        ends = 0.0, 1.0
    elif -1 - overshoot <= low < 0 and high <= 1 + overshoot:
        ends = -1.0, 1.0
    else:
        return None, ""
    if ends[0] <= low and high <= ends[1]:
        return ends, ""
    whatever, if_white = shares_beyond(image, *ends)
    reach, named = f"its values, {low:.3g} to {high:.3g},", f"[{ends[0]:g}, 1]"
    if whatever > TOO_MANY:
        return None, f"{reach} go further beyond {named} than noise does"
    if if_white > TOO_MANY:
        return ends, (
            f"{reach} are taken for {named} and smooth noise; in other units, they are to be "
            "divided by white"
        )
    return ends, ""


def _is_noise_about_black(image, low, overshoot):
    """Whether an image that goes below 0 is a dark one in [0, 1] with noise, not in [-1, 1]."""
    if low < -overshoot / 2 or not 0 <= np.nanmean(image) <= 0.5:
        return False
    if low < -FARTHEST * white_noise(image):
        return False
    return shares_beyond(image, 0.0, 1.0)[0] <= TOO_MANY


def _items(paths: Sequence[str], options: Mapping[str, Any]) -> list[Picture]:
    overshoot = OVERSHOOT if options["measured"] else 0
    return [Picture(path, overshoot, options.get("magnitude", False)) for path in paths]


FORMAT = Format("pictures", EXTENSIONS, recognises, _items)
