"""The sets that measure biases: drawn here, or real ones in the folders they are published in.

- Cue conflict (Geirhos et al. 2019, arXiv 1811.12231): `SHAPE/SHAPE10-TEXTURE2.png`, a folder for
  each of 16 classes; the texture's class is in the file's name.
- ImageNet-9 (Xiao et al. 2021, arXiv 2006.09994): `original/val/00_dog/...`, `mixed_same/val/...`
  and `mixed_rand/val/...`, nine class folders each.
- FOCUS (Kattakinda and Feizi, ICML 2022): photos and `annotations.db`, an SQLite file with a row of
  category, time, weather and locations for each; or sorted already, `P0/truck/...` to `P3/...`.

A real set's classes are groups of a model's: `read_class_map` reads them from JSON, as ImageNet-9
comes with `in_to_in9.json`; FOCUS's are here.
"""

import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import quoted, shown
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import ImageSource, SourceError
from jaxsynth.data.decode import IMAGE_SUFFIXES
from jaxsynth.data.procedural.cues import (
    Cues,
    render_backgrounds,
    render_conflicts,
    render_contexts,
)
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.files import FileSource
from jaxsynth.data.sources.folder import folder_source

VARIANTS = ("original", "mixed_same", "mixed_rand")


@dataclass(frozen=True)
class CueConflict:
    """Images with the shape of one class and the texture of another, as places in `names`.

    `source.labels` are the shapes.
    """

    source: ImageSource
    textures: Int[np.ndarray, " n"]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Backgrounds:
    """Foregrounds on their own and on other backgrounds; labels are places in `names`.

    `paired`: image i of all three has the same foreground.
    """

    original: ImageSource
    mixed_same: ImageSource
    mixed_rand: ImageSource
    names: tuple[str, ...]
    paired: bool


@dataclass(frozen=True)
class Contexts:
    """Images and whether their time, weather and location are uncommon for their class (n, 3).

    Of images that were sorted by how many are uncommon, those are the first ones.
    """

    source: ImageSource
    uncommon: Bool[np.ndarray, "n 3"]
    names: tuple[str, ...]


def drawn_conflicts(count: int, size: int, seed: int, *, classes: int = len(SHAPES)) -> CueConflict:
    """`count` images of each pair of a shape and a texture (`data.cues`)."""
    cues = render_conflicts(count, size, seed, classes=classes)
    return CueConflict(_source(cues, "conflict"), cues.textures, SHAPES[:classes])


def drawn_backgrounds(
    count: int, size: int, seed: int, *, classes: int = len(SHAPES)
) -> Backgrounds:
    """`count` images a class and variant (`data.cues`), paired."""
    drawn = render_backgrounds(count, size, seed, classes=classes)
    sources = {name: _source(cues, name) for name, cues in drawn.items()}
    return Backgrounds(**sources, names=SHAPES[:classes], paired=True)


def drawn_contexts(count: int, size: int, seed: int, *, classes: int = len(SHAPES)) -> Contexts:
    """`count` images a class of each way to be common or uncommon (`data.cues`)."""
    cues = render_contexts(count, size, seed, classes=classes)
    moved = cues.backgrounds != cues.shapes
    uncommon = np.stack([cues.night, cues.weathers > 0, moved], axis=1)
    return Contexts(_source(cues, "context"), uncommon, SHAPES[:classes])


def read_conflicts(root: Path, image_size: int = 0) -> CueConflict:
    """A cue-conflict folder. SourceError for a file whose name does not say shape and texture."""
    source, names = folder_source(root, None, image_size)
    textures = np.empty(len(source), np.int32)
    for i, (path, label) in enumerate(zip(source.ids, source.labels, strict=True)):
        named = re.fullmatch(r"(?:.*_)?([a-z]+)\d+-([a-z]+)\d+", Path(path).stem)
        if not named or named[1] != names[label] or named[2] not in names:
            raise SourceError(
                f"{root / path}: expected a name like {names[label]}1-{names[label - 1]}2, its "
                f"folder's class and then the texture's, which is one of {list(names)}"
            )
        textures[i] = names.index(named[2])
    return CueConflict(source, textures, names)


