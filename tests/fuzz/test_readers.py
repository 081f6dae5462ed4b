"""The short form of the fuzzing: every reader takes a changed file or refuses it by name."""

import io
import json
import pickletools
import struct
from pathlib import Path
from random import Random

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
    "folders": 80, "shards": 120, "stores": 120, "lists": 400, "documents": 200, "arrays": 400,
}  # fmt: skip
SLOW = {"adapters": 200, "networks": 80, "pipelines": 40, "checkpoints": 200}


def test_every_reader_has_a_short_form():
    assert set(EXECUTIONS) | set(SLOW) == set(READERS)


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


def _read_of(tmp_path: Path, read) -> run.Figures:
    """What comes of ten changed files for a reader that is this function."""
    path = tmp_path / "x.json"
    path.write_text("{}")
    figures = run.Figures()
    case = Case("x", path, read)
    for number in range(10):
        if kind := run._execute(case, path, figures, loud=False):
            figures.fault(kind, number)
    return figures


def test_what_counts_as_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MOST_SECONDS", 0.05)

    def busy(_):
        while True:
            pass

    def large(_):
        return bytearray(600 << 20).count(0)

    def refuse(_):
        raise UserError("x" * 20)

    def leak(_):
        raise UserError("x" * 2000)

    found = {
        name: _read_of(tmp_path, read)
        for name, read in {
            "typed": lambda _: {}["a"], "large": large, "refuse": refuse, "leak": leak,
        }.items()
    }  # fmt: skip
    assert found["typed"].faults == {"KeyError in test_readers.py, <lambda>": 10}
    assert found["leak"].faults == {"more than 1500 letters": 10}
    assert found["refuse"].refused == 10 and not found["refuse"].faults
    assert found["large"].faults
    figures = run.Figures()
    monkeypatch.setattr(run, "MOST_SECONDS", -0.9)  # a tenth of a second is left
    before = run.signal.signal(run.signal.SIGVTALRM, run._stop)
    try:
        assert run._execute(Case("x", tmp_path, busy), tmp_path, figures, loud=False)
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
            assert parse_json(json.dumps(value), "x", object) == value
            read += 1
        except UserError as error:
            assert str(error).startswith("x: ") and len(str(error)) < 300
    assert 200 < read < 1900


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
        assert sum(one != content for one in made[0]) > 30
