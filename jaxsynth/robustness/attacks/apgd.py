"""Auto-PGD (Croce and Hein 2020, arXiv 2003.01690, algorithm 1): PGD without a step size to choose.

It starts with steps of 2 eps and momentum. At checkpoints that come closer and closer it looks
back: where the loss rose in fewer than 3 of 4 steps, or neither the step nor the best loss changed
since the last checkpoint, that image's step is halved and it goes on from its best point.

The loss is the cross-entropy ("ce"), the difference of logits ratio ("dlr", 3 or more classes), or
its targeted form, tried for the likeliest other classes in turn ("targeted"; with fewer than 4
classes, for which that is not defined, the plain difference of the two logits).
"""

import math
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsynth.robustness.attacks.common import (
    Images,
    Labels,
    Loss,
    Losses,
    Norm,
    Predict,
    cross_entropy,
    difference,
    dlr,
    fold_each,
    iterate,
    likely_targets,
    loss_and_gradient,
    on_host,
    pick,
    prepare,
    project,
    random_start,
    rounds,
    steepest,
    targeted_dlr,
    wrong,
)

_MOMENTUM = 0.75
_RISING = 0.75

LossName = Literal["ce", "dlr", "targeted"]


def apgd(
    predict: Predict,
    images: Images,
    labels: Labels,
    key: Key[Array, "..."],
    *,
    eps: Any,
    loss: LossName = "ce",
    steps: int = 100,
    norm: Norm = "linf",
    restarts: int = 1,
    targets: int = 9,
) -> Images:
    """The last misclassified image found, or else that of the highest loss.

    `targets` classes (at most all others) are tried by "targeted", each with `restarts`. It stops
    between them once every image is misclassified.
    """
    if steps < 2 or restarts < 1 or targets < 1:
        raise ValueError(
            f"steps {steps}, restarts {restarts}, targets {targets}: expected 2, 1 and 1 or more"
        )
    predict, images, labels, keys, radius = prepare(predict, images, labels, key, eps, norm)
    classes = jax.eval_shape(predict, images).shape[1]
    if loss not in ("ce", "dlr", "targeted"):
        raise ValueError(f"loss: expected 'ce', 'dlr' or 'targeted', found {loss!r}")
    if loss == "dlr" and classes < 3:
        raise ValueError(f"loss: 'dlr' needs 3 or more classes, found {classes}")
    runs = restarts * min(targets, classes - 1) if loss == "targeted" else restarts
    run = _apgd if on_host(predict, images, keys, radius) else _whole_apgd
    return run(
        predict, images, labels, keys, radius, loss=loss, steps=steps, norm=norm,
        restarts=restarts, runs=runs,
    )  # fmt: skip


def checkpoints(steps: int) -> list[int]:
    """The steps after which to look back: the paper's w_j = ceil(p_j steps), up to `steps`.

    p_0 = 0, p_1 = 0.22, and each gap is 0.03 less than the one before, but at least 0.06.
    """
    shares = [0.0, 0.22]
    # The gaps are sums of hundredths: rounded, so that ceil sees no error of the sums.
    while (following := round(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06), 10)) <= 1:
        shares.append(following)
    return [math.ceil(round(share * steps, 8)) for share in shares[1:]]


class _State(NamedTuple):
    x: Images
    previous: Images
    loss: Losses
    gradient: Images
    # The point of the highest loss.
    best: Images
    best_loss: Losses
    best_gradient: Images
    # The last misclassified point.
    adversarial: Images
    broken: Bool[Array, " n"]
    step: Float[Array, "n 1 1 1"]
    # Since the last checkpoint: how often the loss rose; the best loss and whether halved there.
    rises: Int[Array, " n"]
    best_then: Losses
    halved_then: Bool[Array, " n"]