def read_backgrounds(root: Path, image_size: int = 0) -> Backgrounds:
    """An ImageNet-9 folder. SourceError for a variant that is missing or has other classes."""
    sources, names = {}, None
    for variant in VARIANTS:
        folder = root / variant
        if not folder.is_dir():
            raise SourceError(f"{folder}: no such folder; expected {', '.join(VARIANTS)} in {root}")
        folder = folder / "val" if (folder / "val").is_dir() else folder
        found = folder_source(folder, None if names is None else list(names), image_size)
        sources[variant], names = found
    assert names is not None
    return Backgrounds(**sources, names=names, paired=False)


# Of a class's number.
_MOST_DIGITS = 6

FOCUS_NAMES = (
    "truck", "car", "plane", "ship", "cat", "dog", "horse", "deer", "frog", "bird",
)  # fmt: skip
FOCUS_PARTITIONS = ("P0", "P1", "P2", "P3")
FOCUS_TIMES = ("day", "night", "none")
FOCUS_WEATHERS = (
    "cloudy", "foggy", "partly cloudy", "raining", "snowing", "sunny", "none",
)  # fmt: skip
FOCUS_LOCATIONS = (
    "forest", "grass", "indoors", "rocks", "sand", "street", "snow", "water", "none",
)  # fmt: skip
# The ImageNet-1k classes that count as each.
FOCUS_CLASSES: dict[str, tuple[int, ...]] = {
    "truck": (407, 555, 569, 654, 675, 717, 757, 779, 864, 867),
    "car": (436, 468, 511, 609, 627, 656, 705, 734, 751, 817),
    "plane": (404, 895),
    "ship": (403, 472, 510, 554, 625, 628, 693, 724, 780, 814, 914),
    "cat": tuple(range(281, 286)),
    "dog": (*range(151, 269), *range(273, 276)),
    "horse": (339, 340),
    "deer": (351, 352, 353),
    "frog": (30, 31, 32),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
}
# Foggy, raining and snowing weather is uncommon for all, night for all but frogs; and these places.
_BAD_WEATHERS = ("foggy", "raining", "snowing")
_UNCOMMON_LOCATIONS = {
    "truck": {"indoors", "rocks", "snow", "water"},
    "car": {"indoors", "rocks", "snow", "water"},
    "plane": {"forest", "indoors", "rocks", "sand", "snow", "water"},
    "ship": {"forest", "grass", "indoors", "rocks", "sand", "street", "snow"},
    "cat": {"forest", "rocks", "sand", "snow", "water"},
    "dog": {"forest", "rocks", "snow"},
    "horse": {"indoors", "rocks", "street", "snow", "water"},
    "deer": {"indoors", "rocks", "sand", "street", "snow", "water"},
    "frog": {"indoors", "street", "snow"},
    "bird": {"indoors", "street", "snow"},
}


def read_focus(root: Path, image_size: int = 0) -> Contexts:
    """A FOCUS folder: with `annotations.db`, or sorted into partitions (`read_partitions`).

    Its columns are told by what they hold, for their names are not documented. SourceError where no
    table has a path, a category, a time, a weather and locations in each row, or a file is missing.
    """
    if not (root / "annotations.db").is_file() and (root / FOCUS_PARTITIONS[0]).is_dir():
        return read_partitions(root, image_size)
    rows = _annotations(root / "annotations.db")
    ids = tuple(path.lstrip("./") for path, *_ in rows)
    for name in ids:
        if not (root / name).is_file():
            raise SourceError(f"{root / name}: no such file, but {root / 'annotations.db'} has it")
    uncommon = [
        (
            time == "night" and category != "frog",
            weather in _BAD_WEATHERS,
            bool(set(locations.split(", ")) & _UNCOMMON_LOCATIONS[category]),
        )
        for _, category, time, weather, locations in rows
    ]
    labels = np.array([FOCUS_NAMES.index(category) for _, category, *_ in rows], np.int32)
    return Contexts(
        FileSource(root, ids, labels, image_size), np.array(uncommon, bool), FOCUS_NAMES
    )


