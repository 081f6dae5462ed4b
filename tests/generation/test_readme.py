"""The guide's snippets run as they stand there, one after the other, on the shipped base."""

import re
import shlex
from pathlib import Path

import pytest

import jaxsynth
from jaxsynth.cli import main as cli
from jaxsynth.diffusion.samplers import NAMES

GUIDE = (Path(jaxsynth.__file__).parent / "generation" / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.heavy
def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(snippets("python")) == 6
    names: dict = {}
    for code in snippets("python"):
        exec(compile(code, "README.md", "exec"), names)


@pytest.mark.heavy
def test_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, folder in zip(snippets("sh"), ("images", "varied"), strict=True):
        program, *argv = shlex.split(command)
        assert program == "jaxsynth" and cli.main(argv) == 0
        assert sorted(path.suffix for path in (tmp_path / folder).iterdir()) == [
            ".json", ".jsonl", ".png", ".png",
        ]  # fmt: skip


def test_the_table_of_samplers_is_whole():
    rows = re.findall(r"^\| `(\S+)` \| `(\w+Scheduler)` \|", GUIDE, re.MULTILINE)
    assert dict(rows) == NAMES
