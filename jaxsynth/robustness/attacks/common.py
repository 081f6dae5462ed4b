"""What all attacks share: the model's form, threat models, losses, keys, and keeping the worst.

An attack is a function of `predict`, images (n, h, w, c) in [0, 1], labels (n,), a key and `eps`,
and returns images in [0, 1] at most `eps` from the given ones: in any pixel ("linf"; 1/255 is one
step of an 8-bit image) or in Euclidean length ("l2"). Images do not influence each other: their
losses are added, and each has its own random key, so neither the batch nor its placement on
devices changes the result.

`predict` maps images to logits (n, classes) and includes the normalisation. To pass weights as
arguments, rather than have them compiled in as constants, give a `jax.tree_util.Partial`:

    predict = Partial(lambda model, images: model((images - mean) / std), model)
    adversarial = pgd(predict, images, labels, jax.random.key(0), eps=1 / 255)
    correct = predict(adversarial).argmax(1) == labels
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsynth.core.words import counted
from jaxsynth.robustness.checks import (
    check_eps,
    check_function,
    check_images,
    check_key,
    check_labels,
)

Images = Float[Array, "n h w c"]
Labels = Int[Array, " n"]
Logits = Float[Array, "n k"]
Losses = Float[Array, " n"]
Predict = Callable[[Images], Logits]
Norm = Literal["linf", "l2"]
Loss = Callable[[Logits, Labels], Losses]

# A length that is not 0, to divide by.
TINY = 1e-12


def prepare(
    predict: Predict, images: Any, labels: Any, key: Key[Array, ""], eps: Any, norm: Norm
) -> tuple[Partial, Images, Labels, Key[Array, " n"], Float[Array, "n 1 1 1"]]:
    """What an attack's program takes: arguments checked, a key and an eps for every image.

    `key` is one for all, or one for each image; so is `eps`. ValueError for images that are not in
    [0, 1], labels outside of the logits' range, an eps that is negative or beyond what such images
    can move, an unknown norm, a seed in a key's place or a `predict` that JAX cannot trace.
    """
    images = check_images(images)
    predict, classes = check_predict(predict, images)
    labels = check_labels(labels, len(images), classes)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm: expected 'linf' or 'l2', found {norm!r}")
    check_eps(eps, norm, images.shape)
    eps = jnp.broadcast_to(jnp.asarray(eps, jnp.float32), (len(images),))
    return predict, images, labels, image_keys(key, len(images)), eps[:, None, None, None]


def check_predict(predict: Predict, images: Images) -> tuple[Partial, int]:
    """`predict` as a Partial, and how many classes its logits have.

    ValueError where it is no function of JAX's, or gives no logits (n, classes).
    """
    check_function(predict)
    predict = predict if isinstance(predict, Partial) else Partial(predict)
    try:
        found = jax.eval_shape(predict, images)
    except (jax.errors.JAXTypeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"predict: JAX cannot trace it ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}): attacks follow its gradient, so it must be made "
            "of JAX operations (of a torch module by jaxsynth.robustness.from_torch); corruptions, "
            "calibration and OOD scores take any function"
        ) from error
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != len(images) or shape[1] < 2:
        raise ValueError(
            f"predict: expected logits ({len(images)}, classes) of 2 or more classes, found "
            f"{type(found).__name__ if shape is None else shape}"
        )
    return predict, shape[1]


def on_host(*trees: Any) -> bool:
    """Whether loops over steps run on the host: on CPU, where nothing is being traced.

    XLA's CPU compiler brings convolutions into the form that its fast routines take only outside of
    loops. Inside of one the gradient to a 3x3 convolution's input took 14 times as long, and PGD of
    a network of three 2.5 times; calling one compiled step after the other costs microseconds.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))
    return jax.default_backend() == "cpu" and not traced


def iterate(count: int, body: Partial, state: Any) -> Any:
    """`count` times state = body(number, state), compiled once for the Partial's function."""
    if not on_host(body, state):
        return jax.lax.fori_loop(0, count, body, state)
    for number in range(count):
        state = _call(body, number, state)
    return state


def rounds(
    count: int,
    attempt: Callable[[Any, Any], Any],
    state: Any,
    done: Callable[[Any], Bool[Array, ""]],
) -> Any:
    """Up to `count` times state = attempt(number, state), which has loops inside, until done."""
    if not on_host(state):

        def guarded(number, state):
            return jax.lax.cond(done(state), lambda: state, lambda: attempt(number, state))

        return jax.lax.fori_loop(0, count, guarded, state)
    for number in range(count):
        if done(state):
            break
        state = attempt(number, state)
    return state


@jax.jit
def _call(body, number, state):
    return body(number, state)


def image_keys(key: Key[Array, "..."], count: int) -> Key[Array, " n"]:
    """A key for each image: those given, or one folded with each place."""
    check_key(key)
    if key.ndim:
        if key.shape != (count,):
            raise ValueError(f"key: {key.shape} keys for {counted(count, 'image')}")
        return key
    return fold_each(key, jnp.arange(count))


