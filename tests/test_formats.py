"""The registry of formats, what a folder's files are taken for, and what results are called."""

import bz2
import gzip
import os
import shutil

import imageio.v3 as iio
import numpy as np
import pytest

from data.dataloader import list_images, natural_key
from data.formats import FORMATS
from data.items import Format
from data.pictures import Picture
from tests.conftest import SR, task, write_yaml
from tests.volume_files import (
    head,
    items_of,
    series_values,
    write_back,
    write_dicom,
    write_nifti,
    write_series,
)
from util.errors import UserError
from util.files import LONGEST_NAME, printable, replacing, safe_name


class Toy(Picture):
    """A text file of grey values, a line for each row."""

    def read(self):
        return np.loadtxt(self.path, dtype=np.float32, skiprows=1)[None] / 10


TOY = Format(
    "toy", (".toy",), lambda head, path: head.startswith(b"TOY\n"),
    lambda paths, options: [Toy(path) for path in paths],
)  # fmt: skip


def write_toy(path):
    with open(path, "w", encoding="utf-8") as file:
        file.write("TOY\n")
        np.savetxt(file, np.linspace(-10, 10, 1024).reshape(32, 32))


def test_a_format_is_a_row_of_the_registry(tiny_run, monkeypatch):
    monkeypatch.setitem(FORMATS, "toy", TOY)
    write_toy("images/a3.toy")
    write_toy("images/named_otherwise.png")
    with open("images/damaged.toy", "w", encoding="utf-8") as file:
        file.write("no such thing")
    found = {i.name: i for i in items_of({"root": "images"})}
    assert list(found) == ["a1", "a2", "a3", "a10", "damaged", "named_otherwise"]
    expected = np.linspace(-1, 1, 1024).reshape(32, 32)
    for name in ("a3", "named_otherwise"):
        np.testing.assert_allclose(found[name].read()[0], expected, atol=1e-6)
    os.remove("images/damaged.toy")
    assert tiny_run("--save_dir", "out") == 0
    truth = iio.imread(f"out/{SR}/truth/a3.png") / 127.5 - 1
    np.testing.assert_allclose(truth, expected, atol=0.005)
    shutil.rmtree("images")
    os.mkdir("images")
    with pytest.raises(UserError, match=r"looked for .*NIfTI.*toy: .*\.toy\)"):
        items_of({"root": "images"})


def test_contents_count_and_names_do_not(tmp_path):
    """The same slices in files of wrong and of no suffix; what is no image is passed over."""
    write_nifti(tmp_path / "right.nii", head())
    right = (tmp_path / "right.nii").read_bytes()
    compressed = {"a.nii": gzip.compress(right), "b.nii.gz": right, "c.nii": bz2.compress(right),
                  "d.img": right, "e": gzip.compress(right), "f.png": right}  # fmt: skip
    for name, contents in compressed.items():
        (tmp_path / name).write_bytes(contents)
    iio.imwrite(tmp_path / "g.png", head()[..., 0].astype(np.uint8))
    os.rename(tmp_path / "g.png", tmp_path / "g.jpg")
    write_dicom(tmp_path / "h.png", head()[..., 0], 0.0)
    for name in ("i.txt", "j", "k.json"):
        (tmp_path / name).write_text("no image")
    items = items_of({"root": str(tmp_path)})
    expected = items_of({"root": str(tmp_path / "right.nii")})
    found = {}
    for item in items:
        found.setdefault(item.label, []).append(item.read())
    assert len(found) == 9 and set(found) == {*compressed, "right.nii", "g.jpg", tmp_path.name}
    for name in compressed:
        np.testing.assert_array_equal(found[name], [i.read() for i in expected])


def test_a_file_that_is_not_there_or_not_itself_is_named_as_such(tmp_path):
    iio.imwrite(tmp_path / "good.png", head()[..., 0].astype(np.uint8))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for name in ("a.nii.gz", "b.dcm", "c.png"):
        (tmp_path / name).write_bytes(pointer)
    os.symlink(".git/annex/objects/x", tmp_path / "d.nii.gz")
    os.symlink(".git/annex/objects/x", tmp_path / "readme")
    items = {i.name: i for i in items_of({"root": str(tmp_path)})}
    assert list(items) == ["a", "b", "c", "d", "good"]
    for name in "abc":
        with pytest.raises(UserError, match=rf"{name}\..*: a Git LFS pointer"):
            items[name].read()
    with pytest.raises(UserError, match=r"d\.nii\.gz: a link to a file that is not there"):
        items["d"].read()
    assert items["good"].read().shape == (1, 32, 32)


