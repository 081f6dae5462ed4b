"""The image store: generated images with how each was made, written so that a run may stop anytime.

A store is a folder of numbered shards. The number of images is known beforehand, so a shard is a
fixed range of them and any process can write any shard. Per shard there are three files:

    00007.array_record   PNG bytes, one record per image
    00007.jsonl          one line per image: class, prompt, seed, guidance, adapter, scores
    00007.seal           counts and SHA-256 of the two, written last

A shard without its seal does not exist; one whose files do not match its seal is damaged, which is
an error to a reader and work to do for a writer.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int, UInt8

from jaxsynth.core.documents import read_lines, take
from jaxsynth.core.errors import UserError, quoted, shown
from jaxsynth.core.io import (
    TEMPORARY,
    file_digest,
    file_digests_cached,
    read_json,
    replacing,
    write_json,
    write_text,
)
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Indices, Record
from jaxsynth.data.decode import decode_image, decoded_digest, encode_png
from jaxsynth.data.names import safe_name
from jaxsynth.data.views import Subset

FORMAT = 1
SEALED = (".array_record", ".jsonl")
logger = logging.getLogger(__name__)


class StoreError(UserError, ValueError):
    """A store that is incomplete, damaged or another one than expected; the message names it."""


@dataclass(frozen=True)
class Entry:
    """How one image was made: a line of the manifest.

    index: the image's number within its class. seed, guidance: of the sampler. adapter: digest of
    the adapter. scores: figures by name, such as a filter's. extra: whatever else is worth keeping.
    dataset: whose class it is, in a store of several data sets.
    """

    label: int
    class_name: str
    index: int
    prompt: str = ""
    seed: int = 0
    guidance: float = 0.0
    adapter: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    dataset: str = ""

    @property
    def title(self) -> str:
        """The class, and its data set before it where a store has several."""
        return f"{self.dataset} {self.class_name}" if self.dataset else self.class_name

    @property
    def id(self) -> str:
        names = [name for name in (self.dataset, self.class_name) if name]
        return "/".join([*map(safe_name, names), f"{self.index:06d}"])


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}"


def damage(folder: Path, number: int) -> str:
    """What is wrong with a sealed shard, in words; "" for an intact one."""
    base = _shard(folder, number)
    try:
        seal = _read_seal(base)
    except UserError as error:
        return str(error)
    paths = [base.with_suffix(suffix) for suffix in SEALED]
    for path in paths:
        if not path.exists():
            return f"{path} is missing"
    # Remembered for files that have not changed, so that a store is read through once.
    for path, digest in zip(paths, file_digests_cached(paths), strict=True):
        if digest != seal[path.suffix]:
            return f"{path} differs from what was written (SHA-256)"
    return ""


def _read_seal(base: Path) -> dict[str, str]:
    """The digests of a shard's files by their suffixes."""
    path = base.with_suffix(".seal")
    seal = read_json(path)
    if not isinstance(seal, dict) or not all(isinstance(seal.get(x), str) for x in SEALED):
        raise StoreError(f"{path}: expected the SHA-256 of {' and '.join(SEALED)}")
    return {suffix: seal[suffix] for suffix in SEALED}


