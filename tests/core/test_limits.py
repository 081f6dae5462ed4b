"""Limits of fields: in the source of every method's config, on the command line and in Python."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated

import pytest

from jaxsynth.cli.main import METHODS
from jaxsynth.core import schema
from jaxsynth.core.config import ConfigError, Text, convert, to_dataclass
from jaxsynth.core.limits import Count, Finite, OneOf, Range, Share, Some, check_limits

# Numbers that may be below zero: guidance away from the prompt, LoRA with the sign turned, where an
# average lies, and places counted from the end.
SIGNED = ("guidance_scale", "image_guidance_scale", "alpha", "own", "t", "data")


def numbers(config, where=""):
    """Dotted name and type of every field that holds numbers, and of those in lists and dicts."""
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        parts = [hint, *typing.get_args(hint)]
        for part in parts:
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from numbers(part, f"{where}{name}.")
        plain = str(hint)
        if ("int" in plain or "float" in plain) and "dict" not in plain and "str" not in plain:
            yield where + name, hint


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_every_config_has_limits(method):
    found = dict(numbers(schema.config_of(METHODS[method])))
    assert len(found) > 30
    taken = []
    for name, hint in found.items():
        size = 1 if "..." in str(hint) else max(str(hint).count("'float'"), 1)
        wrong = ["nan", "inf"] if "float" in str(hint) else []
        wrong += [] if name.rpartition(".")[2] in SIGNED else ["-5"]
        for text in wrong:
            try:
                convert(hint, Text(",".join([text] * size)), "x")
                taken.append(f"{name}={text}")
            except ConfigError as error:
                assert "expected" in str(error)
    assert taken == []


@dataclass(frozen=True)
class Limited:
    count: Count = 1
    share: Share | None = None
    rows: Annotated[tuple[Count, ...], Some()] = (1,)
    kind: Annotated[str, OneOf("a", "b")] = "a"
    scale: Finite = 1.0
    part: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5

    def __post_init__(self):
        check_limits(self)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("count", 0, "1 or more"),
        ("share", 1.5, "0 to 1"),
        ("rows", (), "at least one value"),
        ("rows", (3, 0), "1 or more"),
        ("kind", "c", "one of a, b"),
        ("scale", float("inf"), "finite"),
        ("part", 1.0, "above 0 and below 1"),
    ],
)
def test_a_value_outside_is_refused_with_what_is_expected(field, value, expected):
    with pytest.raises(ConfigError, match=rf"^config\.{field}.*expected .*{expected}"):
        to_dataclass(Limited, {field: value})
    with pytest.raises(ValueError, match=rf"^{field}: .*, expected {expected}"):
        Limited(**{field: value})


def test_values_at_the_ends_are_taken():
    values = {"count": 1, "share": 1.0, "rows": (1, 2), "kind": "b", "scale": -3.0, "part": 0.01}
    assert to_dataclass(Limited, values) == Limited(**values)