def _apgd(predict, images, labels, keys, eps, *, loss, steps, norm, restarts, runs):
    goals, broken = _goals(predict, images, labels, count=runs // restarts)
    # Per step: how many steps its checkpoint looks back on, 0 where there is none.
    marks, spans = checkpoints(steps), np.zeros(steps, np.int32)
    spans[np.array(marks) - 1] = np.diff([0, *marks])
    spans = jnp.asarray(spans)

    def attempt(number, found):
        # Without targets the goal is not looked at.
        goal = goals[number // restarts] if loss == "targeted" else labels
        given = predict, images, labels, goal, eps
        state = _start(*given, fold_each(keys, number), loss=loss, norm=norm)
        state = iterate(steps, Partial(_advance(loss, norm), *given, spans), state)
        # Losses towards different classes do not compare: the first target's best is kept.
        return _merge(found, state, number < restarts)

    # A misclassified image is its own adversarial one.
    found = images, broken, images, jnp.full(len(images), -jnp.inf)
    adversarial, broken, best, _ = rounds(runs, attempt, found, lambda found: found[1].all())
    return pick(broken, adversarial, best)


_whole_apgd = jax.jit(_apgd, static_argnames=("loss", "steps", "norm", "restarts", "runs"))


@partial(jax.jit, static_argnames="count")
def _goals(predict, images, labels, *, count):
    clean = predict(images)
    return likely_targets(clean, labels, min(count, clean.shape[1] - 1)), wrong(clean, labels)


@jax.jit
def _merge(found, state: _State, comparable):
    adversarial, broken, best, best_loss = found
    better = (state.best_loss > best_loss) & comparable
    return (
        pick(state.broken & ~broken, state.adversarial, adversarial),
        broken | state.broken,
        pick(better, state.best, best),
        jnp.where(better, state.best_loss, best_loss),
    )


def _measure(loss: LossName, goal: Labels) -> Loss:
    def targeted(logits, labels):
        enough = logits.shape[1] >= 4
        return (targeted_dlr if enough else difference)(logits, labels, goal)

    return {"ce": cross_entropy, "dlr": dlr, "targeted": targeted}[loss]


@partial(jax.jit, static_argnames=("loss", "norm"))
def _start(predict, images, labels, goal, eps, keys, *, loss, norm) -> _State:
    start = random_start(keys, images, eps, norm=norm)
    value, broken, gradient = loss_and_gradient(predict, _measure(loss, goal), start, labels)
    return _State(
        x=start,
        previous=start,
        loss=value,
        gradient=gradient,
        best=start,
        best_loss=value,
        best_gradient=gradient,
        adversarial=start,
        broken=broken,
        step=2 * eps,
        rises=jnp.zeros(len(images), jnp.int32),
        best_then=value,
        halved_then=jnp.ones(len(images), bool),
    )


@cache
def _advance(loss: LossName, norm: Norm):
    """The step of a loss and a norm, one function object for all calls: programs are kept by it."""

    def advance(predict, images, labels, goal, eps, spans, number, state: _State) -> _State:
        ahead = project(state.x + state.step * steepest(state.gradient, norm), images, eps, norm)
        share = jnp.where(number == 0, 1.0, _MOMENTUM)
        moved = state.x + share * (ahead - state.x) + (1 - share) * (state.x - state.previous)
        x = project(moved, images, eps, norm)
        value, broken, gradient = loss_and_gradient(predict, _measure(loss, goal), x, labels)
        higher = value > state.best_loss
        state = state._replace(
            x=x,
            previous=state.x,
            loss=value,
            gradient=gradient,
            best=pick(higher, x, state.best),
            best_loss=jnp.where(higher, value, state.best_loss),
            best_gradient=pick(higher, gradient, state.best_gradient),
            adversarial=pick(broken, x, state.adversarial),
            broken=broken | state.broken,
            rises=state.rises + (value > state.loss),
        )
        span = spans[number]
        return jax.lax.cond(span > 0, lambda: _look_back(state, span), lambda: state)

    return advance


def _look_back(state: _State, span) -> _State:
    oscillates = state.rises < _RISING * span
    stalls = ~state.halved_then & (state.best_loss <= state.best_then)
    halve = oscillates | stalls
    return state._replace(
        x=pick(halve, state.best, state.x),
        loss=jnp.where(halve, state.best_loss, state.loss),
        gradient=pick(halve, state.best_gradient, state.gradient),
        step=jnp.where(halve[:, None, None, None], state.step / 2, state.step),
        rises=jnp.zeros_like(state.rises),
        best_then=state.best_loss,
        halved_then=halve,
    )
