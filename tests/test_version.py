"""The version stands in one place; what repeats it agrees."""

import os
import re

import yaml

from guided_diffusion import __version__
from tests.conftest import REPOSITORY


def read(name):
    with open(os.path.join(REPOSITORY, name), encoding="utf-8") as file:
        return file.read()


def test_citation_and_changelog_have_the_version():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == __version__
    assert re.findall(r"^## (\d\S*)$", read("CHANGELOG.md"), re.MULTILINE)[0] == __version__


def test_the_project_takes_the_version_from_the_package():
    project = read("pyproject.toml")
    assert 'version = { attr = "guided_diffusion.__version__" }' in project
    assert not re.search(r'^version = "', project, re.MULTILINE)
