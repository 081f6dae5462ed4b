"""Which values a config's field takes, beside its type: a part of the field's annotation.

    batch_size: Count = 16
    precision: Annotated[str, OneOf("default", "high")] = "default"

`core.config.convert` holds config files and command lines to it, `check_limits` what is made in
Python. As annotations they stand in the source, where `core.schema` sees them before JAX is there.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Sized
from functools import cache
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`; only those `above` the one or `below` the other."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def takes(self, value: float) -> bool:
        """Whether a value is within."""
        ends = (self.above and value == self.least) or (self.below and value == self.most)
        return math.isfinite(value) and self.least <= value <= self.most and not ends

    def __str__(self) -> str:
        least, most = _number(self.least), _number(self.most)
        low = f"above {least}" if self.above else f"{least} or more"
        if math.isinf(self.most):
            return "finite" if math.isinf(self.least) else low
        if self.above or self.below:
            return f"{low} and {'below' if self.below else 'at most'} {most}"
        return f"{least} to {most}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


@dataclasses.dataclass(frozen=True, init=False)
class OneOf:
    """Some values alone."""

    choices: tuple[Any, ...]

    def __init__(self, *choices: Any):
        object.__setattr__(self, "choices", choices)

    def takes(self, value: Any) -> bool:
        """Whether a value is among the choices."""
        return value in self.choices

    def __str__(self) -> str:
        names = ("nothing" if choice == "" else str(choice) for choice in self.choices)
        return f"one of {', '.join(names)}"


@dataclasses.dataclass(frozen=True)
class Some:
    """A list that is not empty."""

    def takes(self, value: Sized) -> bool:
        """Whether a list holds a value."""
        return len(value) > 0

    def __str__(self) -> str:
        return "at least one value"


@dataclasses.dataclass(frozen=True)
class Distinct(Some):
    """A list that is not empty and has no value twice, which would count as two."""

    def takes(self, value: Sized) -> bool:
        """Whether a list holds values, each once."""
        return 0 < len(value) == len(set(value))  # pyrefly: ignore[bad-argument-type]

    def __str__(self) -> str:
        return "at least one value, none twice"


Limit = Range | OneOf | Some

Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
# What JAX's keys tell apart: they are of the lowest 32 bits alone.
Seed = Annotated[int, Range(0, 2**32 - 1)]
Finite = Annotated[float, Range()]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, below=True)]


def limits_of(hint: Any) -> list[Limit]:
    """The limits of an annotated type."""
    return [limit for limit in typing.get_args(hint)[1:] if isinstance(limit, Limit)]


def check_limits(config: Any) -> None:
    """ValueError naming the field of a dataclass whose value is outside its limits."""
    for name, hint in _hints(type(config)).items():
        if fault := _fault(hint, value := getattr(config, name)):
            raise ValueError(f"{name}: {value!r}, expected {fault}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fault(hint: Any, value: Any) -> str:
    """What a type expects instead of a value, "" where the value is right."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        wrong = (str(limit) for limit in limits_of(hint) if not limit.takes(value))
        return next(wrong, "") or _fault(args[0], value)
    if origin in (typing.Union, types.UnionType):
        others = [arg for arg in args if arg is not type(None)]
        return "" if value is None or len(others) > 1 else _fault(others[0], value)
    if origin is tuple and args[-1:] == (Ellipsis,):
        return next(filter(None, (_fault(args[0], item) for item in value)), "")
    return ""
