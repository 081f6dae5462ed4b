"""What the guides say is so: links lead somewhere, commands parse, and Python runs."""

import re
import shlex
from pathlib import Path

import pytest

import jaxsynth
from jaxsynth.cli import main as cli
from jaxsynth.cli import parser
from jaxsynth.core.config import load_config, override, to_dataclass

ROOT = Path(__file__).parents[1]
GUIDES = sorted(
    path
    for path in (ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("jaxsynth/**/README.md"))
    if "assets" not in path.parts
)
NAMES = [path.relative_to(ROOT).as_posix() for path in GUIDES]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", path.read_text(), re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


@pytest.mark.parametrize("path", GUIDES, ids=NAMES)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


COMMANDS = [
    (name, line)
    for path, name in zip(GUIDES, NAMES, strict=True)
    for block in blocks(path, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("jaxsynth ", "taskset -c 0 jaxsynth "))
]


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_commands_are_ones_that_the_command_takes(name, line, monkeypatch):
    """Their flags exist, and their configs have the fields that they set."""
    words = shlex.split(line, comments=True)
    words = words[words.index("jaxsynth") + 1 :]
    rest, assignments = parser.take_assignments(words)
    monkeypatch.chdir(ROOT)
    args = parser.parse(rest)
    if args.verb in ("run", "plan"):
        values = override(load_config(args.config), assignments)
        module = cli.method_module(values["method"])
        if "method" not in module.Config.__dataclass_fields__:
            del values["method"]
        assert isinstance(to_dataclass(module.Config, values), module.Config)


# Snippets that need weights of the hub, or the arrays that their text speaks of.
NEEDS = ("facebook/", "states[0]")
SNIPPETS = [
    (name, text)
    for path, name in zip(GUIDES, NAMES, strict=True)
    for text in blocks(path, "python")
    if name.startswith(("README", "jaxsynth/data", "jaxsynth/methods", "jaxsynth/training"))
]


@pytest.mark.parametrize(("name", "text"), SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_python_runs(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if any(need in text for need in NEEDS):
        text = "\n".join(line for line in text.splitlines() if line.startswith("from "))
    # Stages are functions of a module, which a snippet is while it runs.
    names = {"__name__": "snippet", "folder": tmp_path}
    exec(compile(text, name, "exec"), names)


def test_the_facade_holds_what_it_names():
    for name in jaxsynth.__all__:
        assert getattr(jaxsynth, name) is not None
    assert set(jaxsynth.__all__) <= set(dir(jaxsynth))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        jaxsynth.no_such_name  # noqa: B018
