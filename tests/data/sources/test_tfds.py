"""TensorFlow Datasets without TensorFlow: a small data set of our own is written and read."""

import importlib
import os
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from jaxsynth.data.dataset import DataConfig, SourceError
from jaxsynth.data.load import load_dataset
from jaxsynth.methods.robustness.sets import SetConfig, SetsConfig, load_sets

BUILDER = '''
import io

import tensorflow_datasets as tfds
from PIL import Image


class Builder(tfds.core.GeneratorBasedBuilder):
    """Two classes of plain colours."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["red_fox", "GreenFrog"]),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(12, 0), "test": self._generate_examples(6, 100)}

    def _generate_examples(self, count, first):
        for i in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 6), (first + i, i % 2, 0)).save(buffer, "PNG")
            buffer.seek(0)
            yield i, {"image": buffer, "label": i % 2}
'''


def builder_class(packages, name, code):
    """The builder of a package written for the test."""
    package = packages / name
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / f"{name}_dataset_builder.py").write_text(code)
    sys.path.insert(0, str(packages))
    try:
        return importlib.import_module(f"{name}.{name}_dataset_builder").Builder
    finally:
        sys.path.remove(str(packages))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data directory with the set in it."""
    data_dir = tmp_path_factory.mktemp("tfds")
    builder = builder_class(tmp_path_factory.mktemp("packages"), "colour_animals", BUILDER)
    builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return str(data_dir)


def test_read_without_tensorflow(prepared):
    config = DataConfig(source="tfds", name="colour_animals", path=prepared)
    data = load_dataset(config)
    assert data.class_names == ("red_fox", "GreenFrog")
    assert data.display_names == ("red fox", "green frog")
    assert (len(data.train), len(data.test), data.split) == (12, 6, "the split test")
    assert sorted(r.image[0, 0, 0] for r in (data.test[i] for i in range(6))) == [*range(100, 106)]
    for i in range(12):
        record = data.train[i]
        assert record.image.shape == (6, 8, 3) and record.label == record.image[0, 0, 1]
        assert record.label == data.train.labels[i] and record.id == f"train/{i:08d}"
    assert "tensorflow" not in sys.modules
    small = load_dataset(
        DataConfig(source="tfds", name="colour_animals", path=prepared, image_size=4)
    )
    assert small.train[0].image.shape == (4, 4, 3)


def test_slices_subsets_and_batches(prepared):
    from jaxsynth.data.pipeline.batches import train_batches

    config = DataConfig(
        source="tfds",
        name="colour_animals",
        path=prepared,
        train_split="train[:50%]",
        test_split="train[50%:]",
        class_names=("GreenFrog",),
    )
    data = load_dataset(config)
    assert set(data.train.labels) == {0} and len(data.train) + len(data.test) == 6
    batch = next(train_batches(data.train, 2, 0))
    assert (batch["image"][:, 0, 0, 1] == 1).all() and not np.any(batch["label"])


def test_a_split_is_a_set_of_a_robustness_run(prepared, tmp_path):
    """Its classes are the model's, in whatever order the model has them."""
    (tmp_path / "classes.txt").write_text("GreenFrog\nyellow hen\nred_fox\n")
    one = SetConfig("tfds", name="colour_animals", path=prepared)
    train = SetConfig("tfds", name="colour_animals", path=prepared, split="train", count=5)
    config = SetsConfig(
        classes=str(tmp_path / "classes.txt"), clean=one, shifted={"R": train}, ood={"N": one}
    )
    sets = load_sets(config, size=32, per_class=1, seed=0).sets
    for source, count in ((sets.clean, 6), (sets.shifted["R"], 5)):
        found = [source[i] for i in range(len(source))]
        assert len(found) == count
        assert [r.label for r in found] == list(source.labels)
        assert all(r.label == (2, 0)[r.image[0, 0, 1]] for r in found)
    assert sets.subsets == {"R": [0, 2]} and len(sets.ood["N"]) == 6
    # Without a file the data set's classes are the model's.
    alone = load_sets(SetsConfig(clean=one), size=32, per_class=1, seed=0)
    assert alone.words == ("red_fox", "GreenFrog")
    (tmp_path / "classes.txt").write_text("hen\ncow\n")
    with pytest.raises(SourceError, match="clean: colour_animals: 2 of 2 classes are none of the"):
        load_sets(config, size=32, per_class=1, seed=0)
    with pytest.raises(SourceError, match=r"split: colour_animals has no split 'dev'; found"):
        load_sets(SetsConfig(clean=replace(one, split="dev")), size=32, per_class=1, seed=0)


