"""What a classifier goes by: context, shape or texture, background. Every figure has its interval.

- Context (FOCUS; Kattakinda and Feizi, ICML 2022): partition P_k holds the images of which k of
  time, weather and location are uncommon for their class. CB_k is the accuracy in P_k in per cent
  of that in P_0: 100 where context does not matter.
- Shape against texture (Geirhos et al. 2019, arXiv 1811.12231): of images with the shape of one
  class and the texture of another, the share decided by shape of those decided by either.
- Background (ImageNet-9; Xiao et al. 2021, arXiv 2006.09994): foregrounds on backgrounds of their
  own class (Mixed-Same) and of random ones (Mixed-Rand). BG-Gap is the difference in accuracy.

The sets' classes are groups of a model's classes, given as `{name: indices}`. Who wins is settled
the way each set does: the likeliest of all classes, in a group or not (FOCUS, ImageNet-9), or the
group with the highest mean probability (cue conflict).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsynth.core.words import counted
from jaxsynth.robustness.checks import check_classes, check_labels, check_logits
from jaxsynth.robustness.metrics.bootstrap import (
    Figure,
    Interval,
    Measured,
    difference,
    interval,
    mean,
    quotient,
    ratio,
)

ClassMap = Mapping[str, Sequence[int]]


def check_class_map(class_map: ClassMap, classes: int, names: Sequence[str]) -> list[np.ndarray]:
    """The groups' indices in the order of `names`.

    ValueError for names that differ, an index outside of the model's classes, or one in two groups.
    """
    missing, extra = set(names) - set(class_map), set(class_map) - set(names)
    if missing or extra:
        raise ValueError(
            f"class map: missing {sorted(missing)}, unexpected {sorted(extra)}; expected "
            f"{list(names)}"
        )
    groups = [check_classes(class_map[name], classes, f"class map, {name!r}") for name in names]
    values, times = np.unique(np.concatenate(groups), return_counts=True)
    if (times > 1).any():
        twice = [n for n, group in zip(names, groups, strict=True) if values[times > 1][0] in group]
        raise ValueError(f"class map: class {values[times > 1][0]} is in {' and '.join(twice)}")
    return groups


def decide_by_class(
    logits: Float[Array, "n c"], class_map: ClassMap, names: Sequence[str]
) -> Int[np.ndarray, " n"]:
    """The group of the likeliest class, as a place in `names`; -1 where it is in no group."""
    logits = check_logits(logits)
    places = np.full(logits.shape[1], -1, np.int32)
    for place, group in enumerate(check_class_map(class_map, logits.shape[1], names)):
        places[group] = place
    return places[np.asarray(logits.argmax(1))]


def decide_by_group(
    logits: Float[Array, "n c"], class_map: ClassMap, names: Sequence[str]
) -> Int[np.ndarray, " n"]:
    """The group whose classes have the highest mean probability, as a place in `names`."""
    logits = check_logits(logits)
    groups = check_class_map(class_map, logits.shape[1], names)
    shares = np.zeros((logits.shape[1], len(groups)), np.float32)
    for place, group in enumerate(groups):
        shares[group, place] = 1 / len(group)
    return np.asarray(_decide(logits, shares))


@jax.jit
def _decide(logits, shares):
    # Logarithms of the means: float32 would round the smallest probabilities to equal zeros.
    means = jax.lax.map(lambda share: jax.nn.logsumexp(logits + jnp.log(share), axis=1), shares.T)
    return means.argmax(0)


@dataclass(frozen=True)
class ContextBias:
    """Per partition k: how many images, accuracy (a fraction), and CB_k in per cent for k > 0."""

    images: dict[int, int]
    accuracy: dict[int, Interval]
    cb: dict[int, Interval]


def context_partition(uncommon: Bool[np.ndarray, "n attributes"]) -> Int[np.ndarray, " n"]:
    """How many of each image's attributes are uncommon for its class."""
    uncommon = np.asarray(uncommon)
    if uncommon.ndim != 2 or uncommon.dtype != bool:
        raise ValueError(
            f"uncommon: expected booleans (images, attributes), found {uncommon.dtype} "
            f"{uncommon.shape}"
        )
    return uncommon.sum(1)


def context_bias(
    correct: Bool[np.ndarray, " n"],
    partition: Int[np.ndarray, " n"],
    key: Key[Array, ""],
    *,
    partitions: Sequence[int] = (0, 1, 2, 3),
    resamples: int = 2000,
) -> ContextBias:
    """Accuracy in each of `partitions` and CB_k; resamples keep the partitions' sizes.

    ValueError for a partition without images, or if no image of P_0 is right.
    """
    correct = _correct(correct, "correct")
    partition = check_labels(np.asarray(partition), len(correct), len(correct) + 1, "partition")
    partition = np.asarray(partition)
    found = {k: int((partition == k).sum()) for k in sorted({*partitions, *partition.tolist()})}
    for k in (0, *partitions):
        if not found.get(k):
            present = ", ".join(f"P{j} with {count}" for j, count in found.items() if count)
            raise ValueError(f"partition: no image in P{k}; found {present}")
    if not correct[partition == 0].any():
        raise ValueError("correct: no image of P0 is right, CB_k is the accuracy relative to it")

    def measure(figure: Figure, number: int) -> Interval:
        drawn = jax.random.fold_in(key, number)
        return interval(figure, len(correct), drawn, groups=partition, resamples=resamples)

    figures = context_figures(correct, partition, scale=100)
    return ContextBias(
        images={k: found[k] for k in partitions},
        accuracy={k: measure(mean(correct, partition == k), 2 * k) for k in partitions},
        cb={k: measure(figures[k].figure, 2 * k + 1) for k in partitions if k},
    )


