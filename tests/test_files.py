"""Image files in and out, metrics, and configuration files."""

import os
import subprocess
from dataclasses import dataclass

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from data.dataloader import list_images, natural_key, read_image
from util.config import build, locate, portable, read_yaml
from util.errors import UserError
from util.files import replacing
from util.image_files import Recorder, to_uint8, write_comparison, write_gif, write_mp4, write_png
from util.metrics import image_metrics


def ramp(dtype, channels=None):
    top = np.iinfo(dtype).max
    image = np.linspace(0, top, 16 * 24).reshape(16, 24).astype(dtype)
    if channels is None:
        return image
    return np.stack([image // (c + 1) for c in range(channels)], axis=2)


@pytest.mark.parametrize(
    ("name", "image", "tolerance"),
    [
        ("grey8.png", ramp(np.uint8), 0),
        ("grey16.png", ramp(np.uint16), 0),
        ("rgb.png", ramp(np.uint8, 3), 0),
        ("rgba.png", ramp(np.uint8, 4), 0),
        ("grey8.tif", ramp(np.uint8), 0),
        ("grey16.tiff", ramp(np.uint16), 0),
        ("grey8.bmp", ramp(np.uint8), 0),
        ("rgb.bmp", ramp(np.uint8, 3), 0),
        ("grey8.jpg", ramp(np.uint8), 0.05),
        ("grey16.npy", ramp(np.uint16), 0),
        ("UPPER.PNG", ramp(np.uint8), 0),
    ],
)
def test_reading_keeps_the_range_of_the_type(tmp_path, name, image, tolerance):
    path = str(tmp_path / name)
    if name.endswith(".npy"):
        np.save(path, image)
    else:
        iio.imwrite(path, image)
    x = read_image(path)
    expected = 2 * (image / np.iinfo(image.dtype).max) - 1
    expected = expected[None] if image.ndim == 2 else expected[..., :3].transpose(2, 0, 1)
    assert x.dtype == np.float32 and x.shape == expected.shape
    np.testing.assert_allclose(x, expected, atol=tolerance + 1e-6)


def test_16_bits_of_a_colour_png_are_kept(tmp_path):
    image = ramp(np.uint16, 3)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "rawvideo"]
    command += ["-pix_fmt", "rgb48le", "-s", "24x16", "-i", "-", "-pix_fmt", "rgb48be"]
    subprocess.run([*command, tmp_path / "x.png"], input=image.tobytes(), check=True)
    x = read_image(str(tmp_path / "x.png"))
    np.testing.assert_allclose(x, (2 * (image / 65535) - 1).transpose(2, 0, 1), atol=1e-6)


def test_grey_saved_in_colour_is_grey(tmp_path):
    iio.imwrite(tmp_path / "x.png", np.stack([ramp(np.uint8)] * 3, axis=2))
    assert read_image(str(tmp_path / "x.png")).shape == (1, 16, 24)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.7), (-0.9, 0.5)])
def test_float_arrays_are_taken_as_they_are(tmp_path, low, high):
    """A dark image stays dark: nothing is stretched to its own range."""
    image = np.linspace(low, high, 64, dtype=np.float64).reshape(8, 8)
    np.save(tmp_path / "x.npy", image)
    expected = image if low < 0 else 2 * image - 1
    np.testing.assert_allclose(read_image(str(tmp_path / "x.npy"))[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 4, 7), np.uint8), "shape"),
        (np.zeros((0, 4), np.uint8), "shape"),
        (np.full((4, 4), 300.0), "300"),
        (np.full((4, 4), -5.0), "-5"),
        (np.full((4, 4), np.inf), "finite"),
        (np.zeros((4, 4), np.int16), "every value is 0"),
        (np.zeros((4, 4), complex), "complex"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, array, says):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=rf"x\.npy: .*{says}"):
        read_image(str(tmp_path / "x.npy"))


def test_pickled_arrays_are_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_image(str(tmp_path / "x.npy"))


