"""The image store: atomic shards, restart, damage, copies and exports that read back equal."""

import json
import logging
import sys
import tarfile

import numpy as np
import pytest

from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.decode import decode_image
from jaxsynth.data.export import export
from jaxsynth.data.load import load_dataset
from jaxsynth.data.store import Entry, ImageStore, StoreError, StoreWriter, copy_store
from jaxsynth.data.views import Subset

CLASSES = ("F/A-18", "crème brûlée", "v1.0 plain")


def make(position):
    rng = np.random.default_rng(position)
    label = position % 3
    entry = Entry(
        label=label,
        class_name=CLASSES[label],
        index=position // 3,
        prompt=f"a photo of a {CLASSES[label]}",
        seed=7,
        guidance=2.0,
        adapter="abc",
        scores={"clip": position / 8},
        extra={"step": position},
    )
    return rng.integers(0, 256, (6, 5, 3), dtype=np.uint8), entry


def fill(writer, shards):
    for shard in shards:
        images, entries = zip(*map(make, writer.span(shard)), strict=True)
        writer.write_shard(shard, images, entries)


@pytest.fixture
def store(tmp_path):
    writer = StoreWriter(tmp_path / "store", CLASSES, 11, shard_size=4)
    fill(writer, reversed(range(writer.num_shards)))
    return ImageStore(tmp_path / "store")


def test_what_was_written_is_read(store):
    assert len(store) == 11
    assert store.labels.tolist() == [i % 3 for i in range(11)]
    assert store.ids[3] == "F%2FA-18/000001"
    for position in range(11):
        image, entry = make(position)
        assert store.entries[position] == entry
        record = store[position]
        np.testing.assert_array_equal(record.image, image)
        assert (record.label, record.id) == (entry.label, entry.id)
    assert not list(store.folder.glob("*.partial"))
    line = json.loads((store.folder / "00000.jsonl").read_text().splitlines()[1])
    assert line["class_name"] == CLASSES[1] and line["scores"] == {"clip": 0.125}


def test_restart_writes_only_what_is_missing(tmp_path):
    writer = StoreWriter(tmp_path, CLASSES, 11, shard_size=4)
    assert writer.pending() == [0, 1, 2]
    fill(writer, [1])
    before = (tmp_path / "00001.array_record").stat().st_mtime_ns
    # What a kill in the middle of a shard leaves: its files without the seal.
    (tmp_path / "00002.array_record").write_bytes(b"half")
    (tmp_path / "00002.jsonl.123.partial").write_bytes(b"half")
    with pytest.raises(StoreError, match="incomplete, 2 of 3 shards are missing"):
        ImageStore(tmp_path)
    again = StoreWriter(tmp_path, CLASSES, 11, shard_size=4)
    assert again.done_shards() == {1} and again.pending() == [0, 2]
    fill(again, again.pending())
    assert len(ImageStore(tmp_path)) == 11 and not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "00001.array_record").stat().st_mtime_ns == before


def test_same_images_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        fill(StoreWriter(tmp_path / name, CLASSES, 4, 4), [0])
    for suffix in ("array_record", "jsonl", "seal"):
        a, b = ((tmp_path / name / f"00000.{suffix}").read_bytes() for name in ("a", "b"))
        assert a == b


@pytest.mark.parametrize("suffix", ["array_record", "jsonl", "seal"])
def test_damage_is_detected_and_repaired(store, suffix, caplog):
    path = store.folder / f"00001.{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StoreError, match=f"damaged: .*00001.{suffix}"):
        ImageStore(store.folder)
    writer = StoreWriter(store.folder, CLASSES, 11, shard_size=4)
    with caplog.at_level(logging.WARNING):
        assert writer.pending() == [1]
    assert "shard 1 must be written again" in caplog.text
    fill(writer, [1])
    assert ImageStore(store.folder).entries == store.entries


