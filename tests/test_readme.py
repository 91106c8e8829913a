"""What the README says exists: paths, flags, YAML keys, methods."""

import os
import re
import shlex

import pytest

import main
from guided_diffusion import train
from guided_diffusion.condition_methods import METHODS, PARAMETERS
from tests.conftest import REPOSITORY
from util.config import (
    TASK_SCHEMA,
    read_diffusion_config,
    read_model_config,
    read_task_config,
    read_yaml,
)

README = os.path.join(REPOSITORY, "README.md")
NOT_IN_THE_REPOSITORY = ("results/", "path/to/", "models/mine", "models/model080000.pt")
NOT_IN_THE_REPOSITORY += ("models/256x256_diffusion_uncond.pt",)


@pytest.fixture(scope="module")
def text():
    with open(README, encoding="utf-8") as file:
        return file.read()


def test_links_and_paths_exist(text):
    paths = [p for p in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in p]
    paths += re.findall(r"\b((?:configs|data|models|tests|saved_results)/[\w./-]*\w)", text)
    missing = {
        p
        for p in paths
        if not p.startswith(NOT_IN_THE_REPOSITORY)
        and not os.path.exists(os.path.join(REPOSITORY, p))
    }
    assert not missing


def test_every_section_that_is_linked_exists(text):
    titles = {t.lower().replace(" ", "-") for t in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles


def commands(text):
    text = text.replace("\\\n", " ")
    found = re.findall(
        r"^ *(python (?:main\.py|-m guided_diffusion\.train)[^\n`]*)", text, re.MULTILINE
    )
    return found + re.findall(r"`(python (?:main\.py|-m guided_diffusion\.train)[^`]*)`", text)


def test_commands_parse(text):
    found = commands(text)
    assert len(found) > 6
    for command in found:
        if "…" in command:
            continue
        words = shlex.split(command)
        if words[1] == "main.py":
            main.parse_args(words[2:])
        else:
            train.parse_args(words[3:])


def test_every_flag_of_main_is_in_the_table(text):
    table = set(re.findall(r"^\| `--(\w+)` \|", text, re.MULTILINE))
    assert table == set(vars(main.parse_args([])))


def test_every_task_key_and_method_is_in_a_table(text):
    keys = set(re.findall(r"^\| `((?:conditioning|data|measurement)\.[\w.]+)`", text, re.MULTILINE))
    expected = {"conditioning.method", "conditioning.params"}
    expected |= {f"data.{key}" for key in TASK_SCHEMA["data"]}
    for part, schema in TASK_SCHEMA["measurement"].items():
        expected |= {f"measurement.{part}.{key}" for key in schema}
    assert keys == expected
    methods = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    for name in METHODS:
        for key, value in PARAMETERS[name].items():
            assert f"`{key}` ({value:g})" in methods[name]


def test_every_shipped_config_is_valid():
    folder = os.path.join(REPOSITORY, "configs")
    names = sorted(os.listdir(folder))
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("model_"):
            read_model_config(path)
        elif name.startswith("diffusion_"):
            read_diffusion_config(path)
        elif name.startswith("train_"):
            assert set(read_yaml(path)) == set(train.TRAIN_SCHEMA)
        else:
            read_task_config(path)
    assert len(names) == 14
