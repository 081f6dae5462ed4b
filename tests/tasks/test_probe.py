"""Linear probes and neighbors of features whose classes are known to be apart."""

from dataclasses import replace

import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.tasks.probe import BASE_BATCH, ProbeConfig, nearest, probe, with_rates

CONFIG = ProbeConfig(epochs=4, batch_size=32, head_rates=(1e-4, 0.5), neighbors=5)


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of three classes: noise around corners of a cube."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return (np.eye(8)[labels] + 0.2 * rng.standard_normal((count, 8))).astype(np.float32), labels


def test_the_head_of_the_rate_that_learns_is_chosen_by_held_out_features(tmp_path):
    features, labels = clusters(120, 0)
    test, truth = clusters(60, 1)
    found = probe(features, labels, test, CONFIG, tmp_path, num_classes=3, seed=0)
    assert found.rate == 0.5 and found.held_out > 0.95
    assert (found.logits.argmax(-1) == truth).mean() > 0.95
    assert (found.neighbors.argmax(-1) == truth).mean() > 0.95


def test_each_head_is_what_it_would_be_alone(tmp_path):
    """One summed loss trains all of them: none moves another."""
    features, labels = clusters(60, 2)
    given = {"num_classes": 3, "seed": 0}
    both = probe(features, labels, features, CONFIG, tmp_path / "two", **given)
    alone = replace(CONFIG, head_rates=(1e-5, 0.5))
    other = probe(features, labels, features, alone, tmp_path / "other", **given)
    np.testing.assert_allclose(both.logits, other.logits, atol=1e-5)


def test_rates_are_in_proportion_to_the_batch():
    rates = dict(with_rates(CONFIG).rates)
    assert list(rates.values()) == [rate * 32 / BASE_BATCH for rate in CONFIG.head_rates]


def test_neighbors_vote_by_their_cosines():
    features, labels = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])
    test = np.array([[2, 0.1, 0, 0], [0, 0, 0.1, 5]], np.float32)
    votes = nearest(features, labels, test, 1, 2)
    np.testing.assert_array_equal(votes.argmax(-1), [0, 1])
    assert (votes > 0).sum() == 2
    many = nearest(features, labels, test, 50, 2)  # more than there are: all of them vote
    cosines = test / np.linalg.norm(test, axis=1, keepdims=True)
    wanted = np.exp(cosines / 0.07) @ np.eye(2)[labels]
    np.testing.assert_allclose(many, wanted, rtol=1e-4)


def test_a_class_of_one_image_cannot_choose_a_head(tmp_path):
    features, labels = clusters(4, 3)
    with pytest.raises(UserError, match="class 1 has 1 image,"):
        probe(features, labels, features, CONFIG, tmp_path, num_classes=3, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_rates": ()}, "head_rates"),
        ({"head_rates": (0.1, 0.1)}, "twice"),
        ({"held_out": 1.0}, "held_out"),
        ({"neighbors": 0}, "neighbors"),
        ({"rates": (("head", 2.0),)}, "head_rates"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**fields)
