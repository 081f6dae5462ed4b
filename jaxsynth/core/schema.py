"""A method's configuration as its source states it, without importing it.

Config classes lie beside what they configure, so importing one imports JAX, which takes seconds.
Their fields are literals and calls of `field`, which the source shows: `skeleton` makes dataclasses
of the same names, fields and types, which `core.config.to_dataclass` checks values against.
"""

import ast
import copy
import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jaxsynth.core import limits
from jaxsynth.core.config import Text, to_dataclass

_PACKAGE = __name__.partition(".")[0]


class Unknown:
    """The type of a field that only the running program knows: its value is not checked here."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field as a person reads it: its dotted name, and the source of its type and default."""

    name: str
    type: str
    default: str
    doc: str


def check(module: str, values: dict[str, Any]) -> Any:
    """The skeleton of `module`'s `Config` with these values, None where they are left out.

    ConfigError for an unknown field, or a value of another type or outside its limits.
    """
    shape = config_of(module)
    given = {name: value for name, value in values.items() if name != "method"}
    if "method" in shape.__dataclass_fields__:
        given = values
    return to_dataclass(shape, _checked(shape, given))


def describe(module: str, values: dict[str, Any]) -> list[Field]:
    """Every field of `module`'s `Config`, in its order, with the values of a config file."""
    return list(_described(config_of(module), values, ""))


def config_of(module: str) -> type:
    """The skeleton of the class that a module calls `Config`."""
    place = _module(module).place("Config")
    if place is None:
        raise TypeError(f"{module} has no Config of this package")
    return skeleton(*place)


def _described(shape: type, values: Any, where: str) -> Iterator[Field]:
    values = values if isinstance(values, dict) else {}
    for field in dataclasses.fields(shape):
        name, kind = where + field.name, field.type
        if dataclasses.is_dataclass(kind):
            yield from _described(kind, values.get(field.name, {}), f"{name}.")
            continue
        default = field.metadata["default"]
        if field.name in values:
            value = values[field.name]
            default = value.text if isinstance(value, Text) else repr(value)
        yield Field(name, field.metadata["type"], default, _sentence(shape.__doc__, field.name))


def _sentence(text: str | None, name: str) -> str:
    """The sentence of a class's docstring that tells of a field, or its name in words."""
    words = re.sub(r"\s+", " ", text or "")
    own = rf"(?:[\w-]+, )*{name}(?:, \w+)*: "
    for sentence in re.split(r"(?<=[.;]) (?=[A-Z`]|\w+(?:, \w+)*: )|(?<=:) (?=`)", words):
        if re.search(f"`{name}`", sentence) or re.match(own, sentence):
            return re.sub(f"^{own}", "", sentence).strip()
    return name.replace("_", " ")


