"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690): four attacks without settings, in a row.

APGD on the cross-entropy, APGD on the targeted DLR, FAB and Square; each attacks the images that
withstood those before it. Three follow gradients in different ways, the fourth needs none: an
image counts as robust if it withstands all four.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsynth.robustness.attacks.apgd import apgd
from jaxsynth.robustness.attacks.common import Images, Labels, Norm, Predict, fold_each, image_keys
from jaxsynth.robustness.attacks.evaluate import Attack, attacked, check_set, correct
from jaxsynth.robustness.attacks.fab import fab
from jaxsynth.robustness.attacks.square import square
from jaxsynth.robustness.checks import check_eps


class AutoAttack(NamedTuple):
    """Per image: the adversarial image (the clean one where none was found), whether it withstood
    all (`correct`), and which attack broke it: a place in `names`, -1 for none, -2 for an image
    that the model gets wrong without any.
    """

    images: Float[np.ndarray, "n h w c"]
    correct: Bool[np.ndarray, " n"]
    broken_by: Int[np.ndarray, " n"]
    names: tuple[str, ...]

    @property
    def accuracy(self) -> dict[str, float]:
        """The share that is right without attack ("clean") and still after each of them."""
        left = {"clean": self.broken_by != -2}
        for number, name in enumerate(self.names):
            left[name] = (self.broken_by == -1) | (self.broken_by > number)
        return {name: float(right.mean()) for name, right in left.items()}


def standard(norm: Norm = "linf", *, steps: int = 100, queries: int = 5000) -> dict[str, Attack]:
    """The four attacks by name, at their published lengths."""
    return {
        "apgd-ce": partial(apgd, loss="ce", steps=steps, norm=norm),
        "apgd-t": partial(apgd, loss="targeted", steps=steps, norm=norm),
        "fab-t": partial(fab, steps=steps, norm=norm),
        "square": partial(square, steps=queries, norm=norm),
    }


def autoattack(
    predict: Predict,
    images: Images,
    labels: Labels,
    key: Key[Array, "..."],
    *,
    eps: Any,
    norm: Norm = "linf",
    attacks: Mapping[str, Attack] | None = None,
    batch_size: int = 256,
) -> AutoAttack:
    """The worst case over `standard(norm)`, or over `attacks`, in their order.

    `eps` is one number. What an attack finds is checked: it counts if the model is wrong on it and
    it lies within `eps`. Each image has its own key, so no other image changes its result.
    """
    attacks = standard(norm) if attacks is None else dict(attacks)
    predict, images, labels = check_set(predict, images, labels)
    if np.ndim(eps):
        raise ValueError(f"eps: expected one number for all images, found shape {np.shape(eps)}")
    check_eps(eps, norm, images.shape)
    keys = image_keys(key, len(images))
    right = correct(predict, images, labels, batch_size=batch_size)
    worst, broken_by = np.array(images), np.where(right, -1, -2)
    for number, attack in enumerate(attacks.values()):
        left = np.flatnonzero(broken_by == -1)
        if not len(left):
            break
        # Filled up to whole batches with the last image: one program whatever is left.
        size = min(batch_size, len(images))
        rows = np.pad(left, (0, -len(left) % size), mode="edge")
        # Every attack draws other numbers.
        moved = attacked(
            attack,
            predict,
            images[rows],
            labels[rows],
            fold_each(keys[rows], number),
            eps=eps,
            batch_size=size,
        )[: len(left)]
        _check_distance(moved, np.asarray(images)[left], eps, norm)
        fell = left[~correct(predict, moved, labels[left], batch_size=size)]
        worst[fell] = moved[np.isin(left, fell)]
        broken_by[fell] = number
    return AutoAttack(worst, broken_by == -1, broken_by, tuple(attacks))


def _check_distance(moved, clean, eps, norm: Norm) -> None:
    change = np.abs(moved - clean).reshape(len(clean), -1)
    size = change.max(1) if norm == "linf" else np.sqrt(np.square(change, dtype=float).sum(1))
    if size.max() > eps * (1 + 1e-4) + 1e-6:
        raise ValueError(
            f"an attack moved an image by {size.max():g} in {norm}, farther than eps {eps:g}"
        )
    if moved.min() < 0 or moved.max() > 1:
        raise ValueError(f"an attack left [0, 1]: values from {moved.min():g} to {moved.max():g}")
