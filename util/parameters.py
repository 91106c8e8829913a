"""Values that a configuration file may set: declared once, with type, range and default."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from util.errors import UserError

MOST = 3e38  # float32 holds no more
KINDS = {float: "a number", int: "an integer", str: "text", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Parameter:
    """One value that an operator or a method may be given.

    Attributes:
        default: the value where the file gives none.
        help: what it is, half a line for manuals and --help.
        kinds: the types it may have; float also takes integers and text such as "1e-4", which is
            how YAML 1.1 reads that number.
        choices: the values it may have, if they are few.
        low, high: the closed range of a number.
        above: an open lower bound, for what must be positive.
        defaults_for: name of an operator → the default of a method's parameter for its task,
            where a paper has one for each.
    """

    default: Any
    help: str
    kinds: tuple[type, ...] = (float,)
    choices: tuple[Any, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    defaults_for: Mapping[str, Any] = field(default_factory=dict)

    def check(self, value: Any, where: str) -> Any:
        """The value, a number as float where `kinds` say so; None stands for a default of None.

        Raises:
            UserError: another type, no finite number, or a value out of range; starts with `where`.
        """
        if value is None and self.default is None:
            return None
        if self.choices and value not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise UserError(f"{where}: expected one of {known}, found {value!r}")
        value = self._typed(value, where)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            shown = f"{value:.10g}" if isinstance(value, float) else value
            if isinstance(value, float) and not abs(value) <= MOST:
                raise UserError(f"{where}: expected a finite number, found {shown}")
            if not (self.low <= value <= self.high and value > self.above):
                raise UserError(f"{where}: expected {self.range}, found {shown}")
        return value

    def _typed(self, value: Any, where: str) -> Any:
        if isinstance(value, bool):
            if bool in self.kinds:
                return value
        elif isinstance(value, tuple) and list in self.kinds or isinstance(value, self.kinds):
            return value
        elif float in self.kinds and isinstance(value, (int, str)):
            try:
                return float(value)
            except (ValueError, OverflowError):
                pass
        kinds = " or ".join(KINDS[kind] for kind in self.kinds)
        raise UserError(f"{where}: expected {kinds}, found {value!r}")

    @property
    def range(self) -> str:
        """The numbers it may be, in words."""
        if self.above == 0:
            return "a positive number"
        if self.above > -math.inf:
            return f"a number above {self.above:g}"
        if self.high < math.inf:
            return f"a number in [{self.low:g}, {self.high:.10g}]"
        return f"at least {self.low:g}"


Parameters = Mapping[str, Parameter]


def check_parameters(
    declared: Parameters, given: Mapping[str, Any], where: str, owner: str, task: str = ""
) -> dict[str, Any]:
    """The given values, checked, and the defaults of those that are not given.

    Args:
        where: the key path that error messages begin with.
        owner: who takes them, for error messages.
        task: name of an operator, for `Parameter.defaults_for`.

    Raises:
        UserError: an unknown key, or see `Parameter.check`.
    """
    for key in given:
        if key not in declared:
            takes = f"takes {', '.join(declared)}" if declared else "takes none"
            raise UserError(f"{where}: unknown key {key!r} ({owner} {takes})")

    def values() -> Iterator[tuple[str, Any]]:
        for key, parameter in declared.items():
            if key in given:
                yield key, parameter.check(given[key], f"{where}.{key}")
            else:
                yield key, parameter.defaults_for.get(task, parameter.default)

    return dict(values())
