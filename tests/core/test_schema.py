"""The fields of every method's config from source: the classes' own, and told without JAX."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from jaxsynth.cli.main import METHODS, method_module
from jaxsynth.core import schema

ROOT = Path(__file__).parents[2]


def leaves(config, where=""):
    """Dotted name and type of every field, with whether it has a default."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        name, hint = where + field.name, hints[field.name]
        required = field.default is field.default_factory is dataclasses.MISSING
        if dataclasses.is_dataclass(hint) and not hasattr(hint, "schema"):
            yield from leaves(hint, f"{name}.")
        elif field.init:
            yield name, hint, required


@pytest.mark.parametrize("method", METHODS)
def test_the_source_shows_the_class(method):
    real = {name: rest for name, *rest in leaves(method_module(method).Config)}
    shown = {name: rest for name, *rest in leaves(schema.config_of(METHODS[method]))}
    assert list(shown) == list(real)
    for name, (hint, required) in shown.items():
        assert required == real[name][1], name
        if hint is schema.Unknown:
            assert "AdapterChoice" in str(real[name][0]) and "adapter" in name
        elif not any(dataclasses.is_dataclass(part) for part in typing.get_args(hint)):
            assert hint == real[name][0], name
    described = schema.describe(METHODS[method], {"method": method})
    assert [one.name for one in described] == list(real)
    assert all(one.type and one.default and one.doc for one in described)


CONFIG = f"{ROOT / 'configs' / 'datadream.py'}:tiny"
MISTAKES = (
    ("--config.shot=4", "config.shot: no such field; did you mean shots?"),
    ("--config.finetune.epochs=1.5", "config.finetune.epochs='1.5': expected an integer"),
    ("--config.classify.augment.flip=1", "config.classify.augment.flip: no such field"),
    ("--config.seeds=0,-1", "config.seeds[1]='-1': expected an integer, 0 or more"),
    ("--config.seeds=", "config.seeds='': expected a list, each an integer, 0 or more, at least"),
    ("--config.modes=dest", "config.modes[0]='dest': expected one of dset, cls"),
    ("--config.generate.batch_size=0", "batch_size='0': expected an integer, 1 or more"),
    ("--config.finetune.learning_rate=nan", "learning_rate='nan': expected a number, 0 or more"),
    (
        "--config.finetune.remat=all",
        "config.finetune.remat='all': expected one of None, block, dots",
    ),
    ("--config.classify.dropout=1", "expected a number, 0 or more and below 1"),
    ("--config.data.test_fraction=20", "expected a number, above 0 and below 1"),
    ("--config.data.source=folders", "data.source='folders': expected one of nothing, digits"),
    ("--config.data.path=nowhere", "config.data.path: nowhere: no such folder"),
    ("--config.data.labels.a=1", "config.data.labels=a value of type dict: expected a string"),
    ("--config.data=photos", "config.data: holds several fields, set one of them"),
)


def test_fields_and_mistakes_are_told_without_jax(tmp_path):
    commands = [
        ["fields", CONFIG, "--config.generate.sampler=ddim"],
        ["run", "--help", f"--config={CONFIG}"],
        ["plan", "-h", "--config", CONFIG],
    ]
    commands += [
        ["run", f"--config={CONFIG}", f"--workdir={tmp_path / 'w'}", field] for field, _ in MISTAKES
    ]
    code = (
        "import sys; sys.modules['jax'] = None; from jaxsynth.cli.main import main\n"
        + "\n".join(f"main({command!r})" for command in commands)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.count("shots: tuple[int 1 or more, ...] = (16,)\n    ") == len(commands[:3])
    assert done.stdout.count("finetune.adapter: registry.AdapterChoice | None = ") == 3
    assert done.stdout.count("generate.sampler: str = ddim\n") == 1
    told = done.stderr.strip().splitlines()
    assert len(told) == len(MISTAKES)
    for line, (_, words) in zip(told, MISTAKES, strict=True):
        assert words in line
    assert not (tmp_path / "w").exists()