class StoreWriter:
    """Writes a store of `count` images, `shard_size` per shard, in any order and by any process.

    An existing folder is continued if it was begun for the same images, otherwise `StoreError`.

    Args:
        datasets: in a store of several data sets, that of each class.
        first: whether this process writes the head; of several processes one does.
    """

    def __init__(
        self,
        folder: str | Path,
        class_names: Sequence[str],
        count: int,
        shard_size: int = 256,
        *,
        datasets: Sequence[str] = (),
        first: bool = True,
    ):
        if count < 1 or shard_size < 1:
            raise StoreError(f"count {count} and shard_size {shard_size}: expected 1 or more")
        self.folder, self.count, self.shard_size = Path(folder), count, shard_size
        self.class_names, self.datasets = tuple(class_names), tuple(datasets)
        if datasets and len(datasets) != len(class_names):
            raise StoreError(
                f"{counted(len(datasets), 'data set')} for {counted(len(class_names), 'class')}"
            )
        head: dict[str, object] = {
            "format": FORMAT,
            "count": count,
            "shard_size": shard_size,
            "class_names": list(class_names),
        }
        if datasets:
            head["datasets"] = list(datasets)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "store.json"
        if path.exists():
            there = read_json(path)
            for key, value in head.items():
                if there.get(key) != value:
                    raise StoreError(
                        f"{path}: begun with {key} {shown(there.get(key))}, now {value!r} is "
                        "asked for"
                    )
        elif first:
            write_json(path, head)

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    def span(self, shard: int) -> range:
        """The positions of a shard's images among all images."""
        if not 0 <= shard < self.num_shards:
            raise StoreError(f"shard {shard}: expected 0 to {self.num_shards - 1}")
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.count))

    def done_shards(self) -> set[int]:
        """Shards written and intact. A damaged one is reported in the log and not among them."""
        done = set()
        for number in range(self.num_shards):
            if _shard(self.folder, number).with_suffix(".seal").exists():
                fault = damage(self.folder, number)
                if fault:
                    logger.warning("shard %d must be written again: %s", number, fault)
                else:
                    done.add(number)
        return done

    def pending(self) -> list[int]:
        """Shards still to be written, in order."""
        return sorted(set(range(self.num_shards)) - self.done_shards())

    def write_shard(
        self,
        shard: int,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        entries: Sequence[Entry],
    ) -> None:
        """Encode and write one shard; it is there, whole, when this returns."""
        self.write_encoded(shard, [encode_png(np.asarray(image)) for image in images], entries)

    def write_encoded(self, shard: int, pngs: Sequence[bytes], entries: Sequence[Entry]) -> None:
        """The same for images that are encoded already."""
        expected = len(self.span(shard))
        if not len(pngs) == len(entries) == expected:
            raise StoreError(
                f"shard {shard}: {counted(len(pngs), 'image')} and "
                f"{counted(len(entries), 'entry')}, expected {expected} of each"
            )
        for entry in entries:
            known = 0 <= entry.label < len(self.class_names)
            dataset = self.datasets[entry.label] if known and self.datasets else ""
            named = known and self.class_names[entry.label] == entry.class_name
            if not named or dataset != entry.dataset:
                raise StoreError(
                    f"shard {shard}: an entry has label {entry.label} and class "
                    f"{entry.title!r}; the store's classes are {list(self.class_names)}"
                )
        base = _shard(self.folder, shard)
        base.with_suffix(".seal").unlink(missing_ok=True)
        for stale in self.folder.glob(f".{base.name}.*{TEMPORARY}"):  # of a run that was killed
            stale.unlink()
        with replacing(base.with_suffix(".array_record")) as part:
            # PNG does not compress further; groups of one keep random access cheap.
            writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
            for png in pngs:
                writer.write(png)
            writer.close()
        lines = [
            json.dumps({"id": entry.id, **asdict(entry)}, ensure_ascii=False) for entry in entries
        ]
        write_text(base.with_suffix(".jsonl"), "\n".join(lines) + "\n")
        seal: dict[str, object] = {x: file_digest(base.with_suffix(x)) for x in SEALED}
        write_json(base.with_suffix(".seal"), seal | {"count": expected}, indent=None)


