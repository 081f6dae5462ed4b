"""Signs that attacks by gradients would overstate a model's robustness (arXiv 1802.00420; the
checks that AutoAttack's authors added to theirs, and Carlini et al. 2019, arXiv 1902.06705).

Each is a property of the model at the images given, found before or after the attacks; the words
say what it means and what to do.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsynth.core.words import counted
from jaxsynth.robustness.attacks.common import (
    Images,
    Labels,
    Predict,
    cross_entropy,
    loss_and_gradient,
    margin,
)
from jaxsynth.robustness.attacks.evaluate import check_set

# Of the images, from which on vanishing gradients are worth a warning.
_ZERO_SHARE = 0.01


class Warned(NamedTuple):
    """`sign`: "zero gradients", "stochastic", "probabilities", "few classes", "black box",
    "one step" or "large eps"; `text` for a person.
    """

    sign: str
    text: str


def check_model(predict: Predict, images: Images, labels: Labels) -> list[Warned]:
    """What a batch of images shows about the model itself; empty where nothing is wrong."""
    predict, images, labels = check_set(predict, images, labels)
    margins, zero, unusable = (np.asarray(x) for x in _look(predict, images, labels))
    # Outside of a program, where a model that draws numbers of its own draws them anew.
    logits, again = (np.asarray(predict(images)) for _ in range(2))
    warned = []
    if not np.array_equal(logits, again, equal_nan=True):
        warned.append(
            Warned(
                "stochastic",
                "the model answers the same images differently (by up to "
                f"{np.nanmax(np.abs(logits - again)):g}): one gradient is not its gradient; "
                "average many, or switch its randomness off",
            )
        )
    if logits.min() >= 0 and np.allclose(logits.sum(1), 1, atol=1e-3):
        warned.append(
            Warned(
                "probabilities",
                "every row is from 0 to 1 and adds up to 1: these are probabilities, whose loss "
                "has hardly a gradient; return logits",
            )
        )
    if logits.shape[1] < 4:
        warned.append(
            Warned(
                "few classes",
                f"{counted(logits.shape[1], 'class')}: the targeted difference of logits ratio "
                "needs 4; the plain difference of two logits takes its place",
            )
        )
    if zero.mean() > _ZERO_SHARE:
        only = " of the cross-entropy only" if not margins.any() else ""
        warned.append(
            Warned(
                "zero gradients",
                f"the gradient is zero at {100 * zero.mean():.1f} % of the images{only}: attacks "
                "that follow it stand still; trust Square, and losses of logits rather than of "
                "probabilities",
            )
        )
    if unusable.any():
        warned.append(
            Warned("zero gradients", f"{unusable.sum()} images have NaN or infinite gradients")
        )
    return warned


def check_results(
    accuracy: Mapping[str, float],
    *,
    one_step: str = "fgsm",
    many_steps: str = "pgd",
    black_box: str = "square",
    large: str = "large",
) -> list[Warned]:
    """What accuracies under attacks, by their names, show; those that are not there are not judged.

    `large` is an attack of many steps with an eps of 0.5 or more: nothing recognisable is left.
    """
    warned = []
    if {one_step, many_steps} <= accuracy.keys() and accuracy[one_step] < accuracy[many_steps]:
        warned.append(
            Warned(
                "one step",
                f"{one_step} ({accuracy[one_step]:.3f}) does more than {many_steps} "
                f"({accuracy[many_steps]:.3f}): many steps should; is a step larger than eps?",
            )
        )
    if {black_box, many_steps} <= accuracy.keys() and accuracy[black_box] < accuracy[many_steps]:
        warned.append(
            Warned(
                "black box",
                f"{black_box} ({accuracy[black_box]:.3f}), which sees no gradients, does more than "
                f"{many_steps} ({accuracy[many_steps]:.3f}): the gradients mislead",
            )
        )
    if accuracy.get(large, 0) > 0:
        warned.append(
            Warned(
                "large eps",
                f"{100 * accuracy[large]:.1f} % withstand an eps that can turn any image into any "
                "other: the attack fails, not the images",
            )
        )
    return warned


@jax.jit
def _look(predict, images, labels):
    _, _, gradient = loss_and_gradient(predict, cross_entropy, images, labels)
    _, _, by_margin = loss_and_gradient(predict, margin, images, labels)
    zero = (gradient == 0).all((1, 2, 3))
    return (
        (by_margin == 0).all((1, 2, 3)) & zero,
        zero,
        ~jnp.isfinite(gradient).all((1, 2, 3)),
    )
