"""Plots in one style: learning curves, a score with its spread, bars with intervals, reliability.

Figures have a transparent background, mid-grey text and colours of middle lightness (Okabe and
Ito's palette, which people with colour-blindness can tell apart, adjusted), so that one PNG reads
well on a light and on a dark page. Nothing here touches pyplot's global state.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from jaxsynth.core.words import counted
from jaxsynth.report.fonts import drawable, families

_INK, _GRID = "#787e86", "#787e8638"
COLOURS = ("#2f7fd1", "#e0801f", "#1d9e78", "#c95b9c", "#b39211", "#7d6bd6", "#4aa8d8", "#c9503f")
_MARKERS = "osD^vPXd"
# The most values of an axis that have a tick each.
_TICKS = 10


@dataclasses.dataclass(frozen=True)
class Series:
    """A line: `y[i]` at `x[i]`, `std[i]` its spread over seeds (None, or NaN, draws no bar), or
    `low[i]` to `high[i]` its interval."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    std: Sequence[float] | None = None
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    @property
    def reach(self) -> Any:
        """What errorbar takes."""
        if self.low is None or self.high is None:
            return self.std
        y = np.asarray(self.y, float)
        return np.stack([y - np.asarray(self.low, float), np.asarray(self.high, float) - y])

    def __post_init__(self):
        lengths = {len(self.x), len(self.y), len(self.y if self.std is None else self.std)}
        if len(lengths) != 1 or not len(self.x):
            raise ValueError(f"series {self.label!r}: x, y and std must have one length above 0")


def plot_scores(
    path: Path,
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log_x: bool = False,
) -> Path:
    """A score against a few values of x (for example accuracy against shots), with error bars.

    Every x value gets its own tick; `log_x` is base 2. Series are nudged apart a little so that
    their error bars do not cover each other.
    """
    figure, axes = _figure(xlabel, ylabel, title)
    ticks = sorted({float(x) for line in series for x in line.x})
    if log_x:
        axes.set_xscale("log", base=2)
    for index, line in enumerate(series):
        nudge = 0.012 * (index - (len(series) - 1) / 2)
        x = np.asarray(line.x, float)
        if len(ticks) > 1:
            x = x * 2.0 ** (nudge * 2) if log_x else x + nudge * (ticks[-1] - ticks[0])
        axes.errorbar(
            x,
            line.y,
            yerr=line.reach,
            label=line.label,
            linestyle="--" if line.dashed else "-",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            capsize=3,
            linewidth=1.8,
            elinewidth=1.2,
        )
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    return _save(figure, axes, path)