def test_writer_refuses_what_does_not_belong(tmp_path):
    writer = StoreWriter(tmp_path, CLASSES, 11, shard_size=4)
    with pytest.raises(StoreError, match="begun with count 11, now 12"):
        StoreWriter(tmp_path, CLASSES, 12, shard_size=4)
    image, entry = make(0)
    with pytest.raises(StoreError, match="1 images and 1 entries, expected 4"):
        writer.write_shard(0, [image], [entry])
    with pytest.raises(StoreError, match="label 1 and class 'dog'"):
        writer.write_shard(0, [image] * 4, [Entry(label=1, class_name="dog", index=0)] * 4)
    with pytest.raises(StoreError, match="shard 3: expected 0 to 2"):
        writer.span(3)
    with pytest.raises(StoreError, match="is not an image store"):
        ImageStore(tmp_path / "elsewhere")
    writer = StoreWriter(tmp_path / "twice", CLASSES, 2)
    writer.write_shard(0, [image, image], [entry, entry])
    with pytest.raises(StoreError, match="two images are called F%2FA-18/000000"):
        ImageStore(tmp_path / "twice")


def test_copy_keeps_bytes_and_adds_scores(store, tmp_path):
    keep = [7, 2, 5]
    scores = [{"probability": i / 10} for i in keep]
    kept = copy_store(store, tmp_path / "kept", keep, scores, shard_size=2)
    assert kept.ids == tuple(store.ids[i] for i in keep)
    assert [kept.encoded(i) for i in range(3)] == [store.encoded(i) for i in keep]
    assert kept.entries[0].scores == {"clip": 7 / 8, "probability": 0.7}
    assert Subset(store, keep).labels.tolist() == kept.labels.tolist()


def test_imagefolder_reads_back(store, tmp_path):
    path = export(store, tmp_path / "folder", "imagefolder")
    data = load_dataset(DataConfig(source="folder", path=str(path), test_fraction=0.4))
    assert data.class_names == tuple(sorted(CLASSES))
    found = {}
    for part in (data.train, data.test):
        for i in range(len(part)):
            found[part[i].id.removesuffix(".png")] = (
                part[i].image,
                data.class_names[part[i].label],
            )
    assert sorted(found) == sorted(store.ids)
    for i, entry in enumerate(store.entries):
        np.testing.assert_array_equal(found[entry.id][0], store[i].image)
        assert found[entry.id][1] == entry.class_name
    lines = [json.loads(x) for x in (path / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [x["id"] for x in lines] == list(store.ids)
    assert all((path / x["file_name"]).exists() for x in lines)


def test_webdataset_reads_back(store, tmp_path):
    path = export(store, tmp_path / "wds", "webdataset", shard_size=4)
    assert (path / "classnames.txt").read_text("utf-8").splitlines() == list(CLASSES)
    tars = sorted(path.glob("*.tar"))
    assert [t.name for t in tars] == [f"shard-{i:05d}.tar" for i in range(3)]
    position = 0
    for name in tars:
        with tarfile.open(name) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for key in sorted({n.split(".")[0] for n in members}):
            row = json.loads(members[f"{key}.json"])
            assert row["id"] == store.ids[position]
            assert int(members[f"{key}.cls"]) == store.labels[position]
            image = decode_image(members[f"{key}.png"])
            np.testing.assert_array_equal(image, store[position].image)
            position += 1
    assert position == len(store)
    export(store, tmp_path / "again", "webdataset", shard_size=4)
    assert (tmp_path / "again" / tars[0].name).read_bytes() == tars[0].read_bytes()


def test_parquet_reads_back(store, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    path = export(store, tmp_path / "pq", "parquet", shard_size=8)
    tables = [pq.read_table(p) for p in sorted(path.glob("*.parquet"))]
    features = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == list(CLASSES)
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == len(store)
    for row, record, entry in zip(rows, store, store.entries, strict=True):
        np.testing.assert_array_equal(decode_image(row["image"]["bytes"]), record.image)
        assert (row["label"], row["id"], row["prompt"]) == (record.label, record.id, entry.prompt)
        assert json.loads(row["scores"]) == entry.scores


def test_export_refusals(store, tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="found 'zip'"):
        export(store, tmp_path / "x", "zip")
    with pytest.raises(StoreError, match="already exists"):
        export(store, tmp_path, "imagefolder")
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreError, match="pip install pyarrow"):
        export(store, tmp_path / "pq", "parquet")
    assert not (tmp_path / "pq").exists()
