"""Which shape comes when: as often as it has examples, the same after a restart."""

import jax
import numpy as np

from jaxsynth.tasks.told import ToldBatches
from jaxsynth.training.task import Buckets
from jaxsynth.training.turns import Turns, turn

COUNTS = (7, 1, 4)


def turns(steps_per_call=1, parts=({"x": 0}, {"x": 1}, {"x": 2}), seed=5):
    return Turns({"s": 9}, parts, Buckets(parts, COUNTS, seed), steps_per_call, None)


def test_shapes_come_as_often_as_they_have_examples():
    found = [turn(Buckets((), COUNTS, 0), call) for call in range(36)]
    for start in (0, 12, 24):
        shapes = [shape for shape, _ in found[start : start + 12]]
        np.testing.assert_array_equal(np.bincount(shapes), COUNTS)
    for shape in range(3):
        assert [before for one, before in found if one == shape] == list(range(3 * COUNTS[shape]))
    other = [turn(Buckets((), COUNTS, 1), call)[0] for call in range(36)]
    assert other != [shape for shape, _ in found]


def test_every_image_is_seen_equally_often():
    """Of buckets with fewer images than a batch and with more, over many steps."""
    batches = ToldBatches(batch_size=4)
    visits = np.zeros(sum(COUNTS))
    first = np.cumsum([0, *COUNTS])
    parts = [
        {
            name: jax.device_put(np.arange(start, start + count, dtype=np.int32))
            for name in ("first", "sizes")
        }
        | {"choices": np.ones(count, np.int32)}
        for start, count in zip(first[:-1], COUNTS, strict=True)
    ]
    shared = {"order": jax.random.key(0), "ids": np.arange(20)}
    given = Turns(shared, parts, Buckets(tuple(parts), COUNTS, 0), 1, None)
    draw = jax.jit(lambda step, data: batches(step, data)["sizes"])
    for step in range(60 * sum(COUNTS)):
        np.add.at(visits, np.asarray(draw(np.int32(step), next(given))), 1)
    # 240 visits each, but for the filling of the last batch of an epoch.
    np.testing.assert_allclose(visits, 240, rtol=0.12)
    np.testing.assert_allclose(visits[first[1]], 240)


def test_an_iterator_goes_on_where_another_stopped():
    one, other = turns(steps_per_call=3), turns(steps_per_call=3)
    before = [next(one) for _ in range(17)]
    other.set_state(one.get_state())
    after = [next(one) for _ in range(20)]
    assert after == [next(other) for _ in range(20)]
    # Three steps of a call are the three next ones of their shape.
    seen = {0: 0, 1: 0, 2: 0}
    for call, data in enumerate([*before, *after]):
        assert data["s"] == 9
        assert 3 * call + data["shift"] == seen[data["x"]]
        seen[data["x"]] += 3
