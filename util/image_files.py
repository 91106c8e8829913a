"""PNG, GIF, MP4 and comparison pictures of images in [-1, 1]."""

import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

import imageio.v2 as iio
import imageio_ffmpeg
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from util.errors import UserError
from util.files import replacing

Frame = NDArray[np.uint8]  # (H, W) or (H, W, 3)
GIF_SECONDS = 5.0  # of motion
HOLD_SECONDS = 1.5  # on the result, before the loop starts again
GIF_BYTES = 1_500_000  # at most, so that a page shows several
GIF_FRAMES = 40  # at most, of a grey image
LABELS = {
    "input": "input",
    "cubic": "cubic interpolation",
    "recon": "reconstruction",
    "truth": "truth",
}  # of the columns of a comparison
TALL = 2  # times as high as wide: planes one below the other, which get the room they need
GIF_SIDE = 384  # pixels; larger images are reduced


def to_uint8(image: NDArray) -> Frame:
    """Fixed map of (C, H, W) in [-1, 1] to 8 bits, (H, W) or (H, W, 3); outside is clipped."""
    image = np.clip((np.asarray(image, np.float32) + 1) * 127.5, 0, 255)
    image = np.rint(image).astype(np.uint8).transpose(1, 2, 0)
    return image[..., 0] if image.shape[-1] == 1 else image


class Recorder:
    """Keeps about `frames` of a sampling's `steps` states, from noise to image, as 8-bit copies.

    Called as a callback, ``recorder(t, x_t)`` with x_t (N, C, H, W) after step t.
    """

    def __init__(self, steps: int, frames: int = 100):
        self.every = max(1, round(steps / frames))
        self.kept: list[Frame] = []

    def __call__(self, t: int, x_t: torch.Tensor) -> None:
        if t % self.every == 0:
            self.frame(x_t)

    def frame(self, x_t: torch.Tensor) -> None:
        pixels = (x_t.float().clamp(-1, 1) + 1) * 127.5
        self.kept.append(pixels.round().to("cpu", copy=True).numpy().astype(np.uint8))

    def movie(self, i: int, images: int) -> list[Frame]:
        """The frames of image i of `images`: list of (H, W) or (H, W, 3) uint8."""
        return [self._pixels(f.reshape(images, -1, *f.shape[2:])[i]) for f in self.kept]

    @staticmethod
    def _pixels(frame: Frame) -> Frame:
        return frame[0] if len(frame) == 1 else frame.transpose(1, 2, 0)


def write_png(path: str, image: NDArray) -> None:
    """Write (C, H, W) in [-1, 1], or a ready (H, W[, 3]) uint8 array, as an 8-bit PNG."""
    pixels = image if image.dtype == np.uint8 else to_uint8(image)
    with replacing(path) as temporary:
        iio.imwrite(temporary, pixels, format="png")


def deep_png(pixels: NDArray[np.uint16]) -> bytes:
    """A PNG file of (H, W, 3) with 16 bits a colour, which Pillow would cut to 8."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = np.zeros((height, 1 + 6 * width), np.uint8)  # each after its filter, which is none
    rows[:, 1:] = np.ascontiguousarray(pixels.astype(">u2")).view(np.uint8).reshape(height, -1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def read_png(path: str) -> NDArray[np.float32]:
    """Read what `write_png` wrote, as (C, H, W) in [-1, 1]."""
    pixels = np.asarray(iio.imread(path))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1


def write_floats(path: str, image: NDArray) -> None:
    """Write (C, H, W) floats as they are: .npy, or .tif as (H, W) or (H, W, 3)."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if path.endswith(".npy"):
            np.save(file, image)
        else:
            pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            iio.imwrite(file, pixels, format="tiff")


def write_gif(path: str, frames: Sequence[Frame]) -> None:
    """Write uint8 frames (H, W[, 3]) as a looping GIF that pauses on the last one.

    It stays below GIF_BYTES by showing fewer frames, more of them towards the end, where the
    image appears, and fewer grey levels while noise hides the steps between them. The last frame
    keeps all levels that a GIF can hold.
    """
    factor = math.ceil(max(frames[0].shape[:2]) / GIF_SIDE)
    count = GIF_FRAMES // frames[0][0, 0].size  # colours take about as many times the bytes
    with replacing(path) as temporary:
        while True:
            shown = _gif_frames(frames, count, factor)
            motion = 1000 * GIF_SECONDS / len(shown)
            durations = [motion] * (len(shown) - 1) + [1000 * HOLD_SECONDS]
            iio.mimwrite(temporary, shown, format="gif", duration=durations, loop=0)
            size = os.path.getsize(temporary)
            if size < GIF_BYTES:
                break
            count = int(0.9 * len(shown) * GIF_BYTES / size)


