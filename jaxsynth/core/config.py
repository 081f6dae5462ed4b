"""From a config file and command-line overrides to the frozen dataclasses that methods take.

A config file is Python with `get_config(variant)`, which returns an `ml_collections.ConfigDict`. It
is turned once, at the edge, into a method's nested frozen dataclasses, and the type hints of those
are the only schema: a misspelt field, a value of the wrong type and a missing field each fail
before anything starts, with the dotted name of the field. Library code never sees a ConfigDict.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from jaxsynth.core.errors import UsageError, quoted
from jaxsynth.core.limits import limits_of
from jaxsynth.core.words import counted

T = TypeVar("T")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_MOST_SHOWN, _LONGEST_NAME = 8, 80
_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


class ConfigError(UsageError, ValueError):
    """A config field is unknown, missing or has a value it cannot take."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A value as typed on the command line: its type is decided by the field it is given to.

    `fields` are those set beside it, where a part is chosen by name (`_convert_choice`).
    """

    text: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_config(spec: str) -> dict[str, Any]:
    """Reads `FILE[:VARIANT]` and returns what its `get_config` gives, as nested plain dicts.

    Raises `ConfigError` naming the file when it is missing, has no `get_config`, or does not know
    the variant.
    """
    name, _, variant = spec.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(_no_config_file(name, path))
    module_spec = importlib.util.spec_from_file_location(f"jaxsynth_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"config file {name!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise ConfigError(f"config file {name}{line}: {error.msg}") from error
    except Exception as error:
        raise _own_fault(name, "", error) from error
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"config file {name!r} has no get_config(variant) function")
    if variant and not inspect.signature(get_config).parameters:
        raise ConfigError(f"config file {name!r} has no variants, found {variant!r}")
    try:
        config = get_config(variant) if variant else get_config()
    except (ValueError, KeyError) as error:
        detail = error.args[0] if error.args else error
        asked = f", variant {variant!r}" if variant and repr(variant) not in str(detail) else ""
        raise ConfigError(f"config file {name}{asked}: {detail}") from error
    except Exception as error:
        raise _own_fault(name, variant, error) from error
    return _plain(config)


def _no_config_file(name: str, path: Path) -> str:
    """Why a name is that of no config file, and which are there."""
    if not name.strip():
        return "the config's name is empty, expected FILE[:VARIANT]"
    folder = path if path.is_dir() else path.parent
    beside = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    found = "is a folder, expected a Python file" if path.is_dir() else "does not exist"
    close = difflib.get_close_matches(f"{path.stem}.py", beside, n=1)
    meant = f"; did you mean {folder / close[0]}?" if close and not path.is_dir() else ""
    there = f"; {folder}/ holds {', '.join(beside)}" if beside and not meant else ""
    return f"config file {name!r} {found}{meant or there}"


def _own_fault(name: str, variant: str, error: Exception) -> ConfigError:
    """What a config file, which is a program, does wrong itself, with the line."""
    frames = traceback.extract_tb(error.__traceback__)
    path = Path(name).expanduser().absolute()
    own = [frame for frame in frames if Path(frame.filename).absolute() == path]
    where = f", line {own[-1].lineno}" if own else ""
    asked = f", variant {variant!r}" if variant else ""
    return ConfigError(f"config file {name}{asked}{where}: {type(error).__name__}: {error}")


def override(config: Mapping[str, Any], assignments: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A copy of `config` with each `("a.b", text)` set; the text is parsed by `to_dataclass`.

    A part that is chosen by name keeps the fields set beside it, `("a", name)` and `("a.b", text)`,
    in any order.
    """
    result = _plain(config)
    for dotted, text in sorted(assignments, key=lambda item: item[0].count(".")):
        *parents, leaf = dotted.split(".")
        node = result
        for depth, part in enumerate(parents):
            child = node.setdefault(part, {})
            if child is None:
                child = node[part] = {}
            if isinstance(child, (str, Text)):
                name = Text(child, {}) if isinstance(child, str) else child
                node[part] = Text(name.text, dict(name.fields))
                child = node[part].fields
            if not isinstance(child, dict):
                parent = ".".join(parents[: depth + 1])
                raise ConfigError(f"config.{dotted}: config.{parent} is a value and has no fields")
            node = child
        node[leaf] = Text(text)
    return result


