"""What names of models, files and folders are taken for, before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest

from jaxsynth.core.errors import UsageError
from jaxsynth.core.places import (
    Clip,
    MaybeFile,
    MaybeFolder,
    Pipeline,
    Place,
    Templates,
    check_places,
)


@dataclass(frozen=True)
class Config:
    model: Annotated[str, Place(model=True)] = "tiny"
    clip: Clip = "tiny/clip"
    base: Pipeline = "tiny"
    file: MaybeFile = ""
    folders: dict[str, MaybeFolder] = field(default_factory=dict)
    templates: Templates = "imagenet7"
    either: Annotated[str, Place(model=True, prefix="inception:")] | None = None
    any: str = "nothing"


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("checkpoint.safetensors").touch()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": ""}, "config.model: is empty, expected a folder, a hub id (owner/name) or tiny"),
        ({"model": "tinny"}, "and not a hub id (owner/name); did you mean tiny?"),
        ({"model": "tiny/clpi"}, "'tiny/clpi': not among the package's files"),
        ({"model": "a/b/c"}, "config.model: 'a/b/c': no such folder, and not a hub id"),
        ({"model": "./phots"}, "did you mean photos?"),
        ({"model": "checkpoint.safetensors"}, "checkpoint.safetensors: is a file, expected a f"),
        ({"base": "checkpoint2.safetensors"}, "no such file; did you mean checkpoint.safetensors?"),
        ({"base": "checkpoint.safetensors@./phots"}, "config.base: './phots': no such folder"),
        ({"base": "gone/model.ckpt"}, "config.base: gone/model.ckpt: no such file"),
        ({"base": "photos"}, "config.base: photos: a folder without model_index.json"),
        ({"base": "tiny/clip"}, "without model_index.json; did you mean tiny?"),
        (
            {"clip": "tiny"},
            "tiny: a folder without config.json; did you mean tiny/clip?",
        ),
        ({"file": "photos"}, "config.file: photos: is a folder, expected a file"),
        ({"folders": {"depth": "photo"}}, "config.folders.depth: photo: no such folder; did you"),
        ({"folders": {"depth": "checkpoint.safetensors"}}, "is a file, expected a folder"),
        ({"templates": "imagenet8"}, "config.templates: imagenet8: no such file"),
        ({"either": "inception:gone.pth"}, "config.either: gone.pth: no such file"),
    ],
)
def test_a_name_of_nothing_is_refused(given, message):
    with pytest.raises(UsageError) as error:
        check_places(Config(**given))
    assert message in str(error.value)


def test_names_of_what_is_here_or_on_the_hub():
    here = (
        {"model": "photos"},
        {"model": "tiny/clip"},
        {"base": "checkpoint.safetensors"},
        {"base": "checkpoint.safetensors@photos"},
        {"base": "checkpoint.safetensors@tiny"},
        {"file": "checkpoint.safetensors"},
        {"folders": {"depth": "photos", "edges": ""}},
        {"templates": "checkpoint.safetensors"},
        {"either": "inception:checkpoint.safetensors"},
    )
    for given in here:
        assert check_places(Config(**given)) == []
    away = Config(model="owner/name", base="owner/other@refs/pr/1", either="a/b")
    assert check_places(away) == [
        ("config.model", "owner/name"),
        ("config.base", "owner/other@refs/pr/1"),
        ("config.either", "a/b"),
    ]
    assert check_places(Config(file="gone"), models_alone=True) == []
