"""The short form of the fuzzing: every reader takes a changed file or refuses it by name."""

import io
import json
import pickletools
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from jaxsynth.core.documents import parse_json
from jaxsynth.core.errors import UserError
from jaxsynth.weights.torch_files.pickles import Machine
from tests.fuzz import mutate, run
from tests.fuzz.cases import Case
from tests.fuzz.readers import READERS

# How many files of each reader. Those that build networks take longer for each.
EXECUTIONS = {
    "torch": 400, "safetensors": 400, "tokenizers": 100, "configs": 400, "images": 400,
    "folders": 80, "shards": 100, "stores": 80, "lists": 400, "documents": 160, "arrays": 400,
    "films": 120, "faces": 200,
}  # fmt: skip
SLOW = {"adapters": 200, "networks": 80, "pipelines": 40}
# Orbax leaves coroutines that nobody awaits, which fail whatever test runs when they are collected.
ALONE = {"checkpoints"}


def test_every_reader_has_a_short_form():
    assert set(EXECUTIONS) | set(SLOW) | ALONE == set(READERS)


@pytest.mark.filterwarnings("ignore")  # decoders warn of damaged files
@pytest.mark.parametrize(
    ("reader", "executions"),
    [*EXECUTIONS.items(), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW.items())],
)
def test_readers_accept_or_refuse(tmp_path, reader, executions):
    figures = run.Figures()
    run.run(reader, range(executions), 0, tmp_path / "fuzz", figures)
    assert not figures.faults, figures
    assert figures.executions == executions and figures.refused > executions // 10


def _figures_of(tmp_path: Path, read) -> run.Figures:
    """What comes of a file for a reader that is this function."""
    figures = run.Figures()
    if kind := run._execute(Case("x", tmp_path, read), tmp_path, figures, loud=False):
        figures.fault(kind, 0)
    return figures


def test_what_counts_as_a_fault(tmp_path, monkeypatch):
    def busy(_):
        while True:
            pass

    def large(_):
        assert np.ones(60 << 20, np.uint8)[-1]

    def refuse(letters):
        raise UserError("x" * letters)

    assert _figures_of(tmp_path, lambda _: {}["a"]).faults == {
        "KeyError in test_readers.py, <lambda>": 1
    }
    assert _figures_of(tmp_path, lambda _: refuse(20)) == run.Figures(refused=1)
    assert "more than 1500 letters" in _figures_of(tmp_path, lambda _: refuse(2000)).faults
    assert _figures_of(tmp_path, lambda _: None) == run.Figures(accepted=1)
    monkeypatch.setattr(run, "MOST_MEGABYTES", 30)
    assert "more than 30 MB" in _figures_of(tmp_path, large).faults
    monkeypatch.setattr(run, "MOST_SECONDS", -0.9)  # a tenth of a second is left
    before = run.signal.signal(run.signal.SIGVTALRM, run._stop)
    try:
        assert "more than -0.9 s" in _figures_of(tmp_path, busy).faults
    finally:
        run.signal.signal(run.signal.SIGVTALRM, before)


def _json(random: Random, depth: int = 0) -> object:
    """A JSON value of any kind."""
    kind = random.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [_json(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 7:
        return {_text(random): _json(random, depth + 1) for _ in range(random.randrange(4))}
    return [
        None,
        random.random() < 0.5,
        random.randrange(-(2**70), 2**70),
        struct.unpack("d", random.randbytes(8))[0],
        _text(random),
        random.choice(mutate.VALUES[:14]),
    ][kind]


def _text(random: Random) -> str:
    return "".join(chr(random.choice([*range(128), 0xD800, 0x202E, 0x1F600])) for _ in range(5))


def test_every_json_value_is_read_or_refused():
    random, read = Random(0), 0
    for _ in range(2000):
        value = _json(random)
        try:
            assert parse_json(json.dumps(value), "x", Any) == value
            read += 1
        except UserError as error:
            assert str(error).startswith("x: ") and len(str(error)) < 300
    assert 1500 < read < 2000


def test_every_text_is_read_or_refused():
    random = Random(0)
    letters = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\u", b"1", b"e", b"-", b"\xff", b" "]
    for _ in range(3000):
        content = b"".join(random.choices(letters, k=random.randrange(12)))
        try:
            assert isinstance(parse_json(content, "x"), dict)
        except UserError as error:
            assert str(error).startswith("x: ") and len(str(error)) < 300


OPCODES = [
    *(opcode.code.encode("latin-1") for opcode in pickletools.opcodes),
    *mutate._SNIPPETS,
]


def test_every_row_of_instructions_is_read_or_refused():
    random, refused = Random(0), 0
    for _ in range(3000):
        parts = random.choices(OPCODES, k=random.randrange(30))
        parts.insert(random.randrange(len(parts) + 1), random.randbytes(5))
        try:
            Machine(Path("x.pt"), "data.pkl").run(io.BytesIO(b"".join(parts) + b"."))
        except UserError as error:
            refused += 1
            assert str(error).startswith("x.pt: ") and len(str(error)) < 400
    assert refused > 2000


def test_changes_follow_from_the_seed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(3))
    for name, content in {
        "x.json": b'{"a": [1, 2]}', "x.csv": b"a,b\n1,2\n", "x.bin": bytes(range(200)),
        "x.jsonl": b'{"a": 1}\n{"a": 2}\n', "x.npz": path.read_bytes(),
    }.items():  # fmt: skip
        made = [
            [mutate.changed(Random(n), Path(name), content) for n in range(40)] for _ in range(2)
        ]
        assert made[0] == made[1]
        assert sum(one != content for one in made[0]) > 20
