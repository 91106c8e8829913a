"""What the pages and the notebook say exists: links, paths, flags, YAML keys, methods, defaults."""

import dataclasses
import importlib
import json
import os
import re
import shlex

import pytest
import yaml

import main
from data.formats import extensions
from guided_diffusion import statistics, train
from guided_diffusion.config import (
    Conditioning,
    DataConfig,
    ModelConfig,
    NoiseConfig,
    Schedule,
    read_model_config,
    read_schedule,
    read_task_config,
)
from guided_diffusion.methods import METHODS, VANILLA, method_names
from guided_diffusion.noise import NOISES
from guided_diffusion.operators import OPERATORS
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.unconditional import PriorStep
from tests.benchmarks import kspace
from tests.conftest import REPOSITORY
from util.config import config_fields, read_yaml

ENGLISH, SPANISH = "README.md", "README.es.md"
CONFIGS, METHOD, PRIORS = "configs/README.md", "guided_diffusion/README.md", "models/README.md"
PAGES = (ENGLISH, SPANISH, CONFIGS, METHOD, PRIORS)
PAGES += ("CONTRIBUTING.md", "saved_results/README.md", "tests/benchmarks/README.md")
EVERYWHERE = (*PAGES, "DMPS.ipynb")
NOT_IN_THE_REPOSITORY = ("results/", "path/to/", "models/mine", "models/model080000.pt")
NOT_IN_THE_REPOSITORY += ("models/256x256_diffusion_uncond.pt", "models/first", "models/second")
NOT_IN_THE_REPOSITORY += ("models/third", "models/fourth", "models/fifth", "models/sixth")
NOT_IN_THE_REPOSITORY += ("models/seventh",)
OF_OTHER_PROGRAMS = {"help", "depth", "nproc", "diffusion_steps", "predict_xstart", "learn_sigma"}
BENCHMARKS = ("accelerator", "noise_ahead", "run_all", "speed", "thick_slices")
BENCHMARKS += ("noise_maps", "volume_denoising", "volume_memory", "volume_real", "volume_samples")
BENCHMARKS += ("noise_estimates",)


def read(name):
    """A page, or the text of a notebook's cells."""
    with open(os.path.join(REPOSITORY, name), encoding="utf-8") as file:
        text = file.read()
    if name.endswith(".ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def prose(text):
    """What is not in a block of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(title):
    """As GitHub makes a heading's anchor."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def headings(text):
    return re.findall(r"^(#+) (.+)$", prose(text), re.MULTILINE)


def table(page, title):
    """The rows of all tables under a heading, up to the next one: first cell → the others."""
    part = re.split(rf"^#+ {title}$", prose(read(page)), flags=re.MULTILINE)[1]
    part = re.split(r"^#+ ", part, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `([^`|]+)` \|(.*)\|$", part, re.MULTILINE)
    return {key: [cell.strip() for cell in cells.split(" | ")] for key, cells in rows}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_links_and_paths_exist(name):
    text, folder = read(name), os.path.dirname(name)
    links = [p for p in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in p]
    links += re.findall(r'<img [^>]*src="([^"]+)"', text)
    missing = {p for p in links if not os.path.exists(os.path.join(REPOSITORY, folder, p))}
    bare = re.sub(r"\]\([^)]*\)|src=\"[^\"]*\"", "", text)
    places = "configs|data|guided_diffusion|models|tests|saved_results|util"
    paths = re.findall(rf"(?<![\w./-])((?:{places})/[\w./-]*\w)", bare)
    missing |= {
        p
        for p in paths
        if not p.startswith(NOT_IN_THE_REPOSITORY)
        and not os.path.exists(os.path.join(REPOSITORY, p))
    }
    assert not missing


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_list_of_contents_is_whole(name):
    """From the first section that it names on."""
    text = read(name)
    sections = [slug(title) for level, title in headings(text) if level == "##"]
    listed = re.findall(r"\]\(#([^)]+)\)", re.split(r"^## ", text, flags=re.MULTILINE)[0])
    named = [s for s in listed if s in sections]
    assert not named or sections[sections.index(named[0]) :] == named


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_section_that_is_linked_exists(name):
    for file, section in re.findall(r"\]\(([^):#]*)#([^)]+)\)", read(name)):
        target = os.path.normpath(os.path.join(os.path.dirname(name), file)) if file else name
        assert section in {slug(title) for _, title in headings(read(target))}, (file, section)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_the_pages_know_no_owner(name):
    """They work from whatever copy they are opened in."""
    assert "OWNER" not in read(name)
    assert not re.search(r"colab\.research\.google\.com/github/\w", read(name))


def commands(text):
    text = text.replace("\\\n", " ")
    form = r"python (?:main\.py|-m guided_diffusion\.\w+|tests/benchmarks/\w+\.py)[^\n`#]*"
    found = re.findall(rf"^ *(?:pip install [^\n&]* && )?({form})", text, re.MULTILINE)
    return [c.strip() for c in found + re.findall(rf"`({form})`", text) if "…" not in c]