def test_images_are_listed_in_natural_order(tmp_path):
    for name in ("s10.png", "s9.tif", "S1.png", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    assert [os.path.basename(p) for p in list_images(str(tmp_path))] == [
        "S1.png",
        "s9.tif",
        "s10.png",
    ]
    assert sorted(["10", "a", "9"], key=natural_key)  # digits and letters compare


def test_png_map_is_fixed(tmp_path):
    """A constant grey image keeps its grey; values outside are clipped, none is stretched."""
    x = np.full((1, 4, 4), 0.2, np.float32)
    x[0, 0, :2] = [-3, 3]
    write_png(str(tmp_path / "x.png"), x)
    pixels = iio.imread(tmp_path / "x.png")
    assert pixels[0, 0] == 0 and pixels[0, 1] == 255
    assert (pixels[1:] == 153).all()
    colour = to_uint8(np.zeros((3, 2, 5), np.float32))
    assert colour.shape == (2, 5, 3) and (colour == 128).all()


def test_png_round_trip_is_exact(tmp_path):
    iio.imwrite(tmp_path / "in.png", ramp(np.uint8))
    write_png(str(tmp_path / "out.png"), read_image(str(tmp_path / "in.png")))
    assert np.array_equal(iio.imread(tmp_path / "out.png"), ramp(np.uint8))


def test_recorder_keeps_about_a_hundred_frames_and_leaves_the_state_alone():
    recorder = Recorder(1000)
    x = torch.linspace(-2, 2, 2 * 6 * 6).reshape(2, 1, 6, 6)
    before = x.clone()
    recorder.frame(x)
    for t in reversed(range(1000)):
        recorder(t, x)
    assert torch.equal(x, before)
    movies = [recorder.movie(i, 2) for i in range(2)]
    assert len(movies[0]) == 101
    assert np.array_equal(movies[1][-1], to_uint8(x[1].numpy()))
    assert not np.array_equal(movies[0][0], movies[1][0])
    assert len(Recorder(20).kept) == 0 and Recorder(20).every == 1
    composite = Recorder(1)
    composite.frame(torch.zeros(6, 1, 4, 5))  # two images of three contrasts
    assert composite.movie(1, 2)[0].shape == (4, 5, 3)


def test_movies_play_all_frames_and_hold_the_last(tmp_path):
    ramp = np.zeros((16, 1), int) + 15 * np.arange(17)
    frames = [np.uint8((20 * i + ramp) % 256) for i in range(10)]
    write_gif(str(tmp_path / "x.gif"), frames)
    played = iio.imread(tmp_path / "x.gif", index=None)
    assert len(played) == 10
    grey = played.reshape(10, 16, 17, -1)[..., 0].astype(int)
    assert np.abs(grey - np.stack(frames)).max() <= 19  # 8 grey levels at least
    assert np.array_equal(grey[-1], frames[-1])
    assert iio.immeta(tmp_path / "x.gif", index=9)["duration"] > 1000
    assert iio.immeta(tmp_path / "x.gif")["loop"] == 0
    frames = [np.full((16, 17), 20 * i, np.uint8) for i in range(10)]
    write_mp4(str(tmp_path / "x.mp4"), frames)
    metadata = iio.immeta(tmp_path / "x.mp4", plugin="FFMPEG")
    assert metadata["codec"] == "h264" and metadata["pix_fmt"].startswith("yuv420p")
    assert metadata["size"] == (18, 16)
    video = iio.imread(tmp_path / "x.mp4", plugin="FFMPEG")
    assert len(video) == 13  # 2 frames a second, the last held for 1.5 s more
    assert abs(int(video[-1][8, 8, 0]) - 180) < 6


@pytest.mark.parametrize("shape", [(256, 256), (256, 256, 3), (300, 800)])
def test_a_gif_of_noise_stays_small_and_ends_with_the_image(tmp_path, shape):
    rng = np.random.default_rng(0)
    image = np.uint8(rng.integers(0, 60, (*shape[:2], 1)) * 4) + np.zeros(shape[2:], np.uint8)
    image = image.reshape(shape)
    noisy = [
        np.uint8(np.clip(image + s * rng.standard_normal(shape), 0, 255))
        for s in np.linspace(300, 5, 30)
    ]
    path = str(tmp_path / "x.gif")
    write_gif(path, [frame for frame in noisy for _ in range(3)] + [image])
    assert os.path.getsize(path) < 1_500_000
    last = list(iio.imiter(path))[-1]
    if shape == (300, 800):  # reduced 3 times
        assert last.shape[:2] == (100, 267)
    else:
        assert np.array_equal(last, np.broadcast_to(image.reshape(256, 256, -1), (256, 256, 3)))


def row(name, degraded, recon, truth=None, caption=""):
    images = {"input": degraded, "recon": recon} | ({} if truth is None else {"truth": truth})
    return name, images, caption


def test_comparison_is_written_with_and_without_truth(tmp_path):
    x = np.zeros((1, 16, 16), np.float32)
    rgb = np.zeros((3, 16, 16), np.float32)
    path = str(tmp_path / "c.png")
    write_comparison(path, [row("a", x, x + 0.1, x, "PSNR"), row("b", x, rgb, rgb)], "title")
    wide = iio.imread(path).shape[1]
    write_comparison(path, [row("a", x, x)], "title")
    assert iio.imread(path).shape[1] < wide


def test_dollars_in_names_and_titles_are_no_formula(tmp_path):
    x = np.zeros((1, 16, 16), np.float32)
    path = str(tmp_path / "c.png")
    write_comparison(path, [row("scan$1_$2", x, x)], "$a_$/denoise")
    assert iio.imread(path).ndim == 3


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(str(path)) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_metrics_against_their_definitions():
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (1, 32, 32))
    x = np.clip(truth + 0.1 * rng.standard_normal(truth.shape), -1, 1)
    metrics = image_metrics(x + 0.0, truth)
    mse = np.mean(((x - truth) / 2) ** 2)
    assert metrics["psnr"] == pytest.approx(-10 * np.log10(mse))
    assert metrics["nmse"] == pytest.approx(mse / np.mean(((truth + 1) / 2) ** 2))
    same = image_metrics(truth, truth)
    assert same.pop("haarpsi") == pytest.approx(1)
    assert same == {"psnr": np.inf, "ssim": 1.0, "nmse": 0.0}
    outside = truth.copy()
    outside[outside > 0.9] = 5  # clipped to 1 before comparing
    assert image_metrics(outside, truth)["psnr"] > 25


