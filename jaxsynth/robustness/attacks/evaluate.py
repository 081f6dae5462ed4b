"""Accuracy under attacks: many images in batches, many radii in one program."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsynth.robustness.attacks.common import (
    Images,
    Labels,
    Predict,
    check_predict,
    image_keys,
    on_host,
    prepare,
    wrong,
)
from jaxsynth.robustness.checks import check_images, check_labels

# fgsm, pgd, apgd, fab or square with its settings, by keywords: attack(predict, images, labels,
# key, eps=eps).
Attack = Callable[..., Images]


def correct(
    predict: Predict, images: Images, labels: Labels, *, batch_size: int = 256
) -> Bool[np.ndarray, " n"]:
    """Whether each image is classified rightly."""
    predict = predict if isinstance(predict, Partial) else Partial(predict)
    found = np.empty(len(images), bool)
    for rows, batch in batches(len(images), batch_size):
        right = _right(predict, check_images(images[batch]), jnp.asarray(labels[batch]))
        found[rows] = np.asarray(right)[: rows.stop - rows.start]
    return found


def attacked(
    attack: Attack,
    predict: Predict,
    images: Images,
    labels: Labels,
    key: Key[Array, "..."],
    *,
    eps: Any,
    batch_size: int = 256,
) -> Float[np.ndarray, "n h w c"]:
    """The adversarial images of an attack, a batch at a time; any batch size gives the same."""
    found = np.empty(images.shape, np.float32)
    keys = image_keys(key, len(images))
    for rows, batch in batches(len(images), batch_size):
        # One batch at a time goes to the device, however many images there are.
        moved = attack(
            predict, jnp.asarray(images[batch]), jnp.asarray(labels[batch]), keys[batch], eps=eps
        )
        if np.shape(moved) != (len(batch), *images.shape[1:]):
            raise ValueError(
                f"attack: expected images {(len(batch), *images.shape[1:])}, made {np.shape(moved)}"
            )
        found[rows] = np.asarray(moved)[: rows.stop - rows.start]
    return found


def eps_sweep(
    attack: Attack,
    predict: Predict,
    images: Images,
    labels: Labels,
    key: Key[Array, "..."],
    epsilons: Float[Array, " k"],
) -> Bool[Array, "k n"]:
    """Which images are still classified rightly at each eps, all by one program.

    On an accelerator `attack` is compiled in: give the same function object again to reuse the
    program. Each eps is attacked from anew, so a curve that rises shows an attack that fails, not a
    robust model.
    """
    if np.ndim(epsilons) != 1 or not len(epsilons) or np.any(np.asarray(epsilons) < 0):
        raise ValueError(f"epsilons: expected a row of numbers from 0, found {epsilons}")
    epsilons = jnp.asarray(epsilons, jnp.float32)
    predict, images, labels, keys, _ = prepare(predict, images, labels, key, 0.0, "linf")
    if not on_host(predict, images, keys):
        return _sweep(attack, predict, images, labels, keys, epsilons)
    moved = (attack(predict, images, labels, keys, eps=eps) for eps in epsilons)
    return jnp.stack([_right(predict, x, labels) for x in moved])


def batches(count: int, size: int):
    """(rows, indices): slices of `count` rows, and for each `size` indices, the last ones repeated.

    All of one size, so that one program takes them all.
    """
    if size < 1:
        raise ValueError(f"batch_size: expected 1 or more, found {size}")
    size = min(size, count)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), np.minimum(np.arange(start, start + size), count - 1)


def check_set(
    predict: Predict, images: Any, labels: Any
) -> tuple[Partial, Images, Int[Array, " n"]]:
    """A model, and images and labels of a whole set, checked against its classes."""
    images = check_images(images)
    predict, classes = check_predict(predict, images[:1])
    return predict, images, check_labels(labels, len(images), classes)


@jax.jit
def _right(predict, images, labels):
    return ~wrong(predict(images), labels)


@partial(jax.jit, static_argnums=0)
def _sweep(attack, predict, images, labels, keys, epsilons):
    def one(eps):
        return _right(predict, attack(predict, images, labels, keys, eps=eps), labels)

    return jax.lax.map(one, epsilons)
