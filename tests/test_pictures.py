"""Pictures as viewers show them: photometric interpretations, compressions, depths, orientation.

Pillow writes most of them, and says how most should look; where it cannot, the rule is computed.
"""

import builtins
import gzip
import itertools
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from data.crops import TrainingCrops
from data.dataloader import list_images, read_image, read_picture
from tests.volume_files import items_of
from util.errors import UserError
from util.image_files import deep_png, write_floats

GREY = np.uint8(np.add.outer(3 * np.arange(40), 2 * np.arange(30)))  # 0 to 175
COLOURS = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)
DEEP = GREY.astype(np.uint16) * 257 + np.arange(30, dtype=np.uint16)


@pytest.fixture
def plain_install(monkeypatch):
    """Without imagecodecs, which tifffile would use, and which is no requirement."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "imagecodecs":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


def shown(image):
    """What (C, H, W) in [-1, 1] looks like, as 8 bits."""
    pixels = np.rint((image + 1) * 127.5).astype(int)
    return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)


def ramp_palette():
    return np.stack([np.uint16(np.arange(255, -1, -1)) * 257] * 3)


def colour_map():
    return np.stack([np.uint16((np.arange(256) * k) % 256) * 257 for k in (1, 3, 5)])


TIFFS = {
    "white is zero": (lambda p: tifffile.imwrite(p, 255 - GREY, photometric="miniswhite"), GREY),
    "16 bits, white is zero": (
        lambda p: tifffile.imwrite(p, np.uint16(255 - GREY) * 257, photometric="miniswhite"),
        GREY,
    ),
    "grey palette": (
        lambda p: tifffile.imwrite(p, 255 - GREY, photometric="palette", colormap=ramp_palette()),
        GREY,
    ),
    "colour palette": (
        lambda p: tifffile.imwrite(p, GREY, photometric="palette", colormap=colour_map()),
        (colour_map() // 257)[:, GREY].transpose(1, 2, 0),
    ),
    "planar": (
        lambda p: tifffile.imwrite(
            p, COLOURS.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
        ),
        COLOURS,
    ),
    "planar, deep": (
        lambda p: tifffile.imwrite(
            p, np.uint16(COLOURS.transpose(2, 0, 1)) * 257, photometric="rgb",
            planarconfig="separate",
        ),
        COLOURS,
    ),
    "big endian": (lambda p: tifffile.imwrite(p, np.uint16(GREY) * 257, byteorder=">"), GREY),
    "BigTIFF": (lambda p: tifffile.imwrite(p, GREY, bigtiff=True), GREY),
    "tiles": (lambda p: tifffile.imwrite(p, GREY, tile=(16, 16)), GREY),
    "alpha": (
        lambda p: Image.fromarray(np.dstack([COLOURS, GREY])).save(p, compression="tiff_lzw"),
        COLOURS,
    ),
    "4 bits": (lambda p: write_bits(p, GREY // 16, 4), GREY // 16 * 17),
    "1 bit": (lambda p: write_bits(p, GREY // 128, 1), GREY // 128 * 255),
    "float, white is zero": (
        lambda p: tifffile.imwrite(p, 500 - np.float32(GREY), photometric="miniswhite"),
        None,
    ),
}  # fmt: skip


def write_bits(path, values, bits):
    """A TIFF whose samples have fewer than 8 bits, packed; nothing else is special."""
    ones = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    rows = np.packbits(ones.reshape(len(values), -1), axis=1)
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1), (262, 1),
            (273, 8), (277, 1), (278, values.shape[0]), (279, rows.size)]  # fmt: skip
    entries = b"".join(
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes()
        for tag, value in tags
    )
    with open(path, "wb") as file:
        file.write(b"II*\0" + np.uint32(8 + rows.size).tobytes() + rows.tobytes())
        file.write(np.uint16(len(tags)).tobytes() + entries + b"\0\0\0\0")


@pytest.mark.parametrize("case", TIFFS)
def test_photometric_interpretations_of_tiff(tmp_path, plain_install, case):
    write, expected = TIFFS[case]
    write(str(tmp_path / "x.tif"))
    if expected is None:  # scaled by percentiles, dark where the numbers are high
        image, (black, white) = read_picture(str(tmp_path / "x.tif"))
        values = 500.0 - GREY
        assert (black, white) == pytest.approx(tuple(np.percentile(values, (99.9, 0.1))))
        order = np.argsort(image[0].ravel(), kind="stable")
        assert (np.diff(values.ravel()[order]) <= 0).all()
    else:
        assert np.abs(shown(read_image(str(tmp_path / "x.tif"))) - expected).max() <= 1


LOSSLESS = [None, "tiff_lzw", "tiff_deflate", "packbits"]
MODES = ["L", "RGB", "I;16", "F", "P", "CMYK", "YCbCr", "1", "LAB"]


@pytest.mark.parametrize(
    ("mode", "compression"),
    [*itertools.product(MODES, LOSSLESS), *((m, "jpeg") for m in ("L", "RGB", "CMYK", "YCbCr"))],
)
def test_what_pillow_writes_and_reads_is_read(tmp_path, plain_install, mode, compression):
    picture = {
        "L": lambda: Image.fromarray(GREY),
        "I;16": lambda: Image.fromarray(DEEP),
        "F": lambda: Image.fromarray(np.float32(GREY) / 255),
        "P": lambda: Image.fromarray(COLOURS).quantize(64),
    }.get(mode, lambda: Image.fromarray(COLOURS).convert(mode))()
    path = str(tmp_path / "x.tif")
    picture.save(path, compression=compression)
    with Image.open(path) as again:
        try:
            again.load()
        except OSError:
            pytest.skip("this Pillow cannot read what it wrote")  # YCbCr as it is, before 13
        expected = np.asarray(again if mode in ("L", "I;16", "F", "1") else again.convert("RGB"))
    image = read_image(path)
    top = {"I;16": 65535, "F": 1, "1": 1}.get(mode, 255)
    expected = 2 * (expected.astype(np.float64) / top) - 1
    found = image[0] if expected.ndim == 2 else np.moveaxis(image, 0, 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_ccitt(tmp_path, plain_install, compression):
    bits = GREY > 90
    Image.fromarray(bits).save(tmp_path / "x.tif", compression=compression)
    assert np.array_equal(read_image(str(tmp_path / "x.tif"))[0], np.where(bits, 1, -1))


def test_what_is_written_of_white_is_zero_is_seen_as_it_was(tmp_path, plain_install):
    tifffile.imwrite(tmp_path / "a.tif", 65535 - DEEP, photometric="miniswhite")
    [item] = items_of({"root": str(tmp_path / "a.tif"), "measured": True})
    image = item.read()
    write_floats(str(tmp_path / "b.tif"), item.to_floats(image))
    np.testing.assert_allclose(tifffile.imread(tmp_path / "b.tif"), DEEP, atol=0.01)


def test_16_bits_of_a_compressed_colour_tiff_are_kept(tmp_path, plain_install):
    deep = np.stack([DEEP, DEEP[::-1], 65535 - DEEP], axis=2)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", compression="zlib")
    np.testing.assert_allclose(
        read_image(str(tmp_path / "a.tif")), (2 * (deep / 65535) - 1).transpose(2, 0, 1), atol=1e-6
    )


ORIENTED = list(itertools.product(("x.jpg", "x.png", "x.tif"), range(1, 9)))


@pytest.mark.parametrize(("name", "orientation"), ORIENTED)
def test_the_orientation_of_exif_is_applied(tmp_path, plain_install, name, orientation):
    """By EXIF's own table: where the 0th row and the 0th column of the file are to be seen."""
    seen = {1: GREY, 2: np.fliplr(GREY), 3: np.rot90(GREY, 2), 4: np.flipud(GREY), 5: GREY.T,
            6: np.rot90(GREY, -1), 7: np.rot90(GREY, 2).T, 8: np.rot90(GREY)}  # fmt: skip
    expected = seen[orientation]
    picture, exif = Image.fromarray(GREY), Image.Exif()
    exif[274] = orientation
    extra = {"quality": 100} if name == "x.jpg" else {}
    picture.save(tmp_path / name, exif=exif, **extra)
    found = shown(read_image(str(tmp_path / name)))
    assert found.shape == expected.shape
    assert np.abs(found - expected.astype(int)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_16_bits_a_colour_is_applied(tmp_path, plain_install, orientation):
    """As it is of the same picture in 8 bits."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(COLOURS).save(tmp_path / "8.png", exif=exif)
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    extra = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    deep = deep_png(COLOURS.astype(np.uint16) * 257)
    (tmp_path / "16.png").write_bytes(deep[:33] + extra + deep[33:])  # behind the header
    found, expected = (read_image(str(tmp_path / name)) for name in ("16.png", "8.png"))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_cmyk_is_no_rgb_with_alpha(tmp_path):
    Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown(read_image(str(tmp_path / "x.jpg"))) - expected).max() <= 1


def test_several_pages_are_no_image(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.stack([GREY] * 3), photometric="minisblack")
    with pytest.raises(UserError, match=r"x\.tif: .*several images, of shape 3×40×30"):
        read_image(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("form", ["npy", "tif"])
def test_byte_order_does_not_count(tmp_path, kind, form):
    values = (GREY / 255 if kind[0] == "f" else GREY // 2).astype(kind)
    found = {}
    for order in "<>":
        path = str(tmp_path / f"{'le' if order == '<' else 'be'}.{form}")
        if form == "npy":
            np.save(path, values.astype(order + kind))
        else:
            tifffile.imwrite(path, values, byteorder=order)
        found[order] = read_picture(path)
    assert np.array_equal(found["<"][0], found[">"][0]) and found["<"][1] == found[">"][1]
    if kind in ("u1", "u2"):
        np.testing.assert_allclose(found[">"][0][0], 2 * values / np.iinfo(kind).max - 1, atol=1e-6)


def test_restoring_and_training_read_alike(tmp_path, plain_install):
    Image.fromarray(255 - GREY).save(tmp_path / "a.tif", compression="tiff_lzw")
    tifffile.imwrite(tmp_path / "b.tif", GREY, photometric="miniswhite")
    [first, second] = [item.read() for item in items_of({"root": str(tmp_path)})]
    assert np.array_equal(first, second)
    crops = TrainingCrops([list_images(str(tmp_path))], [1.0], 1, np.ones(1), 30, False, 0.0, 0)
    rows = {first[0, i : i + 30].tobytes() for i in range(11)}
    assert all(crops[n][0].numpy()[0].tobytes() in rows for n in range(4))


def test_a_damaged_picture_is_one_sentence_and_its_own_failure(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.tif").write_bytes(b"")
    (tmp_path / "half.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff")
    (tmp_path / "zipped.png").write_bytes(gzip.compress(whole))
    items = {i.name: i for i in items_of({"root": str(tmp_path)})}
    assert items["good"].read().shape == items["zipped"].read().shape == (1, 40, 30)
    for name in ("cut", "empty", "half"):
        with pytest.raises(UserError, match=rf"{name}\.\w+: cannot be read as an image") as error:
            items[name].read()
        assert "\n" not in str(error.value)