def parse(command):
    words = shlex.split(command)
    if words[1] == "main.py":
        main.parse_args(words[2:])
    elif words[1] == "-m":
        importlib.import_module(words[2]).parse_args(words[3:])
    else:
        module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        if len(words) > 2:
            module.parse_args(words[2:])


@pytest.mark.parametrize("name", EVERYWHERE)
def test_commands_parse(name):
    for command in commands(read(name)):
        parse(command)


def test_commands_are_found_where_they_are():
    least = {ENGLISH: 10, METHOD: 1, PRIORS: 8, "tests/benchmarks/README.md": 6}
    for name, count in least.items():
        assert len(commands(read(name))) >= count, name


def flags_of(module, *required):
    """Flag → default; None for those that are required."""
    filled = [word for flag in required for word in (f"--{flag}", "")]
    return {**vars(module.parse_args(filled)), **dict.fromkeys(required)}


def flags_of_train():
    return flags_of(train, "data_dir", "out")


def flags_of_statistics():
    return flags_of(statistics, "data_dir", "out")


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_flag_that_is_named_exists(name):
    named = set(re.findall(r"[`\"(]--([a-z]\w*)", read(name)))
    known = {*vars(main.parse_args([])), *flags_of_train(), *flags_of_statistics()}
    for benchmark in BENCHMARKS:
        module = importlib.import_module(f"tests.benchmarks.{benchmark}")
        known |= {*vars(module.parse_args([]))}
    known |= {*flags_of(kspace, "val")}
    assert named <= known | OF_OTHER_PROGRAMS


def task_keys():
    """Key → (default, whether the table gives it: those of operators may differ by type)."""
    missing = dataclasses.MISSING
    keys = {"conditioning.method": missing, "conditioning.params": {}, "diffusion_config": None}
    assert set(config_fields(Conditioning)) == {"method", "params"}
    keys |= {f"data.{key}": f.default for key, f in config_fields(DataConfig).items()}
    keys |= {f"measurement.noise.{k}": f.default for k, f in config_fields(NoiseConfig).items()}
    keys |= {"measurement.noise.sigma": missing}  # but for clean, which the table says
    keys |= {"measurement.operator.name": missing, "measurement.operator.in_shape": None}
    for operator in OPERATORS.values():
        for key, parameter in operator.parameters.items():
            full = f"measurement.operator.{key}"
            same = keys.get(full, parameter.default) == parameter.default
            keys[full] = parameter.default if same else ...
    return keys


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_task_key_that_is_named_exists(name):
    form = r"[`\"]((?:conditioning|data|measurement)\.[a-z_]+(?:\.[a-z_]+)*)[`\":]"
    named = {k for k in re.findall(form, read(name)) if not k.endswith((".py", ".yaml"))}
    methods = (*METHODS.values(), PriorStep)
    params = {f"conditioning.params.{key}" for m in methods for key in m.parameters}
    assert named <= {*task_keys(), *params}


def check_flags(rows, defaults, off, required):
    """Every flag has a row; a default that the row gives is the program's."""
    assert set(rows) == {f"--{flag}" for flag in defaults}
    for flag, default in defaults.items():
        shown = rows[f"--{flag}"][0].strip("`")
        if isinstance(default, bool):
            assert shown == off
        elif default not in (None, "", []):
            assert shown == str(default)
        elif flag in required:
            assert shown == "required"


@pytest.mark.parametrize(
    "page, title, off", [(ENGLISH, "Flags", "off"), (SPANISH, "Opciones", "no")]
)
def test_every_flag_is_in_a_table_with_its_default(page, title, off):
    check_flags(table(page, title), vars(main.parse_args([])), off, ())


