"""Square attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search without gradients.

What it breaks and PGD does not shows gradients that mislead. It starts with vertical stripes of
+-eps ("linf") or a grid of bumps ("l2") and proposes one square at a time, smaller and smaller; a
proposal stays if it lowers the margin. An image that is misclassified is left alone, and the search
ends when all are.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxsynth.robustness.attacks.common import (
    TINY,
    Images,
    Labels,
    Norm,
    Predict,
    fold_each,
    margin,
    pick,
    prepare,
)

# After which share of all steps the squares' area halves (the paper's 10 to 8000 of 10,000).
_HALVINGS = tuple(n / 10_000 for n in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
# The paper's first area, as a share of the image.
AREA = 0.8


def square(
    predict: Predict,
    images: Images,
    labels: Labels,
    key: Key[Array, "..."],
    *,
    eps: Any,
    steps: int = 5000,
    norm: Norm = "linf",
    area: float = AREA,
) -> Images:
    """The image of the largest margin found by `steps` queries of the model.

    Every image has its own squares. For "l2" images need at least 5 pixels a side: ValueError.
    """
    if steps < 1 or not 0 < area <= 1:
        raise ValueError(f"steps {steps}, area {area}: expected 1 or more, and above 0 to 1")
    predict, images, labels, keys, radius = prepare(predict, images, labels, key, eps, norm)
    if norm == "l2" and min(images.shape[1:3]) < 5:
        raise ValueError(f"images: {images.shape[1:3]} pixels, expected at least 5 a side for 'l2'")
    return _square(predict, images, labels, keys, radius, steps=steps, norm=norm, area=area)


def sides(steps: int, height: int, width: int, area: float, norm: Norm) -> list[int]:
    """The squares' side before the first halving of their area and after each.

    "l2" squares have an odd side of at least 3, for their bumps have a centre.
    """
    least, most = (3 if norm == "l2" else 1), min(height, width)
    found = []
    for halvings in range(len(_HALVINGS) + 1):
        side = max(round(math.sqrt(area / 2**halvings * height * width)), least)
        if norm == "l2" and side % 2 == 0:
            side += 1
        found.append(min(side, most if norm == "linf" or most % 2 else most - 1))
    return found


@partial(jax.jit, static_argnames=("steps", "norm", "area"))
def _square(predict, images, labels, keys, eps, *, steps, norm, area):
    height, width = images.shape[1:3]
    all_sides = sides(steps, height, width, area, norm)
    starts = jnp.asarray([math.ceil(share * steps) for share in _HALVINGS])
    if norm == "linf":
        start, propose = _stripes, _linf_proposal(all_sides)
    else:
        start, propose = _grid, _l2_proposal(all_sides)

    def going(state):
        number, _, loss = state
        return (number < steps) & (loss <= 0).any()

    def step(state):
        number, x, loss = state
        stage = (number >= starts).sum()
        drawn = fold_each(keys, number)
        moved = jax.vmap(propose, (0, 0, 0, 0, None))(drawn, x, images, eps, stage)
        found = margin(predict(moved), labels)
        # Margins above 0 are misclassified: such an image is done.
        better = (found > loss) & (loss <= 0)
        return number + 1, pick(better, moved, x), jnp.where(better, found, loss)

    x = jax.vmap(start)(fold_each(keys, 0), images, eps)
    clean, begun = margin(predict(images), labels), margin(predict(x), labels)
    # Already wrong, an image is its own adversarial one.
    state = (1, pick(clean > 0, images, x), jnp.where(clean > 0, clean, begun))
    return jax.lax.while_loop(going, step, state)[1]


def _signs(key, shape) -> Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _within(moved: Array, image: Array, eps: Array, norm: Norm) -> Array:
    if norm == "linf":
        moved = jnp.clip(moved, -eps, eps)
    else:
        moved = moved * eps / jnp.maximum(jnp.sqrt(jnp.square(moved).sum()), TINY)
    return jnp.clip(image + moved, 0, 1)


def _stripes(key, image: Array, eps: Array) -> Array:
    """One sign for each column and channel."""
    return _within(eps * _signs(key, (1, *image.shape[1:])), image, eps, "linf")


def _corner(key, room: tuple[Array, Array]) -> tuple[Array, Array]:
    """Row and column of a square's first pixel, each from 0 to its room."""
    place = jax.random.uniform(key, (2,))
    return tuple(jnp.floor(place[i] * (room[i] + 1)).astype(jnp.int32) for i in range(2))