def test_ssim_equals_an_explicit_computation():
    """Wang et al. 2004 in the middle of one 11×11 window."""
    rng = np.random.default_rng(1)
    truth, x = rng.uniform(-1, 1, (2, 1, 11, 11))
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    a, b = (truth[0] + 1) / 2, (x[0] + 1) / 2
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * a**2).sum() - mean_a**2, (window * b**2).sum() - mean_b**2
    cov = (window * a * b).sum() - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    expected = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    assert image_metrics(x, truth)["ssim"] == pytest.approx(expected, rel=1e-6)


@dataclass
class Keys:
    a: float = 0.0
    b: float = 0.0
    c: tuple | list | None = None
    d: int = 7


def test_a_yaml_key_that_is_there_twice_is_refused_with_both_lines(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n")
    with pytest.raises(UserError, match=r"at line 5 \(the key 'c' is there twice, first at line 3"):
        read_yaml(str(path))
    path.write_text("x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\n")  # a merge may be overruled
    assert read_yaml(str(path))["y"] == {"a": 1, "b": 3}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom"])
def test_yaml_of_every_unicode_encoding_is_read(tmp_path, encoding):
    text = "name: σ\n"
    data = b"\xff\xfe" + text.encode("utf-16-le") if "bom" in encoding else text.encode(encoding)
    (tmp_path / "x.yaml").write_bytes(data)
    assert read_yaml(str(tmp_path / "x.yaml")) == {"name": "σ"}


def test_paths_lead_from_here_from_the_file_or_from_the_program(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "task").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    near = str(tmp_path / "task" / "t.yaml")
    (tmp_path / "task" / "images").touch()
    (tmp_path / "home" / "images").touch()
    assert locate("images", near) == str(tmp_path / "task" / "images")
    (tmp_path / "work" / "images").touch()
    assert locate("images", near) == "images"
    assert locate("~/images") == str(tmp_path / "home" / "images")
    shipped = locate("models/mri.pt", near)
    assert os.path.isfile(shipped) and portable(shipped) == os.path.join("models", "mri.pt")
    assert locate("nowhere", near) == "nowhere"
    assert locate("gs://bucket/x", near) == "gs://bucket/x"


def test_yaml_types(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-4\nb: 3\nc: !!python/tuple [1, 2]\n")
    config = read_yaml(str(path))
    checked = build(Keys, config, "x")
    assert checked == Keys(1e-4, 3.0, (1, 2), 7)
    assert isinstance(checked.b, float)
    with pytest.raises(UserError, match="x: a: expected a number, found bool True"):
        build(Keys, {"a": True}, "x")
