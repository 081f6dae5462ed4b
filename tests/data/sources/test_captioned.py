"""Folders of captioned images: both layouts, what is a caption's place, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import DataConfig, Dataset, SourceError
from jaxsynth.data.load import load_dataset
from jaxsynth.data.sources.captioned import captions, read_captions

TEXTS = {"1.png": "a red  square\n", "2.jpg": "ein Würfel", "10.png": "a last one", "3.png": "c"}


def images(root):
    root.mkdir(exist_ok=True)
    for i, name in enumerate(TEXTS):
        Image.fromarray(np.full((6, 6, 3), 40 * i, np.uint8)).save(root / name)
    return root


def table(root, texts=TEXTS, key="text"):
    lines = [json.dumps({"file_name": name, key: text}) for name, text in texts.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def beside(root):
    for name, text in TEXTS.items():
        (root / name).with_suffix(".txt").write_text(text, "utf-8")


def load(root, **more):
    return load_dataset(DataConfig(source="captions", path=str(root), **more))


def texts_of(data):
    parts = (data.train, data.test)
    return {id_: x for part in parts for id_, x in zip(part.ids, captions(data, part), strict=True)}


@pytest.mark.parametrize("write", [table, beside, lambda root: table(root, key="caption")])
def test_each_image_has_its_text(tmp_path, write):
    root = images(tmp_path / "my_toys")
    write(root)
    data = load(root, test_fraction=0.25)
    assert data.class_names == ("my_toys",) and data.name == "my_toys"
    assert (len(data.train), len(data.test)) == (3, 1)
    assert texts_of(data) == {name: " ".join(text.split()) for name, text in TEXTS.items()}


def test_a_text_is_part_of_what_identifies_the_data(tmp_path):
    root = images(tmp_path / "x")
    table(root)
    before = load(root)
    table(root, {**TEXTS, "3.png": "another"})
    after = load(root)
    changed = {k for k, v in before.listing.items() if after.listing[k] != v}
    assert {name.split(": ")[1] for name in changed} == {"3.png"}


def test_data_without_texts_are_told_by_their_class():
    data = load_dataset(DataConfig(source="digits", class_names=("7", "2")))
    found = dict(zip(captions(data, data.test), data.test.labels, strict=True))
    assert found == {"a photo of the digit seven": 0, "a photo of the digit two": 1}


def test_what_is_missing_is_named(tmp_path):
    root = images(tmp_path / "x")
    with pytest.raises(SourceError, match=r"4 of 4 images have no text, the first is '1\.png'"):
        load(root)
    rows = {
        '{"file_name": "9.png", "text": "x"}': "line 1: no image '9.png'",
        '{"file_name": "1.png", "label": "x"}': "line 1: expected file_name and text or caption",
        '{"file_name": "1.png", "text": "x"}\n{"file_name": "1.png", "text": "y"}': "another",
        '{"file_name": "1.png", "text": "x"}': "3 of 4 images have no text",
    }
    for text, message in rows.items():
        (root / "metadata.jsonl").write_text(text)
        with pytest.raises(SourceError, match=message):
            load(root)
    (root / "notes.md").write_text("")
    with pytest.raises(SourceError, match=r"notes\.md: not an image file"):
        load(root)
    for path, message in ((tmp_path / "gone", "no such folder"), ("", "needs the folder")):
        with pytest.raises(SourceError, match=message):
            load(path)


def of_classes(tmp_path) -> tuple[Path, Dataset]:
    """Photos in folders of classes, and their data set."""
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name / f"{i}.png")
    return root, load_dataset(DataConfig(path=str(root), test_fraction=0.5))


def test_images_of_classes_have_captions_in_a_table_or_beside_them(tmp_path):
    root, data = of_classes(tmp_path)
    ids = list(data.train.ids)
    lines = [json.dumps({"file_name": id_, "text": f"this is {id_}"}) for id_ in ids]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    for id_ in ids:
        (root / id_).with_suffix(".txt").write_text(f"this is {id_}")
    found = [read_captions(path, data) for path in (tmp_path / "texts.jsonl", root)]
    assert [one.of(data.train) for one in found] == [[f"this is {id_}" for id_ in ids]] * 2
    assert found[0].digest == found[1].digest
    (root / ids[0]).with_suffix(".txt").write_text("another")
    assert read_captions(root, data).digest != found[0].digest
    (root / ids[1]).with_suffix(".txt").unlink()
    with pytest.raises(UserError, match=rf"no text of 1 image of 2, the first is '{ids[1]}'"):
        read_captions(root, data).of(data.train)
    (tmp_path / "texts.jsonl").write_text('{"file_name": "cat/9.png", "text": "a"}')
    with pytest.raises(UserError, match=r"texts.jsonl, line 1: no image 'cat/9.png'"):
        read_captions(tmp_path / "texts.jsonl", data)
    with pytest.raises(UserError, match=r"captions: .*nowhere: no such file or folder"):
        read_captions(tmp_path / "nowhere", data)