class ImageStore:
    """A complete store, as a source of images.

    Opening it compares every file with its digest; StoreError for one that is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "store.json"
        if not path.exists():
            raise StoreError(f"{path}: not found, so {self.folder} is not an image store")
        head = read_json(path)
        if head.get("format") != FORMAT:
            raise StoreError(f"{path}: format {quoted(head.get('format'))}, expected {FORMAT}")
        count, self._shard_size = (take(head, name, int, path) for name in ("count", "shard_size"))
        if min(count, self._shard_size) < 1:
            raise StoreError(f"{path}: count and shard_size are less than 1")
        self.class_names = take(head, "class_names", tuple[str, ...], path)
        self.datasets = take(head, "datasets", tuple[str, ...], path, ())
        if self.datasets and len(self.datasets) != len(self.class_names):
            raise StoreError(f"{path}: datasets: expected one for each of class_names")
        shards = range(-(-count // self._shard_size))
        # Before anything is made of as many shards as the head says.
        sealed = {file.stem for file in self.folder.glob("*.seal")}
        first = next((n for n in shards if _shard(self.folder, n).name not in sealed), None)
        if first is not None:
            there = sum(name.isdecimal() and int(name) in shards for name in sealed)
            raise StoreError(
                f"{self.folder}: incomplete, {len(shards) - there} of "
                f"{counted(len(shards), 'shard')} are "
                f"missing, the first is {_shard(self.folder, first).name}"
            )
        bases = [_shard(self.folder, number) for number in shards]
        for number in shards:
            fault = damage(self.folder, number)
            if fault:
                seal = _shard(self.folder, number).with_suffix(".seal")
                raise StoreError(
                    f"{self.folder}: damaged: {fault}; remove {seal} and manifest.json beside it, "
                    "and the command that made the images draws that shard again"
                )
        self._seals = [_read_seal(base) for base in bases]
        entries = [entry for base in bases for entry in _read_entries(base.with_suffix(".jsonl"))]
        self.entries = tuple(entries)
        for entry in entries:
            if entry.index < 0:
                raise StoreError(
                    f"{self.folder}: an image has index {entry.index}, expected 0 or more"
                )
            named = 0 <= entry.label < len(self.class_names)
            if not named or self.class_names[entry.label] != entry.class_name:
                raise StoreError(
                    f"{self.folder}: an image has label {entry.label} and class "
                    f"{quoted(entry.class_name)}, which are not one class of store.json"
                )
        try:
            self._records = ArrayRecordDataSource(
                [str(b.with_suffix(".array_record")) for b in bases]
            )
        except (RuntimeError, ValueError):
            raise StoreError(f"{self.folder}: damaged: a file of records cannot be read") from None
        if not len(self._records) == len(entries) == count:
            raise StoreError(
                f"{self.folder}: {counted(len(self._records), 'image')}, {len(entries)} manifest "
                f"lines, expected {count}"
            )
        if len(set(self.ids)) != len(self.ids):
            twice = next(id_ for id_ in self.ids if self.ids.count(id_) > 1)
            raise StoreError(f"{self.folder}: two images are called {twice}")

    @property
    def titles(self) -> tuple[str, ...]:
        """The classes, each with its data set before it where the store has several."""
        if not self.datasets:
            return self.class_names
        both = zip(self.datasets, self.class_names, strict=True)
        return tuple(f"{dataset} {name}" for dataset, name in both)

    @cached_property
    def labels(self) -> Int[np.ndarray, " n"]:
        return np.asarray([entry.label for entry in self.entries], np.int32)

    @cached_property
    def ids(self) -> Sequence[str]:
        return tuple(entry.id for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def of_dataset(self, name: str, classes: Sequence[str]) -> Subset:
        """The images of one data set of a store of several, labels being places in `classes`.

        StoreError where the store lacks one of the data set's classes, or has it twice.
        """
        known = list(zip(self.datasets, self.class_names, strict=True)) if self.datasets else []
        places = np.full(len(self.class_names), -1, np.int32)
        for place, class_name in enumerate(classes):
            if (times := known.count((name, class_name))) != 1:
                own = [other for dataset, other in known if dataset == name]
                raise StoreError(
                    f"{self.folder}: has class {class_name!r} of data set {name!r} {times} times, "
                    f"expected once; found {own} of {list(dict.fromkeys(self.datasets))}"
                )
            places[known.index((name, class_name))] = place
        rows = np.flatnonzero(places[self.labels] >= 0)
        return Subset(self, rows, places[self.labels[rows]])

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        size = self._shard_size
        return [
            decoded_digest(f"{self._seals[i // size]['.array_record']} {i % size}", 0)
            for i in (range(len(self)) if indices is None else map(int, indices))
        ]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the store's head and of what its seals say of images and manifest."""
        head = (self.folder / "store.json").read_text("utf-8")
        return hashlib.sha256(json.dumps([head, self._seals]).encode()).hexdigest()

    def encoded(self, index: int) -> bytes:
        """The PNG bytes of an image."""
        try:
            return self._records[index]
        except RuntimeError:
            name = self.entries[index].id
            raise StoreError(f"{self.folder} {name}: damaged: its record cannot be read") from None

    def __getitem__(self, index: int) -> Record:
        entry = self.entries[index]  # first: its IndexError ends an iteration
        image = decode_image(self.encoded(index), f"{self.folder} {entry.id}")
        return Record(image, entry.label, entry.id)


_TYPES = {
    "label": int, "class_name": str, "index": int, "prompt": str, "seed": int, "adapter": str,
    "scores": dict, "extra": dict, "dataset": str,
}  # fmt: skip


def _read_entries(path: Path) -> list[Entry]:
    """The entries of a shard; StoreError naming the line for what is none."""
    entries = []
    for number, values in enumerate(read_lines(path), 1):
        values.pop("id", None)
        where = f"{path}, line {number}"
        for name, kind in _TYPES.items():
            if (
                name in values
                and type(values[name]) is not kind
                and not (kind is dict and isinstance(values[name], dict))
            ):
                raise StoreError(
                    f"{where}: {name}: {quoted(values[name])}, expected {kind.__name__}"
                )
        if type(values.get("guidance", 0.0)) not in (int, float):
            raise StoreError(f"{where}: guidance: {quoted(values['guidance'])}, expected a number")
        try:
            entries.append(Entry(**values))
        except TypeError:
            wanted = ", ".join(field.name for field in fields(Entry))
            raise StoreError(f"{where}: no image's entry; its fields are {wanted}") from None
    return entries
