"""The identity of data: what changes it, what does not, and that the changed file can be named."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxsynth.data.conditions import partner_digests
from jaxsynth.data.dataset import DataConfig, SourceError, source_digest, source_listing
from jaxsynth.data.load import load_dataset
from jaxsynth.data.sources.arrays import ArraySource, cached
from jaxsynth.data.splits import few_shot
from jaxsynth.data.views import Subset, joined, shared


def photo(path, value, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        for i in range(4):
            photo(tmp_path / "photos" / name / f"{i}.png", 100 * number + i)
    return tmp_path / "photos"


def load(path, **fields):
    return load_dataset(DataConfig(source="folder", path=str(path), **fields))


def test_a_folder_is_the_same_wherever_it_lies(photos, tmp_path, monkeypatch):
    before = load(photos).digest
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    os.symlink(photos, tmp_path / "link")
    for spelling in (
        f"{photos}/",
        "photos",
        "./photos/.",
        "photos/../photos",
        tmp_path / "elsewhere" / "photos",
        tmp_path / "link",
    ):
        assert load(spelling).digest == before, spelling


def replaced(photos):
    path = photos / "dog" / "2.png"
    photo(path, 7)
    return {"changed dog/2.png"}


def replaced_with_its_old_times(photos):
    path = photos / "dog" / "2.png"
    stamp = path.stat()
    photo(path, 103)  # as many bytes as before
    assert path.stat().st_size == stamp.st_size
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    return {"changed dog/2.png"}


def added(photos):
    photo(photos / "cat" / "9.png", 3)
    return {"added cat/9.png"}


def removed(photos):
    (photos / "cat" / "3.png").unlink()
    return {"removed cat/3.png"}


def moved(photos):
    (photos / "cat" / "3.png").rename(photos / "dog" / "33.png")
    return {"removed cat/3.png", "added dog/33.png"}


@pytest.mark.parametrize(
    "change",
    [replaced, replaced_with_its_old_times, added, removed, moved],
    ids=lambda f: f.__name__,
)
def test_a_changed_photo_changes_the_identity_and_is_named(photos, change):
    before = load(photos, test_fraction=0.5)
    old, digest = dict(before.listing), before.digest
    whole = {key.split(": ")[1]: value for key, value in old.items() if ": " in key}
    expected = change(photos)
    after = load(photos, test_fraction=0.5)
    assert after.digest != digest
    now = {key.split(": ")[1]: value for key, value in after.listing.items() if ": " in key}
    found = {f"added {key}" for key in now.keys() - whole.keys()}
    found |= {f"removed {key}" for key in whole.keys() - now.keys()}
    found |= {f"changed {key}" for key in now.keys() & whole.keys() if now[key] != whole[key]}
    assert found == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"template": "a sketch of a {}"},
        {"display_names": {"cat": "kitten"}},
        {"image_size": 4},
        {"class_names": ("cat",)},
        {"class_names": ("dog", "cat")},
        {"test_fraction": 0.5},
        {"split_seed": 3},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_setting_that_changes_what_is_seen_changes_the_identity(photos, fields):
    assert load(photos, **fields).digest != load(photos).digest


def test_only_the_chosen_photos_count(photos):
    shots = few_shot(load(photos), 1, 0)
    before = source_digest(shots.train_source(load(photos)))
    dataset = load(photos)
    chosen = {id_ for ids in shots.train for id_ in ids}
    other = next(id_ for id_ in dataset.train.ids if id_ not in chosen)
    photo(photos / other, 50)
    assert source_digest(shots.train_source(load(photos))) == before
    photo(photos / next(iter(chosen)), 50)
    assert source_digest(shots.train_source(load(photos))) != before


def arrays(**changes):
    images = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    values = {"images": images, "labels": np.array([0, 1, 0], np.int32), "ids": ("a", "b", "c")}
    return ArraySource(**(values | changes))


@pytest.mark.parametrize(
    "other",
    [
        lambda: arrays(images=arrays().images[::-1]),
        lambda: arrays(images=arrays().images.reshape(3, 1, 4, 3)),
        lambda: arrays(labels=np.array([0, 1, 1], np.int32)),
        lambda: arrays(ids=("a", "b", "d")),
        lambda: arrays(maps={"depth": np.zeros((3, 2, 2), np.uint8)}),
        lambda: Subset(arrays(), [0, 1]),
        lambda: Subset(arrays(), [1, 0, 2]),
        lambda: Subset(arrays(), [0, 1, 2], [1, 1, 1]),
    ],
)
def test_arrays_are_identified_by_pixels_labels_and_ids(other):
    assert source_digest(arrays()) == source_digest(arrays())
    assert source_digest(other()) != source_digest(arrays())


def test_views_of_the_same_records_are_the_same():
    whole = arrays()
    assert source_digest(Subset(whole, range(3))) == source_digest(whole)
    assert source_digest(cached(Subset(whole, [0, 2]))) == source_digest(Subset(whole, [0, 2]))
    nested = Subset(Subset(whole, [2, 1, 0]), [0, 2])
    assert source_digest(nested) == source_digest(Subset(whole, [2, 0]))
    assert list(source_listing(Subset(whole, [0, 0]))) == ["a", "a (2)"]


def test_joined_data_sets_hold_what_each_holds(photos):
    digits = load_dataset(DataConfig(class_names=("1", "2")))
    both = joined({"a": load(photos), "b": digits})
    before = both.digest
    assert joined({"a": load(photos), "b": digits}).digest == before
    photo(photos / "cat" / "1.png", 99)
    assert joined({"a": load(photos), "b": digits}).digest != before


def test_sources_share_places_in_proportion():
    """As long as both: the one comes several times over, of the other the first are taken."""
    few, many = (
        ArraySource(
            np.arange(first, first + n, dtype=np.uint8)[:, None, None, None].repeat(3, 3),
            np.arange(n, dtype=np.int32) % 2,
            [f"{first + i}" for i in range(n)],
        )
        for first, n in ((0, 2), (100, 6))
    )
    one = shared({"few": few, "many": many}, {"few": 3.0, "many": 1.0})
    seen = [int(one[i].image[0, 0, 0]) for i in range(len(one))]
    assert seen == [0, 1, 0, 1, 0, 1, 100, 101]
    assert one.labels.tolist() == [0, 1] * 4 and len(set(one.ids)) == 8
    even = shared({"few": few, "many": many}, {"few": 1.0, "many": 1.0})
    assert [int(even[i].image[0, 0, 0]) for i in range(8)] == [0, 1, 0, 1, 100, 101, 102, 103]
    with pytest.raises(SourceError, match="many: a set without images"):
        shared({"few": few, "many": Subset(many, [])}, {"few": 1.0, "many": 1.0})


def test_condition_files_are_identified_by_content(photos, tmp_path):
    source = load(photos).train
    for id_ in source.ids:
        photo(tmp_path / "depth" / id_, 5)
    before = partner_digests(source, tmp_path / "depth")
    assert list(before) == list(source.ids)
    photo(tmp_path / "depth" / source.ids[2], 6)
    after = partner_digests(source, tmp_path / "depth")
    assert {key for key in before if before[key] != after[key]} == {source.ids[2]}