def to_dataclass(cls: type[T], config: Mapping[str, Any], *, path: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a ConfigDict or dict, recursively.

    Understands nested dataclasses, bool, int, float (an integer is taken), str, Path, None,
    Optional and other unions, Literal, tuples (from any sequence) and dicts, and the limits of
    fields (`core.limits`). `path` is the dotted
    name that errors start with. Raises `ConfigError` naming the field, what was found and what was
    expected; a `ValueError` of a dataclass's own `__post_init__` is given the field's name too.
    """
    if not (dataclasses.is_dataclass(cls) and isinstance(cls, type)):
        raise TypeError(f"to_dataclass: {cls!r} is not a dataclass")
    if isinstance(config, cls):
        return config
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ConfigError(f"{path}: expected the fields of {cls.__name__}, found {_show(config)}")
    values = dict(config.items())
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in values:
        if name not in fields:
            near = _nearest(str(name)[:_LONGEST_NAME], list(fields))
            raise ConfigError(f"{path}.{_shortened(name)}: no such field{near}")
    kwargs = {}
    for name, field in fields.items():
        if name in values:
            kwargs[name] = convert(hints[name], values[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name}: missing, expected {_describe(hints[name])}")
    try:
        return cls(**kwargs)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def to_dict(config: Any) -> Any:
    """A dataclass as nested dicts that JSON can hold: tuples become lists and paths strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def _plain(config: Any) -> dict[str, Any]:
    """ConfigDicts and dicts as new nested dicts; other values as they are."""
    if isinstance(config, Mapping) or hasattr(config, "to_dict"):
        return {key: _maybe_plain(config[key]) for key in config}
    raise ConfigError(f"get_config returned {_show(config)}, expected a ConfigDict or a dict")


def _maybe_plain(value: Any) -> Any:
    nested = isinstance(value, Mapping) or hasattr(value, "to_dict")
    return _plain(value) if nested else value


def convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint` asks; ConfigError naming the field `path` where it cannot be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Text) and value.fields and not _may_be_chosen(hint):
        raise ConfigError(f"{path}.{next(iter(value.fields))}: {path} is a value and has no fields")
    if origin is typing.Annotated:
        found = convert(args[0], value, path)
        if not all(limit.takes(found) for limit in limits_of(hint)):
            raise _mistyped(path, hint, value)
        return found
    if hint is Any or isinstance(hint, TypeVar):
        return _guess(value.text) if isinstance(value, Text) else value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, args, value, path)
    if origin is Literal:
        return _convert_literal(hint, args, value, path)
    if dataclasses.is_dataclass(hint):
        if hasattr(hint, "schema"):
            return _convert_choice(hint, value, path)
        if isinstance(value, Text):
            names = ", ".join(f"{path}.{field.name}" for field in dataclasses.fields(hint))
            raise ConfigError(f"{path}: holds several fields, set one of them: {names}")
        return to_dataclass(hint, value, path=path)
    if hint in (tuple, list) or origin in (tuple, list, Sequence):
        return _convert_sequence(hint, args, value, path)
    if hint is dict or origin in (dict, Mapping):
        value = _mapping(value, path)
        value_hint = args[1] if args else Any
        return {
            key: convert(value_hint, item, f"{path}.{_shortened(key)}")
            for key, item in value.items()
        }
    if hint is None or hint is type(None):
        if value is None or (isinstance(value, Text) and value.text.lower() == "none"):
            return None
        raise _mistyped(path, hint, value)
    if hint is Path and isinstance(value, (str, Path, Text)):
        return Path(value.text if isinstance(value, Text) else value)
    if hint in _SCALARS:
        return _convert_scalar(hint, value, path)
    raise TypeError(f"{path}: the config dataclass uses {hint!r}, which has no text form")


def _mapping(value: Any, path: str) -> Mapping[Any, Any]:
    """A mapping, also as it is typed: `--config.names="{'a': 'b'}"`, or each entry by itself."""
    found = _guess(value.text.strip()) if isinstance(value, Text) else value
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        typed = (
            f"; set one by --{path}.NAME=VALUE, or all by --{path}=\"{{'NAME': VALUE}}\""
            if isinstance(value, Text)
            else ""
        )
        raise ConfigError(f"{path}={_show(value)}: expected names with a value each{typed}")
    return found


def _may_be_chosen(hint: Any) -> bool:
    return any(hasattr(arg, "schema") for arg in (hint, *typing.get_args(hint)))


def _convert_choice(hint: Any, value: Any, path: str) -> Any:
    """A part that a name chooses: `hint(kind, settings)`, whose `schema(kind)` has the fields."""
    if isinstance(value, hint):
        return value
    if isinstance(value, Mapping):
        fields = dict(value)
        kind = fields.pop("kind", hint().kind)
    elif isinstance(value, (str, Text)):
        kind, fields = value, dict(value.fields) if isinstance(value, Text) else {}
    else:
        raise _mistyped(path, hint, value)
    kind = kind.text if isinstance(kind, Text) else kind
    # As a run's record has it.
    fields |= fields.pop("settings", {})
    try:
        schema = hint.schema(kind)
        hints = typing.get_type_hints(schema, include_extras=True)
        known = [field.name for field in dataclasses.fields(schema)]
        for name in fields:
            if name not in known:
                raise ConfigError(f"{path}.{name}: no such field of {kind}{_nearest(name, known)}")
        settings = {n: convert(hints[n], x, f"{path}.{n}") for n, x in fields.items()}
        return hint(kind, settings)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
    if isinstance(value, Text):
        text = value.text.strip()
        if hint is str:
            return value.text
        if hint is bool and text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        if hint in (int, float):
            try:
                return hint(text.replace("_", ""))
            except ValueError:
                pass  # falls through to the error that names the field
        raise _mistyped(path, hint, value)
    # numpy's scalars turn up in config files that compute a value.
    item = getattr(value, "item", None)
    value = item() if callable(item) and not isinstance(value, type) else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int, and True as a number of steps is always a mistake.
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _mistyped(path, hint, value)


def _convert_union(hint: Any, args: tuple, value: Any, path: str) -> Any:
    # None first, so that --config.x=none empties an Optional[str]; str last, as it takes any text.
    order = sorted(args, key=lambda arg: 0 if arg is type(None) else 2 if arg is str else 1)
    if isinstance(value, (Mapping, Text)):
        # A nested config given for an Optional[Dataclass] keeps its own, more exact, error.
        nested = [arg for arg in order if dataclasses.is_dataclass(arg)]
        none = isinstance(value, Text) and value.text.lower() == "none"
        if len(nested) == 1 and not none and len(order) == 2 and type(None) in order:
            return convert(nested[0], value, path)
    for arg in order:
        try:
            return convert(arg, value, path)
        except ConfigError:
            continue
    raise _mistyped(path, hint, value)


def _convert_literal(hint: Any, args: tuple, value: Any, path: str) -> Any:
    for choice in args:
        if isinstance(value, Text) and value.text == str(choice):
            return choice
        if type(value) is type(choice) and value == choice:
            return choice
    text = value.text if isinstance(value, Text) else quoted(value)
    guess = difflib.get_close_matches(str(text), [str(arg) for arg in args], n=1)
    hint_text = f"; did you mean {guess[0]!r}?" if guess else ""
    raise ConfigError(f"{path}={_show(value)}: expected {_describe(hint)}{hint_text}")


def _convert_sequence(hint: Any, args: tuple, value: Any, path: str) -> Any:
    as_list = (typing.get_origin(hint) or hint) is list
    if isinstance(value, Text):
        value = _split(value.text)
    elif isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise _mistyped(path, hint, value)
    if not args or as_list or args[-1] is Ellipsis or typing.get_origin(hint) is Sequence:
        item_hints = [args[0] if args else Any] * len(value)
    elif len(args) == len(value):
        item_hints = list(args)
    else:
        raise ConfigError(f"{path}: expected {counted(len(args), 'value')}, found {len(value)}")
    items = [
        convert(item_hint, item, f"{path}[{i}]")
        for i, (item_hint, item) in enumerate(zip(item_hints, value, strict=True))
    ]
    return items if as_list else tuple(items)


def _split(text: str) -> list[Any]:
    """`1,4,16`, `(1, 4, 16)`, `a,b` or nothing; quoted text in brackets is read as Python."""
    text = text.strip()
    if text[:1] in "([" and text[-1:] in ")]" and text:
        try:
            return list(ast.literal_eval(f"[{text[1:-1]}]"))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            text = text[1:-1]
    return [Text(part.strip()) for part in text.split(",") if part.strip()]


def _guess(text: str) -> Any:
    """The Python value a text spells, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; the fields here are {', '.join(known)}" if known else "; there are no fields here"


def _shortened(name: Any) -> str:
    """A field's name as an error shows it; a file's may be anything."""
    text = str(name)
    return text if len(text) <= _LONGEST_NAME and text.isprintable() else quoted(text)


def _mistyped(path: str, hint: Any, value: Any) -> ConfigError:
    return ConfigError(f"{path}={_show(value)}: expected {_describe(hint)}")


def _show(value: Any) -> str:
    if isinstance(value, Text):
        return quoted(value.text)
    if isinstance(value, (list, tuple)) and len(value) <= _MOST_SHOWN:
        # Of parts that hold others only the type is shown: a file's may have any size and depth.
        return f"[{', '.join(map(quoted, value))}] ({type(value).__name__})"
    if value is None or isinstance(value, (str, bool, int, float)):
        return f"{quoted(value)} ({type(value).__name__})"
    return quoted(value)


def _describe(hint: Any) -> str:
    """A type hint in words a user of the command reads."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is typing.Annotated:
        limits = [str(limit) for limit in limits_of(hint)]
        own = [] if limits and limits[0].startswith("one of") else [_describe(args[0])]
        return ", ".join(own + limits)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin in (tuple, list, Sequence):
        if not args or args[-1] is Ellipsis or origin is not tuple:
            return f"a list, each {_describe(args[0])}" if args else "a list"
        return f"{counted(len(args), 'value')}"
    if hint is None or hint is type(None):
        return "none"
    if dataclasses.is_dataclass(hint):
        return f"the fields of {hint.__name__}"
    return _SCALARS.get(hint, getattr(hint, "__name__", str(hint)))
