"""What a module of this package defines, read from its source where importing it would import JAX.

`module(name).value(inner)` is a class, function or value as importing would give it, made from its
own lines: of a dataclass a skeleton with its fields, methods and checks; of a function one whose
names are looked up in its module when they are used. What JAX, or another library that is slow to
import, would have to say is `HIDDEN`: any use of it raises `NotShown`.
"""

import __future__

import ast
import contextlib
import copy
import dataclasses
import importlib
import sys
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jaxsynth.core import limits, places
from jaxsynth.core.errors import UserError

_PACKAGE = __name__.partition(".")[0]
_READER = f"{_PACKAGE}.core.config"
# Imported where a name of theirs is used; they take no time.
_QUICK = sys.stdlib_module_names | {"numpy"}
_PLAIN_DECORATORS = {"property", "staticmethod", "classmethod", "cached_property"}
_BUILTINS = {"None": None} | {
    kind.__name__: kind for kind in (bool, int, float, str, tuple, list, dict)
}

# The type of a field that only the running program knows: its value is not checked here.
Unknown = typing.TypeVar("Unknown")


class NotShown(Exception):
    """The source alone does not say a value that was asked for."""


class _Hidden:
    """A value that the source does not show: it is not None, and no more is known."""


def _refuse(*_: Any, **__: Any) -> typing.NoReturn:
    raise NotShown


_USES = (
    "add", "bool", "call", "contains", "eq", "float", "floordiv", "ge", "getattr", "getitem", "gt",
    "hash", "index", "int", "iter", "le", "len", "lt", "mod", "mul", "ne", "or", "radd", "rmul",
    "ror", "rsub", "rtruediv", "str", "sub", "truediv",
)  # fmt: skip
for _use in _USES:
    setattr(_Hidden, f"__{_use}__", _refuse)
HIDDEN = _Hidden()


def is_part(kind: Any) -> bool:
    """Whether a type is a class of config fields, and no choice by name (`core.config`)."""
    is_class = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    return is_class and not hasattr(kind, "schema")


@cache
def skeleton(module_name: str, name: str) -> type:
    """The dataclass `name` of a module, with the fields of its bases in this package.

    Its types, defaults, methods and `__post_init__` are the class's own. A check ends without a
    word where it comes to something that is `HIDDEN`.
    """
    source = module(module_name)
    node = source.classes[name]
    bases = [
        skeleton(*place)
        for base in node.bases
        if isinstance(base, ast.Name) and (place := source.place(base.id)) is not None
    ]
    fields: dict[str, Any] = {}
    for base in bases:
        fields |= {field.name: field for field in dataclasses.fields(base)}
    made = {n: (n, f.type, _copied(f)) for n, f in fields.items()}
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        default = _default(line.value)
        notes = {"type": source.words(line.annotation), "default": default or "(to be given)"}
        given = {} if line.value is None or default is None else source.default(line.value)
        made[line.target.id] = (
            line.target.id,
            source.type_of(line.annotation),
            dataclasses.field(**given, metadata=notes),
        )
    methods = source.methods(node, bases)
    space = {}
    if hasattr(methods, "__post_init__"):
        space["__post_init__"] = _where_shown(methods.__post_init__)
    shape = dataclasses.make_dataclass(
        name, made.values(), bases=(methods,), namespace=space, frozen=True
    )
    docs = [ast.get_docstring(node), *(base.__doc__ for base in bases)]
    shape.__doc__ = " ".join(filter(None, docs))
    return shape


def _where_shown(check: Callable[[Any], None]) -> Callable[[Any], None]:
    def __post_init__(self) -> None:
        try:
            check(self)
        except (ValueError, UserError):
            raise
        except Exception:
            # The class itself will check it, with all that it knows.
            return

    return __post_init__


def _copied(field: dataclasses.Field) -> dataclasses.Field:
    given = {"default": field.default, "default_factory": field.default_factory}
    given = {name: value for name, value in given.items() if value is not dataclasses.MISSING}
    return dataclasses.field(**given, metadata=field.metadata)


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


class _Names(dict):
    """The globals of what is compiled of a module: each name is looked up when it is first used."""

    def __init__(self, source: "Module"):
        super().__init__(__name__=source.name)
        self._source = source

    def __missing__(self, name: str) -> Any:
        found = self._source.value(name)
        self[name] = found
        return found


class _Part:
    """A module as a name in another: its attributes are looked up when they are used."""

    def __init__(self, look_up: Callable[[str], Any]):
        self._look_up = look_up

    def __getattr__(self, name: str) -> Any:
        return self._look_up(name)


