"""A short form of the fuzzing: readers take a changed file or refuse it by an error for users."""

import io
import json
import pickletools
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxsynth.core.documents import parse_json
from jaxsynth.core.errors import UserError
from jaxsynth.weights.torch_files.pickles import Machine
from tests.fuzz import mutate
from tests.fuzz.readers import READERS
from tests.fuzz.run import Figures, run

# How many files of each reader; those that build networks take longer for each.
EXECUTIONS = {
    "torch": 500, "safetensors": 500, "tokenizers": 150, "configs": 500, "stores": 150,
    "images": 400, "documents": 400,
}  # fmt: skip
SLOW = {"adapters": 300, "networks": 60}
QUICK = hypothesis.settings(
    max_examples=200, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip


def test_every_reader_has_a_short_form():
    assert set(EXECUTIONS) | set(SLOW) == set(READERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("reader", "executions"),
    [*EXECUTIONS.items(), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW.items())],
)
def test_readers_accept_or_refuse(tmp_path, reader, executions):
    figures = Figures()
    run(reader, range(executions), 0, tmp_path / "fuzz", figures)
    assert not figures.faults, figures
    assert figures.executions == executions and figures.refused > executions // 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@QUICK
@hypothesis.given(JSON)
def test_every_json_value_is_read_or_refused(value):
    text = json.dumps(value)
    try:
        assert parse_json(text, "x", object) == value
    except UserError as error:
        assert str(error).startswith("x: ")


@QUICK
@hypothesis.given(st.binary(max_size=200))
def test_every_text_is_read_or_refused(content):
    try:
        assert isinstance(parse_json(content, "x"), dict)
    except UserError as error:
        assert str(error).startswith("x: ") and len(str(error)) < 300


OPCODES = st.sampled_from(
    [opcode.code.encode("latin-1") for opcode in pickletools.opcodes] + mutate._SNIPPETS
)


@QUICK
@hypothesis.given(st.lists(OPCODES | st.binary(max_size=5), max_size=30))
def test_every_row_of_instructions_is_read_or_refused(parts):

    try:
        Machine(Path("x.pt"), "data.pkl").run(io.BytesIO(b"".join(parts) + b"."))
    except UserError as error:
        assert str(error).startswith("x.pt: ") and len(str(error)) < 400
