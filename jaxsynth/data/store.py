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
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int, UInt8

from jaxsynth.data.dataset import Record
from jaxsynth.data.decode import decode_image, encode_png
from jaxsynth.data.names import safe_name

FORMAT = 1
logger = logging.getLogger(__name__)


class StoreError(ValueError):
    """A store that is incomplete, damaged or another one than expected; the message names it."""


@dataclass(frozen=True)
class Entry:
    """How one image was made: a line of the manifest.

    index: the image's number within its class. seed, guidance: of the sampler. adapter: digest of
    the adapter. scores: figures by name, such as a filter's. extra: whatever else is worth keeping.
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

    @property
    def id(self) -> str:
        return f"{safe_name(self.class_name)}/{self.index:06d}"


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it, and on disk when this returns."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}"


def damage(folder: Path, number: int) -> str:
    """What is wrong with a sealed shard, in words; "" for an intact one."""
    base = _shard(folder, number)
    try:
        seal = json.loads(base.with_suffix(".seal").read_text("utf-8"))
        wanted = {suffix: seal[suffix] for suffix in (".array_record", ".jsonl")}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"{base}.seal cannot be read ({error!r})"
    for suffix, digest in wanted.items():
        path = base.with_suffix(suffix)
        if not path.exists():
            return f"{path} is missing"
        if _sha256(path) != digest:
            return f"{path} differs from what was written (SHA-256)"
    return ""


class StoreWriter:
    """Writes a store of `count` images, `shard_size` per shard, in any order and by any process.

    An existing folder is continued if it was begun for the same images, otherwise `StoreError`.
    """

    def __init__(
        self, folder: str | Path, class_names: Sequence[str], count: int, shard_size: int = 256
    ):
        if count < 1 or shard_size < 1:
            raise StoreError(f"count {count} and shard_size {shard_size}: expected 1 or more")
        self.folder, self.count, self.shard_size = Path(folder), count, shard_size
        self.class_names = tuple(class_names)
        head = {
            "format": FORMAT,
            "count": count,
            "shard_size": shard_size,
            "class_names": list(class_names),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "store.json"
        if path.exists():
            there = json.loads(path.read_text("utf-8"))
            for key, value in head.items():
                if there.get(key) != value:
                    raise StoreError(
                        f"{path}: begun with {key} {there.get(key)!r}, now {value!r} is asked for"
                    )
        else:
            _write(path, json.dumps(head, indent=1, ensure_ascii=False).encode())

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
                f"shard {shard}: {len(pngs)} images and {len(entries)} entries, "
                f"expected {expected} of each"
            )
        for entry in entries:
            known = 0 <= entry.label < len(self.class_names)
            if not known or self.class_names[entry.label] != entry.class_name:
                raise StoreError(
                    f"shard {shard}: an entry has label {entry.label} and class "
                    f"{entry.class_name!r}; the store's classes are {list(self.class_names)}"
                )
        base = _shard(self.folder, shard)
        base.with_suffix(".seal").unlink(missing_ok=True)
        for stale in self.folder.glob(f"{base.name}.*partial"):  # of a run that was killed
            stale.unlink()
        part = base.with_name(f"{base.name}.{os.getpid()}.partial")
        # PNG does not compress further; groups of one keep random access cheap.
        writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        for png in pngs:
            writer.write(png)
        writer.close()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, base.with_suffix(".array_record"))
        lines = [
            json.dumps({"id": entry.id, **asdict(entry)}, ensure_ascii=False) for entry in entries
        ]
        _write(base.with_suffix(".jsonl"), ("\n".join(lines) + "\n").encode())
        seal = {".array_record": _sha256(base.with_suffix(".array_record"))}
        seal |= {".jsonl": _sha256(base.with_suffix(".jsonl")), "count": expected}
        _write(base.with_suffix(".seal"), json.dumps(seal).encode())


class ImageStore:
    """A complete store, as a source of images. `verify` reads every byte against its digest."""

    def __init__(self, folder: str | Path, *, verify: bool = True):
        self.folder = Path(folder)
        path = self.folder / "store.json"
        if not path.exists():
            raise StoreError(f"{path}: not found, so {self.folder} is not an image store")
        head = json.loads(path.read_text("utf-8"))
        if head["format"] != FORMAT:
            raise StoreError(f"{path}: format {head['format']}, expected {FORMAT}")
        self.class_names = tuple(head["class_names"])
        shards = range(-(-head["count"] // head["shard_size"]))
        bases = [_shard(self.folder, number) for number in shards]
        missing = [base.name for base in bases if not base.with_suffix(".seal").exists()]
        if missing:
            raise StoreError(
                f"{self.folder}: incomplete, {len(missing)} of {len(bases)} shards are missing, "
                f"the first is {missing[0]}"
            )
        if verify:
            for number in shards:
                fault = damage(self.folder, number)
                if fault:
                    raise StoreError(f"{self.folder}: damaged: {fault}")
        entries = []
        for base in bases:
            for line in base.with_suffix(".jsonl").read_text("utf-8").split("\n"):
                if line:
                    values = json.loads(line)
                    values.pop("id")
                    entries.append(Entry(**values))
        self.entries = tuple(entries)
        self._records = ArrayRecordDataSource([str(b.with_suffix(".array_record")) for b in bases])
        if not len(self._records) == len(entries) == head["count"]:
            raise StoreError(
                f"{self.folder}: {len(self._records)} images, {len(entries)} manifest lines, "
                f"expected {head['count']}"
            )
        if len(set(self.ids)) != len(self.ids):
            twice = next(id_ for id_ in self.ids if self.ids.count(id_) > 1)
            raise StoreError(f"{self.folder}: two images are called {twice}")

    @cached_property
    def labels(self) -> Int[np.ndarray, " n"]:
        return np.asarray([entry.label for entry in self.entries], np.int32)

    @cached_property
    def ids(self) -> Sequence[str]:
        return tuple(entry.id for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def encoded(self, index: int) -> bytes:
        """The PNG bytes of an image."""
        return self._records[index]

    def __getitem__(self, index: int) -> Record:
        entry = self.entries[index]  # first: its IndexError ends an iteration
        image = decode_image(self.encoded(index), f"{self.folder} {entry.id}")
        return Record(image, entry.label, entry.id)


def copy_store(
    store: ImageStore,
    folder: str | Path,
    keep: Sequence[int] | None = None,
    scores: Sequence[Mapping[str, float]] | None = None,
    shard_size: int = 256,
) -> ImageStore:
    """A store of the images at the positions `keep` (all by default), their bytes as they are.

    `scores`, one mapping per kept image, are added to its entry: how a filter leaves its figures.
    """
    keep = range(len(store)) if keep is None else [int(i) for i in keep]
    if scores is not None and len(scores) != len(keep):
        raise StoreError(f"{len(scores)} scores for {len(keep)} images")
    writer = StoreWriter(folder, store.class_names, len(keep), shard_size)
    for shard in writer.pending():
        pngs, entries = [], []
        for position in writer.span(shard):
            values = asdict(store.entries[keep[position]])
            if scores is not None:
                values["scores"] = {**values["scores"], **scores[position]}
            entries.append(Entry(**values))
            pngs.append(store.encoded(keep[position]))
        writer.write_encoded(shard, pngs, entries)
    return ImageStore(folder)
