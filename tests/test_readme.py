"""What the READMEs and the notebook say exists: paths, flags, YAML keys, methods, defaults."""

import dataclasses
import json
import os
import re
import shlex

import pytest
import yaml

import main
from guided_diffusion import train
from guided_diffusion.config import (
    DataConfig,
    ModelConfig,
    NoiseConfig,
    Schedule,
    read_model_config,
    read_schedule,
    read_task_config,
)
from guided_diffusion.methods import METHODS, method_names
from guided_diffusion.operators import OPERATORS
from guided_diffusion.training.config import TrainConfig
from tests.benchmarks import accelerator, run_all
from tests.conftest import REPOSITORY
from util.config import config_fields, read_yaml

READMES = ("README.md", "README.es.md")
NOT_IN_THE_REPOSITORY = ("results/", "path/to/", "models/mine", "models/model080000.pt")
NOT_IN_THE_REPOSITORY += ("models/256x256_diffusion_uncond.pt",)
OF_OTHER_PROGRAMS = {"help", "depth", "nproc", "diffusion_steps", "predict_xstart", "learn_sigma"}


def read(name):
    """A README, or the text of a notebook's cells."""
    with open(os.path.join(REPOSITORY, name), encoding="utf-8") as file:
        text = file.read()
    if name.endswith(".ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


@pytest.fixture(scope="module")
def manual():
    return read("README.md")


def slug(title):
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def sections(text):
    return {slug(t) for t in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def table(text, title):
    """The rows of all tables under a heading, up to the next one: first cell → the others."""
    part = re.split(rf"^#+ {title}$", text, flags=re.MULTILINE)[1]
    part = re.split(r"^#+ ", part, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `([^`|]+)` \|(.*)\|$", part, re.MULTILINE)
    return {key: [cell.strip() for cell in cells.split(" | ")] for key, cells in rows}


@pytest.mark.parametrize("name", [*READMES, "DMPS.ipynb"])
def test_links_and_paths_exist(name):
    text = read(name)
    paths = [p for p in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in p]
    paths += re.findall(r"\b((?:configs|data|models|tests|saved_results)/[\w./-]*\w)", text)
    missing = {
        p
        for p in paths
        if not p.startswith(NOT_IN_THE_REPOSITORY)
        and not os.path.exists(os.path.join(REPOSITORY, p))
    }
    assert not missing


@pytest.mark.parametrize("name", READMES)
def test_every_section_that_is_linked_exists(name):
    for file, section in re.findall(r"\]\(([^):#]*)#([^)]+)\)", read(name)):
        assert section in sections(read(file or name))


def commands(text):
    text = text.replace("\\\n", " ")
    found = re.findall(
        r"^ *(python (?:main\.py|-m guided_diffusion\.train)[^\n`]*)", text, re.MULTILINE
    )
    return found + re.findall(r"`(python (?:main\.py|-m guided_diffusion\.train)[^`]*)`", text)


@pytest.mark.parametrize("name", READMES)
def test_commands_parse(name):
    found = commands(read(name))
    assert len(found) > 6
    for command in found:
        if "…" in command:
            continue
        words = shlex.split(command)
        if words[1] == "main.py":
            main.parse_args(words[2:])
        else:
            train.parse_args(words[3:])


def test_the_spanish_commands_are_the_english_ones(manual):
    assert set(commands(read("README.es.md"))) <= set(commands(manual))


def flags_of_train():
    return {**vars(train.parse_args(["--data_dir", "", "--out", ""])), "data_dir": None}


@pytest.mark.parametrize("name", [*READMES, "DMPS.ipynb"])
def test_every_flag_that_is_named_exists(name):
    named = set(re.findall(r"[`\"]--([a-z]\w*)", read(name)))
    known = {*vars(main.parse_args([])), *flags_of_train(), *OF_OTHER_PROGRAMS}
    for benchmark in (accelerator, run_all):
        known |= {*vars(benchmark.parse_args([]))}
    assert named <= known


def task_keys():
    keys = {"conditioning.method", "conditioning.params"}
    operator_keys = {"name", "in_shape"}.union(*(o.parameters for o in OPERATORS.values()))
    keys |= {f"data.{key}" for key in config_fields(DataConfig)}
    keys |= {f"measurement.noise.{key}" for key in config_fields(NoiseConfig)}
    return keys | {f"measurement.operator.{key}" for key in operator_keys}


@pytest.mark.parametrize("name", [*READMES, "DMPS.ipynb"])
def test_every_task_key_that_is_named_exists(name):
    form = r"[`\"]((?:conditioning|data|measurement)\.[a-z_]+(?:\.[a-z_]+)*)[`\":]"
    named = set(re.findall(form, read(name)))
    params = {f"conditioning.params.{key}" for m in METHODS.values() for key in m.parameters}
    assert named and named <= task_keys() | params


def check_flags(rows, defaults):
    """Every flag has a row; a default that the row gives is the program's."""
    assert set(rows) == {f"--{flag}" for flag in defaults}
    for flag, default in defaults.items():
        shown = rows[f"--{flag}"][0].strip("`")
        if isinstance(default, bool):
            assert shown == "off"
        elif default not in (None, "", []):
            assert shown == str(default)


def test_every_flag_is_in_a_table_with_its_default(manual):
    check_flags(table(manual, "Flags"), vars(main.parse_args([])))
    rows = table(manual, "Training")
    check_flags({k: v for k, v in rows.items() if k.startswith("--")}, flags_of_train())


def test_every_task_key_and_method_is_in_a_table(manual):
    assert set(table(manual, "Task file")) == task_keys()
    methods = table(manual, "Methods")
    assert set(methods) - {"--method"} == set(method_names())
    for name, method in METHODS.items():
        for key, parameter in method.parameters.items():
            assert f"`{key}` ({parameter.default:g}" in methods[name][0]
            for task, default in parameter.defaults_for.items():
                assert f"{task}: {default:g}" in methods[name][0]


@pytest.mark.parametrize(
    "title, schema",
    [
        ("Diffusion file", Schedule),
        ("Model file", ModelConfig),
        ("Training", TrainConfig),
    ],
)
def test_every_key_is_in_a_table_with_its_default(manual, title, schema):
    rows = {k: v for k, v in table(manual, title).items() if not k.startswith("--")}
    fields = config_fields(schema)
    assert set(rows) == set(fields)
    for key, field in fields.items():
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            assert rows[key][0] == "required"
        elif default is not None:
            assert yaml.safe_load(rows[key][0].strip("`")) == default


def test_every_shipped_config_is_valid():
    folder = os.path.join(REPOSITORY, "configs")
    names = sorted(os.listdir(folder))
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("model_"):
            read_model_config(path)
        elif name.startswith("diffusion_"):
            read_schedule(path)
        elif name.startswith("train_"):
            assert set(read_yaml(path)) == set(config_fields(TrainConfig))
        else:
            read_task_config(path)
    assert len(names) == 15
