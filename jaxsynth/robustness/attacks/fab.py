"""FAB, the fast adaptive boundary attack (Croce and Hein 2020, arXiv 1907.02044), targeted.

It looks for the smallest perturbation instead of one within `eps`, and does not depend on how
logits are scaled. Each step takes the model as linear: from the current point and from the clean
image it goes to the nearest point within [0, 1] at which the logit of a target class equals the
label's, a little beyond, and between the two. From a misclassified point it goes back a tenth of
the way to the clean image. Every one of the likeliest other classes is a target in turn (FAB-T, as
in AutoAttack), always from the clean image.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from jaxsynth.robustness.attacks.common import (
    TINY,
    Images,
    Labels,
    Losses,
    Norm,
    Predict,
    difference,
    distance,
    iterate,
    likely_targets,
    loss_and_gradient,
    on_host,
    pick,
    prepare,
    rounds,
    wrong,
)

# The paper's: how far beyond the boundary, the way back, and the most that the clean image weighs.
_OVERSHOOT, _BACKWARD, _LARGEST_SHARE = 1.05, 0.9, 0.1
# Of Newton's steps to the boundary; fewer than ten are usual.
_MOST_PIECES = 50


def fab(
    predict: Predict,
    images: Images,
    labels: Labels,
    key: Key[Array, "..."],
    *,
    eps: Any,
    steps: int = 100,
    norm: Norm = "linf",
    targets: int = 9,
) -> Images:
    """The nearest misclassified image found, the given one where none lies within `eps`.

    Nothing is drawn: `key` is taken so that attacks are called alike.
    """
    if steps < 1 or targets < 1:
        raise ValueError(f"steps {steps}, targets {targets}: expected 1 or more")
    predict, images, labels, _, radius = prepare(predict, images, labels, key, eps, norm)
    targets = min(targets, jax.eval_shape(predict, images).shape[1] - 1)
    search = _search if on_host(predict, images, radius) else _whole_search
    nearest, size = search(predict, images, labels, steps=steps, norm=norm, targets=targets)
    # What adding and subtracting in float32 leaves of a distance.
    return pick(size <= radius[:, 0, 0, 0] + 1e-7, nearest, images)


def fab_distance(
    predict: Predict,
    images: Images,
    labels: Labels,
    *,
    steps: int = 100,
    norm: Norm = "linf",
    targets: int = 9,
) -> tuple[Images, Float[Array, " n"]]:
    """The nearest misclassified images found, and how far they are (infinity where none was)."""
    key = jax.random.key(0)  # nothing is drawn
    predict, images, labels, *_ = prepare(predict, images, labels, key, 0.0, norm)
    targets = min(targets, jax.eval_shape(predict, images).shape[1] - 1)
    search = _search if on_host(predict, images) else _whole_search
    return search(predict, images, labels, steps=steps, norm=norm, targets=targets)


def _search(predict, images, labels, *, steps, norm, targets):
    goals, size = _goals(predict, images, labels, count=targets)

    def attempt(number, found):
        step = Partial(_step(norm), predict, images, labels, goals[number])
        _, *found = iterate(steps, step, (images, *found))
        return tuple(found)

    # A misclassified image is at no distance.
    return rounds(targets, attempt, (images, size), lambda found: (found[1] == 0).all())


_whole_search = jax.jit(_search, static_argnames=("steps", "norm", "targets"))


@partial(jax.jit, static_argnames="count")
def _goals(predict, images, labels, *, count):
    clean = predict(images)
    return likely_targets(clean, labels, count), jnp.where(wrong(clean, labels), 0.0, jnp.inf)


@cache
def _step(norm: Norm):
    """The step of a norm, one function object for all calls: programs are kept by it."""

    def step(predict, images, labels, goal, _, state):
        x, nearest, size = state

        def margin(logits, labels):
            return difference(logits, labels, goal)

        gap, _, gradient = loss_and_gradient(predict, margin, x, labels)
        here = to_boundary(x, gradient, gap, norm)
        # The same linear model, at the clean image.
        offset = (gradient * (images - x)).sum((1, 2, 3))
        there = to_boundary(images, gradient, gap + offset, norm)
        one, other = distance(here, norm), distance(there, norm)
        share = jnp.minimum(one / jnp.maximum(one + other, TINY), _LARGEST_SHARE)
        share = share[:, None, None, None]
        x = (1 - share) * (x + _OVERSHOOT * here) + share * (images + _OVERSHOOT * there)
        x = jnp.clip(x, 0, 1)
        broken = wrong(predict(x), labels)
        moved = distance(x - images, norm)
        better = broken & (moved < size)
        nearest, size = pick(better, x, nearest), jnp.where(better, moved, size)
        return pick(broken, images + _BACKWARD * (x - images), x), nearest, size

    return step


def to_boundary(x: Images, gradient: Images, gap: Losses, norm: Norm) -> Images:
    """The smallest d with gap + gradient . d = 0 and x + d in [0, 1]; as far as [0, 1] lets it.

    Every pixel moves s (linf) or s |gradient| (l2) in the direction that closes the gap, or as far
    as it can. What they gain together is a concave function of s in straight pieces, so Newton's
    steps from 0 never pass the s that is looked for, and end on its piece.
    """
    direction = -jnp.sign(gradient) * jnp.sign(gap)[:, None, None, None]
    room = jnp.where(direction > 0, 1 - x, x)
    steep = jnp.abs(gradient)
    speed = jnp.ones_like(steep) if norm == "linf" else steep

    def total(values: Images) -> Images:
        return values.sum((1, 2, 3), keepdims=True)

    wanted = jnp.abs(gap)[:, None, None, None]

    def short(s):
        """What is missing, and how fast s gains it; 0 where nothing can move any more."""
        missing = wanted - total(steep * jnp.minimum(s * speed, room))
        rate = total(jnp.where(s * speed < room, steep * speed, 0))
        return jnp.where(rate > TINY, missing, 0), rate

    def going(state):
        count, s = state
        return (count < _MOST_PIECES) & (short(s)[0] > 1e-6 * wanted).any()

    def newton(state):
        count, s = state
        missing, rate = short(s)
        return count + 1, s + jnp.maximum(missing, 0) / jnp.maximum(rate, TINY)

    _, s = jax.lax.while_loop(going, newton, (0, jnp.zeros_like(wanted)))
    return direction * jnp.minimum(s * speed, room)
