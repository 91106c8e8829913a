"""The power spectrum and the mean of a prior's images: measured, stored, found again."""

import json
import os
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import scipy.fft

from guided_diffusion import statistics
from guided_diffusion.statistics import NATURAL_IMAGES, PriorStatistics, load_statistics
from tests.conftest import REPOSITORY
from util.errors import UserError

LAW = PriorStatistics(-0.3, (1.0, 400.0), (200.0, 200.0 / 400**2), source="1/f²")


def images_of(law, count, height, width, seed=0):
    """Gaussian images of a given mean and spectrum, (1, height, width)."""
    rng = np.random.default_rng(seed)
    std = np.sqrt(law.power_spectrum(height, width).numpy())
    for _ in range(count):
        coefficients = std * rng.standard_normal((height, width))
        coefficients[0, 0] = 0
        yield 1, law.mean_intensity + scipy.fft.idctn(coefficients, norm="ortho")[None]


@pytest.mark.parametrize("side", [64, 256])
def test_a_known_law_is_measured(side):
    found = PriorStatistics.measure(images_of(LAW, 60, side, side), "x")
    assert found.mean_intensity == pytest.approx(-0.3, abs=1e-3)
    expected = LAW.power_spectrum(side, side).numpy()[2:, 2:]
    # within a band of an octave the mean power and the mean frequency differ from a power law's
    ratio = found.power_spectrum(side, side).numpy()[2:, 2:] / expected
    assert 0.6 < ratio.min() and ratio.max() < 1.7
    assert ratio.mean() == pytest.approx(1, abs=0.15)


def test_the_variance_of_a_pixel_is_the_spectrum_s_mean():
    """Parseval: what makes the units of the powers those of the [-1, 1] image."""
    images = np.concatenate([image for _, image in images_of(LAW, 100, 64, 64)])
    expected = LAW.power_spectrum(64, 64).numpy()
    expected[0, 0] = 0
    assert images.var() == pytest.approx(expected.sum() / 64**2, rel=0.1)


def test_files_hold_what_was_measured(tmp_path):
    path = str(tmp_path / "prior.json")
    for law in (replace(LAW, rim=(-0.98, 0.03)), replace(LAW, mean_power=700.0), LAW):
        law.save(path)
        assert PriorStatistics.load(path) == law
    assert load_statistics(str(tmp_path / "prior.pt")) == LAW
    assert load_statistics(str(tmp_path / "other.pt")) is None
    assert load_statistics("") is None


def test_the_shipped_prior_has_its_own():
    found = load_statistics(os.path.join(REPOSITORY, "models", "mri.pt"))
    assert found is not None and found != NATURAL_IMAGES
    assert found.mean_intensity == -0.7356


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        json.dumps({"mean_intensity": 0}),
        json.dumps({**vars(LAW), "powers": [1.0]}),
        json.dumps({**vars(LAW), "powers": [1.0, -1.0]}),
        json.dumps({**vars(LAW), "frequencies": [2.0, 1.0]}),
        json.dumps({**vars(LAW), "rim": [-0.98]}),
        json.dumps({**vars(LAW), "rim": [-0.98, -1]}),
        json.dumps({**vars(LAW), "mean_power": 0}),
        json.dumps({**vars(LAW), "mean_power": float("inf")}),
        json.dumps({**vars(LAW), "mean_power": [1.0]}),
        json.dumps({**vars(LAW), "mean_intensity": float("nan")}),
        json.dumps({**vars(LAW), "mean_intensity": 1e9}),
        json.dumps({**vars(LAW), "powers": [float("inf")] * len(LAW.powers)}),
        3000 * "[" + 3000 * "]",
    ],
)
def test_files_that_hold_no_statistics(tmp_path, text):
    path = tmp_path / "prior.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"prior\.json: expected"):
        PriorStatistics.load(str(path))


@pytest.fixture
def sources(tmp_path):
    """all/: a, one image of grey value 0 around a square, and b, four of 255."""
    for name, value, count in (("a", 0, 1), ("b", 255, 4)):
        (tmp_path / "all" / name).mkdir(parents=True)
        image = np.full((32, 40), value, np.uint8)
        image[8:16, 10:20] = 128
        for i in range(count):
            iio.imwrite(tmp_path / "all" / name / f"{i}.png", image)
    return tmp_path / "all"


