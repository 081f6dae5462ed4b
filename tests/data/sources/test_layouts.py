"""Folders as people have them: layouts, rubbish, tables of labels, packed files; and refusals."""

import json
import os
import shutil
import tarfile
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image

from jaxsynth.data.dataset import DataConfig, SourceError
from jaxsynth.data.export import KINDS, export
from jaxsynth.data.load import ALWAYS, READ, load_dataset, source_of
from jaxsynth.data.prompts import prompts
from jaxsynth.data.sources.folder import _part
from jaxsynth.data.store import Entry, ImageStore, StoreWriter

RED, BLUE = (200, 0, 0), (0, 0, 200)
COLORS = {"robin": RED, "wren": BLUE, "train": (0, 200, 0)}


def draw(folder, name, count, first=0):
    """Images of a class's color; the green value tells which."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        red, _, blue = COLORS[name]
        Image.new("RGB", (8, 6), (red, i, blue)).save(folder / f"{i}.png")


def load(root, **values):
    return load_dataset(DataConfig(path=str(root), **values))


def check(data, train, test):
    """Counts, and that every record has its class's color."""
    assert (len(data.train), len(data.test)) == (train, test)
    for part in (data.train, data.test):
        for record in part:
            name = data.class_names[record.label]
            assert tuple(record.image[0, 0, ::2]) == COLORS[name][::2], (record.id, name)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Train", "Test"),
        ("TRAINING", "validation"),
        ("training_set", "test_set"),
        ("train-data", "valid"),
        ("trainset", "dev"),
        ("train_images", "eval"),
    ],
)
def test_splits_by_any_of_their_names(tmp_path, train, test):
    for name in ("robin", "wren"):
        draw(tmp_path / train / name, name, 3)
        draw(tmp_path / test / name, name, 2)
    data = load(tmp_path)
    check(data, 6, 4)
    assert data.split == f"the folder {test}/"


def test_a_class_called_train(tmp_path):
    for name in COLORS:
        draw(tmp_path / name, name, 5)
    data = load(tmp_path)
    assert data.class_names == ("robin", "train", "wren")
    check(data, 12, 3)


def test_test_images_elsewhere(tmp_path):
    for name in ("robin", "wren"):
        draw(tmp_path / "mine" / name, name, 3)
        draw(tmp_path / "theirs" / name, name, 2)
    data = load(tmp_path / "mine", test_path=str(tmp_path / "theirs"))
    check(data, 6, 4)
    with pytest.raises(SourceError, match=r"test_path: .*nowhere: no such folder"):
        load(tmp_path / "mine", test_path=str(tmp_path / "nowhere"))


def test_an_unusable_test_folder_can_be_passed_over(tmp_path):
    for name in ("robin", "wren"):
        draw(tmp_path / "train" / name, name, 5)
    draw(tmp_path / "test", "wren", 2)
    with pytest.raises(SourceError, match=r"2 images side by side.*test_split=none"):
        load(tmp_path)
    check(load(tmp_path, test_split="none"), 8, 2)


RUBBISH = [
    "Thumbs.db", "robin/Thumbs.db", "desktop.ini", "wren/Desktop.ini", ".DS_Store", "robin/._0.png",
    "__MACOSX/robin/._0.png", "robin/@eaDir/0.png", ".ipynb_checkpoints/0.png", "robin/0.txt",
    "robin/0.caption", "wren/1.png.json", "README.md", "LICENSE", "classes.txt", "notes.csv",
    "robin/0.MOV", "wren/Picasa.ini",
]  # fmt: skip


def test_known_rubbish_is_passed_over(tmp_path):
    for name in ("robin", "wren"):
        draw(tmp_path / name, name, 5)
    before = load(tmp_path).digest
    for name in RUBBISH:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"rubbish")
    assert load(tmp_path).digest == before


