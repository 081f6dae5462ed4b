"""A short form of the fuzzing: readers take a changed file or refuse it by an error for users."""

import pytest

from tests.fuzz.readers import READERS
from tests.fuzz.run import Figures, run

# How many files of each reader; those that build networks take longer for each.
EXECUTIONS = {
    "torch": 500, "safetensors": 500, "tokenizers": 150, "configs": 500, "stores": 150,
    "images": 400, "documents": 400,
}  # fmt: skip
SLOW = {"adapters": 300, "networks": 60}

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