def test_every_flag_of_training_is_in_a_table_with_its_default():
    needed = ("data_dir", "out")
    check_flags(table(PRIORS, "Training"), flags_of_train(), "off", needed)
    check_flags(table(PRIORS, "Statistics"), flags_of_statistics(), "off", needed)


def check_default(shown, default):
    if default is dataclasses.MISSING:
        assert shown == "required"
    else:
        assert yaml.safe_load(shown.strip("`")) == default


def test_every_task_key_is_in_a_table_with_its_default():
    rows = {k: v for k, v in table(CONFIGS, "Task file").items() if not k.endswith(".yaml")}
    assert set(rows) == set(task_keys())
    for key, default in task_keys().items():
        if rows[key][0] == "see right":  # the text says which for which type
            assert key.endswith((".type", ".kernel_size", ".singular_value_threshold"))
        else:
            check_default(rows[key][0], default)
    for key, known in (("operator", OPERATORS), ("noise", NOISES)):
        names = rows[f"measurement.{key}.name"][1]
        assert all(f"`{name}`" in names for name in known)


def test_every_method_is_in_a_table_with_its_parameters():
    rows = table(CONFIGS, "Methods")
    assert set(rows) - {"--method"} == set(method_names())
    for name, method in {**METHODS, VANILLA: PriorStep}.items():
        named = re.findall(r"`(\w+)` \(", rows[name][0])
        assert named == list(method.parameters)
        for key, parameter in method.parameters.items():
            assert f"`{key}` ({parameter.default:g}" in rows[name][0]
            for task, default in parameter.defaults_for.items():
                assert f"{task}: {default:g}" in rows[name][0]


def test_every_method_and_operator_is_explained():
    text = read(METHOD)
    for name in (*METHODS, *OPERATORS):
        assert f"`{name}`" in text or f"`--method {name}`" in text
    for name in METHODS:
        assert f"`{name}`" in read(ENGLISH) and f"`{name}`" in read(SPANISH)


@pytest.mark.parametrize(
    "title, schema",
    [
        ("Diffusion file", Schedule),
        ("Model file", ModelConfig),
        ("Training file", TrainConfig),
    ],
)
def test_every_key_is_in_a_table_with_its_default(title, schema):
    rows = {k: v for k, v in table(CONFIGS, title).items() if not k.endswith(".yaml")}
    fields = config_fields(schema)
    assert set(rows) == set(fields)
    for key, field in fields.items():
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is not None:
            check_default(rows[key][0], default)


def test_every_format_is_named():
    for page in (ENGLISH, SPANISH):
        text = read(page)
        missing = {e for e in extensions() if f"`{e}`" not in text}
        assert missing <= {".jpeg", ".tiff"}  # other spellings


def test_every_shipped_config_is_valid_and_named():
    folder, text = os.path.join(REPOSITORY, "configs"), read(CONFIGS)
    names = sorted(n for n in os.listdir(folder) if n.endswith(".yaml"))
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
        assert f"`{name}`" in text
    assert len(names) >= 15


def test_the_manual_is_short():
    for page in (ENGLISH, SPANISH):
        assert len(read(page).splitlines()) < 320


def shape(text):
    """What two languages have in common: levels of headings, rows of tables, blocks of code."""
    levels = [len(level) for level, _ in headings(text)]
    rows = [line.count(" | ") for line in prose(text).splitlines() if line.startswith("|")]
    blocks = re.findall(r"^```(\w*)\n.*?^```", text, re.MULTILINE | re.DOTALL)
    return levels, rows, blocks


def test_the_spanish_manual_is_the_english_one():
    english, spanish = read(ENGLISH), read(SPANISH)
    assert shape(spanish) == shape(english)
    assert commands(spanish) == commands(english)
    links = [
        [p for p in re.findall(r"\]\(([^)]+)\)", text) if not p.startswith(("#", "README"))]
        for text in (english, spanish)
    ]
    assert [p.partition("#")[0] for p in links[0]] == [p.partition("#")[0] for p in links[1]]
    code = re.compile(r"^```(?:bash|powershell|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"  # .*", "", "".join(code.findall(text))) for text in (english, spanish)]
    assert lines[0] == lines[1]