def _checked(shape: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values without those of fields whose type is not known here."""
    kept = dict(values)
    for field in dataclasses.fields(shape):
        if field.name in kept and field.type is Unknown:
            del kept[field.name]
        elif dataclasses.is_dataclass(field.type) and isinstance(kept.get(field.name), dict):
            kept[field.name] = _checked(field.type, kept[field.name])
    return kept


@cache
def skeleton(module: str, name: str) -> type:
    """A dataclass with the fields of `name` in `module`, and of its bases in this package."""
    source = _module(module)
    node = source.classes[name]
    fields: dict[str, Any] = {}
    for base in node.bases:
        place = source.place(base.id) if isinstance(base, ast.Name) else None
        if place is not None:
            fields |= {field.name: field for field in dataclasses.fields(skeleton(*place))}
    made = {n: (n, f.type, _copied(f)) for n, f in fields.items()}
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        default = _default(line.value)
        notes = {"type": source.words(line.annotation), "default": default or "(to be given)"}
        given = {} if default is None else {"default_factory": lambda: None}
        made[line.target.id] = (
            line.target.id,
            source.type_of(line.annotation),
            dataclasses.field(**given, metadata=notes, kw_only=True),
        )
    shape = dataclasses.make_dataclass(name, made.values(), frozen=True)
    shape.__doc__ = " ".join(filter(None, (ast.get_docstring(node), _docs_of(source, node))))
    return shape


def _docs_of(source: "_Module", node: ast.ClassDef) -> str:
    places = [source.place(base.id) for base in node.bases if isinstance(base, ast.Name)]
    return " ".join(skeleton(*place).__doc__ or "" for place in places if place is not None)


def _copied(field: dataclasses.Field) -> dataclasses.Field:
    given = {}
    if field.default_factory is not dataclasses.MISSING:
        given = {"default_factory": field.default_factory}
    return dataclasses.field(**given, metadata=field.metadata, kw_only=True)


def _default(value: ast.expr | None) -> str | None:
    """The source of a default; None where the field has none."""
    if value is None:
        return None
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
        given = {word.arg: word.value for word in value.keywords}
        if "default_factory" in given:
            return f"{ast.unparse(given['default_factory'])}()"
        return ast.unparse(given["default"]) if "default" in given else None
    if isinstance(value, ast.Call) and value.args:  # a helper that wraps the default
        return ast.unparse(value.args[0])
    return ast.unparse(value)


class _Module:
    """The source of a module: its classes, imports and names of types."""

    def __init__(self, name: str):
        self._name = name
        path = _path(name)
        body = ast.parse(path.read_text(encoding="utf-8")).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        self._values = {
            target.id: node.value
            for node in body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self._imports: dict[str, tuple[str, str]] = {}
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self._imports[alias.asname or alias.name] = (node.module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self._imports[alias.asname or alias.name] = (alias.name, "")

    def place(self, name: str) -> tuple[str, str] | None:
        """Module and name of a class of this package; None for another one."""
        if name in self.classes:
            return self._name, name
        module, inner = self._imports.get(name, ("", ""))
        return _module(module).place(inner) if module.partition(".")[0] == _PACKAGE else None

    def type_of(self, node: ast.expr) -> Any:
        """The type that an annotation means; `Unknown` where the source does not show it."""
        names = {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}
        try:
            space = {name: self._named(name) for name in names}
            if Unknown in space.values() or any(
                isinstance(found, ast.Attribute) for found in ast.walk(node)
            ):
                return Unknown
            return eval(compile(ast.Expression(node), self._name, "eval"), space)
        except (LookupError, TypeError):
            return Unknown

    def words(self, node: ast.expr) -> str:
        """An annotation as a person reads it: what its limits are, not what they are called."""
        return ast.unparse(_Words(self).visit(copy.deepcopy(node)))

    def _named(self, name: str) -> Any:
        if name in _BUILTINS:
            return _BUILTINS[name]
        if self._imports.get(name, ("",))[0] == limits.__name__:
            return getattr(limits, self._imports[name][1])
        if name in self._values:
            return self.type_of(self._values[name])
        place = self.place(name)
        if place is not None:
            node = _module(place[0]).classes[place[1]]
            chosen = any(isinstance(n, ast.FunctionDef) and n.name == "schema" for n in node.body)
            decorated = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
            return skeleton(*place) if decorated and not chosen else Unknown
        module, inner = self._imports[name]
        if module.partition(".")[0] == _PACKAGE:
            return _module(module)._named(inner)
        if module in ("typing", "pathlib", "collections.abc"):
            return getattr(importlib.import_module(module), inner)
        return Unknown


class _Words(ast.NodeTransformer):
    """Puts words in the place of limits."""

    def __init__(self, source: _Module):
        self._source = source

    def visit_Name(self, node: ast.Name) -> ast.expr:
        kind = self._source.type_of(node)
        if found := limits.limits_of(kind):
            return ast.Name(f"{typing.get_args(kind)[0].__name__} {found[0]}")
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if not isinstance(node.value, ast.Name) or node.value.id != "Annotated":
            return self.generic_visit(node)
        (limit,) = limits.limits_of(self._source.type_of(node)) or [None]
        if isinstance(limit, limits.OneOf):
            return ast.Name(str(limit))
        inner = node.slice.elts[0]  # pyrefly: ignore[missing-attribute]
        if isinstance(limit, limits.Range):
            return ast.Name(f"{ast.unparse(inner)} {limit}")
        return self.visit(inner)


_BUILTINS = {"None": None} | {
    kind.__name__: kind for kind in (bool, int, float, str, tuple, list, dict)
}


@cache
def _module(name: str) -> _Module:
    return _Module(name)


def _path(name: str) -> Path:
    root = Path(__file__).parent.parent.parent.joinpath(*name.split("."))
    return root / "__init__.py" if root.is_dir() else root.with_suffix(".py")
