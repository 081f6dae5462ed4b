"""A small trained classifier of scikit-learn's digits, 8 by 8 pixels, as JAX and as torch code."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.tree_util import Partial
from sklearn.datasets import load_digits

CLASSES = 10


class Digits(NamedTuple):
    """`predict` with its weights, and 64 test images with labels, most classified rightly."""

    predict: Partial
    images: jax.Array
    labels: jax.Array


def apply(weights, images):
    """A hidden layer; softplus, so that gradients agree to rounding and none is zero."""
    hidden = jax.nn.softplus(images.reshape(len(images), -1) @ weights["a"] + weights["b"])
    return hidden @ weights["c"] + weights["d"]


def torch_predict(predict: Partial):
    """The same function of NCHW images in torch."""
    weights = {name: torch.tensor(np.asarray(value)) for name, value in predict.args[0].items()}

    def run(images):
        flat = images.permute(0, 2, 3, 1).reshape(len(images), -1)
        hidden = torch.nn.functional.softplus(flat @ weights["a"] + weights["b"])
        return hidden @ weights["c"] + weights["d"]

    return run


def train() -> Digits:
    data = load_digits()
    images = jnp.asarray(data.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(data.target, jnp.int32)
    rng = np.random.default_rng(0)
    shapes = {"a": (64, 48), "b": (48,), "c": (48, CLASSES), "d": (CLASSES,)}
    weights = {
        name: jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)
        for name, shape in shapes.items()
    }
    tx = optax.adam(1e-2)

    @jax.jit
    def fit(weights):
        def loss(weights):
            logits = apply(weights, images[400:])
            # Smoothed labels: where a probability is 1 in float32, gradients are rounding noise.
            wanted = 0.9 * jax.nn.one_hot(labels[400:], CLASSES) + 0.1 / CLASSES
            return optax.softmax_cross_entropy(logits, wanted).mean()

        def step(_, carry):
            weights, state = carry
            updates, state = tx.update(jax.grad(loss)(weights), state)
            return optax.apply_updates(weights, updates), state

        return jax.lax.fori_loop(0, 150, step, (weights, tx.init(weights)))[0]

    return Digits(Partial(apply, fit(weights)), images[:64], labels[:64])
