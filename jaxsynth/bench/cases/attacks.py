"""PGD of 20 steps on a small classifier: ours, and foolbox's or torchattacks' on equal weights."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsynth.bench.cases.attacked_networks import STEP_SIZE, Attack, AttackCase

CASES = (
    AttackCase("mlp", "mlp", images=256),
    AttackCase("resnet20", "resnet20", images=32),
    AttackCase("convolutions", "convolutions", images=32),
)


def build(case: AttackCase) -> Attack:
    """Our side of a case, with random weights."""
    return Attack(case)


def connect(ours: Attack, peer: str) -> Any:
    """The peer's attack on the same network, weights and images."""
    if peer == "torchattacks":
        from jaxsynth.bench.peers.torchattacks import TorchattacksPGD

        return TorchattacksPGD(ours)
    from jaxsynth.bench.peers.foolbox import FoolboxPGD

    return FoolboxPGD(ours)


def compare(ours: Attack, found: list[np.ndarray], peer: Any) -> float:
    """The share of pixels that differ after one step, or the relative difference of the last loss.

    Whichever is larger. A pixel whose gradient is rounding noise may move either way, and changes
    those around it from then on: all steps are held to the loss that they reach.
    """
    apart = np.abs(ours.step(steps=1) - peer.step(steps=1)) > STEP_SIZE / 100
    mine, theirs = ours.loss(found[0]), ours.loss(peer.step())
    return max(float(apart.mean()), abs(mine - theirs) / theirs)


def peer_call(ours: Attack, peer: Any) -> Callable[[], object]:
    """What the peer does instead of `ours.step`."""
    return peer.step
