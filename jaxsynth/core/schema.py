"""A method's configuration as its source states it, without importing it.

Config classes lie beside what they configure, so importing one imports JAX, which takes seconds.
`core.source` makes dataclasses of the same names, fields, types and checks from their source, which
`core.config.to_dataclass` makes of values as it would make the classes themselves.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jaxsynth.core.config import Text, to_dataclass
from jaxsynth.core.source import HIDDEN, Unknown, is_part, module, skeleton


@dataclasses.dataclass(frozen=True)
class Field:
    """A field as a person reads it: its dotted name, and the source of its type and default."""

    name: str
    type: str
    default: str
    doc: str


def check(name: str, values: dict[str, Any]) -> Any:
    """The skeleton of module `name`'s `Config` with these values.

    ConfigError for an unknown field, a value of another type or outside its limits, and what the
    class's own checks refuse as far as they need no JAX.
    """
    shape = config_of(name)
    given = {name: value for name, value in values.items() if name != "method"}
    if "method" in shape.__dataclass_fields__:
        given = values
    return to_dataclass(shape, _checked(shape, given))


def describe(name: str, values: dict[str, Any]) -> list[Field]:
    """Every field of module `name`'s `Config`, in its order, with the values of a config file."""
    return list(_described(config_of(name), values, ""))


def config_of(name: str) -> type:
    """The skeleton of the class that a module calls `Config`."""
    place = module(name).place("Config")
    if place is None:
        raise TypeError(f"{name} has no Config of this package")
    return skeleton(*place)


def _described(shape: type, values: Any, where: str) -> Iterator[Field]:
    values = values if isinstance(values, Mapping) else {}
    for field in dataclasses.fields(shape):
        name, kind = where + field.name, field.type
        if is_part(kind):
            yield from _described(kind, values.get(field.name, {}), f"{name}.")
            continue
        default = field.metadata["default"]
        if field.name in values:
            value = values[field.name]
            default = value.text if isinstance(value, Text) else repr(value)
        yield Field(name, field.metadata["type"], default, _sentence(shape.__doc__, field.name))
        for inner, given in _parts(kind, values.get(field.name)).items():
            yield from _described(inner[1], given, f"{name}.{inner[0]}")


def _parts(kind: Any, value: Any) -> dict[tuple[str, type], Any]:
    """What lies under a field that may have fields: (prefix of their names, class) -> its values.

    That is a part which may be left out, and each part of a mapping (NAME where it has none).
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    parts = [arg for arg in args if is_part(arg)]
    if len(parts) != 1:
        return {}
    if origin in (typing.Union, types.UnionType):
        return {("", parts[0]): value}
    if origin in (dict, Mapping):
        named = value if isinstance(value, Mapping) and value else {"NAME": {}}
        return {(f"{name}.", parts[0]): given for name, given in named.items()}
    return {}


def _sentence(text: str | None, name: str) -> str:
    """The sentence of a class's docstring that tells of a field, or its name in words."""
    words = re.sub(r"\s+", " ", text or "")
    own = rf"(?:[\w-]+, )*{name}(?:, \w+)*: "
    for sentence in re.split(r"(?<=[.;]) (?=[A-Z`]|\w+(?:, \w+)*: )|(?<=:) (?=`)", words):
        if re.search(f"`{name}`", sentence) or re.match(own, sentence):
            return re.sub(f"^{own}", "", sentence).strip()
    return name.replace("_", " ")


def _checked(shape: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with those hidden whose type the source does not show."""
    kept = dict(values)
    for field in dataclasses.fields(shape):
        value = kept.get(field.name)
        if field.type is Unknown and value is not None:
            kept[field.name] = HIDDEN
        elif is_part(field.type) and isinstance(value, Mapping):
            kept[field.name] = _checked(field.type, value)
    return kept
