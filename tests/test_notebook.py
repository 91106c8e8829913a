"""DMPS.ipynb: it runs from top to bottom, and is committed with its outputs."""

import os
import re
import sys

import pytest

from tests.conftest import REPOSITORY

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
PATH = os.path.join(REPOSITORY, "DMPS.ipynb")


def outputs(notebook, kind):
    """The data of every output of this MIME type."""
    found = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return [o["data"][kind] for o in found if kind in o.get("data", {})]


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def check_pictures(notebook):
    assert len(outputs(notebook, "image/png")) == 6
    assert len(outputs(notebook, "image/gif")) == 1


def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    monkeypatch.setenv("DMPS_STEPS", "2")
    monkeypatch.setenv("DMPS_SAMPLES", "2")
    monkeypatch.setenv("DMPS_RESULTS", str(tmp_path))
    resources = {"metadata": {"path": REPOSITORY}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    check_pictures(notebook)
    assert len(list(tmp_path.rglob("summary.json"))) == 6


def test_the_committed_outputs_are_of_one_run_and_small(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_pictures(notebook)
    assert os.path.getsize(PATH) < 3_000_000
    with open(PATH, encoding="utf-8") as file:
        text = file.read()
    assert '"ename"' not in text
    for folder in (REPOSITORY, os.path.expanduser("~") + os.sep, sys.prefix):
        assert folder not in text


def test_the_badge_opens_the_repository_that_is_cloned(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    (clone,) = re.findall(r'REPOSITORY = "https://github\.com/([^"]+)"', text)
    assert f"https://colab.research.google.com/github/{clone}/blob/main/DMPS.ipynb" in text
