"""The data sets that need no download."""

import numpy as np
import pytest

from jaxsynth.data.dataset import DataConfig, SourceError
from jaxsynth.data.load import load_dataset
from jaxsynth.data.sources.builtin import NAMES


@pytest.mark.parametrize(
    ("name", "classes"), [("printed", 18), ("textures", 4), ("scenes", 8), ("patches", 2)]
)
def test_sets_are_labelled_repeatable_and_split(name, classes):
    config = DataConfig(source="builtin", name=name, images_per_class=6)
    first, again = load_dataset(config), load_dataset(config)
    assert first.num_classes == classes
    assert set(np.asarray(first.train.labels)) <= set(range(classes))
    assert len(first.train) == 6 * classes and len(first.test) == classes
    assert first.train[0].image.shape == (32, 32, 3)
    for index in range(len(first.train)):
        np.testing.assert_array_equal(first.train[index].image, again.train[index].image)
    trained = {first.train[i].image.tobytes() for i in range(len(first.train))}
    assert not trained & {first.test[i].image.tobytes() for i in range(len(first.test))}
    assert not set(first.train.ids) & set(first.test.ids)
    seeded = load_dataset(DataConfig(source="builtin", name=name, images_per_class=6, split_seed=1))
    assert not np.array_equal(seeded.train[0].image, first.train[0].image)


def test_a_scene_is_of_its_front_shape():
    """Of all that is known to be of one shape, the nearest is of the class."""
    data = load_dataset(DataConfig(source="builtin", name="scenes", images_per_class=3))
    for index in range(len(data.train)):
        depth, labels = (data.train.maps[kind][index] for kind in ("depth", "segmentation"))
        front = labels[depth == depth.max()]
        assert set(front) == {1 + data.train[index].label} and len(set(labels.ravel())) >= 2


def test_test_patches_come_from_elsewhere_in_the_photo():
    """The dahlia's right third is nearly all petals, its left is half background."""
    data = load_dataset(DataConfig(source="builtin", name="patches", images_per_class=100))

    def brightness(source):
        rows = np.flatnonzero(np.asarray(source.labels) == 1)
        return np.mean([source[i].image.mean() for i in rows])

    assert abs(brightness(data.test) - brightness(data.train)) > 5


def test_unknown_names_and_empty_sets_are_refused():
    with pytest.raises(SourceError, match=rf"name: 'faces', expected one of {', '.join(NAMES)}"):
        load_dataset(DataConfig(source="builtin", name="faces"))
    with pytest.raises(SourceError, match="images_per_class: 0"):
        load_dataset(DataConfig(source="builtin", name="printed", images_per_class=0))
