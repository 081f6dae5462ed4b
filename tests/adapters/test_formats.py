"""The README of the adapters: its table of formats is what files do, and its examples run."""

import re

import pytest

from jaxsynth.adapters import registry
from tests.adapters import format_table


# peft warns where its own BOFT has no CUDA, and of constants that it makes and never writes.
@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys .*glora_")
@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_table_says_what_files_do(kind):
    assert format_table.committed()[kind] == format_table.row(kind), (
        "python -m tests.adapters.format_table writes the table"
    )


@pytest.mark.heavy
def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = format_table.README.read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) >= 3
    names: dict = {}
    for example in found:
        exec(compile(example, str(format_table.README), "exec"), names)
