"""Config files and overrides become frozen dataclasses, or fail by the name of the field."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.core.config import ConfigError, load_config, override, to_dataclass, to_dict


@dataclasses.dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: expected more than 0")


@dataclasses.dataclass(frozen=True)
class Data:
    source: Literal["digits", "folder"]
    path: Path | None = None
    class_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    data: Data
    optim: Optim = Optim()
    second: Optim | None = None
    shots: tuple[int, ...] = (1, 4)
    steps: int = 10
    ema: float | None = None
    flip: bool = False
    name: str | None = None
    extra: dict[str, float] = dataclasses.field(default_factory=dict)


def build(*assignments, **fields) -> Config:
    config = ConfigDict({"data": {"source": "digits"}, **fields})
    return to_dataclass(Config, override(config, assignments))


def test_nested_config_dict_becomes_dataclasses():
    config = build(
        optim={"learning_rate": 1, "betas": [0.5, 0.9]}, shots=[1, 16], extra={"a": 1}, steps=3
    )
    assert config.optim == Optim(1.0, "cosine", (0.5, 0.9))
    assert isinstance(config.optim.learning_rate, float)
    assert config.shots == (1, 16) and config.extra == {"a": 1.0} and config.second is None
    assert build(steps=np.int64(7)).steps == 7


def test_text_is_read_by_the_fields_type():
    config = build(
        ("data.source", "folder"),
        ("data.path", "my photos"),
        ("data.class_names", "cat,dog/wolf"),
        ("optim.learning_rate", "3e-4"),
        ("optim.betas", "(0.8, 0.9)"),
        ("second.learning_rate", "2"),
        ("shots", "8"),
        ("steps", "1_000"),
        ("ema", "0.99"),
        ("flip", "true"),
        ("name", "16"),
        ("extra.weight", "2"),
    )
    assert config.data == Data("folder", Path("my photos"), ("cat", "dog/wolf"))
    assert config.optim == Optim(3e-4, "cosine", (0.8, 0.9))
    assert config.second == Optim(2.0)
    assert (config.shots, config.steps, config.ema) == ((8,), 1000, 0.99)
    assert config.flip is True and config.name == "16" and config.extra == {"weight": 2.0}
    assert build(("ema", "none"), ema=0.9).ema is None
    assert build(("data.class_names", "['a, b', 'c']")).data.class_names == ("a, b", "c")
    assert build(("shots", "")).shots == ()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (("data.sourc", "x"), r"config\.data\.sourc: no such field; did you mean source\?"),
        (("zzz", "x"), r"config\.zzz: no such field; the fields here are data, optim, .*extra"),
        (("steps", "ten"), r"config\.steps='ten': expected an integer"),
        (("steps", "1.5"), r"config\.steps='1\.5': expected an integer"),
        (("flip", "maybe"), r"config\.flip='maybe': expected true or false"),
        (("ema", "x"), r"config\.ema='x': expected a number or none"),
        (("optim", "x"), r"config\.optim: holds several fields, set one of them: config\.optim"),
        (("shots", "1,b"), r"config\.shots\[1\]='b': expected an integer"),
        (("optim.betas", "1,2,3"), r"config\.optim\.betas: expected 2 values, found 3"),
        (("data.source", "digit"), r"expected one of digits, folder; did you mean 'digits'\?"),
        (("steps.x", "1"), r"config\.steps\.x: config\.steps is a value and has no fields"),
        (("optim.learning_rate", "-1"), r"config\.optim: learning_rate=-1\.0: expected more"),
        (("second.learning_rte", "1"), r"config\.second\.learning_rte: no such field"),
    ],
)
def test_bad_text_names_the_field(assignment, message):
    with pytest.raises(ConfigError, match=message):
        build(assignment, steps=10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 1.5}, r"config\.steps=1\.5 \(float\): expected an integer"),
        ({"steps": True}, r"config\.steps=True \(bool\): expected an integer"),
        ({"name": 3}, r"config\.name=3 \(int\): expected a string or none"),
        ({"shots": 3}, r"config\.shots=3 \(int\): expected a list, each an integer"),
        ({"optim": 3}, r"config\.optim: expected the fields of Optim, found 3"),
        ({"data": {}}, r"config\.data\.source: missing, expected one of digits, folder"),
    ],
)
def test_bad_values_of_a_config_file_name_the_field(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(**fields)


def test_to_dict_is_json_and_goes_back():
    config = build(("data.path", "x"), second={"betas": (0.1, 0.2)})
    assert to_dataclass(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_load_config_reads_variants_and_names_what_is_wrong(tmp_path):
    good = tmp_path / "good.py"
    good.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(variant='full'):\n"
        "    if variant not in ('full', 'tiny'):\n"
        "        raise ValueError(f'unknown variant {variant!r}, expected full or tiny')\n"
        "    return ConfigDict({'a': {'b': (1, 2)}, 'variant': variant}).lock()\n"
    )
    assert load_config(f"{good}:tiny") == {"a": {"b": (1, 2)}, "variant": "tiny"}
    assert load_config(str(good))["variant"] == "full"
    with pytest.raises(ConfigError, match=r"good\.py: unknown variant 'tny'"):
        load_config(f"{good}:tny")
    with pytest.raises(ConfigError, match=r"goood\.py' does not exist; did you mean .*/good"):
        load_config(str(tmp_path / "goood.py"))
    (tmp_path / "bad.py").write_text("def get_config(:\n")
    with pytest.raises(ConfigError, match=r"bad\.py, line 1"):
        load_config(str(tmp_path / "bad.py"))
    for name, text, message in (
        ("typo", "import math\nx = mth.pi\n", r"typo\.py, line 2: NameError: name 'mth'"),
        ("lacks", "import nothing_of_this_name\n", r"lacks\.py, line 1: ModuleNotFoundError"),
        ("inner", "def get_config(v=''):\n    return v.nothing\n", r"line 2: AttributeError"),
        ("args", "def get_config(a, b):\n    return {}\n", r"args\.py: TypeError"),
        ("nul", "x = 1\0\n", r"nul\.py.*null bytes"),
        ("latin", "x = '\xe9'\n", r"latin\.py.*utf-8"),
    ):
        (tmp_path / f"{name}.py").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=message):
            load_config(str(tmp_path / f"{name}.py"))
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no get_config"):
        load_config(str(tmp_path / "none.py"))
    (tmp_path / "single.py").write_text("def get_config():\n    return {'a': 1}\n")
    with pytest.raises(ConfigError, match="has no variants, found 'tiny'"):
        load_config(f"{tmp_path / 'single.py'}:tiny")


@dataclasses.dataclass(frozen=True)
class Fine:
    adapter: AdapterChoice | None = None
    own: AdapterChoice = dataclasses.field(default_factory=AdapterChoice)


def chosen(*assignments, **values):
    pairs = [tuple(text.split("=")) for text in assignments]
    return to_dataclass(Fine, override(values, pairs))


def test_a_part_chosen_by_name():
    """`--config.adapter=lokr --config.adapter.rank=3`, in any order."""
    found = chosen("adapter.rank=3", "adapter=lokr", "own.kind=ia3", "own.targets=to_q,to_k")
    assert found.adapter == AdapterChoice("lokr", {"rank": 3})
    assert found.own == AdapterChoice("ia3", {"targets": ("to_q", "to_k")})
    assert found.adapter.config(targets=("x",), defaults={"rank": 8}).rank == 3
    config = found.own.config(targets=("x",), defaults={"rank": 8})
    assert config.targets == ("to_q", "to_k") and config.feedforward == ("ff.net.2",)
    file = {"adapter": {"kind": "dora", "rank": 3, "alpha": 2}}
    assert chosen("adapter.rank=5", **file).adapter.settings == {"rank": 5, "alpha": 2.0}
    # Another kind does not keep the settings of the first.
    assert chosen("adapter=lora", **file).adapter == AdapterChoice("lora")
    assert chosen("adapter=none", **file).adapter is None
    assert chosen("adapter.rank=2", adapter="loha").adapter == AdapterChoice("loha", {"rank": 2})
    assert to_dataclass(Fine, to_dict(found)) == found


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("adapter=lorka",), "config.adapter: adapter 'lorka': expected one of lora, dora"),
        (("adapter=lokr", "adapter.rnk=2"), "config.adapter.rnk: no such field of lokr; did you"),
        (("adapter=ia3", "adapter.rank=2"), "config.adapter.rank: no such field of ia3"),
        (("adapter=lokr", "adapter.rank=x"), "config.adapter.rank='x': expected an integer"),
        (("adapter=lokr", "adapter.rank=0"), "config.adapter: LoKrConfig: rank is 0"),
        (("adapter=lora", "adapter.init=pisa"), "did you mean 'pissa'"),
    ],
)
def test_a_wrong_choice_is_named(assignments, message):
    with pytest.raises(ConfigError, match=message):
        chosen(*assignments)
