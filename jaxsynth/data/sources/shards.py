"""Images packed into a few files, as `data.export` and Hugging Face write them.

- WebDataset: .tar files of <key>.<image suffix> with <key>.cls (a number, named by classnames.txt,
  or a class) or <key>.json (with class_name or label);
- Parquet: an image column (bytes, or a struct with them) and a label column;
- Arrow, as `datasets.Dataset.save_to_disk` writes it: the same columns.

Labels are read at once, pictures when they are asked for.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxsynth.core.documents import parse_json, read_text, take
from jaxsynth.core.errors import quoted, shown
from jaxsynth.core.io import file_digests_cached
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Indices, Record, SourceError
from jaxsynth.data.decode import decode_image, decoded_digest, square
from jaxsynth.data.sources.files import is_image, visible

KINDS = (".tar", ".parquet", ".arrow")
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "class_name", "class", "fine_label", "cls")


class EncodedSource:
    """Images that are read as encoded bytes from the places of a few files."""

    def __init__(
        self,
        read: Callable[[Path, Any], bytes],
        places: Sequence[tuple[Path, Any]],
        ids: Sequence[str],
        labels: Sequence[int],
        image_size: int,
    ):
        self._read, self._places, self.image_size = read, places, image_size
        self.ids, self._labels = tuple(ids), np.asarray(labels, np.int32)

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        return self._labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        file, place = self._places[index]
        image = decode_image(self._read(file, place), f"{file} {self.ids[index]}")
        return Record(square(image, self.image_size), int(self._labels[index]), self.ids[index])

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        files = list(dict.fromkeys(file for file, _ in self._places))
        digests = dict(zip(files, file_digests_cached(files), strict=True))
        return [
            decoded_digest(f"{digests[file]} {place}", self.image_size)
            for file, place in (
                self._places if indices is None else [self._places[i] for i in indices]
            )
        ]


def is_shards(root: Path) -> bool:
    """Whether a folder holds packed images and no class folders."""
    return bool(_shards(root))


def _shards(root: Path) -> list[Path]:
    for folder in (root, root / "data"):
        if folder.is_dir():
            found = [path for path in visible(folder) if path.suffix.lower() in KINDS]
            if found:
                return found
    return []


def read_shards(
    root: Path, image_size: int = 0, class_names: tuple[str, ...] | None = None
) -> tuple[dict[str, EncodedSource], tuple[str, ...]]:
    """The sources by split ("train" where the files' names say none), and the class names.

    SourceError for files of several kinds, without images or labels, or with other classes than
    `class_names`.
    """
    files = _shards(root)
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) > 1:
        raise SourceError(f"{root}: holds {' and '.join(sorted(kinds))} files, expected one kind")
    reading = {".tar": _read_tars, ".parquet": _read_parquet, ".arrow": _read_arrow}[kinds.pop()]
    splits: dict[str, list[Path]] = {}
    for path in files:
        prefix = path.stem.split("-")[0].lower()
        split = prefix if prefix in ("test", "validation", "val") else "train"
        splits.setdefault(split, []).append(path)
    parts = {split: reading(root, paths) for split, paths in splits.items()}
    named = {names for _, _, _, names, _ in parts.values() if names}
    texts = {label for *_, labels, names, _ in parts.values() if not names for label in labels}
    if len(named) > 1 or (named and texts):
        raise SourceError(f"{root}: its files have different classes: {sorted(map(str, named))}")
    names = named.pop() if named else tuple(sorted(map(str, texts)))
    if class_names is not None and sorted(names) != sorted(class_names):
        raise SourceError(f"{root}: its classes are {names}, expected {class_names}")
    order = names if class_names is None else class_names
    sources = {}
    for split, (places, ids, labels, known, read) in parts.items():
        numbers = []
        for id_, label in zip(ids, labels, strict=True):
            if known and not (isinstance(label, int) and 0 <= label < len(known)):
                raise SourceError(
                    f"{root}: {id_}: label {shown(label)}, expected 0 to {len(known) - 1}"
                )
            numbers.append(order.index(known[label] if known else str(label)))
        sources[split] = EncodedSource(read, places, ids, numbers, image_size)
    return sources, order


# (places, ids, labels, class names where labels are numbers, reader of a place)
_Part = tuple[list[tuple[Path, Any]], list[str], list[Any], tuple[str, ...], Callable]


def _read_tars(root: Path, files: list[Path]) -> _Part:
    listed = root / "classnames.txt"
    names = tuple(read_text(listed).splitlines()) if listed.is_file() else ()
    places: list[tuple[Path, Any]] = []
    ids: list[str] = []
    labels: list[Any] = []
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                members = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
        except Exception as error:  # tarfile raises many types for damaged headers
            raise _damaged(file, "a tar file", error) from None
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size in members:
            folder, _, base = name.rpartition("/")
            key, _, suffix = base.partition(".")
            samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[suffix.lower()] = (offset, size)
        for key, parts in samples.items():
            pictures = [suffix for suffix in parts if is_image(Path(f"x.{suffix}"))]
            if len(pictures) != 1:
                raise SourceError(
                    f"{file}: sample {shown(key)} has {counted(len(pictures), 'image')}, expected 1"
                )
            labels.append(_tar_label(file, key, parts, names))
            places.append((file, parts[pictures[0]]))
            ids.append(f"{file.name}/{key}")
    return places, ids, labels, names if all(isinstance(x, int) for x in labels) else (), _tar_bytes


def _tar_label(
    file: Path, key: str, parts: dict[str, tuple[int, int]], names: tuple[str, ...]
) -> int | str:
    if "cls" in parts:
        text = _tar_bytes(file, parts["cls"]).decode("utf-8", "replace").strip()
        return int(text) if text.isdecimal() and names else text
    if "json" in parts:
        row = parse_json(_tar_bytes(file, parts["json"]), f"{file}: {quoted(key)[1:-1]}.json")
        for column in ("class_name", "label", "class"):
            if isinstance(row.get(column), str | int):
                return row[column] if names else str(row[column])
    raise SourceError(
        f"{file}: sample {shown(key)} has no class: expected {key}.cls or one in its json"
    )


def _tar_bytes(file: Path, place: tuple[int, int]) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(place[0])
        return opened.read(place[1])


def _read_parquet(root: Path, files: list[Path]) -> _Part:
    _arrow(root)
    import pyarrow.parquet as pq

    places: list[tuple[Path, Any]] = []
    ids: list[str] = []
    labels: list[Any] = []
    names: tuple[str, ...] = ()
    for file in files:
        try:
            opened = pq.ParquetFile(file)
            schema = opened.schema_arrow
        except Exception as error:  # pyarrow raises many types for damaged files
            raise _damaged(file, "a Parquet file", error) from None
        image, label, names = _columns(file, schema)
        try:
            table = opened.read([label])
            table.validate(full=True)
        except Exception as error:
            raise _damaged(file, "a Parquet file", error) from None
        labels += _plain(file, table.column(label).to_pylist())
        for group in range(opened.num_row_groups):
            for row in range(opened.metadata.row_group(group).num_rows):
                ids.append(f"{file.name}/{len(ids):08d}")
                places.append((file, (image, group, row)))
    return places, ids, labels, names, _parquet_bytes


@lru_cache(maxsize=8)
def _parquet_group(file: Path, stamp: int, image: str, group: int):
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file).read_row_group(group, [image])
    table.validate(full=True)
    return table.column(image)


def _parquet_bytes(file: Path, place: tuple[str, int, int]) -> bytes:
    image, group, row = place
    try:
        column = _parquet_group(file, file.stat().st_mtime_ns, image, group)
    except Exception as error:  # pyarrow raises many types for damaged files
        raise _damaged(file, "a Parquet file", error) from None
    if row >= len(column):
        raise SourceError(f"{file}: row {row} of its group {group} is missing")
    return _cell_bytes(file, row, column[row].as_py())


def _read_arrow(root: Path, files: list[Path]) -> _Part:
    _arrow(root)
    places: list[tuple[Path, Any]] = []
    ids: list[str] = []
    labels: list[Any] = []
    names: tuple[str, ...] = ()
    for file in files:
        table = _arrow_table(file, file.stat().st_mtime_ns)
        image, label, names = _columns(file, table.schema)
        labels += _plain(file, table.column(label).to_pylist())
        places += [(file, (image, row)) for row in range(table.num_rows)]
        ids += [f"{file.name}/{row:08d}" for row in range(table.num_rows)]
    return places, ids, labels, names, _arrow_bytes


@lru_cache(maxsize=64)
def _arrow_table(file: Path, stamp: int):
    """The table of a file, mapped into memory."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        # Lengths and offsets come from the file, and are believed from here on.
        table.validate(full=True)
        return table
    except Exception as error:  # pyarrow raises many types for damaged files
        raise _damaged(file, "an Arrow stream", error) from None


def _arrow_bytes(file: Path, place: tuple[str, int]) -> bytes:
    image, row = place
    cell = _arrow_table(file, file.stat().st_mtime_ns).column(image)[row].as_py()
    return _cell_bytes(file, row, cell)


def _damaged(file: Path, kind: str, error: Exception) -> SourceError:
    text = quoted(str(error) or type(error).__name__, 200)[1:-1]
    return SourceError(f"{file}: not {kind} that can be read ({text})")


def _arrow(root: Path) -> None:
    try:
        import pyarrow  # noqa: F401  (an extra)
    except ImportError:
        raise SourceError(
            f"{root}: Parquet and Arrow files need the package pyarrow: "
            "pip install 'jaxsynth[parquet]'"
        ) from None


def _columns(file: Path, schema) -> tuple[str, str, tuple[str, ...]]:
    """The image's column, the label's, and the class names that Hugging Face's metadata gives."""
    there = list(schema.names)
    chosen = []
    for what, known in (("image", _IMAGE_COLUMNS), ("label", _LABEL_COLUMNS)):
        found = [name for name in known if name in there]
        if not found:
            raise SourceError(f"{file}: no {what} column, expected one of {known}; found {there}")
        chosen.append(found[0])
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    where = f"{file}: huggingface"
    info = take(parse_json(text, where), "info", dict, where, {})
    feature = take(take(info, "features", dict, where, {}), chosen[1], dict, where, {})
    names = take(feature, "names", tuple[str, ...] | None, where, ())
    return chosen[0], chosen[1], names or ()


def _plain(file: Path, labels: list[Any]) -> list[int | str]:
    if any(not isinstance(label, int | str) for label in labels):
        raise SourceError(f"{file}: a label is missing, or neither a number nor a text")
    if any(isinstance(label, int) and label < 0 for label in labels):
        raise SourceError(
            f"{file}: a label is below 0, as Hugging Face writes images without one; leave this "
            "file out, or name the splits by train_split and test_split"
        )
    return labels


def _cell_bytes(file: Path, row: int, cell: Any) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise SourceError(
            f"{file}, row {row}: holds no image bytes (found {type(data).__name__}); write the "
            "data set with its images embedded"
        )
    return data
