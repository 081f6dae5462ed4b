"""What a study's answers say: curves, equivalent real images, and claims with their intervals.

Differences are paired by seed, with Student's 95 % interval. `OBSERVATIONS` are those of the study
of synthetic clones (Singh et al. 2024, arXiv 2405.20469) that its published result files bear out
for its CLIPs of 371 million images (real, synthetic, both) and its ViT-B of 16 million.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsynth.methods.scaling import fit as laws
from jaxsynth.methods.scaling.config import REAL, Config
from jaxsynth.methods.scaling.points import PRACTICED
from jaxsynth.methods.scaling.trainings import Answers

Found = Mapping[str, list[Answers]]
# Errors of seeds by size (images of a class) of each curve.
Curves = dict[str, dict[float, dict[int, float]]]
# A row of the robustness suite's figures: "setting", "seed", "size" and each figure by its name.
Judged = Sequence[Mapping[str, Any]]


def curves(found: Found) -> Curves:
    """Errors of the seeds by size (images of a class), of each setting that is a curve."""
    out: Curves = {}
    for setting, answers in found.items():
        if setting.endswith(", mixed"):
            continue
        curve = out.setdefault(setting, {})
        for one in answers:
            curve.setdefault(one.point.size, {})[one.point.seed] = one.error
    return {setting: dict(sorted(curve.items())) for setting, curve in out.items()}


def errors_of(curve: Mapping[float, Mapping[int, float]]) -> dict[float, list[float]]:
    """A curve's errors without their seeds."""
    return {size: list(own.values()) for size, own in curve.items()}


def equivalents(config: Config, found: Found) -> list[dict[str, Any]]:
    """What each point of the curves was worth in real images of a class."""
    measured = {setting: errors_of(curve) for setting, curve in curves(found).items()}
    real = measured.get(REAL, {})
    rows = []
    if len(real) < 2 or min(map(len, real.values())) < 2 or min(map(min, real.values())) <= 0:
        return rows
    for setting, curve in measured.items():
        if setting == REAL:
            continue
        for size, errors in curve.items():
            if min(errors) <= 0 or len(errors) < 2:
                continue
            estimate, words = laws.worth(errors, real, resamples=config.resamples)
            rows.append(
                {"setting": setting, "size": size, "worth": estimate.value, "low": estimate.low,
                 "high": estimate.high, "beyond": words}
            )  # fmt: skip
    return rows


def compared(
    claim: str, one: Mapping[int, float], other: Mapping[int, float]
) -> list[dict[str, Any]]:
    """The claim that `one` is less than `other`, values by seed; [] of fewer than two seeds."""
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        return []
    apart = laws.difference([one[seed] for seed in seeds], [other[seed] for seed in seeds])
    holds = "yes" if apart.high < 0 else "no" if apart.low > 0 else "not told"
    return [
        {"claim": claim, "difference": apart.value, "low": apart.low, "high": apart.high,
         "holds": holds}
    ]  # fmt: skip


def tested(config: Config, found: Found) -> list[dict[str, Any]]:
    """The claims of the studies, each a difference of errors with its interval."""
    measured, rows = curves(found), []
    for name in config.sources:
        curve, both = measured.get(name, {}), measured.get(f"{name} + real", {})
        practiced = measured.get(f"{name}{PRACTICED}", {})
        sizes = list(curve)
        if len(sizes) > 1:
            rows += compared(
                f"{name}: {sizes[-1]} images a class err less than {sizes[0]}",
                curve[sizes[-1]], curve[sizes[0]],
            )  # fmt: skip
            for below, above in itertools.pairwise(sizes):
                rows += compared(
                    f"{name}: {above} err less than {below}", curve[above], curve[below]
                )
        for size in sizes:
            if size in both:
                rows += compared(
                    f"{name} + {config.added_real} real err less than {name}, {size} images",
                    both[size], curve[size],
                )  # fmt: skip
            # The first size is the same images.
            if size in practiced and size != min(practiced):
                rows += compared(
                    f"{name}, practiced err less than {name}, {size} images",
                    practiced[size], curve[size],
                )  # fmt: skip
        real = measured.get(REAL, {})
        if config.added_real in real and both:
            last = list(both)[-1]
            rows += compared(
                f"{name}, {last} images + {config.added_real} real err less than "
                f"{config.added_real} real alone", both[last], real[config.added_real],
            )  # fmt: skip
    names = [name for name in config.sources if name in measured]
    names.sort(key=lambda name: config.sources[name].shots)
    for one, other in ((a, b) for i, a in enumerate(names) for b in names[:i]):
        for size in measured[one]:
            rows += compared(
                f"{one} err less than {other}, {size} images",
                measured[one][size], measured[other].get(size, {}),
            )  # fmt: skip
    return rows


