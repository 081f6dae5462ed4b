"""What curves and weights say: steps and seconds to a quality, who wins, what is repaid, copied.

A curve is the held-out L1 of one unseen concept after each of the measured steps. Seconds are those
of making the initial weights and of the steps; the programs' compilation is in neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxsynth.core.words import counted
from jaxsynth.methods.weightgen.generator import Baselines, group_norms

# Initial weights in the order of the tables.
INITS = {
    "scratch": "pix2pix, scratch",
    "default": "default LoRA",
    "mean": "mean LoRA",
    "nearest": "nearest LoRA",
    "noise": "nearest + noise",
    "ridge": "ridge",
    "one_step": "generated, 1 step",
    "few_steps": "generated, few",
    "shuffled": "shuffled prompts",
    "random": "random prompts",
}
GENERATED = ("one_step", "few_steps")
CONTROLS = ("shuffled", "random")


@dataclass(frozen=True)
class Curves:
    """The held-out L1 `l1[c][s]` of concept c after `steps[s]` steps, from one kind of weights.

    `prepare` is the seconds that making one concept's initial weights took, `step` those of one
    training step. `fd[c][s]` is the Frechet distance, where it was measured.
    """

    steps: tuple[int, ...]
    l1: Float[np.ndarray, "c s"]
    prepare: float
    step: float
    fd: Float[np.ndarray, "c s"] | None = None

    def __post_init__(self):
        object.__setattr__(self, "l1", np.asarray(self.l1, float))
        fd = None if self.fd is None else np.asarray(self.fd, float)
        object.__setattr__(self, "fd", fd if fd is not None and fd.size else None)
        if self.l1.ndim != 2 or self.l1.shape[1] != len(self.steps):
            raise ValueError(
                f"Curves: {self.l1.shape} errors at {counted(len(self.steps), 'step')}"
            )

    def seconds(self, steps: float) -> float:
        """Until so many steps are done."""
        return self.prepare + steps * self.step

    def steps_to(self, targets: Sequence[float]) -> list[float]:
        """For each concept the first measured step at or below its target; infinite if none is."""
        found = []
        for own, target in zip(self.l1, targets, strict=True):
            reached = np.flatnonzero(own <= target)
            found.append(float(self.steps[reached[0]]) if len(reached) else math.inf)
        return found


@dataclass(frozen=True)
class Reached:
    """How fast one kind of weights reaches the targets: the share of concepts that do at all, and
    the medians over all concepts, infinite where no more than half do."""

    share: float
    steps: float
    seconds: float


def reached(curves: Sequence[Curves], targets: Sequence[Sequence[float]]) -> Reached:
    """Over the concepts of all seeds: one that does not reach its target counts as infinite."""
    steps: list[float] = []
    for own, wanted in zip(curves, targets, strict=True):
        steps += own.steps_to(wanted)
    ordered = np.sort(steps)
    # The median of an even number is the mean of two: infinite where one of them is.
    middle = float(ordered[(len(steps) - 1) // 2] / 2 + ordered[len(steps) // 2] / 2)
    seconds = float(np.mean([own.seconds(middle) for own in curves]))
    return Reached(float(np.isfinite(steps).mean()), middle, seconds)


@dataclass(frozen=True)
class Duel:
    """One kind of weights against another at each step: relative difference of the mean L1
    (negative: lower) and the share of concepts at which it is lower."""

    steps: tuple[int, ...]
    difference: tuple[float, ...]
    won: tuple[float, ...]

    @property
    def throughout(self) -> bool:
        """Whether the mean is lower at every step."""
        return all(value < 0 for value in self.difference)


def duel(own: Sequence[Curves], other: Sequence[Curves]) -> Duel:
    """Over the concepts of all seeds, concept by concept."""
    first, second = (np.concatenate([curves.l1 for curves in side]) for side in (own, other))
    if own[0].steps != other[0].steps or first.shape != second.shape:
        raise ValueError(f"duel: {first.shape} errors at {own[0].steps}, {second.shape} at others")
    difference = first.mean(0) / second.mean(0) - 1
    return Duel(own[0].steps, tuple(difference.tolist()), tuple((first < second).mean(0).tolist()))


def verdict(name: str, rival: str, found: Duel) -> str:
    """A sentence that says who is ahead, where, and by how much."""
    ahead = [step for step, value in zip(found.steps, found.difference, strict=True) if value < 0]
    first, last = found.difference[0], found.difference[-1]
    edges = (
        f"{first:+.1%} at step {found.steps[0]}, {last:+.1%} at step {found.steps[-1]}, lower for "
        f"{found.won[0]:.0%} and {found.won[-1]:.0%} of the concepts"
    )
    if found.throughout:
        return f"{name} **beats** {rival} from step {found.steps[0]} through the end ({edges})."
    worst = max(range(len(found.steps)), key=lambda i: found.difference[i])
    where = f"it is ahead at steps {_listed(ahead)} only" if ahead else "it is behind at every step"
    return (
        f"{name} **does not beat** {rival} from step {found.steps[0]} through the end: {where}, "
        f"and at worst {found.difference[worst]:+.1%} at step {found.steps[worst]} ({edges})."
    )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def repaid_after(cost: float, own: float, other: float) -> float:
    """How many concepts it takes until `cost` seconds are repaid by `own` instead of `other`
    seconds for each; infinite if they never are."""
    if not math.isfinite(own):
        return math.inf
    saved = other - own
    return math.inf if saved <= 0 else cost / saved


def described(blocks: Float[np.ndarray, "m n v"], baselines: Baselines) -> dict[str, float]:
    """The squared distance to the nearest LoRA of the collection, arrays weighted alike and over
    the mean LoRA's to all of them, and the least and largest of the layers' relative norms."""
    own, learnt = baselines.scaled(blocks), baselines.scaled(baselines.blocks)
    closest = [np.square(learnt - row).sum(1).min() for row in own]
    typical = group_norms(baselines.blocks, baselines.layout).mean(0)
    ratios = group_norms(blocks, baselines.layout) / np.maximum(typical, 1e-12)
    return {
        "nearest_train": float(np.mean(closest) / _spread(learnt)),
        "norm_low": float(ratios.min()),
        "norm_high": float(ratios.max()),
    }


def unexplained(blocks: Float[np.ndarray, "c n v"], baselines: Baselines) -> float:
    """The share of the collection's variance, arrays weighted alike, that these miss."""
    learnt = baselines.scaled(baselines.blocks)
    return float(np.square(baselines.scaled(blocks) - learnt).sum(1).mean() / _spread(learnt))


def trained(baselines: Baselines) -> dict[str, float]:
    """The same of the collection's own LoRAs, each to the nearest of the others."""
    learnt = baselines.scaled(baselines.blocks)
    closest = [
        np.square(np.delete(learnt, row, axis=0) - own).sum(1).min()
        for row, own in enumerate(learnt)
    ]
    nearest = float(np.mean(closest) / _spread(learnt))
    return described(baselines.blocks, baselines) | {"nearest_train": nearest}


def _spread(values: Float[np.ndarray, "c values"]) -> float:
    return float(np.square(values - values.mean(0)).sum(1).mean())
