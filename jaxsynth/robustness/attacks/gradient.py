"""FGSM and projected gradient descent.

FGSM is one step of size `eps` (Goodfellow et al. 2015, arXiv 1412.6572). PGD takes many from a
random start and projects after each (Madry et al. 2018, arXiv 1706.06083). A step larger than the
ball makes every iterate a corner of it: the default, 2.5 eps / steps, reaches the ball's edge from
anywhere and can still turn round.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Key

from jaxsynth.robustness.attacks.common import (
    Images,
    Labels,
    Norm,
    Predict,
    Worst,
    cross_entropy,
    fold_each,
    iterate,
    loss_and_gradient,
    on_host,
    prepare,
    project,
    random_start,
    rounds,
    steepest,
    wrong,
)

# The synthetic-clone study's (arXiv 2405.20469): its step, meant as 2/255, exceeds its ball.
PAPER_EPS, PAPER_STEPS, PAPER_STEP_SIZE = 1 / 255, 20, 2 / 225


def fgsm(
    predict: Predict,
    images: Images,
    labels: Labels,
    key: Key[Array, "..."] | None = None,
    *,
    eps: Any,
    norm: Norm = "linf",
) -> Images:
    """One step of size `eps` along the gradient of the cross-entropy.

    Nothing is drawn: `key` is there so that attacks are called alike.
    """
    key = jax.random.key(0) if key is None else key
    return pgd(
        predict,
        images,
        labels,
        key,
        eps=eps,
        steps=1,
        step_size=eps,
        norm=norm,
        from_random=False,
    )


def pgd(
    predict: Predict,
    images: Images,
    labels: Labels,
    key: Key[Array, "..."],
    *,
    eps: Any,
    steps: int = 20,
    step_size: Any = None,
    norm: Norm = "linf",
    restarts: int = 1,
    from_random: bool = True,
) -> Images:
    """The last iterate of steepest ascent of the cross-entropy.

    `eps` and `step_size` (2.5 eps / steps if None) are numbers or one for each image, and changing
    them compiles nothing. Of several `restarts` each image keeps the worst: misclassified, then of
    the highest loss. Without a random start there is nothing to restart: ValueError.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps {steps}, restarts {restarts}: expected 1 or more")
    if restarts > 1 and not from_random:
        raise ValueError(f"restarts: {restarts} from the same start, expected from_random")
    predict, images, labels, keys, radius = prepare(predict, images, labels, key, eps, norm)
    if step_size is None:
        size = 2.5 * radius / steps
    else:
        size = jnp.broadcast_to(jnp.asarray(step_size, jnp.float32), (len(images),))
        size = size[:, None, None, None]
    run = _pgd if on_host(predict, images, keys, radius) else _whole_pgd
    return run(
        predict,
        images,
        labels,
        keys,
        radius,
        size,
        steps=steps,
        norm=norm,
        restarts=restarts,
        from_random=from_random,
    )


def _pgd(predict, images, labels, keys, eps, size, *, steps, norm, restarts, from_random):
    ascend = Partial(_ascent(norm), predict, images, labels, eps, size)

    def run(number) -> Images:
        start = images
        if from_random:
            start = random_start(fold_each(keys, number), images, eps, norm=norm)
        return iterate(steps, ascend, start)

    if restarts == 1:
        return run(0)

    def restart(number, worst: Worst) -> Worst:
        return _keep_worst(predict, labels, run(number), worst)

    nothing = jnp.zeros(len(images), bool), jnp.full(len(images), -jnp.inf)
    worst = Worst(images, *nothing)
    return rounds(restarts, restart, worst, lambda _: jnp.array(False)).images


_whole_pgd = jax.jit(_pgd, static_argnames=("steps", "norm", "restarts", "from_random"))


@cache
def _ascent(norm: Norm):
    """The step of a norm, one function object for all calls: programs are kept by it."""

    def ascend(predict, images, labels, eps, size, _, x: Images) -> Images:
        _, _, gradient = loss_and_gradient(predict, cross_entropy, x, labels)
        return project(x + size * steepest(gradient, norm), images, eps, norm)

    return ascend


@jax.jit
def _keep_worst(predict, labels, x: Images, worst: Worst) -> Worst:
    logits = predict(x)
    return worst.or_else(x, wrong(logits, labels), cross_entropy(logits, labels))
