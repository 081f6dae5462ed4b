"""JSON of other people: bounded, strict, of the asked type, and errors that name file and field."""

import dataclasses
import json
import time

import pytest

from jaxsynth.core import io
from jaxsynth.core.documents import parse_json, read_json, read_lines, take
from jaxsynth.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.x < 0:
            raise ValueError(f"x is {self.x}, expected 0 or more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON: Expecting property name"),
        (b"", "not valid JSON: Expecting value"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"a": 1e999}', "a number that is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a": ' + b"9" * 100 + b"}", "a number of 100 digits"),
        (b'{"a": "\\ud800"}', "not valid JSON: half of a character"),
        (b'{"\\udfff": 1}', "not valid JSON: half of a character"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "more than 64 levels"),
        (b'{"a": ' + b"[" * 100_000, "more than 64 levels"),
        (b'{"a": "' + b"\\" * 100_001 + b'"' + b"[" * 100, "not valid JSON|more than 64"),
    ],
)
def test_what_is_no_document_is_refused_by_file(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(UserError, match=rf"bad\.json: ({message})") as caught:
        read_json(path)
    assert time.process_time() - start < 60 and len(str(caught.value)) < 300


def test_documents_that_are_valid(tmp_path):
    path = tmp_path / "good.json"
    deep = {"[": ["{" * 100, "\\", '"[[[', "\U0001f600", {"b": -1.5e3, "c": [None, True, 2**64]}]}
    for value in (deep, {}, {"a": [[[]] * 70] * 2}):
        io.write_json(path, value)
        assert read_json(path) == value
        path.write_text(json.dumps(value))  # with escapes
        assert read_json(path) == value
        path.write_text(json.dumps(value), "utf-8-sig")
        assert read_json(path) == value == parse_json(path.read_text(), path)
    assert parse_json('{"a": NaN}', "x", finite=False)["a"] != 0
    assert read_json(tmp_path / "none.json", optional=True) == {}
    with pytest.raises(UserError, match=r"none\.json: missing"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_json(path, most_bytes=10)


def test_a_field_that_is_missing_is_named_with_its_file():
    document = parse_json('{"a": {"b": 1}}', "file.json")
    assert document["a"]["b"] == 1 and document.get("c") is None and document == {"a": {"b": 1}}
    for part in (document, document["a"]):
        with pytest.raises(UserError, match=r"file\.json: c is missing"):
            part["c"]


@pytest.mark.parametrize(
    ("content", "hint", "message"),
    [
        ('["a", 1]', list[str], r"\[1\]=1 \(int\): expected a string"),
        ('{"a": "x"}', dict[str, int], r"a='x' \(str\): expected an integer"),
        ('{"x": "1"}', Point, r"x='1' \(str\): expected an integer"),
        ('{"x": true}', Point, r"x=True \(bool\): expected an integer"),
        ('{"x": 1.5}', Point, r"x=1\.5 \(float\): expected an integer"),
        ("{}", Point, "x: missing, expected an integer"),
        ('{"x": 1, "y": 2}', Point, "y: no such field; the fields here are x, names"),
        ('{"x": -1}', Point, "x is -1, expected 0 or more"),
        ('{"x": 1, "names": "ab"}', Point, r"names='ab' \(str\): expected a list"),
        ('{"x": {"a": [1]}}', Point, "x=a value of type dict: expected an integer"),
        ("[1]", Point, "expected the fields of Point"),
        ('{"x": 1, "%s": 2}' % ("\\u202e" * 500), Point, r"'(\\u202e)+'\.\.\.: no such field"),
    ],
)
def test_types_are_those_asked_for(content, hint, message):
    with pytest.raises(UserError, match=rf"^file: {message}") as caught:
        parse_json(content, "file", hint)
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


def test_types_that_fit():
    assert parse_json('{"x": 1, "names": ["a"]}', "file", Point) == Point(1, ("a",))
    document = parse_json('{"a": 3, "b": [1, 2.5]}', "file")
    assert take(document, "a", float, "file") == 3.0
    assert take(document, "b", tuple[float, float], "file") == (1.0, 2.5)
    assert take(document, "c", int, "file", 7) == 7
    with pytest.raises(UserError, match="file: c is missing"):
        take(document, "c", int, "file")
    with pytest.raises(UserError, match="file: b: expected 3 values, found 2"):
        take(document, "b", tuple[float, float, float], "file")


def test_lines_are_numbered_and_a_cut_one_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2}\n{"ste')
    assert list(read_lines(path, cut=True)) == [{"step": 1}, {"step": 2}]
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 4: not valid JSON"):
        list(read_lines(path))
    path.write_bytes(b'{"step": 1}\n{"step": \xff}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not UTF-8 at byte 9"):
        list(read_lines(path, cut=True))
