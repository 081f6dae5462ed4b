"""An image store in the formats other tools read: ImageFolder, WebDataset, Parquet.

Images are the store's own PNG bytes, and how each was made goes with them. An export is written
beside its place and moved there when complete, so that half an export is never taken for one.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from jaxsynth.data.names import safe_name
from jaxsynth.data.store import ImageStore, StoreError


def _rows(store: ImageStore) -> Iterator[tuple[bytes, dict]]:
    for index, entry in enumerate(store.entries):
        yield store.encoded(index), {"id": entry.id, **asdict(entry)}


def _imagefolder(store: ImageStore, folder: Path, _: int) -> None:
    """<class>/<index>.png, and Hugging Face's metadata.jsonl with the classes' whole names."""
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as manifest:
        for entry, (png, row) in zip(store.entries, _rows(store), strict=True):
            name = f"{safe_name(entry.title)}/{entry.index:06d}.png"
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png)
            manifest.write(json.dumps({"file_name": name, **row}, ensure_ascii=False) + "\n")


def _webdataset(store: ImageStore, folder: Path, shard_size: int) -> None:
    """shard-<n>.tar of <key>.png, <key>.cls, <key>.json, and classnames.txt in label order.

    The key is the image's position: class names may hold dots, where WebDataset ends a key.
    """
    if any("\n" in name for name in store.titles):
        raise StoreError("webdataset: a class name with a line break does not fit classnames.txt")
    (folder / "classnames.txt").write_text("\n".join(store.titles) + "\n", "utf-8")
    tar = None
    try:
        for position, (png, row) in enumerate(_rows(store)):
            if position % shard_size == 0:
                if tar is not None:
                    tar.close()
                path = folder / f"shard-{position // shard_size:05d}.tar"
                tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            members = {
                "png": png,
                "cls": str(row["label"]).encode(),
                "json": json.dumps(row, ensure_ascii=False).encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{position:08d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    finally:
        if tar is not None:
            tar.close()


def _parquet(store: ImageStore, folder: Path, shard_size: int) -> None:
    """<n>.parquet with Hugging Face's image and class columns, which `datasets` recognises."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise StoreError(
            "parquet: the package pyarrow is missing (pip install 'jaxsynth[parquet]')"
        ) from error
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    value = {"dtype": "string", "_type": "Value"}
    columns = {
        "image": (image, {"_type": "Image"}),
        "label": (pa.int64(), {"names": list(store.titles), "_type": "ClassLabel"}),
        "id": (pa.string(), value),
        "index": (pa.int64(), value | {"dtype": "int64"}),
        "dataset": (pa.string(), value),
        "prompt": (pa.string(), value),
        "seed": (pa.int64(), value | {"dtype": "int64"}),
        "guidance": (pa.float64(), value | {"dtype": "float64"}),
        "adapter": (pa.string(), value),
        "scores": (pa.string(), value),
        "extra": (pa.string(), value),
    }
    features = {"info": {"features": {name: kind for name, (_, kind) in columns.items()}}}
    schema = pa.schema(
        [(name, kind) for name, (kind, _) in columns.items()],
        metadata={"huggingface": json.dumps(features)},
    )
    rows: list[dict] = []

    def flush(number: int) -> None:
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=256)
        rows.clear()

    number = 0
    for png, row in _rows(store):
        cells = {name: row[name] for name in columns if name != "image"}
        # Scores differ between images; as JSON text they keep one schema for every shard.
        cells |= {key: json.dumps(row[key], ensure_ascii=False) for key in ("scores", "extra")}
        rows.append({"image": {"bytes": png, "path": f"{row['id']}.png"}, **cells})
        if len(rows) == shard_size:
            flush(number)
            number += 1
    if rows:
        flush(number)


KINDS = {"imagefolder": _imagefolder, "webdataset": _webdataset, "parquet": _parquet}


def export(store: ImageStore, folder: str | Path, kind: str, *, shard_size: int = 4096) -> Path:
    """Write the store to a new folder as "imagefolder", "webdataset" or "parquet"."""
    if kind not in KINDS:
        raise StoreError(f"kind: expected one of {list(KINDS)}, found {kind!r}")
    folder = Path(folder)
    if folder.exists():
        raise StoreError(f"{folder}: already exists; an export goes to a new folder")
    part = folder.with_name(folder.name + ".partial")
    if part.exists():  # ours alone: what an interrupted export left
        shutil.rmtree(part)
    part.mkdir(parents=True)
    KINDS[kind](store, part, shard_size)
    part.rename(folder)
    return folder