@dataclass(frozen=True)
class Observation:
    """That a figure of the suite is lower of `lower` than of `higher`: "real", "synthetic", "both",
    and "small" and "large" numbers of synthetic images."""

    words: str
    figure: str
    lower: str
    higher: str


OBSERVATIONS = (
    Observation("Synthetic images alone make more errors than real ones", "accuracy", "synthetic",
                REAL),
    Observation("Real images beside them make fewer errors than synthetic ones alone", "accuracy",
                "synthetic", "both"),
    Observation("Real images beside them calibrate better than synthetic ones alone", "ECE", "both",
                "synthetic"),
    Observation("Synthetic and real images calibrate better than real ones alone", "ECE", "both",
                REAL),
    Observation("Synthetic images alone withstand FGSM less than real ones", "R_adv FGSM",
                "synthetic", REAL),
    Observation("Real images beside them withstand FGSM more than synthetic ones alone",
                "R_adv FGSM", "synthetic", "both"),
    Observation("Synthetic images alone withstand corruptions less than real ones", "R_cc",
                "synthetic", REAL),
    Observation("Synthetic images alone detect images of no class less well than real ones",
                "AUROC textures", "synthetic", REAL),
    Observation("More synthetic images make fewer errors", "accuracy", "small", "large"),
    Observation("More synthetic images calibrate better", "ECE", "large", "small"),
)  # fmt: skip


def observed(config: Config, judged: Judged) -> list[dict[str, Any]]:
    """Which observations hold for each source, at the largest size that was judged for both sides.

    A pair of sources is compared too, in each figure that an observation is about: which prompts or
    adapters are more robust.
    """
    rows, table = [], _by_setting(judged)
    for name in config.sources:
        sides = {REAL: REAL, "synthetic": name, "both": f"{name} + real"}
        for seen in OBSERVATIONS:
            if seen.lower in sides:
                size, lower, higher = _largest(table, sides[seen.lower], sides[seen.higher])
                where = f"{size:g} images"
            else:
                sizes = sorted(table.get(name, {}))
                if len(sizes) < 2:
                    continue
                ends = {"small": table[name][sizes[0]], "large": table[name][sizes[-1]]}
                lower, higher = ends[seen.lower], ends[seen.higher]
                where = f"{sizes[-1]:g} against {sizes[0]:g} images"
            rows += [
                row | {"source": name, "figure": seen.figure}
                for row in compared(
                    f"{seen.words} ({name}, {where})",
                    _values(lower, seen.figure), _values(higher, seen.figure),
                )
            ]  # fmt: skip
    figures = dict.fromkeys(seen.figure for seen in OBSERVATIONS)
    for one, other in itertools.combinations(config.sources, 2):
        size, first, second = _largest(table, one, other)
        for figure in figures:
            rows += [
                row | {"source": one, "figure": figure}
                for row in compared(
                    f"{figure} of {one} is below that of {other} ({size:g} images)",
                    _values(first, figure), _values(second, figure),
                )
            ]  # fmt: skip
    return rows


_Seeds = dict[int, Mapping[str, Any]]


def _by_setting(judged: Judged) -> dict[str, dict[float, _Seeds]]:
    table: dict[str, dict[float, _Seeds]] = {}
    for row in judged:
        own = table.setdefault(row["setting"], {}).setdefault(row["size"], {})
        own[row["seed"]] = row
    return table


def _largest(
    table: Mapping[str, Mapping[float, _Seeds]], one: str, other: str
) -> tuple[float, _Seeds, _Seeds]:
    """The largest size of both settings, and their rows at it; nothing where there is none."""
    common = table.get(one, {}).keys() & table.get(other, {}).keys()
    if not common:
        return np.nan, {}, {}
    size = max(common)
    return size, table[one][size], table[other][size]


def _values(rows: _Seeds, figure: str) -> dict[int, float]:
    found = {seed: row.get(figure) for seed, row in rows.items()}
    return {seed: value for seed, value in found.items() if value is not None}