AWKWARD = [
    b"plain.png",
    b"caf\xe9.png",  # Latin-1, so no UTF-8
    "\u00e9\u4e2d\u6587.png".encode(),  # UTF-8, but not of every terminal
    b"new\nline.png",
    b"colon: and star*.png",
    b"trailing. .png",
    b"x" * 251 + b".png",
    ("\u4e2d" * 83).encode() + b".png",
]


def test_any_name_that_the_file_system_allows(tiny_run, capfd):
    """Results have safe names, of which some are the sources' own; a second run finds them."""
    image = iio.imread("images/a1.png")
    shutil.rmtree("images")
    os.mkdir("images")
    for name in AWKWARD:
        with open(b"images/" + name, "wb") as file:
            file.write(iio.imwrite("<bytes>", image, extension=".png"))
    os.mkdir("volumes")
    write_yaml("task.yaml", task())
    assert tiny_run("--save_dir", "out") == 0
    results = os.listdir(f"out/{SR}/recon")
    assert len(results) == len(AWKWARD)
    assert "plain.png" in results and "\u00e9\u4e2d\u6587.png" in results
    for name in results:
        name.encode("utf-8")
        assert not set(name) & set('\n\\/:*?"<>|') and len(os.fsencode(name)) < 220
    capfd.readouterr()
    assert tiny_run("--save_dir", "out") == 0
    assert "8 of 8 images had been restored" in capfd.readouterr().out
    labels = [i.label for i in items_of({"root": "images"})]
    assert r"caf\udce9.png" in labels and r"new\nline.png" in labels
    for label in labels:
        assert label.isprintable() and label.encode("utf-8")


def test_safe_names_are_unique_and_stable():
    names = [
        "a",
        "a:b",
        "a*b",
        "a_b",
        "caf\udce9",
        "caf\udcea",
        ".a",
        "",
        "a.",
        "n" * 300,
        "n" * 301,
    ]
    safe = [safe_name(n) for n in names]
    assert len(set(safe)) == len(names) and safe == [safe_name(n) for n in names]
    assert safe[0] == "a" and safe[3] == "a_b"
    assert all(len(s.encode()) <= 200 and s[:1] not in ("", ".") for s in safe)
    assert printable("a\tb\udcff") == r"a\tb\udcff"


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path):
    path = str(tmp_path / ("n" * LONGEST_NAME))
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("whole")
    assert os.listdir(tmp_path) == ["n" * LONGEST_NAME]


def test_digits_of_other_scripts_are_no_numbers(tmp_path):
    for name in ("\u00b2.png", "x\u0663.png", "x2.png", "x10.png"):
        (tmp_path / name).touch()
    names = [os.path.basename(p) for p in list_images(str(tmp_path))]
    assert names.index("x2.png") < names.index("x10.png") and len(names) == 4
    assert natural_key("slice_2") < natural_key("slice_10")


def test_a_volume_with_an_awkward_name_is_written(tmp_path):
    folder = os.fsdecode(b"s\xe9rie: " + b"n" * 150)
    write_series(tmp_path / folder, head())
    items = items_of({"root": str(tmp_path / folder)})
    [written] = write_back(items, tmp_path / "out")
    assert not written.failed
    [name] = os.listdir(tmp_path / "out/volumes")
    assert name.isprintable() and ":" not in name
    np.testing.assert_allclose(
        series_values(tmp_path / "out/volumes" / name)[1], head()[..., 1], atol=0.02
    )


def test_names_of_windows_devices_are_no_results():
    devices = ["con", "nul", "AUX.1", "Com1.t1", "lpt9", "prn .x", "COM²"]
    found = [safe_name(name) for name in devices]
    assert len({name.lower() for name in found}) == len(devices)
    stems = [name.partition(".")[0].rstrip().lower() for name in found]
    assert not {"con", "nul", "aux", "com1", "lpt9", "prn", "com²"} & set(stems)
    for name in ("console", "nul_1", "com10", "x.con", "auxiliary.1"):
        assert safe_name(name) == name
