"""What a text in a config or on a command line names: a model, a file or a folder.

A field says it by its type, `base: Pipeline`, and `check_places` tells before anything is loaded
or written that nothing has the name. `local_model` is also what `weights.hub` finds models by.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from jaxsynth.core.errors import UsageError, UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Place:
    """What a field of text names: `model`, `file` or `folder`, or one of `words` instead.

    A model is a folder, what ships with the package, or a hub id; a folder has one of the files
    `has`. Behind `prefix` lies a file.
    """

    model: bool = False
    file: bool = False
    folder: bool = False
    words: tuple[str, ...] = ()
    prefix: str = ""
    has: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = {
            "a folder": self.model or self.folder,
            "a file": self.file,
            "a hub id (owner/name)": self.model,
            "tiny": self.model,
            f"{self.prefix}FILE": bool(self.prefix),
        }
        *names, last = [name for name, taken in kinds.items() if taken] + [
            w for w in self.words if w
        ]
        return f"{', '.join(names)} or {last}" if names else last


_PIPELINE, _NETWORK = ("model_index.json",), ("config.json",)
# A CLIP; a whole Stable Diffusion; and what may be left out.
Clip = Annotated[str, Place(model=True, has=_NETWORK)]
Pipeline = Annotated[str, Place(model=True, file=True, has=_PIPELINE)]
MaybePipeline = Annotated[str, Place(model=True, file=True, has=_PIPELINE, words=("",))]
MaybeNetwork = Annotated[str, Place(model=True, file=True, has=_NETWORK, words=("",))]
MaybeFile = Annotated[str, Place(file=True, words=("",))]
MaybeFolder = Annotated[str, Place(folder=True, words=("",))]
MaybeFileOrFolder = Annotated[str, Place(file=True, folder=True, words=("",))]
# As `data.prompts.read_templates` takes them.
Templates = Annotated[str, Place(file=True, words=("", "imagenet7", "object", "style"))]


def place_of(hint: Any) -> Place | None:
    """What a type of text names, None for any other type."""
    found = (one for one in typing.get_args(hint)[1:] if isinstance(one, Place))
    return next(found, None) if typing.get_origin(hint) is Annotated else None


def local_model(name_or_path: str | os.PathLike) -> Path | None:
    """The folder of a model that is here or comes with the package; None for a hub id.

    UserError for a name that is neither.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if not text.strip():
        # As a path it would be the current folder.
        raise UserError("the name of a model is empty, expected a folder, a hub id or tiny")
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file, expected a folder")
    if text == "tiny" or text.startswith("tiny/"):
        packaged = ASSETS / text
        if packaged.is_dir():
            return packaged
        raise UserError(f"{text!r}: not among the package's files (looked for {packaged})")
    if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise UserError(
            f"{text!r}: no such folder, and not a hub id (owner/name){_near(text, shipped=True)}"
        )
    return None


def check_places(config: Any, *, models_alone: bool = False) -> list[tuple[str, str]]:
    """UsageError naming a field of which nothing has the name, and what it may name.

    Returns (field, hub id) of models that are not here: whether they are there, the hub knows. A
    config's skeleton (`core.schema`) is taken, too.
    """
    away = []
    for where, place, text in _places(config, "config"):
        if models_alone:
            # A plan needs less of a folder than a run.
            place = dataclasses.replace(place, has=())
            if not place.model:
                continue
        try:
            found = _find(place, text)
        except UserError as error:
            raise UsageError(f"{where}: {error}") from None
        if found:
            away.append((where, found))
    return away


def _find(place: Place, text: str) -> str:
    """The hub id of a place that is not here, "" for one that is. UserError for none."""
    if text in place.words:
        return ""
    if place.prefix and text.startswith(place.prefix):
        _find(Place(file=True), text.removeprefix(place.prefix))
        return ""
    if not text.strip():
        raise UserError(f"is empty, expected {place}")
    path = Path(text).expanduser()
    file, at, folder = text.rpartition("@")
    if place.file and (path.is_file() or (at and Path(file).expanduser().is_file())):
        # FILE@FOLDER has what a checkpoint in one file lacks.
        return "" if path.is_file() or not folder else _find(Place(model=True), folder)
    if place.file and not path.exists() and (Path(file or text).suffix in _WEIGHTS):
        raise UserError(f"{file or text}: no such file{_near(file or text)}")
    if place.model:
        local = local_model(text)
        if local is None:
            return text
        return _check_has(place, text, local)
    if place.folder and path.is_dir():
        return _check_has(place, text, path)
    if path.exists():
        found = "a folder" if path.is_dir() else "a file"
        raise UserError(f"{text}: is {found}, expected {place}")
    raise UserError(f"{text}: no such {'folder' if place.folder else 'file'}{_near(text)}")


def _check_has(place: Place, text: str, folder: Path) -> str:
    """UserError for a folder that has none of the files of its kind."""
    if not place.has or any((folder / name).is_file() for name in place.has):
        return ""
    around = [folder.parent, *sorted(path for path in folder.iterdir() if path.is_dir())]
    fit = next((path for path in around if (path / place.has[0]).is_file()), None)
    meant = ""
    if fit is not None:
        name = os.path.dirname(text) if fit == folder.parent else f"{text.rstrip('/')}/{fit.name}"
        meant = f"; did you mean {name}?" if name else ""
    raise UserError(f"{text}: a folder without {' or '.join(place.has)}{meant}")


def _near(text: str, *, shipped: bool = False) -> str:
    """What was probably meant: a name beside it, or of the package's models."""
    path = Path(text).expanduser()
    beside = []
    if path.parent.is_dir():
        with os.scandir(path.parent) as entries:
            beside = [entry.name for entry in entries]
    if close := difflib.get_close_matches(path.name, beside, n=1):
        return f"; did you mean {path.parent / close[0]}?"
    names = ["tiny", *(f"tiny/{one.name}" for one in sorted((ASSETS / "tiny").iterdir()))]
    close = difflib.get_close_matches(text, names, n=1) if shipped else []
    return f"; did you mean {close[0]}?" if close else ""


def _places(value: Any, where: str, hint: Any = None) -> Iterator[tuple[str, Place, str]]:
    """Dotted name, place and text of each field that names one."""
    if (place := place_of(hint)) is not None:
        if isinstance(value, str):
            yield where, place, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value), include_extras=True)
        for field in dataclasses.fields(value):
            yield from _places(
                getattr(value, field.name), f"{where}.{field.name}", hints[field.name]
            )
    elif isinstance(value, Mapping):
        args = typing.get_args(hint)
        for name, item in value.items():
            yield from _places(item, f"{where}.{name}", args[1] if len(args) == 2 else None)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = next((one for one in typing.get_args(hint) if place_of(one)), None)
        if inner is not None:
            yield from _places(value, where, inner)