def plot_scaling(
    path: Path,
    series: Sequence[Series],
    laws: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Path:
    """Errors against numbers of images, both logarithmic, with fitted laws `{label: (x, y)}`.

    A law has the color of the series of its label, whose points it does not join. Where an error
    is 0 the axis is linear from 0 to the smallest of the others.
    """
    figure, axes = _figure(xlabel, ylabel, title)
    above = [y for line in series for y in line.y if y > 0]
    has_zero = any(y <= 0 for line in series for y in line.y)
    axes.set_xscale("log")
    if has_zero:
        axes.set_yscale("symlog", linthresh=min(above, default=1.0))
    else:
        axes.set_yscale("log")
    for index, line in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        law = laws.get(line.label)
        axes.errorbar(
            line.x,
            line.y,
            yerr=line.reach,
            label=line.label,
            color=colour,
            linestyle="none" if law else "--" if line.dashed else "-",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            capsize=3,
            linewidth=1.2,
        )
        if law:
            axes.plot(*law, color=colour, linewidth=1.8)
    sizes = [x for line in series for x in line.x]
    if len(set(sizes)) > _TICKS:
        sizes = _round_ticks(sizes)
    errors = [0.0] * has_zero + (_round_ticks(above) if above else [])
    for axis, values in ((axes.xaxis, sizes), (axes.yaxis, errors)):
        ticks = sorted({float(value) for value in values})
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    return _save(figure, axes, path)


def _round_ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 3, 5 and 7 times powers of ten around values above 0."""
    low, high = min(values) / 1.5, max(values) * 1.5
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 3, 5, 7)]
    return [tick for tick in ticks if low <= tick <= high]


def plot_curves(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str = "step",
    ylabel: str = "loss",
    title: str = "",
    smooth: float = 0.9,
    log_y: bool = False,
) -> Path:
    """Learning curves `{label: (steps, values)}`.

    Each value is drawn faintly and its exponential moving average, with the start-up bias removed,
    strongly; `smooth` in [0, 1) is the average's memory, 0 draws the values alone.
    """
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth={smooth}: expected 0 <= smooth < 1")
    figure, axes = _figure(xlabel, ylabel, title)
    for index, (label, (steps, values)) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        values = np.asarray(values, float)
        if smooth and len(values) > 2:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
            values = moving_average(values, smooth)
        axes.plot(steps, values, color=colour, label=label, linewidth=1.8)
    if log_y:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return _save(figure, axes, path)


def plot_scatter(
    path: Path,
    labels: Sequence[str],
    x: Sequence[float],
    y: Sequence[float],
    shade: Sequence[float],
    *,
    xlabel: str,
    ylabel: str,
    shade_label: str,
    title: str = "",
) -> Path:
    """A named point for each (x, y), colored by a third value, whose scale stands beside.

    ValueError unless all have one length above 0.
    """
    if len({len(labels), len(x), len(y), len(shade)}) != 1 or not len(labels):
        raise ValueError("plot_scatter: labels, x, y and shade must have one length above 0")
    figure, axes = _figure(xlabel, ylabel, title)
    points = axes.scatter(x, y, c=shade, cmap="viridis", s=64, edgecolors=_INK, linewidths=0.6)
    for label, *place in zip(labels, x, y, strict=True):
        axes.annotate(
            drawable(label), tuple(place), xytext=(6, 5), textcoords="offset points",
            color=_INK, fontsize=9, fontfamily=families([label]),
        )  # fmt: skip
    bar = figure.colorbar(points, ax=axes)
    bar.set_label(shade_label, color=_INK)
    bar.ax.tick_params(colors=_INK)
    axes.margins(0.12)
    return _save(figure, axes, path)


@dataclasses.dataclass(frozen=True)
class Bars:
    """A bar `value[i]` for label i, and its interval from `low[i]` to `high[i]`; NaN draws none."""

    label: str
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def plot_bars(
    path: Path, labels: Sequence[str], groups: Sequence[Bars], *, xlabel: str, title: str = ""
) -> Path:
    """Horizontal bars with intervals, one cluster a label (a metric) and one bar a group (a model).

    ValueError for a group that has not one bar a label.
    """
    figure, axes = _figure(xlabel, "", title, height=1.3 + 0.17 * len(labels) * (len(groups) + 1))
    rows = np.arange(len(labels))
    thick = 0.8 / max(1, len(groups))
    for index, bars in enumerate(groups):
        if not len(bars.value) == len(bars.low) == len(bars.high) == len(labels):
            raise ValueError(
                f"bars {bars.label!r}: {counted(len(bars.value), 'value')} for "
                f"{counted(len(labels), 'label')}"
            )
        value, low, high = (np.asarray(x, float) for x in (bars.value, bars.low, bars.high))
        axes.barh(
            rows + (index - (len(groups) - 1) / 2) * thick,
            value,
            xerr=np.stack([value - low, high - value]),
            height=thick * 0.9,
            label=bars.label,
            color=COLOURS[index % len(COLOURS)],
            error_kw={"ecolor": _INK, "elinewidth": 1.1, "capsize": 2},
        )
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks(rows, [drawable(label) for label in labels])
    axes.tick_params(labelfontfamily=families(labels))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return _save(figure, axes, path)


def plot_reliability(
    path: Path, diagrams: Mapping[str, Mapping[str, Sequence[float | None]]], *, title: str = ""
) -> Path:
    """Accuracy against confidence, a panel each; the diagonal is where a model is calibrated.

    A diagram has the `edges` of its bins, and of each its `confidence`, `accuracy` (None where it
    is empty) and `count`, which the width of a dot shows.
    """
    columns = min(3, len(diagrams))
    rows = -(-len(diagrams) // columns)
    figure = Figure(figsize=(7.2, 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    for number, (name, diagram) in enumerate(diagrams.items()):
        axes = _style(figure.add_subplot(rows, columns, number + 1))
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle="--")
        points = [
            (confidence, accuracy, count)
            for confidence, accuracy, count in zip(
                diagram["confidence"], diagram["accuracy"], diagram["count"], strict=True
            )
            if confidence is not None and accuracy is not None
        ]
        x, y, count = (np.array(values, float) for values in zip(*points, strict=True))
        axes.plot(x, y, color=COLOURS[number % len(COLOURS)], linewidth=1.4)
        sizes = 12 + 120 * count / max(count.sum(), 1)
        axes.scatter(x, y, s=sizes, color=COLOURS[number % len(COLOURS)], zorder=3)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_title(name, color=_INK, fontsize=10)
        axes.set_xlabel("confidence", color=_INK, fontsize=9)
        axes.set_ylabel("accuracy", color=_INK, fontsize=9)
    if title:
        figure.suptitle(title, color=_INK, fontsize=12)
    return _write(figure, path)


def moving_average(values: Float[np.ndarray, " n"], memory: float) -> Float[np.ndarray, " n"]:
    """Exponential moving average divided by its weights' sum, as Adam does; NaN is passed over."""
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total = memory * total + (1 - memory) * value
            weight = memory * weight + (1 - memory)
        out[i] = total / weight if weight else np.nan
    return out


def _figure(xlabel: str, ylabel: str, title: str, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = _style(figure.add_subplot())
    figure.patch.set_alpha(0)
    axes.set_xlabel(xlabel, color=_INK, fontsize=11)
    axes.set_ylabel(ylabel, color=_INK, fontsize=11)
    if title:
        axes.set_title(title, color=_INK, fontsize=12, fontweight="bold", loc="left")
    return figure, axes


def _style(axes: Axes) -> Axes:
    axes.set_prop_cycle(color=COLOURS)
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK, which="both", length=3, labelsize=10)
    return axes


def _legend(figure: Figure, handles: Sequence, labels: Sequence[str]) -> Legend:
    """Above the axes, so that it never covers a line, in as many columns as the figure holds."""
    font = {"family": families(labels), "size": 10}
    labels = [drawable(label) for label in labels]
    for columns in (3, 2, 1):
        legend = figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, frameon=False, prop=font
        )
        width = legend.get_window_extent(figure.canvas.get_renderer()).width
        if columns == 1 or width <= figure.bbox.width:
            break
        legend.remove()
    return legend


def _save(figure: Figure, axes: Axes, path: Path) -> Path:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        legend = _legend(figure, handles, labels)
        for text in legend.get_texts():
            text.set_color(_INK)
    return _write(figure, path)


def _write(figure: Figure, path: Path) -> Path:
    written = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    fonts = families(text.get_text() for text in written)
    for text in written:
        text.set_parse_math(False)  # a class may be named "$100 bill"
        text.set_fontfamily(fonts)
        if (shown := drawable(text.get_text())) != text.get_text().strip():
            text.set_text(shown)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, transparent=True)
    return path
