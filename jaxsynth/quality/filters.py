"""Which synthetic images are kept, as places in their store: nothing is copied or removed.

- adherence: a CLIP's share for the image's own class among all (the filter of He et al. 2023, arXiv
  2210.07574, keeps shares above 1 / classes);
- agreement: its first choice is the image's class (da Costa et al. 2023, DISEF);
- nearness to the shots: the cosine to the nearest shot of the image's class, not so small that the
  image shows something else, not so large that it is a copy;
- near-duplicates: of images of a class whose features have a cosine above a limit the first stays;
- a cap: at most so many of each class, those with the highest share;
- a floor: so many of each class at least, filled up by the highest share, as He et al. do;
- uncertainty: those that a classifier is least certain of (`most_uncertain`).
"""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

from jaxsynth.core.limits import BelowOne, Natural, OneOf, Range, check_limits

Cosine = Annotated[float, Range(-1, 1)]
# What a cosine between features is multiplied by before the softmax, as CLIP's logits are.
SCALE = 100.0


@dataclass(frozen=True)
class FilterConfig:
    """What is kept. The defaults take nothing out.

    least_share: of the image's own class. agreement: whether that must be the largest. judge: who
        says what share: a CLIP by the classes' "texts", or by the mean features of their "shots".
    least_cosine, most_cosine: to the nearest shot of the image's class. duplicates: the cosine
        above which an image of a class repeats an earlier one. most: images of each class.
    fewest: images of each class that stay at least, filled up with those of the highest share.
    """

    least_share: BelowOne = 0.0
    agreement: bool = False
    judge: Annotated[str, OneOf("texts", "shots")] = "texts"
    least_cosine: Cosine = -1.0
    most_cosine: Cosine = 1.0
    duplicates: Annotated[float, Range(0, 1, above=True)] = 1.0
    most: Natural = 0
    fewest: Natural = 0

    def __post_init__(self):
        check_limits(self)
        if self.least_cosine >= self.most_cosine:
            raise ValueError(
                f"least_cosine: {self.least_cosine}, most_cosine: {self.most_cosine}; expected the "
                "first to be smaller"
            )
        if self.fewest and replace(self, fewest=0) == FilterConfig():
            raise ValueError(f"fewest: {self.fewest}, but nothing else is filtered")
        if 0 < self.most < self.fewest:
            raise ValueError(
                f"fewest: {self.fewest}, expected at most `most`, which is {self.most}"
            )
        if self.judge != "texts" and not (self.least_share or self.agreement or self.most):
            raise ValueError(
                f"judge: {self.judge!r}, but none of least_share, agreement and most asks for it"
            )

    @property
    def takes_any(self) -> bool:
        """Whether anything is filtered at all."""
        return self != FilterConfig()

    @property
    def needs_shots(self) -> bool:
        """Whether a filter looks at real images."""
        return self.judge == "shots" or self.least_cosine > -1 or self.most_cosine < 1


def kept(
    shares: Float[np.ndarray, "n c"],
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    config: FilterConfig,
    nearest: Float[np.ndarray, " n"] | None = None,
) -> tuple[np.ndarray, dict[str, int]]:
    """The places of the images that stay, in their order, and how many each filter took out.

    Args:
        shares: a classifier's probabilities of the classes.
        features: of any length; cosines compare them.
        nearest: the largest cosine to a shot of the image's class (`nearest_shot`), where the
            config has limits of it.
    """
    own = shares[np.arange(len(labels)), labels]
    stays = own >= config.least_share
    counts = {"least_share": int((~stays).sum())}
    if config.agreement:
        agrees = shares.argmax(1) == labels
        counts["agreement"] = int((stays & ~agrees).sum())
        stays &= agrees
    for name, beyond in (
        ("least_cosine", lambda found: found < config.least_cosine),
        ("most_cosine", lambda found: found > config.most_cosine),
    ):
        if getattr(config, name) != getattr(FilterConfig, name):
            far = beyond(nearest)
            counts[name] = int((stays & far).sum())
            stays &= ~far
    if config.duplicates < 1:
        before = stays.sum()
        for label in np.unique(labels):
            places = np.flatnonzero(stays & (labels == label))
            stays[places[_repeats(features[places], config.duplicates)]] = False
        counts["duplicates"] = int(before - stays.sum())
    if config.most:
        before = stays.sum()
        for label in np.unique(labels):
            places = np.flatnonzero(stays & (labels == label))
            lowest = places[np.argsort(-own[places], kind="stable")[config.most :]]
            stays[lowest] = False
        counts["most"] = int(before - stays.sum())
    if config.fewest:
        before = stays.sum()
        for label in np.unique(labels):
            out = np.flatnonzero(~stays & (labels == label))
            missing = max(config.fewest - int((stays & (labels == label)).sum()), 0)
            stays[out[np.argsort(-own[out], kind="stable")[:missing]]] = True
        counts["fewest"] = int(before - stays.sum())
    return np.flatnonzero(stays), counts


def _repeats(features: Float[np.ndarray, "n d"], limit: float) -> np.ndarray:
    """Whether each image is near an earlier one that stays."""
    unit = _unit(features)
    found = np.zeros(len(unit), bool)
    for i in range(1, len(unit)):
        found[i] = (unit[:i][~found[:i]] @ unit[i] > limit).any()
    return found


def nearest_shot(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    shots: Float[np.ndarray, "m d"],
    shot_labels: Int[np.ndarray, " m"],
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The largest cosine of each image to a shot of its class, and that shot's place.

    -1 and the place 0 where the class has no shot.
    """
    cosines = _unit(features) @ _unit(shots).T
    cosines = np.where(labels[:, None] == shot_labels[None], cosines, -1.0)
    return cosines.max(1), cosines.argmax(1)


def shot_shares(
    features: Float[np.ndarray, "n d"],
    shots: Float[np.ndarray, "m d"],
    shot_labels: Int[np.ndarray, " m"],
    num_classes: int,
) -> Float[np.ndarray, "n c"]:
    """Probabilities of the classes by the cosine to the mean of each class's shots."""
    known = _unit(shots)
    means = np.stack([known[shot_labels == c].mean(0) for c in range(num_classes)])
    return softmax(SCALE * (_unit(features) @ _unit(means).T), axis=1)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def entropy(shares: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
    """-sum_c p_c log p_c of each row, in nats."""
    logs = np.log(np.maximum(shares, np.finfo(np.float64).tiny))
    return -(shares * logs).sum(1, dtype=np.float64)


def most_uncertain(
    shares: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    taken: Int[np.ndarray, " t"],
    count: int,
) -> Int[np.ndarray, " m"]:
    """The `count` places of each class with the largest entropy that are not among `taken`.

    Classes one after the other, the least certain first, of equal ones the earlier; fewer of a
    class that has no more.
    """
    uncertain, free = entropy(shares), np.ones(len(labels), bool)
    free[taken] = False
    found = [np.zeros(0, np.int64)]
    for label in np.unique(labels):
        places = np.flatnonzero(free & (labels == label))
        found.append(places[np.argsort(-uncertain[places], kind="stable")[:count]])
    return np.concatenate(found)
