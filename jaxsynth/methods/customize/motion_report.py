"""The page's part on motion: how clips move, before and after."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxsynth.core.arrays import read_arrays
from jaxsynth.methods.customize.films import FIGURES, STRIPS
from jaxsynth.report.page import Picture, Section
from jaxsynth.report.tables import Measure, Table
from jaxsynth.robustness.metrics.bootstrap import TooFewError, interval, weighted_sum

_TEXT = (
    "Difference: mean absolute difference of neighbouring frames, in percent of white. "
    "Consistency: cosine of CLIP's features of neighbouring frames; prompt: of each frame with its "
    "prompt. Speed: pixels from a frame to the next, by phase correlation. Both draw the same "
    "prompts from the same noise."
)
_ALONG = " Along: the part of the speed that is along the mean shift of the clips learned from."
# Heading, and how many times a figure is shown.
_COLUMNS = {
    "difference": ("difference, %", 100.0),
    "consistency": ("consistency", 1.0),
    "prompt": ("prompt", 1.0),
    "speed": ("speed, px", 1.0),
    "along": ("along, px", 1.0),
}
_BEFORE = {
    "animatediff": "untouched base, frame by frame",
    "motion_lora": "given motion modules",
}


def _columns(technique: str) -> list[str]:
    """The figures that are shown; clips of one direction are for MotionLoRA alone."""
    return [key for key in _COLUMNS if key != "along" or technique == "motion_lora"]


def compared(results: list[dict], technique: str, title: str) -> Table:
    """Held-out clips, and animations before and after."""
    rows: list[list[Any]] = []
    columns = {key: _COLUMNS[key] for key in _columns(technique)}
    names = {"clips": "held-out clips", "base": _BEFORE[technique], "custom": title}
    for name, label in names.items():
        measures = [
            Measure(tuple(factor * result[f"{name}_{key}"] for result in results))
            for key, (_, factor) in columns.items()
        ]
        rows.append([label, *measures])
    return Table(
        ["Clips", *(heading for heading, _ in columns.values())],
        rows,
        caption="mean ± standard deviation of seeds",
        better=None,
        digits=3,
        rules=(1,),
    )


def gains(folders: list[Path], technique: str) -> dict[str, str]:
    """Mean differences from before with their intervals, animations of all seeds."""
    found = {}
    for key in _columns(technique):
        names = [f"{name}_{key}" for name in ("base", "custom")]
        arrays = [read_arrays(folder / FIGURES, names) for folder in folders]
        before, after = (np.concatenate([x[name] for x in arrays]) for name in names)
        change = _COLUMNS[key][1] * (after - before)
        # Not `bootstrap.mean`, which takes values in [0, 1] for shares.
        figure = Partial(_mean, jnp.asarray(change, jnp.float32))
        try:
            found[key] = interval(figure, len(change), jax.random.key(0)).text(scale=1.0, digits=3)
        except TooFewError:
            found[key] = f"{change.mean():.3f}, in all animations"
    return found


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    return weighted_sum(values, weights) / weights.sum()


def section(folder: Path, technique: str, table: Table, lines: list[str]) -> Section:
    """The table, the differences, and strips of the seed in `folder`."""
    text = f"{_TEXT}{_ALONG}" if technique == "motion_lora" else _TEXT
    return Section(
        "How the clips move",
        f"{text}\n\nDifference of after from before, over the animations of all seeds, with the "
        "95 % interval of a bootstrap:\n\n" + "\n".join(f"- {line}" for line in lines),
        tables=[table],
        images=[
            Picture(
                folder / STRIPS,
                "Frames from left to right: clips learned from and held out, and of each prompt "
                "animations before and after, from the same noise.",
                pixelated=True,
            )
        ],
    )
