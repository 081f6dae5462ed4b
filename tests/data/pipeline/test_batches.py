"""Grain pipelines: order, exact resume, processes, mixing, padding."""

import json

import numpy as np
import pytest
from absl import flags

from jaxsynth.data.dataset import SourceError
from jaxsynth.data.pipeline.batches import eval_batches, mixed_batches, real_count, train_batches
from jaxsynth.data.sources.arrays import ArraySource

# What images (real ones below 100) the first batches of seed 3 hold.
ORDER = [
    [2, 3, 1, 4, 107, 109, 100, 108],
    [0, 1, 4, 0, 104, 102, 105, 106],
    [3, 2, 4, 3, 110, 101, 103, 106],
]


def source(n, first=0, size=4):
    """Image i is filled with first + i, so that a batch tells what is in it."""
    values = np.arange(first, first + n, dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (n, size, size, 3)).copy()
    return ArraySource(images, values.astype(np.int32) % 5, tuple(str(v) for v in values))


def noise(image, rng):
    return image.astype(np.float32) + rng.random(dtype=np.float32)


def seen(batches):
    return [batch["image"][:, 0, 0, 0].tolist() for batch in batches]


def test_epochs_cover_everything_in_new_orders():
    batches = list(train_batches(source(12), 4, 0, epochs=2))
    first, second = (np.ravel(seen(part)).tolist() for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert batches[0]["label"].dtype == np.int32
    assert (batches[0]["label"] == batches[0]["image"][:, 0, 0, 0] % 5).all()
    assert seen(train_batches(source(12), 4, 0, epochs=1)) == seen(batches[:3])
    assert seen(train_batches(source(12), 4, 1, epochs=1)) != seen(batches[:3])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("threads", [0, 2])
def test_resume_is_exact(mixed, threads):
    def start():
        if mixed:
            return mixed_batches(source(7), source(20, 100), 6, 3, noise, num_threads=threads)
        return train_batches(source(10), 4, 3, noise, num_threads=threads)

    straight = start()
    for _ in range(5):
        next(straight)
    state = json.loads(json.dumps(straight.get_state()))
    expected = [next(straight) for _ in range(6)]
    resumed = start()
    next(resumed)
    resumed.set_state(state)
    for batch in expected:
        other = next(resumed)
        for key, value in batch.items():
            np.testing.assert_array_equal(value, other[key])


def test_augmentation_differs_between_epochs_and_images():
    batches = list(train_batches(source(8), 8, 0, noise, epochs=2))
    noises = np.concatenate([b["image"][:, 0, 0, 0] % 1 for b in batches])
    assert len(set(noises.tolist())) == 16


def test_processes_read_disjoint_parts():
    parts = [
        seen(train_batches(source(12), 4, 0, epochs=1, process_index=p, process_count=2))
        for p in range(2)
    ]
    assert all(len(batch) == 2 for part in parts for batch in part)
    assert sorted(np.ravel(parts).tolist()) == list(range(12))
    with pytest.raises(SourceError, match="batch_size 5 does not divide among 2"):
        train_batches(source(12), 5, 0, process_count=2)


@pytest.mark.multiprocess
def test_worker_processes_give_the_same_batches():
    flags.FLAGS.unparse_flags()  # as in a program that uses no absl flags
    args = (source(10), 4, 3, noise)
    here, there = train_batches(*args, epochs=1), train_batches(*args, epochs=1, num_workers=1)
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_mixed_batches_always_hold_both():
    batches = list(mixed_batches(source(3), source(30, 100), 8, 0, real_fraction=0.25, steps=40))
    assert len(batches) == 40
    for batch in batches:
        assert batch["is_real"].tolist() == [True] * 2 + [False] * 6
        assert ((batch["image"][:, 0, 0, 0] < 100) == batch["is_real"]).all()
    counts = np.bincount(np.concatenate([b["image"][:2, 0, 0, 0] for b in batches]))
    assert counts.max() - counts.min() <= 1, "real images are repeated equally often"
    assert real_count(8, 0.01) == 1 and real_count(8, 0.99) == 7
    for bad in (0.0, 1.0):
        with pytest.raises(SourceError, match="real_fraction"):
            real_count(8, bad)
    with pytest.raises(SourceError, match="real images: the source has no images"):
        mixed_batches(source(0), source(3), 4, 0)
    with pytest.raises(SourceError, match="real images are"):
        next(mixed_batches(source(4), source(4, size=6), 4, 0, num_threads=0))


def test_the_order_of_mixed_batches_stays():
    """Figures that were published hang on which images a seed puts together."""
    batches = mixed_batches(source(5), source(11, 100), 8, 3, noise)
    first = [next(batches) for _ in range(3)]
    assert [b["image"][:, 0, 0, 0].astype(int).tolist() for b in first] == ORDER
    short = list(mixed_batches(source(5), source(11, 100), 8, 3, noise, steps=3))
    for a, b in zip(first, short, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_numbered_batches_say_which_images_they_hold():
    """The same images as without numbers, each with its place in its own source."""
    args = (source(7), source(20, 100), 6, 3, noise)
    plain, numbered = mixed_batches(*args), mixed_batches(*args, numbered=True)
    for step in range(4):
        expected, batch = next(plain), next(numbered)
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])
        firsts = np.where(batch["is_real"], 0, 100)
        assert (batch["index"] == batch["image"][:, 0, 0, 0].astype(int) - firsts).all()
        assert batch["step"].tolist() == [step] * 6 and batch["step"].dtype == np.int32
    resumed = mixed_batches(*args, numbered=True)
    resumed.set_state(numbered.get_state())
    assert next(resumed)["step"].tolist() == [4] * 6
    assert set(next(train_batches(source(12), 4, 0, numbered=True))) == {
        "image", "label", "index", "step",
    }  # fmt: skip


