"""Which images of a store of several data sets are whose."""

import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.data.store import Entry, StoreWriter
from jaxsynth.methods.diffscaler.report import images_of


def write_store(folder, titles):
    """Two images a class, the value of every pixel its class's number."""
    writer = StoreWriter(folder, titles, 2 * len(titles))
    entries = [Entry(label, title, i) for label, title in enumerate(titles) for i in range(2)]
    images = [np.full((4, 4, 3), entry.label, np.uint8) for entry in entries]
    writer.write_shard(0, images, entries)
    return folder


def test_a_set_never_takes_the_images_of_one_whose_name_begins_alike(tmp_path):
    titles = ["photos night cat", "photos night dog", "photos cat", "photos dog", "photo cat"]
    store = write_store(tmp_path / "store", titles)
    for name, classes, values in (
        ("photos", ("cat", "dog"), (2, 3)),
        ("photos night", ("cat", "dog"), (0, 1)),
        ("photo", ("cat",), (4,)),
    ):
        found = images_of(store, name, classes)
        assert len(found) == 2 * len(classes)
        assert np.asarray(found.labels).tolist() == np.repeat(np.arange(len(classes)), 2).tolist()
        for record in found:
            assert record.image[0, 0, 0] == values[record.label]


def test_a_class_that_is_missing_or_twice_there_is_named(tmp_path):
    store = write_store(tmp_path / "one", ["photos cat"])
    with pytest.raises(UserError, match="0 classes are called 'photos dog'"):
        images_of(store, "photos", ("cat", "dog"))