def read_partitions(root: Path, image_size: int = 0) -> Contexts:
    """FOCUS sorted by how many attributes are uncommon: P0 to P3, each with class folders.

    SourceError for a partition that is missing, or a class that is none of FOCUS's.
    """
    ids, labels, counts = [], [], []
    for count, partition in enumerate(FOCUS_PARTITIONS):
        if not (root / partition).is_dir():
            raise SourceError(
                f"{root / partition}: no such folder; expected {', '.join(FOCUS_PARTITIONS)}"
            )
        source, names = folder_source(root / partition, None, image_size)
        strange = [name for name in names if name not in FOCUS_NAMES]
        if strange:
            raise SourceError(
                f"{root / partition}: {strange} are none of FOCUS's classes: {list(FOCUS_NAMES)}"
            )
        places = np.array([FOCUS_NAMES.index(name) for name in names], np.int32)
        ids += [f"{partition}/{name}" for name in source.ids]
        labels.append(places[source.labels])
        counts += [count] * len(source)
    uncommon = np.arange(len(FOCUS_PARTITIONS) - 1) < np.array(counts)[:, None]
    return Contexts(
        FileSource(root, tuple(ids), np.concatenate(labels), image_size), uncommon, FOCUS_NAMES
    )


def read_class_map(path: Path, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Groups of a model's classes from JSON: {name: [classes]}, or {class: place in `names`}.

    In the second form (of `in_to_in9.json`) a place of -1 puts a class in no group. SourceError for
    any other form.
    """
    found = read_json(path)
    if found and all(isinstance(v, list) and all(map(_is_place, v)) for v in found.values()):
        return {name: tuple(indices) for name, indices in found.items()}
    groups: dict[str, list[int]] = {name: [] for name in names}
    for index, place in found.items():
        number = index.isascii() and index.isdecimal() and len(index) <= _MOST_DIGITS
        if not number or type(place) is not int or not -1 <= place < len(names):
            raise SourceError(
                f"{path}: {quoted(index)}: {shown(place)}; expected a list of classes for "
                f"each name, or a place from -1 to {len(names) - 1} for each class"
            )
        if place >= 0:
            groups[names[place]].append(int(index))
    return {name: tuple(indices) for name, indices in groups.items()}


def _is_place(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**_MOST_DIGITS


def _source(cues: Cues, part: str) -> ArraySource:
    ids = tuple(f"{part}/{SHAPES[shape]}/{i:05d}" for i, shape in enumerate(cues.shapes))
    return ArraySource(cues.images, cues.shapes, ids, {"depth": cues.depths, "mask": cues.masks})


def _annotations(path: Path) -> list[tuple[str, str, str, str, str]]:
    """(path, category, time, weather, locations) of every row of the table that has them."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file; expected FOCUS's annotations")
    holds: list[Callable[[str], bool]] = [
        lambda value: value.lower().endswith(IMAGE_SUFFIXES),
        lambda value: value in FOCUS_NAMES,
        lambda value: value in FOCUS_TIMES,
        lambda value: value in FOCUS_WEATHERS,
        lambda value: set(value.split(", ")) <= set(FOCUS_LOCATIONS),
    ]
    seen = []
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            for (table,) in tables.fetchall():
                cursor = database.execute(f'SELECT * FROM "{table}"')
                names = [column[0] for column in cursor.description]
                rows = cursor.fetchall()
                seen.append(f"{table} ({', '.join(names)}; {counted(len(rows), 'row')})")
                places = [_column(rows, test) for test in holds]
                if rows and None not in places:
                    return [tuple(row[place] for place in places) for row in rows]
    except sqlite3.DatabaseError as error:
        raise SourceError(f"{path}: not an SQLite file ({error})") from error
    raise SourceError(
        f"{path}: no table with an image's path, category, time, weather and locations in every "
        f"row; found {'; '.join(seen) or 'no table'}"
    )


def _column(rows: list[tuple], test: Callable[[str], bool]) -> int | None:
    """The first column all of whose values are text that passes; "none" alone tells nothing."""
    for place in range(len(rows[0]) if rows else 0):
        values = {row[place] for row in rows}
        if all(isinstance(v, str) and test(v) for v in values) and values != {"none"}:
            return place
    return None
