"""The image store: atomic shards, restart, damage, copies and exports that read back equal."""

import json
import logging
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from jaxsynth.core import io
from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import DataConfig, source_digest, source_listing
from jaxsynth.data.decode import decode_image
from jaxsynth.data.export import export
from jaxsynth.data.load import load_dataset
from jaxsynth.data.store import Entry, ImageStore, StoreError, StoreWriter

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
    assert not list(store.folder.glob(".*"))
    line = json.loads((store.folder / "00000.jsonl").read_text().splitlines()[1])
    assert line["class_name"] == CLASSES[1] and line["scores"] == {"clip": 0.125}


def test_restart_writes_only_what_is_missing(tmp_path):
    writer = StoreWriter(tmp_path, CLASSES, 11, shard_size=4)
    assert writer.pending() == [0, 1, 2]
    fill(writer, [1])
    before = (tmp_path / "00001.array_record").stat().st_mtime_ns
    # What a kill in the middle of a shard leaves: its files without the seal.
    (tmp_path / "00002.array_record").write_bytes(b"half")
    (tmp_path / ".00002.jsonl.0123.tmp").write_bytes(b"half")
    with pytest.raises(StoreError, match="incomplete, 2 of 3 shards are missing"):
        ImageStore(tmp_path)
    again = StoreWriter(tmp_path, CLASSES, 11, shard_size=4)
    assert again.done_shards() == {1} and again.pending() == [0, 2]
    fill(again, again.pending())
    assert len(ImageStore(tmp_path)) == 11 and not list(tmp_path.glob(".*"))
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
    with pytest.raises(StoreError, match="1 image and 1 entry, expected 4"):
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


def test_a_store_of_several_data_sets_keeps_them_apart(tmp_path):
    datasets = ("photos", "photos", "photos night", "photos night")
    names = ("cat", "night cat", "cat", "owl")
    writer = StoreWriter(tmp_path, names, 8, datasets=datasets)
    entries = [
        Entry(label, names[label], index, dataset=datasets[label])
        for index in range(2)
        for label in range(4)
    ]
    images = [np.full((2, 2, 3), 10 * e.label + e.index, np.uint8) for e in entries]
    with pytest.raises(StoreError, match="label 0 and class 'cat'"):
        writer.write_shard(0, images, [replace(e, dataset="") for e in entries])
    writer.write_shard(0, images, entries)
    store = ImageStore(tmp_path)
    assert store.ids[0] == "photos/cat/000000" and len(set(store.ids)) == 8
    for dataset, first in (("photos", 0), ("photos night", 20)):
        own = store.of_dataset(
            dataset, [n for n, d in zip(names, datasets, strict=True) if d == dataset]
        )
        assert own.labels.tolist() == [0, 1, 0, 1]
        assert [r.image[0, 0, 0] for r in own] == [first, first + 10, first + 1, first + 11]
    turned = store.of_dataset("photos night", ("owl", "cat"))
    assert [r.image[0, 0, 0] for r in turned] == [20, 30, 21, 31]
    assert turned.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(StoreError, match=r"class 'owl' of data set 'photos' 0 times.*'night cat'"):
        store.of_dataset("photos", ("cat", "owl"))
    with pytest.raises(StoreError, match=r"data set 'phot' 0 times.*'photos', 'photos night'"):
        store.of_dataset("phot", ("cat",))


def test_identity_is_of_the_content(store, tmp_path):
    again = StoreWriter(tmp_path / "again", CLASSES, 11, shard_size=4)
    fill(again, again.pending())
    same = ImageStore(tmp_path / "again")
    assert same.digest == store.digest and source_digest(same) == source_digest(store)
    images, entries = zip(*map(make, again.span(2)), strict=True)
    again.write_shard(2, images, [replace(e, prompt="another") for e in entries])
    prompted = ImageStore(tmp_path / "again")
    assert prompted.digest != store.digest and source_digest(prompted) == source_digest(store)
    again.write_shard(2, [255 - image for image in images], entries)
    other = ImageStore(tmp_path / "again")
    assert other.digest != store.digest
    changed = {
        key for key, value in source_listing(other).items() if source_listing(store)[key] != value
    }
    assert changed == {store.ids[i] for i in (8, 9, 10)}


def test_files_of_an_unchanged_store_are_read_once(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(io, "_SETTLED", 0.0)
    read = []
    plain = io.file_digest
    monkeypatch.setattr(io, "file_digest", lambda path: read.append(path) or plain(path))
    ImageStore(store.folder)
    assert len(read) == 2 * 3
    ImageStore(store.folder)
    assert len(read) == 2 * 3


def test_one_process_writes_the_head(tmp_path):
    StoreWriter(tmp_path, CLASSES, 11, first=False)
    assert not list(tmp_path.iterdir())
    StoreWriter(tmp_path, CLASSES, 11)
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]
    with pytest.raises(StoreError, match="begun with count 11, now 12"):
        StoreWriter(tmp_path, CLASSES, 12, first=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("store.json", "{", r"store\.json: not valid JSON"),
        ("store.json", "[]", "expected a JSON object, got list"),
        ("store.json", '{"format": 1}', "count is missing"),
        ("00000.seal", "[]", r"00000\.seal: expected a JSON object, got list"),
    ],
)
def test_files_that_say_nothing_are_named(store, name, content, message):
    (store.folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        ImageStore(store.folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("index", -1, "index -1, expected 0 or more"),
        ("label", 99, "label 99 and class 'crème brûlée', which are not one class"),
        ("label", -1, "label -1 and class 'crème brûlée', which are not one class"),
        ("class_name", "../x", r"label 1 and class '\.\./x', which are not one class"),
    ],
)
def test_an_entry_whose_seal_fits_is_not_believed(store, field, value, message):
    path = store.folder / "00000.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), field: value})
    path.write_text("\n".join(lines) + "\n")
    seal = path.with_suffix(".seal")
    content = json.loads(seal.read_text()) | {".jsonl": io.file_digest(path)}
    seal.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=message):
        ImageStore(store.folder)


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
    with pytest.raises(StoreError, match=r"pip install .jaxsynth\[parquet\]"):
        export(store, tmp_path / "pq", "parquet")
    assert not (tmp_path / "pq").exists()