def context_figures(
    correct: Bool[np.ndarray, " n"], partition: Int[np.ndarray, " n"], *, scale: float = 1.0
) -> dict[int, Measured]:
    """CB_k of every partition but P_0, times `scale`; no number where no image of P_0 is right."""
    common = mean(correct, partition == 0)
    found = {}
    for k in np.unique(partition[partition > 0]).tolist():
        inside = partition == k
        above = ratio(correct & inside, inside, scale=scale)
        found[k] = Measured(quotient(above, common), len(correct), partition)
    return found


@dataclass(frozen=True)
class ShapeBias:
    """Shape bias overall and by class; a class of whose images none was decided by either has None.

    `accuracy` is the share of conflicting images decided for their shape ("shape") and for their
    texture ("texture").
    """

    overall: Interval
    per_class: dict[str, float | None]
    accuracy: dict[str, Interval]
    images: int


def shape_bias(
    decisions: Int[np.ndarray, " n"],
    shapes: Int[np.ndarray, " n"],
    textures: Int[np.ndarray, " n"],
    names: Sequence[str],
    key: Key[Array, ""],
    *,
    per_class: Literal["shape", "decision"] = "shape",
    resamples: int = 2000,
) -> ShapeBias:
    """From decisions among the classes `names`; images whose shape and texture agree are left out.

    `per_class` counts a class's images by their shape (Geirhos et al.) or by what was decided, as
    the synthetic-clone study did (arXiv 2405.20469). ValueError where nothing conflicts, or no
    image was decided by shape or texture.
    """
    names = list(names)
    decisions, shapes, textures = (
        np.asarray(check_labels(np.asarray(x), len(decisions), len(names), what))
        for x, what in ((decisions, "decisions"), (shapes, "shapes"), (textures, "textures"))
    )
    conflict = shapes != textures
    if not conflict.any():
        raise ValueError("textures: each is its image's shape, expected images that conflict")
    decisions, shapes, textures = (x[conflict] for x in (decisions, shapes, textures))
    by_shape, by_texture = decisions == shapes, decisions == textures
    either = by_shape | by_texture
    if not either.any():
        raise ValueError("decisions: no image was decided by its shape or its texture")
    count = len(decisions)
    groups = shapes if per_class == "shape" else decisions

    def share(index: int) -> float | None:
        among = either & (groups == index)
        return float(by_shape[among].mean()) if among.any() else None

    def measure(figure: Figure, number: int) -> Interval:
        return interval(figure, count, jax.random.fold_in(key, number), resamples=resamples)

    return ShapeBias(
        overall=measure(shape_figure(decisions, shapes, textures).figure, 0),
        per_class={name: share(index) for index, name in enumerate(names)},
        accuracy={
            "shape": measure(mean(by_shape), 1),
            "texture": measure(mean(by_texture), 2),
        },
        images=count,
    )


def shape_figure(
    decisions: Int[np.ndarray, " n"], shapes: Int[np.ndarray, " n"], textures: Int[np.ndarray, " n"]
) -> Measured:
    """Shape bias; images whose shape and texture agree do not count."""
    conflict = shapes != textures
    by_shape = conflict & (decisions == shapes)
    either = by_shape | (conflict & (decisions == textures))
    return Measured(ratio(by_shape, either), len(shapes))


@dataclass(frozen=True)
class BackgroundBias:
    """Accuracies (fractions) and their difference, Mixed-Same less Mixed-Rand."""

    original: Interval
    mixed_same: Interval
    mixed_rand: Interval
    gap: Interval


def background_bias(
    original: Bool[np.ndarray, " n"],
    mixed_same: Bool[np.ndarray, " m"],
    mixed_rand: Bool[np.ndarray, " r"],
    key: Key[Array, ""],
    *,
    paired: bool = False,
    resamples: int = 2000,
) -> BackgroundBias:
    """From the correctness of every image of the three sets.

    `paired`: image i has the same foreground in both mixed sets, so that they are resampled
    together; else each set is resampled on its own. ValueError where paired sets differ in size.
    """
    sets = {"original": original, "mixed_same": mixed_same, "mixed_rand": mixed_rand}
    right = {name: _correct(values, name) for name, values in sets.items()}
    same, random = right["mixed_same"], right["mixed_rand"]

    def measure(figure: Figure, count: int, number: int, groups=None) -> Interval:
        drawn = jax.random.fold_in(key, number)
        return interval(figure, count, drawn, groups=groups, resamples=resamples)

    gap = background_gap(same, random, paired=paired)
    single = (measure(mean(x), len(x), number) for number, x in enumerate(right.values()))
    return BackgroundBias(*single, measure(gap.figure, gap.count, 3, gap.groups))


def background_gap(
    mixed_same: Bool[np.ndarray, " m"], mixed_rand: Bool[np.ndarray, " r"], *, paired: bool
) -> Measured:
    """BG-Gap; the images of unpaired sets are resampled set by set."""
    if paired:
        if len(mixed_same) != len(mixed_rand):
            raise ValueError(
                f"mixed_rand: {counted(len(mixed_rand), 'image')}, expected the {len(mixed_same)} "
                "of mixed_same"
            )
        return Measured(difference(mean(mixed_same), mean(mixed_rand)), len(mixed_same))
    groups = np.repeat([0, 1], [len(mixed_same), len(mixed_rand)])
    both = np.concatenate([mixed_same, mixed_rand])
    gap = difference(mean(both, groups == 0), mean(both, groups == 1))
    return Measured(gap, len(both), groups)


def _correct(values: Any, name: str) -> Bool[np.ndarray, " n"]:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or values.dtype != bool:
        raise ValueError(
            f"{name}: expected one boolean an image, found {values.dtype} {values.shape}"
        )
    return values
