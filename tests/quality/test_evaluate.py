"""From images to figures: stores, folders and sources, classes, and what cannot be compared."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.load import load_dataset
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.store import Entry, ImageStore, StoreWriter
from jaxsynth.data.views import Subset
from jaxsynth.quality.evaluate import compare, open_images
from jaxsynth.quality.features import clip_extractor
from jaxsynth.quality.metrics import QualityConfig, evaluate

QUICK = QualityConfig(kid_subsets=5, repeats=2)
TRAINING = "training images"
NAMES = ("0", "1", "2")


@pytest.fixture(scope="module")
def clip():
    return clip_extractor()


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(class_names=NAMES))


def first(source, per_class):
    labels = np.asarray(source.labels)
    members = [np.flatnonzero(labels == label)[:per_class] for label in range(3)]
    return Subset(source, np.concatenate(members))


def write_store(folder, source, class_names=NAMES):
    writer = StoreWriter(folder, class_names, len(source), shard_size=len(source))
    records = [source[i] for i in range(len(source))]
    seen = dict.fromkeys(range(len(class_names)), 0)
    entries = []
    for record in records:
        entries.append(Entry(record.label, class_names[record.label], seen[record.label]))
        seen[record.label] += 1
    writer.write_shard(0, [record.image for record in records], entries)
    return folder


def test_a_store_against_a_source(clip, digits, tmp_path):
    generated = first(digits.test, 30)
    folder = write_store(tmp_path / "store", generated)
    found = compare(digits.train, folder, clip, QUICK, reference=TRAINING, seed=1)
    assert found.pop("features") == clip.identity
    assert found.pop("reference") == TRAINING
    features = clip.of_source(digits.train), clip.of_source(generated)
    assert found == evaluate(*features, QUICK, seed=1)
    assert found["samples"]["generated"] == 90
    json.dumps(found)


@pytest.mark.heavy
def test_what_is_missing_shows(clip, digits):
    """Held-out digits are at the floor; without one class recall and coverage fall but not
    precision; and noise is far from everything."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 32, 32, 3)).astype(np.uint8)
    sets = {
        "good": digits.test,
        "dropped": Subset(digits.test, np.flatnonzero(np.asarray(digits.test.labels) != 2)),
        "noise": ArraySource(noise, np.zeros(90, np.int32), tuple(map(str, range(90)))),
    }
    found = {
        name: compare(digits.train, source, clip, QUICK, reference=TRAINING, seed=0)
        for name, source in sets.items()
    }

    def mean(name, figure):
        return found[name]["matched"][figure]["mean"]

    floor = {figure: value["mean"] for figure, value in found["good"]["floor"].items()}
    assert mean("good", "fid") < 1.5 * floor["fid"]
    for figure in ("recall", "coverage"):
        assert mean("good", figure) > 0.9 * floor[figure]
        assert mean("dropped", figure) < 0.85 * floor[figure]
    assert mean("dropped", "precision") > 0.9 * floor["precision"]
    assert 2 * mean("good", "fid") < mean("dropped", "fid") < 0.2 * mean("noise", "fid")
    assert mean("good", "kid") < mean("dropped", "kid") < 0.2 * mean("noise", "kid")
    assert mean("noise", "precision") == mean("noise", "density") == 0


def test_classes(clip, digits, tmp_path):
    """Within classes a swap of two labels shows, though the whole set is the same."""
    real, generated = first(digits.train, 30), first(digits.test, 20)
    swapped = Subset(generated, np.arange(60), np.array([1, 0, 2])[generated.labels])
    found, wrong = (
        compare(
            real,
            source,
            clip,
            QUICK,
            reference=TRAINING,
            seed=0,
            per_class=True,
            class_names=NAMES,
        )
        for source in (generated, swapped)
    )
    assert list(found["classes"]) == list(NAMES) and found["left_out"] == {}
    assert found["all"] == wrong["all"]
    assert found["classes"]["2"] == wrong["classes"]["2"]
    for name in ("0", "1"):
        assert found["classes"][name]["samples"]["generated"] == 20
        mine, theirs = (r["classes"][name]["all"]["fid"] for r in (found, wrong))
        assert theirs > 2 * mine


def test_classes_with_too_few_images_are_named(clip, digits):
    generated = first(digits.test, 20)
    few = Subset(generated, np.flatnonzero((generated.labels != 1) | (np.arange(60) < 23)))
    found = compare(digits.train, few, clip, QUICK, reference=TRAINING, seed=0, per_class=True)
    assert list(found["classes"]) == ["0", "2"]
    counted = int((np.asarray(digits.train.labels) == 1).sum())
    assert found["left_out"] == {"1": {"real": counted, "generated": 3}}


def test_labels_must_mean_the_same(clip, digits, tmp_path):
    generated = first(digits.test, 8)
    store = ImageStore(write_store(tmp_path / "store", generated, ("a", "b", "c")))
    with pytest.raises(UserError, match=r"classes of generated are \['a', 'b', 'c'\], of class_n"):
        compare(
            digits.train,
            store,
            clip,
            QUICK,
            reference=TRAINING,
            seed=0,
            per_class=True,
            class_names=NAMES,
        )
    with pytest.raises(UserError, match="labels up to 2, but class_names has 2 classes"):
        compare(
            digits.train,
            generated,
            clip,
            QUICK,
            reference=TRAINING,
            seed=0,
            per_class=True,
            class_names=NAMES[:2],
        )


def test_too_few_images_or_no_reference(clip, digits):
    with pytest.raises(UserError, match="reference: expected which images"):
        compare(digits.train, digits.test, clip, QUICK, reference=" ", seed=0)
    with pytest.raises(UserError, match="generated: 3 samples, expected 6 or more"):
        compare(digits.train, first(digits.test, 1), clip, QUICK, reference=TRAINING, seed=0)


def test_paths(digits, tmp_path):
    images = [digits.test[i].image for i in range(4)]
    for name, folder in (("a", "x/1"), ("b", "x/1"), ("c", "x/2"), ("img10", "y"), ("img2", "y")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[0]).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "y" / ".hidden").touch()
    (tmp_path / "y" / "README.md").touch()
    source, names = open_images(tmp_path / "x")
    assert names == ("1", "2") and source.labels.tolist() == [0, 0, 1]
    source, names = open_images(tmp_path / "y")
    assert names == () and list(source.ids) == ["img2.png", "img10.png"]
    np.testing.assert_array_equal(source[1].image, images[0])
    store = write_store(tmp_path / "store", first(digits.test, 2))
    assert open_images(store)[1] == NAMES and len(open_images(store)[0]) == 6
    np.savez(tmp_path / "samples.npz", np.stack(images))
    assert len(open_images(tmp_path / "samples.npz")[0]) == 4


def test_paths_without_images(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images and no class folders"):
        open_images(tmp_path)
    (tmp_path / "notes.docx").touch()
    with pytest.raises(UserError, match=r"notes\.docx: not an image file"):
        open_images(tmp_path)
