"""The data sets that need no download."""

import dataclasses

import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import DataConfig, SourceError
from jaxsynth.data.faces import (
    Faces,
    keypoint_pictures,
    keypoints_of,
    known_people,
    people_of,
    read_faces,
    write_faces,
)
from jaxsynth.data.load import load_dataset
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.builtin import NAMES
from jaxsynth.data.views import Subset


@pytest.mark.parametrize(
    ("name", "classes"),
    [("printed", 18), ("textures", 4), ("scenes", 8), ("faces", 4), ("patches", 2)],
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


@pytest.mark.heavy
def test_faces_know_their_people_and_keypoints():
    """Ten pictures a person on all backgrounds; the people of the test are others."""
    data = load_dataset(DataConfig(source="builtin", name="faces", images_per_class=5))
    people, points = people_of(data.train), keypoints_of(data.train)
    assert np.bincount(people).tolist() == [10, 10] and points.shape == (20, 5, 2)
    assert known_people(data)
    assert data.class_names[data.train[1].label] == "face on a green background"
    for index, (x, y) in enumerate(points[:, 2].round().astype(int)):
        # The nose is of the person's skin, and no skin is as the backgrounds are.
        corner, nose = data.train[index].image[0, 0], data.train[index].image[y, x]
        assert np.abs(corner.astype(int) - nose).sum() > 60
    picture = Subset(data.train, [3, 1])
    np.testing.assert_array_equal(keypoints_of(picture), points[[3, 1]])
    moved = dataclasses.replace(data.train, facts={**data.train.facts, "keypoints": points + 1})
    assert moved.record_digests() != data.train.record_digests()
    with pytest.raises(UserError, match="people: not known of these images"):
        people_of(load_dataset(DataConfig(source="builtin", name="printed")).train)


def test_faces_in_files_are_those_of_the_images(tmp_path):
    data = load_dataset(DataConfig(source="builtin", name="faces", images_per_class=3))
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    faces = Faces(tuple(reversed(data.train.ids)), rows, keypoints_of(data.train)[::-1])
    again = read_faces(write_faces(tmp_path / "faces.npz", faces))
    assert again.digest == faces.digest and again.width == 2
    own = again.of(data.train)
    np.testing.assert_array_equal(own.embeddings, rows[::-1])
    np.testing.assert_array_equal(own.keypoints, keypoints_of(data.train))
    with pytest.raises(UserError, match=r"x.npz: no face of 4 images, the first is .*test/face"):
        again.of(data.test, "x.npz")
    pictures = keypoint_pictures(data.train, own.keypoints, 64)
    assert pictures.shape == (12, 64, 64, 3) and pictures.any((1, 2, 3)).all()
    wide = ArraySource(np.zeros((1, 8, 16, 3), np.uint8), np.zeros(1, int), ("w",))
    with pytest.raises(UserError, match="w: 16x8 pixels, and keypoints go with square images"):
        keypoint_pictures(wide, own.keypoints, 8)
    good = {"ids": np.array(["a", "b"]), "embeddings": rows[:2], "keypoints": np.ones((2, 5, 2))}
    for change, words in (
        ({"ids": np.array(["a", "a"])}, "the same is there twice"),
        ({"ids": np.array(["a"])}, "embeddings of float32"),
        ({"embeddings": rows[:2] * np.nan}, "embeddings are not finite"),
        ({"keypoints": np.ones((2, 4, 2))}, r"keypoints of float64 \(2, 4, 2\), expected ids"),
    ):
        np.savez(tmp_path / "bad.npz", **good | change)
        with pytest.raises(UserError, match=words):
            read_faces(tmp_path / "bad.npz")


def test_test_patches_come_from_elsewhere_in_the_photo():
    """The dahlia's right third is nearly all petals, its left is half background."""
    data = load_dataset(DataConfig(source="builtin", name="patches", images_per_class=100))

    def brightness(source):
        rows = np.flatnonzero(np.asarray(source.labels) == 1)
        return np.mean([source[i].image.mean() for i in rows])

    assert abs(brightness(data.test) - brightness(data.train)) > 5


def test_unknown_names_and_empty_sets_are_refused():
    with pytest.raises(SourceError, match=rf"name: 'people', expected one of {', '.join(NAMES)}"):
        load_dataset(DataConfig(source="builtin", name="people"))
    with pytest.raises(SourceError, match="images_per_class: 0"):
        load_dataset(DataConfig(source="builtin", name="printed", images_per_class=0))