def _window(shape, corner, side) -> Array:
    """1 inside of a square (h, w, 1), else 0."""
    inside = [
        (jnp.arange(shape[i]) >= corner[i]) & (jnp.arange(shape[i]) < corner[i] + side)
        for i in range(2)
    ]
    return (inside[0][:, None] & inside[1][None]).astype(jnp.float32)[..., None]


def _linf_proposal(all_sides):
    table = jnp.asarray(all_sides)

    def propose(key, x, image, eps, stage):
        """A square moved by +-2 eps, one sign a channel, then clipped: to the ball's edge."""
        side = table[stage]
        height, width, channels = image.shape
        corner = _corner(jax.random.fold_in(key, 0), (height - side, width - side))
        signs = _signs(jax.random.fold_in(key, 1), (1, 1, channels))
        moved = x - image + 2 * eps * signs * _window(image.shape, corner, side)
        return _within(moved, image, eps, "linf")

    return propose


def bump(side: int) -> Float[np.ndarray, "side side"]:
    """The paper's l2 pattern: a positive and a negative half with a peak each, of length 1."""

    def half(rows: int, columns: int) -> np.ndarray:
        """Frames around the middle add 1 / (k + 1)^2 up to k pixels away."""
        pattern = np.zeros((rows, columns))
        middle = rows // 2, columns // 2
        for k in range(max(middle) + 1):
            low = [max(m - k, 0) for m in middle]
            pattern[low[0] : middle[0] + k + 1, low[1] : middle[1] + k + 1] += 1 / (k + 1) ** 2
        return pattern / np.sqrt(np.square(pattern).sum())

    whole = np.concatenate([half(side // 2, side), -half(side - side // 2, side)])
    return (whole / np.sqrt(np.square(whole).sum())).astype(np.float32)


def _grid(key, image: Array, eps: Array) -> Array:
    """Five by five bumps over the image, a sign for each bump and channel."""
    height, width, channels = image.shape
    side = min(height, width) // 5
    top, left = (height - 5 * side) // 2, (width - 5 * side) // 2
    signs = _signs(key, (5, 5, 1, 1, channels))
    tiles = signs * bump(side)[..., None] if side > 1 else signs
    tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(5 * side, 5 * side, channels)
    moved = jnp.zeros_like(image).at[top : top + 5 * side, left : left + 5 * side].set(tiles)
    return _within(moved, image, eps, "l2")


def _l2_proposal(all_sides):
    most = max(all_sides)
    table = jnp.asarray(all_sides)
    bumps = jnp.asarray(
        np.stack([np.pad(bump(side), ((0, most - side),) * 2) for side in all_sides])
    )

    def propose(key, x, image, eps, stage):
        """A square gets a bump and the length of another square, which is emptied.

        Also what the perturbation still lacks of eps; so its length stays eps.
        """
        side = table[stage]
        height, width, channels = image.shape
        keys = [jax.random.fold_in(key, i) for i in range(4)]
        room = height - side, width - side
        corner = _corner(keys[0], room)
        here = _window(image.shape, corner, side)
        gone = _window(image.shape, _corner(keys[1], room), side)
        moved = x - image

        def size(mask: Array) -> Array:
            """Length of each channel inside of a mask."""
            return jnp.sqrt(jnp.square(moved * mask).sum((0, 1)))

        pattern = bumps[stage]
        pattern = jnp.where(jax.random.bernoulli(keys[2]), pattern.T, pattern)
        rows, columns = (
            jnp.clip(jnp.arange(n) - corner[i], 0, most - 1) for i, n in enumerate((height, width))
        )
        placed = pattern[rows][:, columns][..., None] * here
        new = placed * _signs(keys[3], (channels,)) + here * moved / (size(here) + TINY)
        left = jnp.maximum(jnp.square(eps[0, 0, 0]) - jnp.square(moved).sum(), 0) / channels
        budget = jnp.sqrt(left + jnp.square(size(jnp.maximum(here, gone))))
        new = new / (jnp.sqrt(jnp.square(new).sum((0, 1))) + TINY) * budget
        moved = jnp.where(here > 0, new, jnp.where(gone > 0, 0, moved))
        return _within(moved, image, eps, "l2")

    return propose