def test_errors(prepared, tmp_path):
    with pytest.raises(SourceError, match="no data set 'colour_plants'"):
        load_dataset(DataConfig(source="tfds", name="colour_plants", path=prepared))
    with pytest.raises(SourceError, match=r"no split 'dev'; found \['test', 'train'\]"):
        load_dataset(
            DataConfig(source="tfds", name="colour_animals", path=prepared, test_split="dev")
        )
    with pytest.raises(SourceError, match="needs the name"):
        load_dataset(DataConfig(source="tfds", path=prepared))


def test_a_failed_download_says_what_to_do(tmp_path):
    failing = BUILDER.replace(
        'return {"train"', 'raise ConnectionError("no network"); return {"train"'
    )
    builder_class(tmp_path, "far_away", failing)
    with pytest.raises(SourceError, match=r"not prepared under .*no network.*give that folder"):
        load_dataset(DataConfig(source="tfds", name="far_away", path=str(tmp_path / "data")))


def test_a_host_out_of_reach_is_told_at_once(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "packages"
    (package / "no_such_host").mkdir(parents=True)
    # The name is reserved: it never resolves.
    line = f"https://nowhere.invalid/photos.zip\t10\t{'0' * 64}\tphotos.zip\n"
    (package / "no_such_host" / "checksums.tsv").write_text(line)
    builder_class(package, "no_such_host", BUILDER)
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"nowhere\.invalid cannot be reached.*that folder"):
        load_dataset(DataConfig(source="tfds", name="no_such_host", path=str(tmp_path / "data")))
    assert time.monotonic() - began < 60


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxsynth" / "labels"


def test_labels_are_read_once(prepared, cache):
    config = DataConfig(source="tfds", name="colour_animals", path=prepared)
    labels = load_dataset(config).train.labels
    kept = list(cache.iterdir())
    assert len(kept) == 2  # of train and of test
    later = load_dataset(config).train
    later._records = range(12)  # has a length, and no record
    np.testing.assert_array_equal(later.labels, labels)
    for path in kept:
        path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(load_dataset(config).train.labels, labels)


def test_labels_are_read_anew_where_the_files_are_others(prepared, cache, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(prepared, moved)
    config = DataConfig(source="tfds", name="colour_animals", path=str(moved))
    before = load_dataset(config).train
    assert len(before.labels) == 12 and len(list(cache.iterdir())) == 2
    for path in moved.rglob("*.array_record*"):
        os.utime(path, ns=(1, 1))
    assert len(load_dataset(config).train.labels) == 12 and len(list(cache.iterdir())) == 4


def test_a_split_is_identified_without_reading_it(prepared, cache):
    config = DataConfig(source="tfds", name="colour_animals", path=prepared)
    data = load_dataset(config)
    for source in (data.train, data.test):
        source._records = range(len(source))  # has a length, and no record
    assert len({*data.train.record_digests(), *data.test.record_digests()}) == 18
    assert data.train.digest == load_dataset(config).train.digest != data.test.digest
    small = load_dataset(replace(config, image_size=4))
    assert small.train.record_digests([3]) != data.train.record_digests([3])
    part = load_dataset(replace(config, train_split="train[:50%]")).train
    assert len(part) == 6 and part.digest != data.train.digest