@pytest.mark.parametrize(
    ("flags", "share"), [([], 1 / 3), (["--shares", "a=0.9"], 0.9), (["--shares", "a=0", "b=1"], 0)]
)
def test_sources_weigh_as_in_training(tmp_path, sources, flags, share):
    """The square roots of 1 and 4, or the share that is named."""
    out = str(tmp_path / "prior.json")
    assert statistics.main(["--data_dir", str(sources), "--out", out, *flags]) == 0
    found = PriorStatistics.load(out)
    square = 80 / 1280
    expected = (1 - square) * (1 - 2 * share)
    assert found.mean_intensity == pytest.approx(expected, abs=0.002)
    assert found.source == "1 images of a, 4 images of b"


@pytest.mark.parametrize("name", ["prior.pt", "prior", "prior.JSON"])
def test_weights_are_not_written_over(tmp_path, sources, capsys, name):
    out = tmp_path / name
    out.write_bytes(b"weights")
    assert statistics.main(["--data_dir", str(sources), "--out", str(out)]) == 2
    expected = f"error: --out: expected a name that ends in .json, found {out}\n"
    assert capsys.readouterr().err == expected
    assert out.read_bytes() == b"weights"


def test_what_is_noted_of_images_is_said_once_for_each_source(tmp_path, sources, capsys):
    """Of a scanner's 12 bits in 16, not of pictures that use their range."""
    for i in range(3):
        pixels = np.linspace(0, 4095 - i, 32 * 40).reshape(32, 40).astype(np.uint16)
        iio.imwrite(sources / "b" / f"dark{i}.png", pixels)
    out = str(tmp_path / "prior.json")
    assert statistics.main(["--data_dir", str(sources), "--out", out]) == 0
    [note] = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert note.startswith("note: --data_dir: b: dark0.png: its values end at 4095 of 65535")


def test_the_rim_is_what_most_images_have_there():
    """Levels 0, 0.01, …, 1 of a frame of 8 of 256 pixels: of a Gaussian ±1 std has 68 % of all."""
    images = []
    for level in np.linspace(0, 1, 101):
        image = np.full((1, 256, 64), np.float32(level))
        image[:, 8:-8, 2:-2] = -1
        images.append((1, image))
    expected = (0.5, 0.34)
    assert PriorStatistics.measure(images, "x").rim == pytest.approx(expected, abs=0.011)
    outliers = [(0.001, np.where(image > -1, 5, image)) for _, image in images]
    assert PriorStatistics.measure(images + outliers, "x").rim == pytest.approx(expected, abs=0.011)
    heavy = [(weight * 200 if i == 70 else weight, x) for i, (weight, x) in enumerate(images)]
    assert PriorStatistics.measure(heavy, "x").rim == pytest.approx((0.7, 0.115), abs=0.01)


def test_the_power_of_the_mean_is_the_variance_of_the_constant():
    """Of images with the means 0.5 ± 0.3 and 0.5, of which the last counts for twice as much."""
    checks = (np.indices((32, 32)).sum(axis=0) % 2 - 0.5)[None]  # of mean 0
    images = [(1, 0.8 + checks), (1, 0.2 + 0.1 * checks), (2, 0.5 + 0.1 * checks)]
    found = PriorStatistics.measure(images, "x")
    constants = [scipy.fft.dctn(image[0], norm="ortho")[0, 0] for _, image in images]
    assert found.mean_power == pytest.approx(np.cov(constants, fweights=[1, 1, 2], ddof=0))
    assert found.mean_intensity == pytest.approx(0.5)
    coloured = [(w, np.concatenate([x - 0.1, x + 0.1, x])) for w, x in images]
    assert PriorStatistics.measure(coloured, "x").mean_power == found.mean_power
    sizes = [(w, x[:, :, : 32 // w]) for w, x in images]  # the last image is half as large
    expected = (2 * 0.3**2 * 32 * 32) / 4
    assert PriorStatistics.measure(sizes, "x").mean_power == pytest.approx(expected)
    assert PriorStatistics.measure(images[:1], "x").mean_power is None


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    out = str(tmp_path / "prior.json")
    assert statistics.main(["--data_dir", str(tmp_path / "none"), "--out", out]) == 2
    iio.imwrite(tmp_path / "flat.png", np.full((16, 16), 7, np.uint8))
    assert statistics.main(["--data_dir", str(tmp_path), "--out", out]) == 2
    assert "all are constant" in capsys.readouterr().err
    twice = ["--data_dir", str(tmp_path), str(tmp_path)]
    for flags in (["--shares", "a"], ["--shares", "a=2"], twice):
        assert statistics.main(["--data_dir", str(tmp_path), "--out", out, *flags]) == 2
        assert capsys.readouterr().err.startswith(f"error: {flags[0]}: ")
    assert not os.path.exists(out)
