"""report.html: what it says is measured right, it stands in one file, and browsers show it."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from guided_diffusion import report
from guided_diffusion.evidence import (
    Evidence,
    autocorrelation,
    combined,
    limit,
    measure,
    rings,
    spectrum_distance,
)
from guided_diffusion.statistics import PriorStatistics
from tests.conftest import SR, task, write_yaml
from tests.volume_files import head, write_nifti

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
VOID = {"meta", "img", "rect", "line", "br"}
STATISTICS = PriorStatistics(-0.8, (1.0, 400.0), (400.0, 400.0 / 400.0**2), "a test")


class Page(HTMLParser):
    """What a page holds: its elements in order, and that each is closed."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        with open(path, encoding="utf-8") as file:
            self.source = file.read()
        self.feed(self.source)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def images(self):
        """The decoded pictures; each says what it is, and comes from the file itself."""
        found = []
        for image in self.of("img"):
            assert image["alt"]
            kind, data = image["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            pixels = Image.open(io.BytesIO(base64.b64decode(data)))
            pixels.load()
            assert (int(image["width"]), int(image["height"])) == pixels.size
            found.append((image["alt"], pixels))
        return found


def check_alone(page):
    """It needs nothing else: no script, no address, no file."""
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    style = re.search("<style>(.*?)</style>", page.source, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert page.of("html")[0]["lang"] == "en" and len(page.of("h1")) == 1


def test_a_picture_run_has_a_report(tiny_run):
    os.rename("images/a1.png", "images/a<b>&'1.png")
    assert tiny_run("--save_dir", "out", "--seed", "5") == 0
    page = Page(f"out/{SR}/report.html")
    check_alone(page)
    for text in ("tiny/super_resolution/x4/0.05", "a<b>&'1.png", "seed 5", "scale_factor 4",
                 "3 images restored", "simulated from the images", "PSNR", "noise.sigma 0.05",
                 "DMPS-MRI", "Warnings", "For research, not for diagnosis"):  # fmt: skip
        assert text in page.text, text
    shown = page.images()
    of_one = [alt for alt, _ in shown if alt.startswith("a2.png: ")]
    for what in ("input", "reconstruction", "truth", "absolute error", "residual, black -4",
                 "the residual's autocorrelation"):  # fmt: skip
        assert sum(what in alt for alt in of_one) == 1, what
    recon = next(pixels for alt, pixels in shown if alt == "a2.png: reconstruction")
    assert np.array_equal(np.asarray(recon), np.asarray(Image.open(f"out/{SR}/recon/a2.png")))
    with open(f"out/{SR}/report/a2.json", encoding="utf-8") as file:
        assert json.load(file)["rms"] > 0


def test_it_is_made_again_after_a_resume_and_is_the_same(tiny_run):
    os.remove("images/a10.png")
    assert tiny_run("--save_dir", "out") == 0
    path = f"out/{SR}/report.html"
    with open(path, "rb") as file:
        before = file.read()
    os.remove(path)
    os.remove(f"out/{SR}/recon/a2.png")  # one image is restored anew
    assert tiny_run("--save_dir", "out") == 0
    with open(path, "rb") as file:
        assert file.read() == before
    assert not [name for name in os.listdir(f"out/{SR}") if name.startswith(".part")]


@pytest.mark.parametrize("broken", ["page", "evidence"])
def test_a_run_does_not_fail_for_want_of_it(tiny_run, monkeypatch, capsys, broken):
    def fail(*arguments):
        raise ValueError("no page today")

    if broken == "page":
        monkeypatch.setattr(report, "make_report", fail)
    else:
        monkeypatch.setattr("guided_diffusion.evidence.measure", fail)
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert "no page today" in capsys.readouterr().err
    assert os.path.exists(f"out/{SR}/report.html") == (broken == "evidence")


@pytest.mark.parametrize("mode", ["slices", "volume"])
def test_a_volume_is_shown_in_three_planes_with_its_interval(tiny_run, mode):
    write_nifti("v.nii", head((32, 32, 5)))
    config = task({"name": "denoise"}, root="v.nii")
    config["data"] |= {"measured": True, "volume_mode": mode}
    write_yaml("task.yaml", config)
    assert tiny_run("--save_dir", "out", "--num_samples", "2") == 0
    page = Page("out/tiny/denoise/gaussian/0.05/report.html")
    check_alone(page)
    shown = dict(page.images())
    assert "1 volume restored" in page.text and "5 slices, pixels of 1 mm, 4 mm apart" in page.text
    for what in ("input (three planes)", "reconstruction (three planes)"):
        assert shown[f"v.nii: {what}"].size == (32, 32 + 2 * 20)
    widths = [alt for alt in shown if "90 % interval of 2 samples" in alt]
    assert len(widths) == 1 and "in the file's units" in widths[0]
    assert shown[widths[0]].size == (32, 72)
    assert ("neighbouring slices" in page.text) == (mode == "volume")


def test_samples_of_the_prior_have_a_report(tiny_run):
    write_yaml("task.yaml", {"conditioning": {"method": "vanilla"}})
    assert tiny_run("--save_dir", "out", "--limit", "2") == 0
    page = Page("out/tiny/vanilla/report.html")
    check_alone(page)
    assert "2 images restored: samples of the prior" in page.text and len(page.images()) == 2


def white(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_autocorrelation_is_the_mean_product_of_pixels_so_far_apart():
    residual, inside = white((2, 17, 23)), np.random.default_rng(1).random((2, 17, 23)) < 0.7
    found = autocorrelation(residual, inside, reach=3)
    x = np.where(inside, residual, np.nan).astype(np.float64)
    for down in range(-3, 4):
        for right in range(-3, 4):
            near = x[:, max(down, 0) : 17 + min(down, 0), max(right, 0) : 23 + min(right, 0)]
            far = x[:, max(-down, 0) : 17 + min(-down, 0), max(-right, 0) : 23 + min(-right, 0)]
            expected = np.nanmean(near * far) / np.nanmean(x**2)
            assert found[down + 3, right + 3] == pytest.approx(expected, abs=1e-9)


def test_noise_has_no_structure_and_anatomy_has():
    image = np.full((1, 96, 96), -1, np.float32)
    image[:, 20:76, 20:76] = 0.2 * np.sin(np.arange(56) / 4) + 0.1  # all of the head
    clean = measure(image, white((1, 96, 96)), None, None, False)
    assert 2500 < clean.pixels < 4500 and clean.rms == pytest.approx(1, abs=0.05)
    assert rings(np.array(clean.correlation)).max() < limit(clean.pixels)
    lost = measure(image, white((1, 96, 96)) + 2 * image, None, None, False)
    assert rings(np.array(lost.correlation)).max() > 2 * limit(lost.pixels)
    # Smooth noise: of a mean of two neighbours, half is shared at distance 1.
    wide = white((1, 96, 97))
    pairs = measure(image, (wide[..., 1:] + wide[..., :-1]) / np.sqrt(2), None, None, False)
    assert pairs.correlation[7][8] == pytest.approx(0.5, abs=0.04)


def test_padding_is_left_out():
    image = np.zeros((1, 40, 40), np.float32)
    residual, padding = white((1, 40, 40)), np.zeros((40, 40), bool)
    padding[:, :10] = True
    residual[0, padding] = 50
    found = measure(image, residual, padding, None, False)
    assert found.pixels == 1200 and found.rms == pytest.approx(1, abs=0.1)


def test_slices_that_went_alone_count_together():
    one, two = (measure(np.zeros((1, 40, 40), np.float32), s * white((1, 40, 40), s), None, None,
                        False) for s in (1, 3))  # fmt: skip
    both = combined([one, two])
    assert both.pixels == 3200 and both.rms == pytest.approx(np.sqrt(5), rel=0.05)
    x = np.concatenate([white((1, 40, 40), 1), 3 * white((1, 40, 40), 3)])
    expected = autocorrelation(x, np.ones(x.shape, bool))
    np.testing.assert_allclose(both.correlation, expected, atol=2e-4)


def test_the_spectrum_s_distance_is_in_powers_of_ten():
    import scipy.fft

    power = STATISTICS.power_spectrum(128, 96).numpy()
    drawn = scipy.fft.idctn(np.sqrt(power) * white((60, 128, 96)), axes=(1, 2), norm="ortho")
    assert spectrum_distance(drawn, STATISTICS) < 0.1
    assert spectrum_distance(0.1 * drawn, STATISTICS) == pytest.approx(2, abs=0.1)


CASES = {  # --sigma, texts that must stand among the warnings, and that must not
    "right": ("0.1", [], ["was given", "range", "contrast"]),
    "estimated": ("auto", [], ["was given", "range"]),
    "too quiet": ("0.002", ["below the prior's range, 0.01", "looks like 0.09"], []),
    "too loud": ("1.5", ["more than half of the displayed range"], ["above the prior's range"]),
    "file's units": ("200", ["above the prior's range, 0.01 to 157"], ["more than half"]),
    "none": ("0", ["σ was given as 0, and a.npy looks like 0.09", "σ 0 is below"], []),
    "next to none": ("1e-30", ["σ was given as 1e-30", "There is no residual picture"], ["inf"]),
    "too small": ("0.05", ["σ was given as 0.05, and a.npy looks like 0.09"], ["prior's range"]),
}


def warnings_in(path):
    return Page(path).text.split("Warnings")[1].split("What was done")[0]


@pytest.mark.parametrize("case", CASES)
def test_warnings_of_sigma(tiny_run, capsys, case):
    sigma, says, silent = CASES[case]
    wave = 0.5 * np.sin(np.arange(64) / 6) * np.cos(np.arange(64)[:, None] / 7)
    np.save("a.npy", (wave + 0.1 * white((64, 64))).astype(np.float32))
    write_yaml("task.yaml", task({"name": "denoise"}))
    given = ("--measured", "--input", "a.npy", "--method", "ddrm", "--sigma", sigma)
    assert tiny_run("--save_dir", "out", *given) == 0
    assert not {"inf", "nan"} & set(capsys.readouterr().out.split())
    [folder] = os.listdir("out/tiny/denoise/gaussian")
    warned = warnings_in(f"out/tiny/denoise/gaussian/{folder}/report.html")
    for text in says:
        assert text in warned, warned
    for text in silent:
        assert text not in warned, warned


@pytest.mark.parametrize("boundary", ["zero", "reflect"])
def test_a_blur_that_ends_at_the_edges_is_doubted_where_edges_do_not_fit(tiny_run, boundary):
    blur = {"type": "uniform", "kernel_size": 9}
    y = 0.6 + 0.02 * white((64, 64))  # blurred and mirrored, a constant is what it was
    np.save("a.npy", y.astype(np.float32))
    noise = {"name": "gaussian", "sigma": 0.02}
    write_yaml("task.yaml", task({"name": "deblur", "boundary": boundary, **blur}, noise))
    assert tiny_run("--save_dir", "out", "--measured", "--input", "a.npy", "--method", "ddrm") == 0
    warned = warnings_in("out/tiny/deblur/uniform/0.02/report.html")
    assert ("boundary: reflect" in warned) is (boundary == "zero"), warned


def test_contrast_unlike_the_training_images_is_said(tiny_run):
    """That is, where statistics of them lie beside the weights."""
    write_yaml("task.yaml", task({"name": "denoise"}, {"name": "gaussian", "sigma": 0.01}))
    given = ("--method", "ddrm", "--limit", "1")
    assert tiny_run("--save_dir", "none", *given) == 0
    STATISTICS.save("tiny.json")
    assert tiny_run("--save_dir", "dark", *given) == 0
    PriorStatistics(0.0, (1.0, 400.0), (300.0, 300.0 / 400.0**2), "").save("tiny.json")
    assert tiny_run("--save_dir", "like", *given) == 0
    none, dark, like = (warnings_in(f"{name}/tiny/denoise/gaussian/0.01/report.html")
                        for name in ("none", "dark", "like"))  # fmt: skip
    assert "contrast is unlike" not in none
    assert "contrast is unlike" in dark and "theirs -0.80" in dark
    assert "mean intensity" not in like


def test_damaged_evidence_counts_as_none(tmp_path):
    path = str(tmp_path / "a.json")
    Evidence(rms=1.5, note="x").save(path)
    assert Evidence.load(path) == Evidence(rms=1.5, note="x")
    for text in ("{", '{"unknown": 1}', "[1]"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        assert Evidence.load(path) is None


LOOK = """<script>document.title = JSON.stringify({
  images: [...document.images].map(i => i.complete && i.naturalWidth),
  widths: [...document.querySelectorAll('figure img, figure svg')].map(
    e => e.getBoundingClientRect().width),
  bars: document.querySelectorAll('svg rect').length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  page: getComputedStyle(document.body).backgroundColor,
  text: getComputedStyle(document.body).color,
});</script>"""


def browse(path, folder, *flags):
    """The command's standard output and error; the browser reaches nothing but the file."""
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync",
             "no-first-run", "disable-quic", "disable-gpu", "no-sandbox", "headless")  # fmt: skip
    command = [CHROMIUM, *(f"--{flag}" for flag in quiet), f"--user-data-dir={folder}/profile"]
    command += ["--enable-logging=stderr", *flags, f"file://{path}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def luminance(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to look at the page with")
def test_a_browser_shows_it(tiny_run, tmp_path):
    assert tiny_run("--save_dir", "out", "--num_samples", "2") == 0
    path = os.path.abspath(f"out/{SR}/report.html")
    pdf = str(tmp_path / "page.pdf")
    said = browse(path, tmp_path, f"--print-to-pdf={pdf}")
    for complaint in ("Refused", "Content Security Policy", "ERR_", "Uncaught"):
        assert complaint not in said.stderr, said.stderr
    with open(pdf, "rb") as file:
        assert file.read(5) == b"%PDF-"
    page = Page(path)
    looked = str(tmp_path / "looked.html")
    with open(looked, "w", encoding="utf-8") as file:
        without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.source)
        file.write(without.replace("</body>", f"{LOOK}</body>"))
    seen = {}
    for scheme, width in (("dark", 420), ("light", 1200)):
        number = {"dark": 0, "light": 1}[scheme]
        said = browse(looked, tmp_path, f"--window-size={width},900", "--dump-dom",
                      f"--blink-settings=preferredColorScheme={number}")  # fmt: skip
        found = re.search("<title>(.*?)</title>", said.stdout, re.DOTALL).group(1)
        seen[scheme] = json.loads(html.unescape(found))
        assert len(seen[scheme]["images"]) == len(page.of("img")) > 10
        assert all(seen[scheme]["images"]) and min(seen[scheme]["widths"]) > 100
        assert seen[scheme]["bars"] == 3 * 7 and seen[scheme]["overflow"] <= 0
    assert luminance(seen["dark"]["page"]) < 60 < 180 < luminance(seen["dark"]["text"])
    assert luminance(seen["light"]["text"]) < 60 < 240 < luminance(seen["light"]["page"])
