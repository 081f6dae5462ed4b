"""Which shape of examples each call of a training's program takes, where they are of several."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from jaxsynth.training import sharding
from jaxsynth.training.task import Buckets


def turn(buckets: Buckets, call: int) -> tuple[int, int]:
    """The shape of a call, and how many calls before had the same one.

    As many calls in a row as there are examples hold each shape as often as it has examples. So
    every example is drawn equally often on average, however few have its shape.
    """
    epoch, place = divmod(call, sum(buckets.counts))
    order = _order(buckets.counts, buckets.seed, epoch)
    shape = int(order[place])
    return shape, epoch * buckets.counts[shape] + int((order[:place] == shape).sum())


@lru_cache(maxsize=4)
def _order(counts: tuple[int, ...], seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    shapes = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng([4, seed, epoch]).permutation(shapes)


class Turns:
    """The arguments of each call: arrays that all shapes share, those of one shape, and its turn.

    All are where they shall lie. "shift" is what a step's number is added to, so that the sum
    counts the steps of its shape. The place in the order is the number of calls so far.
    """

    def __init__(
        self,
        shared: dict[str, Any],
        parts: Sequence[dict[str, Any]],
        buckets: Buckets,
        steps_per_call: int,
        mesh: Mesh | None,
    ):
        self._shared, self._parts, self._buckets = shared, parts, buckets
        self._steps, self._mesh, self._calls = steps_per_call, mesh, 0

    def __iter__(self) -> "Turns":
        return self

    def __next__(self) -> dict[str, Any]:
        shape, before = turn(self._buckets, self._calls)
        shift: Any = np.int32((before - self._calls) * self._steps)
        if self._mesh is not None:
            shift = sharding.place(shift, NamedSharding(self._mesh, PartitionSpec()))
        self._calls += 1
        return {**self._shared, **self._parts[shape], "shift": shift}

    def get_state(self) -> dict[str, int]:
        """What `set_state` takes, as JSON."""
        return {"calls": self._calls}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on after so many calls."""
        self._calls = int(state["calls"])