@jax.jit
def fold_each(key: Key[Array, "..."], data: Int[Array, "..."] | int) -> Key[Array, " n"]:
    """`jax.random.fold_in` for many keys, many numbers, or both."""
    data = jnp.asarray(data)
    return jax.vmap(jax.random.fold_in, (0 if key.ndim else None, 0 if data.ndim else None))(
        key, data
    )


def length(x: Images) -> Float[Array, "n 1 1 1"]:
    """Euclidean length of each image."""
    return jnp.sqrt(jnp.square(x).sum((1, 2, 3), keepdims=True))


def distance(x: Images, norm: Norm) -> Float[Array, " n"]:
    """Size of each perturbation."""
    return jnp.abs(x).max((1, 2, 3)) if norm == "linf" else length(x)[:, 0, 0, 0]


def steepest(gradient: Images, norm: Norm) -> Images:
    """The perturbation of size 1 along which the loss rises most."""
    return jnp.sign(gradient) if norm == "linf" else gradient / jnp.maximum(length(gradient), TINY)


def project(x: Images, centre: Images, eps: Array, norm: Norm) -> Images:
    """The point of the ball around `centre` that is nearest to x, then clipped to [0, 1]."""
    moved = x - centre
    if norm == "linf":
        moved = jnp.clip(moved, -eps, eps)
    else:
        moved = moved * jnp.minimum(1, eps / jnp.maximum(length(moved), TINY))
    return jnp.clip(centre + moved, 0, 1)


@partial(jax.jit, static_argnames="norm")
def random_start(keys: Key[Array, " n"], images: Images, eps: Array, norm: Norm) -> Images:
    """A point drawn uniformly from each ball, clipped to [0, 1]."""
    shape = images.shape[1:]
    if norm == "linf":
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-1, maxval=1))(keys)
    else:
        # Of a normal direction, and at a radius whose power of the dimension is uniform.
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        part = jax.vmap(jax.random.uniform)(fold_each(keys, 0))[:, None, None, None]
        noise = noise / jnp.maximum(length(noise), TINY) * part ** (1 / images[0].size)
    return jnp.clip(images + eps * noise, 0, 1)


def cross_entropy(logits: Logits, labels: Labels) -> Losses:
    """-log p(label)."""
    return -_at(jax.nn.log_softmax(logits), labels)


def margin(logits: Logits, labels: Labels) -> Losses:
    """The largest other logit less the label's: positive where the image is misclassified."""
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[1], dtype=bool), -jnp.inf, logits)
    return others.max(1) - _at(logits, labels)


def dlr(logits: Logits, labels: Labels) -> Losses:
    """Difference of logits ratio (Croce and Hein 2020, arXiv 2003.01690, equation 6).

    The margin over the distance from the largest logit to the third: neither scaling nor shifting
    the logits changes it, so that it has gradients where the cross-entropy's have vanished.
    """
    ordered = jnp.sort(logits, axis=1, descending=True)
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + TINY)


def targeted_dlr(logits: Logits, labels: Labels, targets: Labels) -> Losses:
    """The DLR towards a class (equation 7): over the first logit less the mean of 3rd and 4th."""
    ordered = jnp.sort(logits, axis=1, descending=True)
    spread = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return difference(logits, labels, targets) / (spread + TINY)


def difference(logits: Logits, labels: Labels, targets: Labels) -> Losses:
    """The target's logit less the label's."""
    return _at(logits, targets) - _at(logits, labels)


def likely_targets(logits: Logits, labels: Labels, count: int) -> Int[Array, "count n"]:
    """The `count` most likely classes other than the label, the likeliest first."""
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[1], dtype=bool), -jnp.inf, logits)
    return jax.lax.top_k(others, count)[1].T


def loss_and_gradient(
    predict: Predict, loss: Loss, x: Images, labels: Labels
) -> tuple[Losses, Bool[Array, " n"], Images]:
    """(losses, whether misclassified, gradient of each image's loss)."""

    def total(x: Images):
        logits = predict(x)
        losses = loss(logits, labels)
        return losses.sum(), (losses, wrong(logits, labels))

    (_, (losses, broken)), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return losses, broken, gradient


def wrong(logits: Logits, labels: Labels) -> Bool[Array, " n"]:
    """Whether an image is misclassified; one with NaN among its logits is."""
    return (logits.argmax(1) != labels) | jnp.isnan(logits).any(1)


def pick(condition: Bool[Array, " n"], yes: Images, no: Images) -> Images:
    """Per image."""
    return jnp.where(condition[:, None, None, None], yes, no)


class Worst(NamedTuple):
    """The most harmful images so far, whether they are misclassified, and their loss."""

    images: Images
    broken: Bool[Array, " n"]
    loss: Losses

    def or_else(self, images: Images, broken: Bool[Array, " n"], loss: Losses) -> "Worst":
        """With what is worse: misclassified first, then by the loss."""
        better = (broken & ~self.broken) | ((broken == self.broken) & (loss > self.loss))
        return Worst(
            pick(better, images, self.images),
            broken | self.broken,
            jnp.where(better, loss, self.loss),
        )


def _at(values: Logits, labels: Labels) -> Losses:
    return jnp.take_along_axis(values, labels[:, None], 1)[:, 0]