def test_mixed_batches_share_among_processes():
    for p in range(2):
        batch = next(mixed_batches(source(4), source(9), 8, 0, process_index=p, process_count=2))
        assert batch["is_real"].tolist() == [True, True, False, False]
    with pytest.raises(SourceError, match="1 real and 7 synthetic images, expected at least one"):
        mixed_batches(source(4), source(9), 8, 0, real_fraction=0.1, process_count=2)
    with pytest.raises(SourceError, match="batch_size 9 does not divide among 2"):
        mixed_batches(source(4), source(9), 9, 0, process_count=2)


@pytest.mark.parametrize("mixed", [False, True])
def test_any_number_of_processes_goes_on_with_the_same_batches(mixed):
    """The same images, augmented alike, in the batches after a place that any process saved."""

    def start(count):
        share = [
            {"process_index": p, "process_count": count, "num_threads": 0} for p in range(count)
        ]
        if mixed:  # five real images in a batch, unevenly shared
            args = (source(7), source(20, 100), 12, 3, noise)
            return [mixed_batches(*args, real_fraction=0.4, **one) for one in share]
        return [train_batches(source(10), 12, 3, noise, **one) for one in share]

    def following(iterators):
        parts = [next(one) for one in iterators]
        assert len({len(part["label"]) for part in parts}) == 1
        return np.sort(np.concatenate([part["image"][:, 0, 0, 0] for part in parts]))

    two = start(2)
    for _ in range(3):
        following(two)
    states = [json.loads(json.dumps(one.get_state())) for one in two]
    assert states[0] == states[1]
    expected = [following(two) for _ in range(3)]
    for count in (1, 3, 4):
        others = start(count)
        for one in others:
            one.set_state(states[0])
        for batch in expected:
            np.testing.assert_array_equal(following(others), batch)


def test_eval_visits_everything_once_and_pads():
    batches = list(eval_batches(source(10), 4))
    assert [b["image"].shape[0] for b in batches] == [4, 4, 4]
    index, valid = (np.concatenate([b[key] for b in batches]) for key in ("index", "valid"))
    assert index[valid].tolist() == list(range(10)) and valid.sum() == 10
    assert (index[~valid] == -1).all()
    parts = [list(eval_batches(source(9), 4, process_index=p, process_count=2)) for p in range(2)]
    assert len(parts[0]) == len(parts[1]) == 3
    index = np.concatenate([b["index"][b["valid"]] for part in parts for b in part])
    assert sorted(index) == list(range(9))


def test_errors_say_what_to_do():
    mixed_sizes = [np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]

    def transform(image, rng):
        return mixed_sizes[int(image[0, 0, 0]) % 2]

    with pytest.raises(SourceError, match="set image_size"):
        next(train_batches(source(4), 4, 0, transform, num_threads=0))
    with pytest.raises(SourceError, match="do not fill a batch"):
        train_batches(source(4), 8, 0, epochs=1)
    assert len(next(train_batches(source(4), 8, 0))["label"]) == 8
