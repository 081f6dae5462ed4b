"""TensorFlow Datasets without TensorFlow: a small data set of our own is written and read."""

import importlib
import sys

import numpy as np
import pytest

from jaxsynth.data.sources import DataConfig, SourceError, load_dataset

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
    package.mkdir()
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
    from jaxsynth.data.pipeline import train_batches

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
