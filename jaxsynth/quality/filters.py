"""Which synthetic images are kept, as places in their store: nothing is copied or removed.

- adherence: a CLIP's share for the image's own class among all (the filter of He et al. 2023, arXiv
  2210.07574, keeps shares above 1 / classes);
- agreement: its first choice is the image's class (da Costa et al. 2023, DISEF);
- near-duplicates: of images of a class whose features have a cosine above a limit the first stays;
- a cap: at most so many of each class, those with the highest share.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int

from jaxsynth.core.limits import BelowOne, Natural, Range, check_limits


@dataclass(frozen=True)
class FilterConfig:
    """What is kept. `least_share` 0, `duplicates` 1 and `most` 0 take nothing out.

    least_share: of the image's own class. agreement: whether that must be the largest. duplicates:
    the cosine above which an image of a class repeats an earlier one. most: images of each class.
    """

    least_share: BelowOne = 0.0
    agreement: bool = False
    duplicates: Annotated[float, Range(0, 1, above=True)] = 1.0
    most: Natural = 0

    def __post_init__(self):
        check_limits(self)

    @property
    def takes_any(self) -> bool:
        """Whether anything is filtered at all."""
        return self != FilterConfig()


def kept(
    shares: Float[np.ndarray, "n c"],
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    config: FilterConfig,
) -> tuple[np.ndarray, dict[str, int]]:
    """The places of the images that stay, in their order, and how many each filter took out.

    Args:
        shares: a classifier's probabilities of the classes.
        features: of any length; cosines compare them.
    """
    own = shares[np.arange(len(labels)), labels]
    stays = own >= config.least_share
    counts = {"least_share": int((~stays).sum())}
    if config.agreement:
        agrees = shares.argmax(1) == labels
        counts["agreement"] = int((stays & ~agrees).sum())
        stays &= agrees
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
    return np.flatnonzero(stays), counts


def _repeats(features: Float[np.ndarray, "n d"], limit: float) -> np.ndarray:
    """Whether each image is near an earlier one that stays."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    found = np.zeros(len(unit), bool)
    for i in range(1, len(unit)):
        found[i] = (unit[:i][~found[:i]] @ unit[i] > limit).any()
    return found