def test_all_bad_files_are_named_at_once(tmp_path):
    for name in ("robin", "wren"):
        draw(tmp_path / name, name, 3)
    whole = (tmp_path / "wren" / "0.png").read_bytes()
    bad = {
        "robin/empty.jpg": b"",
        "robin/page.jpg": b"<html>",
        "wren/cut.png": whole[: len(whole) - 30],
        "wren/a.mp4": b"x",
        "stray.docx": b"x",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "wren" / "more").mkdir()
    (tmp_path / "wren" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "wren" / "pipe.jpg")
    (tmp_path / "robin" / ".far.jpg.icloud").write_bytes(b"bplist00")
    with pytest.raises(SourceError, match=r"stray\.docx: a file beside the class folders"):
        load(tmp_path)
    (tmp_path / "stray.docx").unlink()
    with pytest.raises(SourceError) as error:
        load(tmp_path)
    for name in ("robin/empty.jpg", "robin/page.jpg", "wren/cut.png", "wren/a.mp4", "wren/more",
                 "wren/gone.jpg", "wren/pipe.jpg", "robin/far.jpg"):  # fmt: skip
        assert f"{name}: " in str(error.value)
    assert str(error.value).count("\n") == 0
    assert "8 files or folders cannot be used" in str(error.value)
    assert "move or remove anything else" in str(error.value)


@pytest.mark.parametrize("name", [b"gar\xe7on", b"robin/\xff.png"])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
    for bird in ("robin", "wren"):
        draw(tmp_path / bird, bird, 3)
    path = os.path.join(os.fsencode(tmp_path), name)
    if name.endswith(b".png"):
        shutil.copy(tmp_path / "robin" / "0.png", path)
    else:
        shutil.copytree(os.fsencode(tmp_path / "robin"), path)
    with pytest.raises(SourceError, match=r"the name of b'.*\\x.* is not UTF-8.*rename it"):
        load(tmp_path)


TABLES = {
    "labels.csv": "file,label\n0.png,robin\n1.png,wren\n2.png,robin\n3.png,wren\n",
    "labels.tsv": "image\tclass\n0\trobin\n1\twren\n2\trobin\n3\twren\n",
    "metadata.csv": "id;species\n0.png;robin\n1.png;wren\n2.png;robin\n3.png;wren\n",
    "labels.jsonl": "".join(
        json.dumps({"file_name": f"{i}.png", "label": ["robin", "wren"][i % 2]}) + "\n"
        for i in range(4)
    ),
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"{i}.png", "n": i, "category": ["robin", "wren"][i % 2]}) + "\n\n"
        for i in range(4)
    ),
    "truth.txt": "0.png,robin\r\n1.png,wren\r\n2.png,robin\r\n3.png,wren\r\n",
}


