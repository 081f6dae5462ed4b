"""Tables that say what images show: labels.csv, and Hugging Face's metadata.csv and metadata.jsonl.

A table names a file and a class in each row. Column names vary; the file's column is the one whose
cells are files, the class's is called label, class, category or the like, or is the only other one;
one called split, subset or partition says which images are for tests.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jaxsynth.core.documents import parse_json, read_text
from jaxsynth.core.errors import shown
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import SourceError
from jaxsynth.data.decode import IMAGE_SUFFIXES as _SUFFIXES
from jaxsynth.data.sources.files import is_image, nearest_stems, visible

TABLES = ("labels.csv", "metadata.jsonl", "metadata.csv", "labels.tsv", "labels.jsonl")
CLASS_COLUMNS = ("class_name", "label", "class", "category", "label_name", "target", "species")


# Names of splits, of which only letters count: "Training_Set" is a "trainingset".
_KINDS = ("", "set", "data", "dataset", "images", "imgs", "photos")
TRAIN = tuple(name + kind for name in ("train", "training") for kind in _KINDS)
TEST = tuple(name + kind for name in ("test", "testing", "eval", "evaluation") for kind in _KINDS)
VALIDATION = tuple(name + kind for name in ("val", "valid", "validation", "dev") for kind in _KINDS)
SPLIT_COLUMNS = ("split", "subset", "partition")


def split_kind(name: str) -> str:
    """ "train", "test" or "validation" for a name that splits have, "" for any other."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    kinds = (("train", TRAIN), ("test", TEST), ("validation", VALIDATION))
    return next((kind for kind, names in kinds if letters in names), "")


def find_table(root: Path) -> Path | None:
    """The table that lies in a folder of images, if one does."""
    by_name = {path.name.lower(): path for path in visible(root) if path.is_file()}
    return next((by_name[name] for name in TABLES if name in by_name), None)


def read_table(path: Path, root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The class of each image below `root` by its path there, and its split where a column says.

    SourceError for a column that cannot be told, a file that is missing, an image without a class,
    and a class or file that is empty or named twice with different classes.
    """
    if not path.is_file():
        raise SourceError(f"labels: {path}: no such file")
    rows = [(number, row) for number, row in _rows(path) if any(row.values())]
    if not rows:
        raise SourceError(f"{path}: has no rows")
    images = sorted(p.relative_to(root) for p in root.rglob("*") if is_image(p))
    hidden = [p for p in images if any(part.startswith(".") for part in p.parts)]
    files = nearest_stems(p.as_posix() for p in images if p not in hidden)
    find = _finder(files, root)
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    file_column = _file_column(path, rows, find, columns)
    class_column = _class_column(path, columns, file_column)
    split_column = next((c for c in columns if c.lower() in SPLIT_COLUMNS), "")
    found: dict[str, str] = {}
    splits: dict[str, str] = {}
    for number, row in rows:
        name, label = row.get(file_column, ""), row.get(class_column, "")
        file = find(name)
        if not file:
            raise SourceError(f"{path}, line {number}: no image {shown(name)} in {root}")
        if not label:
            raise SourceError(f"{path}, line {number}: {shown(name)} has no {class_column}")
        if found.setdefault(file, label) != label:
            raise SourceError(
                f"{path}, line {number}: {shown(name)} is {shown(label)} here and "
                f"{shown(found[file])} in a row above"
            )
        if split_column:
            splits[file] = split_kind(row.get(split_column, ""))
            if not splits[file]:
                raise SourceError(
                    f"{path}, line {number}: {split_column} is {shown(row.get(split_column, ''))}, "
                    "expected train, test or validation; rename the column if it is no split"
                )
    if missing := sorted(set(files.values()) - set(found)):
        raise SourceError(
            f"{path}: {counted(len(missing), 'image')} of {root} in no row, the first is "
            f"{shown(missing[0])}; add them, or move them away"
        )
    return found, splits


def exported_classes(root: Path) -> dict[str, str]:
    """The class of each folder by metadata.jsonl, where it tells one for every image of it."""
    path = root / "metadata.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, set[str]] = {}
    for _, row in _rows(path):
        folder = Path(row.get("file_name", "")).parts[:1]
        if row.get("class_name") and folder:
            title = " ".join(filter(None, (row.get("dataset"), row["class_name"])))
            found.setdefault(folder[0], set()).add(title)
    return {folder: next(iter(names)) for folder, names in found.items() if len(names) == 1}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows, cells as text; a table without a heading has columns "0", "1", ..."""
    lines = read_text(path).splitlines()
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = parse_json(line, f"{path}, line {number}")
                yield number, {str(k): _cell(v) for k, v in row.items() if _is_cell(v)}
        return
    first = lines[0] if lines else ""
    delimiter = next((sign for sign in ("\t", ";") if sign in first and "," not in first), ",")
    try:
        table = list(csv.reader(lines, delimiter=delimiter))
    except csv.Error as error:
        raise SourceError(f"{path}: not a table: {error}") from None
    if not table:
        return
    headed = not any(Path(cell.strip()).suffix.lower() in _SUFFIXES for cell in table[0])
    heading = [x.strip() for x in table[0]] if headed else [str(i) for i in range(len(table[0]))]
    for number, cells in enumerate(table[headed:], 1 + headed):
        if len(cells) not in (0, len(heading)):
            raise SourceError(
                f"{path}, line {number}: {counted(len(cells), 'cell')}, expected {len(heading)}"
            )
        yield number, {key: cell.strip() for key, cell in zip(heading, cells, strict=False)}


def _is_cell(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _cell(value: object) -> str:
    """A value of JSON as a table without types has it."""
    return "" if value is None else str(value)


def _finder(files: Mapping[str, str], root: Path) -> Callable[[str], str]:
    """A function from a cell to the image that it names, "" where it names none.

    Other systems write folders with backslashes, and do not tell upper case from lower; programs
    write whole paths, and "./" before those that are not.
    """
    start = f"{root.absolute().as_posix()}/"
    folded: dict[str, str] = {}
    for name, file in files.items():
        same = folded.setdefault(name.casefold(), file)
        if same != file:
            folded[name.casefold()] = ""

    def find(cell: str) -> str:
        if cell in files:
            return files[cell]
        path = cell.replace("\\", "/").removeprefix(start)
        while path.startswith("./"):
            path = path.removeprefix("./")
        return files.get(path) or folded.get(path.casefold(), "")

    return find


def _file_column(
    path: Path,
    rows: list[tuple[int, dict[str, str]]],
    find: Callable[[str], str],
    columns: list[str],
) -> str:
    counts = {key: sum(bool(find(row.get(key, ""))) for _, row in rows) for key in columns}
    best = max(columns, key=counts.__getitem__)
    if not counts[best]:
        raise SourceError(
            f"{path}: no column names images that lie beside it; found {columns}, "
            f"with {list(rows[0][1].values())} in the first row"
        )
    return best


def _class_column(path: Path, columns: list[str], file_column: str) -> str:
    others = [k for k in columns if k != file_column and k.lower() not in SPLIT_COLUMNS]
    by_name = {key.lower(): key for key in reversed(others)}
    for name in CLASS_COLUMNS:
        if name in by_name:
            return by_name[name]
    if len(others) == 1 and others[0].lower() not in ("text", "caption", "prompt"):
        return others[0]
    raise SourceError(
        f"{path}: no column of classes; expected one of {', '.join(CLASS_COLUMNS)}, found {others}"
    )
