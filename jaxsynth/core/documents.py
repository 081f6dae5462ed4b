"""JSON from a file that somebody else may have written: bounded, strict and of the asked type.

Python's parser takes the last of two equal keys, numbers that are none, nesting of any depth and
texts that no terminal can print. Here a document is UTF-8 of a bounded size and depth, its keys are
unique and its numbers finite; what is read of it is converted as a config is (`config.convert`).
All that is wrong is a `UserError` that names the file and the field, and nothing else of it.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxsynth.core.config import ConfigError, convert
from jaxsynth.core.errors import UserError, quoted

# The largest files are tokenizers and the indices of large networks.
MOST_BYTES = 64 << 20
MOST_LEVELS = 64
# Generators of random numbers keep states of 128.
_MOST_BITS = 128

_TEXTS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_REQUIRED = object()
_KINDS = {dict: "object", list: "list", str: "text"}


class Document(dict):
    """A JSON object; a field that it lacks is a UserError that names the file."""

    def __init__(self, pairs: Iterable[tuple[str, Any]] = (), where: Any = "document"):
        """ValueError for a field that is there twice. Other code copies a dict by its pairs."""
        pairs = list(pairs)
        super().__init__(pairs)
        self._where = where
        if len(self) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"{quoted(twice)} is there twice")

    def __missing__(self, name: str) -> NoReturn:
        raise UserError(f"{self._where}: {name} is missing")

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)


def read_json(
    path: str | os.PathLike,
    expected: Any = dict,
    *,
    optional: bool = False,
    finite: bool = True,
    most_bytes: int = MOST_BYTES,
) -> Any:
    """The content of a JSON file, converted to the type hint `expected`.

    A missing file is a UserError too, or with `optional` {}. `finite` False lets NaN and Infinity
    pass, which Python writes for figures that are none.
    """
    path = Path(path)
    if optional and not path.exists():
        return {}
    return parse_json(_bytes(path, most_bytes), path, expected, finite=finite)


def read_text(path: str | os.PathLike, *, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file, which is UTF-8, without a mark of byte order; UserError naming it."""
    path = Path(path)
    try:
        return _bytes(path, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None


def read_lines(path: str | os.PathLike, expected: Any = dict, *, cut: bool = False) -> Iterator:
    """The documents of a JSONL file, one a line; with `cut` without a last line that has no end."""
    path = Path(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_BYTES):
            number += 1
            if cut and not line.endswith(b"\n"):
                return
            if line.strip():
                yield parse_json(line, f"{path}, line {number}", expected)


def parse_json(data: bytes | str, where: Any, expected: Any = dict, *, finite: bool = True) -> Any:
    """The content of one JSON document, converted to `expected`; `where` is what errors call it."""
    try:
        # Windows' editors put a mark of byte order in front.
        text = data.removeprefix("\ufeff") if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
    if text.count("[") + text.count("{") > MOST_LEVELS and _depth(text) > MOST_LEVELS:
        raise UserError(f"{where}: more than {MOST_LEVELS} levels of lists and objects")
    try:
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: Document(pairs, where),
            parse_int=_integer,
            parse_float=_finite if finite else None,
            parse_constant=_constant if finite else None,
        )
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        # Where a line is the document, its number is in `where`.
        raise UserError(f"{where}: not valid JSON: {error}") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: not valid JSON: half of a character") from None
    except ValueError as error:  # of the functions below, and numbers of too many digits
        raise UserError(f"{where}: {error}") from None
    kind = _KINDS.get(expected)
    if kind is not None:
        if not isinstance(value, expected):
            raise UserError(f"{where}: expected a JSON {kind}, got {type(value).__name__}")
        return value
    return _converted(value, where, "", expected)


def take(
    document: Mapping[str, Any], name: str, expected: Any, where: Any, default: Any = _REQUIRED
) -> Any:
    """The field `name` of a document, converted to the type hint `expected`.

    UserError naming `where` and the field for another type, or for one that is missing and has no
    `default`.
    """
    if name in document:
        return _converted(document[name], where, name, expected)
    if default is _REQUIRED:
        raise UserError(f"{where}: {name} is missing")
    return default


def checked(where: Any, make: Callable[..., Any], *arguments: Any, **fields: Any) -> Any:
    """`make(...)` of what a document says; its ValueError is a UserError that names `where`."""
    try:
        return make(*arguments, **fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _bytes(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, ValueError) as error:  # a name with a zero byte is no OSError
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(data) > most:
        raise UserError(f"{path}: more than {most} bytes")
    return data


def _converted(value: Any, where: Any, name: str, expected: Any) -> Any:
    try:
        return convert(expected, value, name)
    except ConfigError as error:
        raise UserError(f"{where}: {str(error).lstrip('.=: ')}") from None


def _depth(text: str) -> int:
    """How deep lists and objects lie in one another; texts are left out."""
    depth = most = 0
    for bracket in _BRACKETS.findall(_TEXTS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        most = max(most, depth)
    return most


def _integer(text: str) -> int:
    if len(text) > _MOST_BITS or (number := int(text)).bit_length() > _MOST_BITS:
        raise ValueError(f"a number of {len(text)} digits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number that is too large")
    return number


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