class Module:
    """The source of a module: its classes, imports, functions and values."""

    def __init__(self, name: str):
        self.name = name
        body = ast.parse(_path(name).read_text(encoding="utf-8")).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        self._functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        self._values: dict[str, ast.expr] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        self._names = _Names(self)
        for node in body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self._values |= {t.id: node.value for t in targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (node.module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.imports[alias.asname or root] = (root, "")

    def place(self, name: str) -> tuple[str, str] | None:
        """Module and name of a class of this package; None for another one."""
        if name in self.classes:
            return self.name, name
        found, inner = self.imports.get(name, ("", ""))
        if found.partition(".")[0] != _PACKAGE or _is_module(f"{found}.{inner}"):
            return None
        return module(found).place(inner)

    def value(self, name: str) -> Any:
        """What a name of the module is. KeyError for none of its names, NotShown for a hidden."""
        place = self.place(name)
        if place is not None and _is_dataclass(module(place[0]).classes[place[1]]):
            # What reads configs is no config itself: its classes must be the ones that it knows.
            if place[0] == _READER:
                return getattr(importlib.import_module(_READER), place[1])
            return skeleton(*place)
        if name in self._values:
            return self._evaluate(self._values[name])
        if name in self._functions or name in self.classes:
            if _imports(self._functions.get(name) or self.classes[name]):
                raise NotShown(name)
            return self._executed(self._functions.get(name) or self.classes[name], {})
        found, inner = self.imports[name]
        root = found.partition(".")[0]
        if root == _PACKAGE:
            if _is_module(f"{found}.{inner}"):
                return _Part(lambda attribute: module(f"{found}.{inner}").value(attribute))
            if not _is_quick(found):
                return module(found).value(inner)
        elif root not in _QUICK:
            raise NotShown(name)
        loaded = importlib.import_module(found)
        return getattr(loaded, inner) if inner else loaded

    def default(self, node: ast.expr) -> dict[str, Any]:
        """`dataclasses.field`'s arguments for a default with this source; `HIDDEN` if not shown."""
        with contextlib.suppress(ValueError, TypeError):
            value = ast.literal_eval(node)
            hash(value)
            return {"default": value}

        def make() -> Any:
            try:
                found = self._evaluate(node)
                if not isinstance(found, dataclasses.Field):
                    return found
                has_factory = found.default_factory is not dataclasses.MISSING
                return found.default_factory() if has_factory else found.default
            except (NotShown, LookupError, TypeError):
                return HIDDEN

        return {"default_factory": make}

    def methods(self, node: ast.ClassDef, bases: list[type]) -> type:
        """A class with the methods alone of a dataclass, over the skeletons of its bases."""
        own = copy.deepcopy(node)
        names = {f"_base_{i}": base for i, base in enumerate(bases)}
        own.bases, own.keywords, own.decorator_list = (
            [ast.Name(n, ast.Load()) for n in names],
            [],
            [],
        )
        own.body = [line for line in own.body if _is_plain_method(line)] or [ast.Pass()]
        try:
            return self._executed(own, names)
        except (NotShown, LookupError, TypeError):
            return type(node.name, tuple(bases), {})

    def type_of(self, node: ast.expr) -> Any:
        """The type that an annotation means; `Unknown` where the source does not show it."""
        names = {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}
        try:
            space = {name: self._type(name) for name in names}
            if Unknown in space.values():
                return Unknown
            return eval(compile(ast.Expression(node), self.name, "eval"), space)
        except (LookupError, TypeError, NotShown):
            return Unknown

    def words(self, node: ast.expr) -> str:
        """An annotation as a person reads it: what its limits are, not what they are called."""
        return ast.unparse(_Words(self).visit(copy.deepcopy(node)))

    def _type(self, name: str) -> Any:
        if name in _BUILTINS:
            return _BUILTINS[name]
        for marks in (limits, places):
            if self.imports.get(name, ("",))[0] == marks.__name__:
                return getattr(marks, self.imports[name][1])
        if name in self._values:
            return self.type_of(self._values[name])
        place = self.place(name)
        if place is not None:
            decorated = _is_dataclass(module(place[0]).classes[place[1]])
            return skeleton(*place) if decorated else Unknown
        found, inner = self.imports[name]
        if found.partition(".")[0] == _PACKAGE:
            if _is_module(f"{found}.{inner}"):
                return _Part(lambda attribute: _shown_type(f"{found}.{inner}", attribute))
            return module(found)._type(inner)
        if found in ("typing", "pathlib", "collections.abc"):
            return getattr(importlib.import_module(found), inner)
        return Unknown

    def _evaluate(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Dict):
            # Often a table whose names are of use although its values need JAX.
            return {
                self._evaluate(key): self._evaluate_or_hide(value)
                for key, value in zip(node.keys, node.values, strict=True)
            }
        code = compile(ast.Expression(node), self.name, "eval", dont_inherit=True)
        return eval(code, self._names)

    def _evaluate_or_hide(self, node: ast.expr) -> Any:
        with contextlib.suppress(NotShown):
            return self._evaluate(node)
        return HIDDEN

    def _executed(self, node: ast.stmt, names: dict[str, Any]) -> Any:
        """A definition, run with the names of the module; annotations are not evaluated."""
        for name in _needed_at_once(node) - names.keys():
            # A class's body looks its names up in a way that `_Names` does not see.
            with contextlib.suppress(KeyError):
                self._names[name]
        tree = ast.fix_missing_locations(ast.Module([node], []))
        flags = __future__.annotations.compiler_flag
        exec(compile(tree, self.name, "exec", flags, dont_inherit=True), self._names, names)
        return names[node.name]  # pyrefly: ignore[missing-attribute]


def _shown_type(module_name: str, name: str) -> Any:
    found = module(module_name)._type(name)
    if found is Unknown:
        raise NotShown(name)
    return found


def _needed_at_once(node: ast.stmt) -> set[str]:
    """The names that a definition needs when it is made, rather than when it is called."""
    if isinstance(node, ast.FunctionDef):
        defaults = [one for one in node.args.kw_defaults if one is not None]
        parts = [*node.decorator_list, *node.args.defaults, *defaults]
    elif isinstance(node, ast.ClassDef):
        parts = [*node.bases, *node.keywords, *node.decorator_list]
    else:
        parts = [node]
    names = {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    inner = node.body if isinstance(node, ast.ClassDef) else []
    return names.union(*map(_needed_at_once, inner))


def _imports(node: ast.AST) -> bool:
    """Whether there is an import inside, which may be one of JAX."""
    return any(isinstance(one, (ast.Import, ast.ImportFrom)) for one in ast.walk(node))


def _is_plain_method(line: ast.stmt) -> bool:
    if not isinstance(line, ast.FunctionDef) or _imports(line):
        return False
    return all(
        isinstance(one, ast.Name) and one.id in _PLAIN_DECORATORS for one in line.decorator_list
    )


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


class _Words(ast.NodeTransformer):
    """Puts words in the place of limits and of what names a place."""

    def __init__(self, source: Module):
        self._source = source

    def visit_Name(self, node: ast.Name) -> ast.expr:
        kind = self._source.type_of(node)
        if found := limits.limits_of(kind):
            return ast.Name(f"{typing.get_args(kind)[0].__name__} {found[0]}")
        place = places.place_of(kind)
        return node if place is None else ast.Name(str(place))

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if not isinstance(node.value, ast.Name) or node.value.id != "Annotated":
            return self.generic_visit(node)
        kind = self._source.type_of(node)
        if (place := places.place_of(kind)) is not None:
            return ast.Name(str(place))
        (limit,) = limits.limits_of(kind) or [None]
        if isinstance(limit, limits.OneOf):
            return ast.Name(str(limit))
        inner = node.slice.elts[0]  # pyrefly: ignore[missing-attribute]
        if isinstance(limit, limits.Range):
            return ast.Name(f"{ast.unparse(inner)} {limit}")
        return self.visit(inner)


@cache
def module(name: str) -> Module:
    """The source of a module of this package."""
    return Module(name)


@cache
def _is_quick(name: str) -> bool:
    """Whether a module of this package, with all that it imports, is quick to import."""
    if name == _PACKAGE:
        return True  # its own names are imported on use
    packages = {name.rpartition(".")[0]}
    for found, inner in module(name).imports.values():
        packages.add(f"{found}.{inner}" if _is_module(f"{found}.{inner}") else found)
    return all(
        _is_quick(one) if one.partition(".")[0] == _PACKAGE else one.partition(".")[0] in _QUICK
        for one in packages - {name}
    )


def _is_module(name: str) -> bool:
    return name.partition(".")[0] == _PACKAGE and _path(name).is_file()


def _path(name: str) -> Path:
    root = Path(__file__).parent.parent.parent.joinpath(*name.split("."))
    return root / "__init__.py" if root.is_dir() else root.with_suffix(".py")
