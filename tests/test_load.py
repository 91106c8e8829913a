"""Long runs: memory and the work an image takes do not grow with the number of images."""

import gc
import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import util.results
from guided_diffusion.checkpoints import save_checkpoint
from guided_diffusion.run import Run
from guided_diffusion.unet import create_model
from tests.conftest import LINEAR, TINY, write_yaml
from util.journal import Journal, read_table, write_rows

SMALL = {**TINY, "image_size": 16, "channel_mult": "1", "attention_resolutions": "64"}
IMAGES = 200


def resident_megabytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_memory_and_work_are_flat_over_many_images(tiny_run, monkeypatch):
    save_checkpoint(create_model(**SMALL), "tiny.pt")
    write_yaml("model.yaml", {**SMALL, "model_path": "tiny.pt"})
    write_yaml("diffusion.yaml", {**LINEAR, "timestep_respacing": 1})
    rows, cols = np.mgrid[:16, :16]
    for i in range(IMAGES):
        wave = np.sin(rows / 5 + i) * np.cos(cols / 7)
        iio.imwrite(f"images/b{i}.png", np.uint8(127.5 + 100 * wave))
    restore, tensors, memory, tables = Run.restore, [], [], []

    def watched(self, *arguments):
        restore(self, *arguments)
        if len(self.results.rows) in (40, IMAGES):
            tensors.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
            if os.path.exists("/proc/self/statm"):
                memory.append(resident_megabytes())

    def counted(path, columns, rows):
        tables.append(len(rows))
        write_rows(path, columns, rows)

    monkeypatch.setattr(Run, "restore", watched)
    monkeypatch.setattr(util.results, "write_rows", counted)
    assert tiny_run("--save_dir", "out") == 0
    assert tensors[1] <= tensors[0]
    assert not memory or memory[1] - memory[0] < 8
    assert tables == [IMAGES + 3]  # metrics.csv is written as a whole once, at the end


def test_a_table_that_grew_row_by_row_says_the_same(tmp_path):
    grown, whole = str(tmp_path / "grown.csv"), str(tmp_path / "whole.csv")
    rows = {"a": {"psnr": 27.5, "seconds": 1.0}, 'b, "c"': {"psnr": float("inf"), "seconds": 2.0}}
    journal = Journal(grown)
    for name, row in rows.items():
        journal.add(name, row)
    write_rows(whole, ("psnr", "seconds"), rows)
    with open(grown, "rb") as a, open(whole, "rb") as b:
        assert a.read() == b.read()
    assert read_table(grown).rows == rows


def test_the_last_word_on_an_image_counts(tmp_path):
    path = str(tmp_path / "table.csv")
    journal = Journal(path)
    journal.add("a", {"psnr": 1.0})
    journal.add("b", {"psnr": 2.0})
    journal.add("a", {})
    assert read_table(path).rows == {"a": None, "b": {"psnr": 2.0}}
    Journal(path, ["psnr"]).add("a", {"psnr": 3.0, "ssim": 0.5})
    assert read_table(path).rows["a"] == {"psnr": 3.0, "ssim": 0.5}
    # a row whose writing was cut short, though what there is of it looks whole
    with open(path, "a", encoding="utf-8") as file:
        file.write("b,2.5,0.")
    assert read_table(path).rows["b"] == {"psnr": 2.0}


def test_columns_of_others_and_an_image_called_image_are_kept(tmp_path):
    path = str(tmp_path / "table.csv")
    journal = Journal(path)
    journal.add("image", {"psnr": 1.0, "theirs": 2.0})
    journal.add("b", {"psnr": 3.0, "remark": "odd, but good"})
    found = read_table(path)
    assert found.rows == {
        "image": {"psnr": 1.0, "theirs": 2.0},
        "b": {"psnr": 3.0, "remark": "odd, but good"},
    }
    assert found.columns == ["psnr", "theirs", "remark"] and not found.unread
    write_rows(path, found.columns, found.rows)
    assert read_table(path) == found


def test_a_resumed_run_keeps_columns_it_does_not_know(tiny_run):
    assert tiny_run("--save_dir", "out", "--limit", "2") == 0
    table = "out/tiny/super_resolution/x4/0.05/metrics.csv"
    with open(table, encoding="utf-8") as file:
        heading, *lines = file.read().splitlines()
    grades = ["4", "blurred"]
    with open(table, "w", encoding="utf-8") as file:
        file.write(f"{heading},grade\n")
        file.writelines(f"{line},{g}\n" for line, g in zip(lines, grades, strict=True))
    assert tiny_run("--save_dir", "out") == 0
    found = read_table(table)
    assert [row.get("grade") for row in found.rows.values()] == [4.0, "blurred", None]
    assert len(found.rows) == 3 and found.columns[-1] == "grade"


@pytest.mark.parametrize("what", [b"\xff\xfe\x00 no text", b"image,psnr\na1,2,3,4,5\nnot ours\n"])
def test_what_cannot_be_read_of_a_table_is_kept_aside(tiny_run, capsys, what):
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    table = "out/tiny/super_resolution/x4/0.05/metrics.csv"
    with open(table, "wb") as file:
        file.write(what)
    assert tiny_run("--save_dir", "out", "--limit", "1") == 0
    assert "metrics.csv.unread1" in capsys.readouterr().err
    with open(f"{table}.unread1", "rb") as file:
        assert file.read() == what
    assert list(read_table(table).rows)[0] == "a1"


@pytest.mark.parametrize("rows", [1, 3])
def test_a_folder_that_was_stopped_amid_a_row_is_gone_on_with(tiny_run, capsys, rows):
    assert tiny_run("--save_dir", "out") == 0
    table = "out/tiny/super_resolution/x4/0.05/metrics.csv"
    with open(table, "rb") as file:
        whole = file.read().splitlines(keepends=True)
    with open(table, "wb") as file:
        file.write(b"".join(whole[: rows + 1])[:-4])
    assert tiny_run("--save_dir", "out") == 0
    said = capsys.readouterr().out
    assert ("2 of 3 images had been restored by an earlier run" in said) == (rows == 3)
    with open(table, "rb") as file:
        again = file.read().splitlines()
    timed = whole[0].split(b",").index(b"seconds")
    assert [_without(line, timed) for line in again] == [
        _without(line.strip(), timed) for line in whole
    ]


def _without(line, column):
    cells = line.split(b",")
    return cells[:column] + cells[column + 1 :]
