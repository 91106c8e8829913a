"""Reading and checking YAML files."""

import io
import math

import yaml

from util.errors import UserError
from util.remote import local_file

REQUIRED = object()


class _Loader(yaml.SafeLoader):
    """A safe loader that also knows the one Python tag published task files use."""


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(node)),
)


def read_yaml(path):
    """Read a YAML mapping from a local or remote path.

    Raises:
        UserError: the file is missing, cannot be read or is malformed.
    """
    try:
        with local_file(path) as local, open(local, "rb") as file:
            text = file.read().decode("utf-8")
        config = yaml.load(io.StringIO(text), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "no YAML"
        raise UserError(f"{path}: not valid YAML{at} ({problem})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected keys and values, found {describe(config)}")
    return config


def parse_yaml_value(text):
    """A value given on the command line, read as the YAML file would read it."""
    return yaml.load(text, Loader=_Loader)


def describe(value):
    """A value and its type, as an error message shows them."""
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def check_keys(config, schema, where):
    """Validate a mapping against a schema and fill in defaults.

    Args:
        config: the mapping read.
        schema: key → (type or tuple of types, default), or key → nested schema. A default of
            `REQUIRED` makes the key mandatory. `float` also takes integers and numbers that
            YAML 1.1 reads as text (1e-4); `int` does not take booleans; a text among the
            types stands for itself.
        where: file and key path for error messages.

    Returns:
        New dict with every key of the schema.

    Raises:
        UserError: unknown key, missing key or wrong type.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected keys and values, found {describe(config)}")
    for key in config:
        if key not in schema:
            raise UserError(f"{where}: unknown key {key!r} (known: {', '.join(schema)})")
    checked = {}
    for key, rule in schema.items():
        if isinstance(rule, dict):
            if key not in config:
                raise UserError(f"{where}: missing key {key!r}")
            checked[key] = check_keys(config[key], rule, f"{where}: {key}")
            continue
        types, default = rule
        if key not in config:
            if default is REQUIRED:
                raise UserError(f"{where}: missing key {key!r}")
            checked[key] = default
            continue
        checked[key] = _check_type(config[key], types, f"{where}: {key}")
    return checked


def _check_type(value, types, where):
    types = types if isinstance(types, tuple) else (types,)
    words = [t for t in types if isinstance(t, str)]
    types = tuple(t for t in types if not isinstance(t, str))
    if value in words:
        return value
    if isinstance(value, bool):
        if bool in types:
            return value
    elif isinstance(value, types):
        return value
    elif float in types and isinstance(value, (int, str)):
        try:
            return float(value)
        except ValueError:
            pass
    names = [
        {"str": "text", "int": "an integer", "float": "a number"}.get(t.__name__, f"a {t.__name__}")
        for t in types
    ]
    raise UserError(f"{where}: expected {' or '.join(names + words)}, found {describe(value)}")


def parse_numbers(value, key):
    """Parse "32,16,8", 16 or [32, 16] into a tuple of numbers."""
    if isinstance(value, str):
        parts = [p.strip() for p in value.split(",") if p.strip()]
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = [value]
    try:
        numbers = tuple(float(p) for p in parts)
    except (TypeError, ValueError):
        raise UserError(
            f"model config: {key}: expected numbers separated by commas, found {value!r}"
        ) from None
    if not all(0 < n < math.inf for n in numbers):
        raise UserError(f"model config: {key}: expected positive numbers, found {value!r}")
    return numbers


MODEL_SCHEMA = {
    "image_size": (int, REQUIRED),
    "num_channels": (int, REQUIRED),
    "num_res_blocks": (int, REQUIRED),
    "in_channels": (int, 3),
    "channel_mult": ((str, list), ""),
    "learn_sigma": (bool, False),
    "class_cond": (bool, False),
    "use_checkpoint": (bool, False),
    "attention_resolutions": ((str, int, list), "16"),
    "num_heads": (int, 1),
    "num_head_channels": (int, -1),
    "num_heads_upsample": (int, -1),
    "use_scale_shift_norm": (bool, False),
    "dropout": (float, 0.0),
    "resblock_updown": (bool, False),
    "use_fp16": (bool, False),
    "use_new_attention_order": (bool, False),
    "model_path": (str, REQUIRED),
}

DIFFUSION_SCHEMA = {
    "sampler": (str, "ddpm"),
    "steps": (int, REQUIRED),
    "noise_schedule": (str, "linear"),
    "model_mean_type": (str, "epsilon"),
    "model_var_type": (str, "learned_range"),
    "dynamic_threshold": (bool, False),
    "clip_denoised": ((bool, "auto"), True),
    "rescale_timesteps": (bool, False),
    "timestep_respacing": ((int, str, list), ""),
    "start": ((int, str), ""),
    "eta": (float, 0.0),
    "method": (str, None),
}

# An operator's own keys are checked by guided_diffusion.measurements; here, their types.
# in_shape is read, for published files have it, and not used: every image's own size counts.
TASK_SCHEMA = {
    "conditioning": {"method": (str, REQUIRED), "params": (dict, {})},
    "data": {
        "name": (str, ""),
        "root": (str, REQUIRED),
        "measured": (bool, False),
        "axis": (int, None),
        "volume": (int, None),
        "series": ((int, str), None),
    },
    "measurement": {
        "operator": {
            "name": (str, REQUIRED),
            "type": (str, None),
            "in_shape": ((tuple, list), None),
            "scale_factor": (int, None),
            "kernel_size": (int, None),
            "intensity": ((float, list), None),
            "singular_value_threshold": (float, None),
        },
        "noise": {"name": (str, REQUIRED), "sigma": ((float, "auto"), None)},
    },
}
PRIOR_SCHEMA = {"conditioning": {"method": (str, REQUIRED), "params": (dict, {})}}


def read_model_config(path):
    return check_keys(read_yaml(path), MODEL_SCHEMA, path)


def read_diffusion_config(path):
    """A schedule, checked; "method" is there only if the file names one."""
    config = check_keys(read_yaml(path), DIFFUSION_SCHEMA, path)
    if config["method"] is None:
        del config["method"]
    return config


def read_task_config(path, method=None, measured=False):
    """A task file, checked; where the method is "vanilla" it needs `conditioning` alone.

    Args:
        method: replaces the file's conditioning.method, and, if it is another, drops the
            parameters that belong to the file's.
        measured: the images are measurements, as if the file had data.measured: true.

    Returns:
        dict with "conditioning", and unless vanilla "data" and "measurement"; keys of the
        data and of the operator that the file leaves out are left out.
    """
    config = read_yaml(path)
    conditioning = config.get("conditioning")
    if method and isinstance(conditioning, dict) and conditioning.get("method") != method:
        conditioning = {"method": method}
        config["conditioning"] = conditioning
    if isinstance(conditioning, dict) and conditioning.get("method") == "vanilla":
        if measured:
            raise UserError(f"{path}: method vanilla takes no images, and so no --measured")
        return check_keys({"conditioning": conditioning}, PRIOR_SCHEMA, path)
    config = check_keys(config, TASK_SCHEMA, path)
    operator, noise = config["measurement"]["operator"], config["measurement"]["noise"]
    operator.pop("in_shape")
    config["measurement"]["operator"] = {k: v for k, v in operator.items() if v is not None}
    config["data"] = {k: v for k, v in config["data"].items() if v is not None}
    if noise["sigma"] is None:
        if noise["name"] != "clean":
            raise UserError(f"{path}: measurement: noise: missing key 'sigma'")
        noise["sigma"] = 0.0
    config["data"]["measured"] = config["data"]["measured"] or measured
    if noise["sigma"] == "auto":
        if not config["data"]["measured"]:
            raise UserError(
                f"{path}: measurement: noise: sigma: auto estimates the noise of measured images "
                "(data.measured: true or --measured); noise that is simulated needs a number"
            )
        if noise["name"] not in ("gaussian", "rician"):
            raise UserError(
                f"{path}: measurement: noise: sigma: auto estimates gaussian or rician noise, "
                f"found {noise['name']}"
            )
    return config
