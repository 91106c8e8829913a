"""YAML files into dataclasses: checked once, at the door, with one sentence for each mistake."""

import codecs
import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import yaml

from util.errors import UserError
from util.remote import is_remote, local_file

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
T = TypeVar("T")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
REST = "rest"
NAMES = {str: "text", int: "an integer", float: "a number"}


class _Loader(yaml.SafeLoader):
    """A safe loader that also knows the one Python tag published task files use.

    A key that is given twice is an error: YAML forbids it, and PyYAML would keep the last. So is
    a value that its type does not have, as the date 2024-13-45.
    """

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                first = lines.setdefault((key.tag, key.value), line)
                if first != line:
                    raise yaml.composer.ComposerError(
                        problem=f"the key {key.value!r} is there twice, first at line {first}",
                        problem_mark=key.start_mark,
                    )
        return node

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value[:40]!r} cannot be read as {kind}",
                problem_mark=node.start_mark,
            ) from None


def _tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple:
    return tuple(loader.construct_sequence(node))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def locate(path: str, near: str = "") -> str:
    """Where a path that a user or a YAML file gives leads to.

    A home folder is filled in for "~". A relative path that does not exist from the current
    folder is looked for beside the file `near`, then in this program's own folder, so that
    shipped configs and weights are found from everywhere.

    Returns:
        The path; as it was given if there is no such file anywhere.
    """
    if not path or is_remote(path):
        return path
    path = os.path.expanduser(path)
    if os.path.isabs(path) or os.path.exists(path):
        return path
    folders = [REPOSITORY]
    if near and not is_remote(near):
        folders.insert(0, os.path.dirname(near))
    found = (os.path.join(folder, path) for folder in folders)
    return next(filter(os.path.exists, found), path)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML mapping, in UTF-8 or UTF-16, from a local or remote path.

    Raises:
        UserError: the file is missing, cannot be read or is malformed.
    """
    try:
        with local_file(path) as local, open(local, "rb") as file:
            data = file.read()
        text = data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig")
        config = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML{_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (lists in lists without end)") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected keys and values, found {describe(config)}")
    return config


def parse_yaml_value(text: str, where: str = "command line") -> Any:
    """A value given on the command line, read as the YAML file would read it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {text!r} is not valid YAML{_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML (lists in lists without end)") from None


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    at = f" at line {mark.line + 1}" if mark else ""
    return f"{at} ({getattr(error, 'problem', None) or 'no YAML'})"


def describe(value: Any) -> str:
    """A value and its type, as an error message shows them."""
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"


def rest() -> Any:
    """A field that takes the keys which no other field of its dataclass has, as a dict."""
    return dataclasses.field(default_factory=dict, metadata={REST: True})


def internal(default: Any) -> Any:
    """A field that is no key of the YAML file."""
    return dataclasses.field(default=default, metadata={"internal": True})


def config_fields(cls: Any) -> dict[str, dataclasses.Field]:
    """The keys of the YAML mapping that a dataclass describes, with their fields."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init and "internal" not in f.metadata}


def build(cls: type[T], config: Any, where: str) -> T:
    """Check a mapping and make a dataclass of it.

    Args:
        cls: its fields say what the keys are: names, types, defaults. A field whose type is a
            dataclass is a nested mapping. `float` also takes integers and numbers that YAML 1.1
            reads as text (1e-4); `int` does not take booleans; the texts of a `Literal` stand for
            themselves. See `rest` and `internal`.
        config: the mapping read.
        where: file and key path for error messages.

    Raises:
        UserError: unknown key, missing key or wrong type.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected keys and values, found {describe(config)}")
    fields, hints = config_fields(cls), typing.get_type_hints(cls)
    others = next((name for name, f in fields.items() if REST in f.metadata), None)
    known = [name for name in fields if name != others]
    values: dict[str, Any] = {}
    for key in config:
        if key not in known and others is None:
            raise UserError(f"{where}: unknown key {key!r} (known: {', '.join(known)})")
    for key in known:
        field = fields[key]
        if key in config:
            values[key] = check_type(config[key], hints[key], f"{where}: {key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: missing key {key!r}")
    if others is not None:
        values[others] = {k: v for k, v in config.items() if k not in known}
    return cls(**values)


def check_type(value: Any, hint: Any, where: str) -> Any:
    """The value, as the type `hint` that it must have, see `build`; raises UserError."""
    choices = _choices(hint)
    for choice in choices:
        if dataclasses.is_dataclass(choice) and (len(choices) == 1 or isinstance(value, dict)):
            return build(cast(type, choice), value, where)
    if any(isinstance(c, str) and value == c for c in choices):
        return value
    kinds = tuple(c for c in choices if isinstance(c, type))
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, kinds):
        return value
    elif float in kinds and isinstance(value, (int, str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    names = [NAMES.get(k, f"a {k.__name__}") for k in kinds if k is not type(None)]
    names += [c for c in choices if isinstance(c, str)]
    raise UserError(f"{where}: expected {' or '.join(names)}, found {describe(value)}")


def _choices(hint: Any) -> list[Any]:
    """The types of a union, and the texts of its literals."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [c for part in typing.get_args(hint) for c in _choices(part)]
    if origin is Literal:
        return list(typing.get_args(hint))
    return [origin or hint]


def as_dict(config: Any) -> dict[str, Any]:
    """The mapping that a YAML file would hold for a dataclass, without keys of value None."""
    found: dict[str, Any] = {}
    for name, field in config_fields(config).items():
        value = getattr(config, name)
        if REST in field.metadata:
            found |= value
        elif dataclasses.is_dataclass(value):
            found[name] = as_dict(value)
        elif value is not None:
            found[name] = value
    return found


def portable(path: str) -> str:
    """A path as it is from this program's own folder, if it lies there; for settings on record."""
    inside = os.path.isabs(path) and path.startswith(REPOSITORY + os.sep)
    return os.path.relpath(path, REPOSITORY) if inside else path


def parse_numbers(value: str | float | Sequence[float], where: str) -> tuple[float, ...]:
    """Parse "32,16,8", 16 or [32, 16] into a tuple of positive numbers."""
    parts: Sequence[Any]
    if isinstance(value, str):
        parts = [p.strip() for p in value.split(",") if p.strip()]
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = [value]
    try:
        numbers = tuple(float(p) for p in parts if not isinstance(p, bool))
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: expected numbers separated by commas, found {value!r}") from None
    if len(numbers) < len(parts) or not all(0 < n < math.inf for n in numbers):
        raise UserError(f"{where}: expected positive numbers, found {value!r}")
    return numbers


def changed(config: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A YAML mapping with keys replaced, as ``--set KEY=VALUE`` on the command line asks.

    Args:
        changes: "KEY=VALUE", keys dotted, values as YAML has them.

    Raises:
        UserError: one is no such text, or its value no YAML.
    """
    for change in changes:
        key, found, value = change.partition("=")
        if not (found and all(key.split("."))):
            raise UserError(f"--set: expected KEY=VALUE, found {change!r}")
        config = replaced(config, key, parse_yaml_value(value, f"--set {key}"))
    return dict(config)


def replaced(config: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A YAML mapping with one key, "measurement.noise.sigma" for instance, set to another value."""
    first, _, others = dotted.partition(".")
    if others:
        inner = config.get(first)
        value = replaced(inner if isinstance(inner, dict) else {}, others, value)
    return {**config, first: value}


def differing(earlier: Any, now: Any, at: str = "") -> Iterator[str]:
    """The dotted keys under which two configs differ."""
    if not (isinstance(earlier, dict) and isinstance(now, dict)):
        if earlier != now:
            yield at
        return
    for key in {**now, **earlier}:
        yield from differing(earlier.get(key), now.get(key), f"{at}.{key}" if at else key)