def _gif_frames(frames, count, factor):
    """About `count` of the frames with as many grey levels as their noise leaves visible."""
    last, final = len(frames) - 1, frames[-1].astype(np.float32)
    picked: Iterable[int] = range(last + 1)
    if last >= count:
        left = np.linspace(1, 0, count) ** 2
        picked = np.unique(np.rint(last * (1 - left)).astype(int))
    shown = []
    for i in picked:
        frame = frames[i]
        if factor > 1:
            frame = np.asarray(Image.fromarray(frame).reduce(factor))
        # Steps of half the height of what noise is left vanish in it.
        noise = np.sqrt(np.mean(((frames[i] - final) / 255) ** 2))
        steps = np.clip(np.rint(2 / max(noise, 1e-3)), 7, 255)
        shown.append(np.rint(np.rint(frame * (steps / 255)) * (255 / steps)).astype(np.uint8))
    return shown


def check_mp4() -> None:
    """Raises UserError where there is no ffmpeg, which `write_mp4` needs."""
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise UserError(
            "--video: imageio-ffmpeg brings no ffmpeg for this machine; install one, and name it "
            "in the variable IMAGEIO_FFMPEG_EXE"
        ) from None


def write_mp4(path: str, frames: Sequence[Frame]) -> None:
    """Write uint8 frames as H.264 in MP4, in the pixel format that browsers play."""
    fps = max(1, round(len(frames) / GIF_SECONDS))
    frames = [*frames] + [frames[-1]] * round(fps * HOLD_SECONDS)
    with (
        replacing(path) as temporary,
        iio.get_writer(
            temporary,
            format="ffmpeg",
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-f", "mp4"],
        ) as writer,
    ):
        for pixels in frames:
            if pixels.ndim == 2:
                pixels = np.repeat(pixels[..., None], 3, axis=2)
            writer.append_data(pixels)  # type: ignore[attr-defined]


def _figure(width, height):
    """A matplotlib figure of that many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    return figure


def _heat_map(figure, axis, image, scale, colour_bar_axes):
    """Show (H, W) values from 0 to `scale` with a colour bar beside `colour_bar_axes`."""
    shown = axis.imshow(image, cmap="inferno", vmin=0, vmax=scale)
    if colour_bar_axes is not None:
        bar = figure.colorbar(shown, ax=colour_bar_axes, fraction=0.04)
        bar.set_label("share of the displayed range", fontsize=7)
        bar.ax.tick_params(labelsize=6)


def write_std_map(path: str, std: NDArray) -> None:
    """A heat map of pixelwise standard deviations, (C, H, W) in units of the [-1, 1] image."""
    share = std.mean(axis=0) / 2
    figure = _figure(4.2, 3.6)
    axis = figure.subplots()
    axis.set_title("posterior standard deviation", fontsize=9)
    _heat_map(figure, axis, share, max(float(np.quantile(share, 0.999)), 1e-6), axis)
    axis.set_xticks([])
    axis.set_yticks([])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def write_comparison(
    path: str, rows: Sequence[tuple[str, Mapping[str, NDArray], str]], title: str
) -> None:
    """A labelled figure: input, reconstruction, truth and error of each image, a row each.

    Args:
        rows: list of (name, images, caption); images (C, H, W) in [-1, 1] by what they are, a key
            of `LABELS`. Those that the first has are shown; without a truth there is no error.
        title: text over the figure.
    """
    kinds = [kind for kind in LABELS if kind in rows[0][1]]
    labels = [LABELS[kind] for kind in kinds] + ["|error|"] * ("truth" in kinds)
    size, (height, width) = 2.4, rows[0][1]["input"].shape[1:]
    tall = size * (height / width if height > TALL * width else 1)
    figure = _figure(size * len(labels) + 0.7, tall * len(rows) + 0.6)
    figure.suptitle(title, fontsize=10, parse_math=False)  # names may have dollars in them
    axes = figure.subplots(len(rows), len(labels), squeeze=False)
    errors = {
        i: np.abs(np.clip(images["recon"], -1, 1) - images["truth"]).mean(axis=0) / 2
        for i, (_, images, _) in enumerate(rows)
        if "truth" in images
    }
    scale = max((np.quantile(e, 0.999) for e in errors.values()), default=1) or 1
    for i, (name, images, caption) in enumerate(rows):
        for axis, kind in zip(axes[i], kinds, strict=False):
            if kind in images:
                shown = to_uint8(images[kind])
                axis.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        if i in errors:
            beside = axes[:, len(kinds)] if i == len(rows) - 1 else None
            _heat_map(figure, axes[i][len(kinds)], errors[i], scale, beside)
        axes[i][0].set_ylabel(name, fontsize=7, parse_math=False)
        axes[i][kinds.index("recon")].set_xlabel(caption, fontsize=7)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, label in zip(axes[0], labels, strict=True):
        axis.set_title(label, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