@pytest.mark.parametrize("below", ["", "images"])
@pytest.mark.parametrize("name", TABLES)
def test_images_side_by_side_with_a_table(tmp_path, name, below):
    for i in range(4):
        draw(tmp_path / below, ("robin", "wren")[i % 2], 1, i)
    (tmp_path / name).write_text(TABLES[name])
    values = {"labels": str(tmp_path / name)} if name == "truth.txt" else {}
    data = load(tmp_path, **values)
    assert data.class_names == ("robin", "wren")
    check(data, 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n0.png,robin\n", r"1 image of .* in no row, the first is '1\.png'"),
        ("file,label\n0.png,robin\n9.png,wren\n", r"line 3: no image '9\.png'"),
        ("file,label\n0.png,robin\n1.png,\n", r"line 3: '1\.png' has no label"),
        ("file,label\n0.png,robin\n0.png,wren\n", r"line 3: '0\.png' is 'wren' here and 'robin'"),
        ("file,width\n0.png,1,2\n", r"line 2: 3 cells, expected 2"),
        ("name,label\ncat,robin\n", "no column names images"),
        ("file,width,height\n0.png,8,6\n1.png,8,6\n", "no column of classes; expected one of"),
        ("", "has no rows"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path, text, message):
    draw(tmp_path, "robin", 2)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(SourceError, match=rf"labels\.csv.*{message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "spelling",
    [
        "images\\{}.png",
        "./images/{}.png",
        ".\\images\\{}.PNG",
        "Images/{}.Png",
        "{root}/images/{}.png",
    ],
)
def test_files_as_other_systems_and_programs_spell_them(tmp_path, spelling):
    rows = ["\ufeffFile;Label"]
    for i in range(4):
        draw(tmp_path / "images", ("robin", "wren")[i % 2], 1, i)
        rows.append(f"{spelling.format(i, root=tmp_path)};{('robin', 'wren')[i % 2]}")
    (tmp_path / "labels.csv").write_text("\r\n".join(rows), encoding="utf-8")
    check(load(tmp_path), 2, 2)


def test_a_spelling_of_two_files_is_neither(tmp_path):
    for name in ("A.png", "a.png"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("file,label\nA.png,robin\na.PNG,wren\n")
    with pytest.raises(SourceError, match=r"line 3: no image 'a\.PNG'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ((1.0, 2.0, 1.0), ("1.0", "2.0")),
        ((True, False, True), ("False", "True")),
        (("wren", None, "robin"), r"line 2: '1\.png' has no label"),
        ((None, "wren", "robin"), r"line 1: '0\.png' has no label"),
        ((["wren"], ["wren"], ["robin"]), r"no column of classes; expected one of"),
    ],
)
def test_labels_of_any_kind_in_json_lines(tmp_path, labels, found):
    draw(tmp_path, "robin", 3)
    rows = [json.dumps({"file_name": f"{i}.png", "label": x}) for i, x in enumerate(labels)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    if isinstance(found, str):
        with pytest.raises(SourceError, match=found):
            load(tmp_path)
        return
    source, names, _ = _part(tmp_path, None, DataConfig())
    assert names == found
    assert [names[label] for label in source.labels] == sorted(map(str, labels))


@pytest.mark.parametrize(
    ("kinds", "train", "test"),
    [
        (("train", "test"), 4, 2),
        (("Training", "Validation"), 4, 2),
        (("train", "val", "test"), 2, 2),  # images for validation are not used beside a test's
        (("test",), 4, 2),  # held out, as where nothing is said
    ],
)
def test_a_table_says_which_images_are_for_tests(tmp_path, kinds, train, test):
    for number, name in enumerate(("robin", "wren") * 3):
        draw(tmp_path, name, 1, first=number)
    rows = ["file_name,label,split"]
    for number, name in enumerate(("robin", "wren") * 3):
        kind = kinds[number // 2] if number // 2 < len(kinds) else kinds[0]
        rows.append(f"{number}.png,{name},{kind}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = load(tmp_path)
    check(data, train, test)
    if len(kinds) > 1:
        assert {r.id for r in data.test} == {
            row.split(",")[0] for row in rows if row.endswith(f",{kinds[-1]}")
        }
    (tmp_path / "labels.csv").write_text("\n".join([*rows[:-1], "5.png,wren,3"]))
    with pytest.raises(SourceError, match="line 7: split is '3', expected train, test or"):
        load(tmp_path)


def test_a_flat_folder_says_what_to_do(tmp_path):
    draw(tmp_path, "robin", 2)
    with pytest.raises(SourceError, match=r"2 images side by side.*labels\.csv \(file,label\)"):
        load(tmp_path)
    with pytest.raises(SourceError, match="a file, expected the folder of the images"):
        load(tmp_path / "0.png")


@pytest.fixture
def store(tmp_path):
    names = ("wren", "robin " + "x" * 300, "F/A-18")
    writer = StoreWriter(tmp_path / "store", names, 12)
    entries = [Entry(i % 3, names[i % 3], i // 3, prompt=f"p{i}") for i in range(12)]
    images = [np.full((6, 8, 3), i, np.uint8) for i in range(12)]
    writer.write_shard(0, images, entries)
    return ImageStore(tmp_path / "store")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [False, True])
def test_what_is_exported_is_read(store, tmp_path, kind, split):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    root = tmp_path / kind
    if split:
        export(store, root / "train", kind, shard_size=5)
        export(store, root / "test", kind, shard_size=5)
    else:
        export(store, root, kind, shard_size=5)
    data = load(root)
    names = {data.class_names[data.train.labels[0]]}
    assert sorted(data.class_names) == sorted(store.class_names)
    assert len(data.train) + len(data.test) == (24 if split else 12)
    for part in (data.train, data.test):
        for record in part:
            names.add(data.class_names[record.label])
            expected = store.class_names.index(data.class_names[record.label])
            assert record.image.shape == (6, 8, 3) and record.image[0, 0, 0] % 3 == expected
    assert names == set(store.class_names)
    assert load(root).digest == data.digest
    assert load(root, image_size=4).digest != data.digest


def test_webdataset_of_others(tmp_path):
    """Keys with a folder, labels as texts in .cls or .json, no classnames.txt."""
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for i in range(4):
            draw(tmp_path / "tmp", ("robin", "wren")[i % 2], 1, i)
            tar.add(tmp_path / "tmp" / f"{i}.png", f"a/{i}.png")
            said = tmp_path / "said"
            said.write_text("robin" if i == 0 else json.dumps({"label": ("robin", "wren")[i % 2]}))
            tar.add(said, f"a/{i}.{'json' if i else 'cls'}")
    for path in (tmp_path / "tmp").iterdir():
        path.unlink()
    (tmp_path / "tmp").rmdir()
    (tmp_path / "said").unlink()
    check(load(tmp_path), 2, 2)


def test_parquet_and_arrow_of_hugging_face(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = []
    for i in range(4):
        draw(tmp_path / "tmp", ("robin", "wren")[i % 2], 1, i)
        png = (tmp_path / "tmp" / f"{i}.png").read_bytes()
        rows.append({"img": {"bytes": png, "path": None}, "label": i % 2})
    features = {"label": {"names": ["robin", "wren"], "_type": "ClassLabel"}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    hub, saved = tmp_path / "hub" / "data", tmp_path / "saved" / "train"
    hub.mkdir(parents=True)
    saved.mkdir(parents=True)
    pq.write_table(table, hub / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 1), hub / "test-00000-of-00001.parquet")
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (saved / "state.json").write_text("{}")
    data = load(tmp_path / "hub")
    assert data.split == "the files' own test images" and data.class_names == ("robin", "wren")
    check(data, 4, 1)
    check(load(saved), 2, 2)
    check(load(tmp_path / "saved"), 2, 2)
    without = table.set_column(1, "label", pa.array([-1] * 4))
    pq.write_table(without, hub / "test-00000-of-00001.parquet")
    with pytest.raises(SourceError, match=r"test-0.*a label is below 0.*without one; leave"):
        load(tmp_path / "hub")


@pytest.mark.parametrize(
    ("values", "source"),
    [
        ({}, "digits"),
        ({"path": "photos"}, "folder"),
        ({"path": "photos", "name": "pets"}, "folder"),
        ({"name": "textures"}, "builtin"),
        ({"name": "cifar10"}, "tfds"),
        ({"source": "tfds", "name": "cifar10", "path": "data"}, "tfds"),
    ],
)
def test_the_source_follows_from_what_is_given(values, source):
    assert source_of(DataConfig(**values)) == source


OTHER = {"path": "photos", "test_fraction": 0.5, "split_seed": 3, "images_per_class": 7,
         "train_split": "big", "test_split": "small", "test_path": "more", "labels": "a.csv",
         "name": "pets", "image_size": 9}  # fmt: skip


@pytest.mark.parametrize("source", READ)
@pytest.mark.parametrize("field", [f.name for f in fields(DataConfig) if f.name not in ALWAYS])
def test_a_setting_that_a_source_does_not_read_is_refused(source, field):
    config = replace(DataConfig(source=source), **{field: OTHER[field]})
    if field in READ[source]:
        assert source_of(config) == source
    else:
        with pytest.raises(SourceError, match=f"{field}: {OTHER[field]!r} is not used by source"):
            load_dataset(config)


@pytest.mark.parametrize("field", ["test_fraction", "split_seed"])
def test_what_is_for_held_out_images_is_refused_where_there_are_others(tmp_path, field):
    for name in ("robin", "wren"):
        draw(tmp_path / "train" / name, name, 3)
        draw(tmp_path / "test" / name, name, 2)
    value = {field: OTHER[field]}
    with pytest.raises(SourceError, match=f"{field}: not used, the test images are those of test/"):
        load(tmp_path, **value)
    with pytest.raises(SourceError, match=f"{field}: not used, the test images are those of test_"):
        load(tmp_path / "train", test_path=str(tmp_path / "test"), **value)
    load(tmp_path, test_split="none", **value)


@pytest.mark.parametrize(
    "names",
    [
        ("golden_retriever", "golden retriever"),
        ("caf\u00e9", "cafe\u0301"),
        ("Wren", "wren"),
        ("WildRobin", "wild robin"),
        ("a  b", "a b"),
        ("wren\u200b", "wren"),
        ("\uff57\uff52\uff45\uff4e", "wren"),
    ],
)
def test_classes_with_one_prompt_are_refused(tmp_path, names):
    for name in names:
        draw(tmp_path / name, "wren", 3)
    with pytest.raises(SourceError, match=r"get the same prompt.*merge them, rename one"):
        load(tmp_path)
    first = sorted(names)[0]
    data = load(tmp_path, display_names={first: "another bird"})
    assert len(set(prompts(data))) == 2
    assert load(tmp_path, class_names=(first,)).class_names == (first,)


def test_a_folder_with_nothing_but_an_archive_says_what_to_do(tmp_path):
    (tmp_path / "Photos.ZIP").write_bytes(b"PK\3\4")
    with pytest.raises(SourceError, match=r"no class folders found; .*; unpack Photos\.ZIP there"):
        load(tmp_path)
