"""DMPS.ipynb: it runs from top to bottom, and is committed with its outputs."""

import os
import subprocess
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
    assert len(outputs(notebook, "image/png")) == 8
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
    assert len(list(tmp_path.rglob("summary.json"))) == 8


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


def test_alone_it_asks_for_its_repository(notebook, tmp_path, monkeypatch):
    setup = next(cell.source for cell in notebook.cells if "REPOSITORY =" in cell.source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY is empty, and main.py is not in this folder"):
        exec(setup, {})  # noqa: S102 - our own notebook
    assert not os.listdir(tmp_path)


def test_it_clones_the_repository_that_the_field_names(notebook, tmp_path, monkeypatch):
    setup = next(cell.source for cell in notebook.cells if "REPOSITORY =" in cell.source)
    repository = tmp_path / "any"
    repository.mkdir()
    for name in ("main.py", "requirements.txt"):
        (repository / name).write_text("pytest\n", encoding="utf-8")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    exec(setup.replace('REPOSITORY = ""', f'REPOSITORY = "file://{repository}"'), {})  # noqa: S102
    assert os.path.samefile(os.getcwd(), tmp_path / "alone" / "dmps-mri")
