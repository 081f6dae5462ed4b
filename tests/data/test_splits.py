"""Few-shot splits and prompts."""

import json

import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.data import prompts
from jaxsynth.data.dataset import DataConfig, SourceError
from jaxsynth.data.load import load_dataset
from jaxsynth.data.splits import few_shot, load_shots
from jaxsynth.data.views import select_classes


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig())


def test_shots_are_nested_and_seeded(digits):
    small, large = (few_shot(digits, k, 0, val_fraction=0.25) for k in (7, 8))
    for label in range(10):
        a, b = small.train[label] + small.val[label], large.train[label] + large.val[label]
        assert a == b[:7] and len(set(b)) == 8
        assert all(digits.train.labels[digits.train.ids.index(id_)] == label for id_ in b)
    assert few_shot(digits, 8, 1, val_fraction=0.25).train != large.train
    assert [len(v) for v in large.val] == [2] * 10
    assert not set(large.train[0]) & set(large.val[0])


def test_a_class_keeps_its_shots_among_other_classes(digits):
    few = select_classes(digits, ("7", "2"))
    assert few_shot(few, 4, 3).train[0] == few_shot(digits, 4, 3).train[7]


def test_one_shot_leaves_no_validation(digits):
    shots = few_shot(digits, 1, 0, val_fraction=0.25)
    assert not shots.has_validation and all(len(t) == 1 for t in shots.train)
    assert len(shots.val_source(digits)) == 0
    with pytest.raises(SourceError, match="val_shots"):
        few_shot(digits, 1, 0, val_shots=1)


def test_saved_and_read_again(digits, tmp_path):
    shots = few_shot(digits, 4, 0, val_shots=1)
    shots.save(tmp_path / "shots.json")
    assert load_shots(tmp_path / "shots.json") == shots
    assert json.loads((tmp_path / "shots.json").read_text())["train"][0] == list(shots.train[0])
    train = shots.train_source(digits)
    assert np.bincount(train.labels).tolist() == [3] * 10
    assert [train[i].id for i in range(3)] == list(shots.train[0])
    with pytest.raises(SourceError, match="drawn for classes"):
        shots.train_source(select_classes(digits, ("1",)))
    good = json.loads((tmp_path / "shots.json").read_text())
    for change, message in (
        ({"seed": None}, "seed=None .* expected an integer"),
        ({"train": {}}, "train=.* expected a list"),
        ({"val": [[1]] * 10}, r"val\[0\]\[0\]=1 .* expected a string"),
        (
            {"class_names": ["0"]},
            "Shots: train and val have 10 and 10 lists of ids, expected one for each of 1",
        ),
        ({"more": 1}, "more: no such field"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=rf"other\.json: {message}"):
            load_shots(tmp_path / "other.json")


def test_too_few_images_name_class_and_count(digits):
    with pytest.raises(SourceError, match=r"200 shots asked for, but '0' has \d+"):
        few_shot(digits, 200, 0)
    with pytest.raises(SourceError, match="shots"):
        few_shot(digits, 0, 0)


def test_prompts(digits):
    assert prompts.prompt(digits, 3) == prompts.prompt(digits, "3") == "a photo of the digit three"
    assert prompts.prompts(digits)[9] == "a photo of the digit nine"
    with pytest.raises(ValueError, match="'three' is not in digits"):
        prompts.prompt(digits, "three")
    assert prompts.default_template("eurosat/rgb:2.0.0") == "a satellite photo of a {}"
    assert prompts.default_template("cars196") == "a car photo of a {}"
    assert prompts.default_template("cifar10") == "a photo of a {}"
    assert prompts.default_template("mine") == "a photo of a {}"


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("apple_pie", "apple pie"),
        ("AnnualCrop", "annual crop"),
        ("polka-dotted", "polka-dotted"),
        ("F/A-18", "F/A-18"),
        ("McLaren", "McLaren"),
        ("McDonnell_Douglas", "McDonnell Douglas"),
        ("BMW", "BMW"),
        ("Faces_easy", "Faces easy"),
        ("_", "_"),
    ],
)
def test_display_names(name, readable):
    assert prompts.display_name(name) == readable
    assert prompts.display_name(name, raw=True) == name


def test_templates_come_by_name_or_from_a_file(tmp_path):
    assert len(prompts.read_templates("imagenet7")) == 7
    path = tmp_path / "templates.txt"
    path.write_text("a photo of a {}\n\nart of the {}, old\n")
    assert prompts.read_templates(str(path)) == ("a photo of a {}", "art of the {}, old")
    for text, message in (
        ("", "templates.txt: holds no template"),
        ("a photo\n", "templates.txt: template 'a photo': expected exactly one"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            prompts.read_templates(str(path))
    with pytest.raises(UserError, match="no such file, and none of imagenet7"):
        prompts.read_templates("other")


def test_names_and_template_from_the_config():
    config = DataConfig(template="{} written by hand", display_names={"3": "a three"})
    data = load_dataset(config)
    assert prompts.prompt(data, 3) == "a three written by hand"
    assert prompts.prompt(data, 4) == "four written by hand"
    assert prompts.prompt(load_dataset(DataConfig(raw_names=True)), 4) == "a photo of the digit 4"
    with pytest.raises(ValueError, match=r"no class is called \['thre'\]"):
        load_dataset(DataConfig(display_names={"thre": "x"}))
    for template in ("a photo", "{} and {}", "{name}"):
        with pytest.raises(ValueError, match="exactly one"):
            load_dataset(DataConfig(template=template))
