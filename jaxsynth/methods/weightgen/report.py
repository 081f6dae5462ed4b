"""What a run of generated weights found: results.json, tables on the terminal and one HTML page.

Everything is read from the stages' folders, so the page can be made again at any time. Who wins is
computed, not written: the sentences follow from the curves.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.methods.weightgen.scores import (
    CONTROLS,
    GENERATED,
    INITS,
    Curves,
    Reached,
    duel,
    reached,
    repaid_after,
    verdict,
)
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.plots import plot_curves
from jaxsynth.report.tables import Measure, Table, to_markdown, to_rich
from jaxsynth.runs.results import how_it_was_made
from jaxsynth.runs.stage import MANIFEST, TIMES

# What curves hold: its title, factor and digits.
MEASURES = {
    "l1": ("Held-out L1 x 1000", 1000, 1),
    "fd": ("Frechet distance in CLIP's features", 1, 1),
}
BASELINES = ("scratch", "default", "mean", "nearest", "noise", "ridge")


def page_of(workdir: Path) -> Path:
    """Where `write` puts the page."""
    return workdir / "report.html"


def collect(workdir: Path) -> list[dict[str, Any]]:
    """The finished comparison of every seed."""
    paths = sorted(workdir.glob(f"seed*/comparison/{MANIFEST}"))
    if not paths:
        raise FileNotFoundError(f"{workdir}: no finished comparison (seed*/comparison)")
    return [_with_times(path.parent) for path in paths]


def _with_times(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "comparison.json", finite=False)
    times = read_json(folder / TIMES)
    for name, one in found["inits"].items():
        one |= {key: times[key][name] for key in ("prepare", "step")}
    return found | {"costs": times["costs"]}


def curves_of(result: dict[str, Any], name: str) -> Curves:
    """The curves from one kind of initial weights in one seed's comparison."""
    found = result["inits"][name]
    steps = tuple(found["steps"])
    return Curves(steps, found["l1"], found["prepare"], found["step"], found["fd"])


def write(workdir: Path) -> Path:
    """Collects the figures, prints the tables and writes the page; returns the page's path."""
    results = collect(workdir)
    write_json(workdir / "results.json", results)
    names = [name for name in INITS if name in results[0]["inits"]]
    sections = [
        _errors(workdir, results, names),
        _speed(results, names),
        _winners(results, names),
        _tried(results),
        _honesty(results, names),
        _costs(results),
        how_it_was_made(workdir),
    ]
    tables = [table for section in sections for table in section.tables]
    for table in tables:
        console.print(to_rich(table))
    for line in sections[2].text.splitlines():
        console.print(line.replace("**", ""), highlight=False)
    (workdir / "tables.md").write_text("\n".join(map(to_markdown, tables)), "utf-8")
    first = results[0]
    return write_page(
        page_of(workdir),
        "Denoised neural weights",
        sections,
        subtitle="Initial weights made from a text, and what they have to beat.",
        facts=[
            ("concepts learnt from", str(first["sizes"]["concepts"])),
            ("unseen concepts", f"{len(first['unseen'])}, {_seeds(results)}"),
            ("weights of an adapter", f"{first['sizes']['values']:,}"),
        ],
    )


def errors_table(results: Sequence[dict], names: Sequence[str], measure: str = "l1") -> Table:
    """A measure (of `MEASURES`) after each measured step, mean over the unseen concepts."""
    steps = curves_of(results[0], "default").steps
    title, scale, digits = MEASURES[measure]
    body = []
    for name in names:
        curves = [curves_of(result, name) for result in results]
        if curves[0].steps != steps:  # another network, measured at steps of its own
            continue
        means = np.stack([getattr(own, measure).mean(0) for own in curves])
        body.append([INITS[name], *(Measure(tuple(column.tolist())) for column in means.T)])
    rules = [row for row, line in enumerate(body) if line[0] in _firsts()]
    return Table(
        ["Initial weights", *map(str, steps)],
        body,
        caption=f"{title} after so many steps, mean over {len(results[0]['unseen'])} unseen "
        f"concepts{_spread(results)}",
        better="lower",
        scale=scale,
        digits=digits,
        rules=rules,
    )


def _firsts() -> set[str]:
    """Rows that begin a group."""
    return {INITS[GENERATED[0]], INITS[CONTROLS[0]]}


def _spread(results: Sequence[dict]) -> str:
    return f", mean ± standard deviation of {len(results)} seeds" if len(results) > 1 else ""


def _mean_curve(results: Sequence[dict], name: str, measure: str) -> tuple[tuple, np.ndarray]:
    """Steps, and a measure over all seeds and concepts."""
    own = [curves_of(result, name) for result in results]
    return own[0].steps, np.mean([getattr(c, measure).mean(0) for c in own], axis=0)


def _seeds(results: Sequence[dict]) -> str:
    return "one seed" if len(results) == 1 else f"{len(results)} seeds"


def _errors(workdir: Path, results: Sequence[dict], names: Sequence[str]) -> Section:
    measures = [m for m in MEASURES if results[0]["inits"]["default"][m] is not None]
    pictures, lines = [], []
    for measure in measures:
        title, scale, digits = MEASURES[measure]
        curves = {INITS[name]: _mean_curve(results, name, measure) for name in names}
        steps, values = curves.pop(INITS["scratch"])
        shown = {
            label: (at, scale * found)
            for label, (at, found) in curves.items()
            if label not in (INITS["noise"], INITS["random"])  # a plot has seven colours
        }
        path = plot_curves(
            workdir / f"{measure}.png", shown, xlabel="steps", ylabel=title,
            smooth=0,
        )  # fmt: skip
        pictures.append(Picture(path, f"{title} against steps of fine-tuning, mean over concepts."))
        found = (f"{scale * v:.{digits}f} after {s}" for s, v in zip(steps, values, strict=True))
        lines.append(f"{title}: {', '.join(found)}.")
    grids = sorted(workdir.glob("seed*/comparison/samples.png"))
    pictures += [
        Picture(grid, "Unseen concepts, on held-out photos.", pixelated=True) for grid in grids[:1]
    ]
    return Section(
        "Unseen concepts",
        "Every kind of initial weights is fine-tuned in the same way on photos edited by a concept "
        "that nothing was trained on, and its L1 to the true edit measured on other photos, as is "
        "the Frechet distance to them in the features of the shipped CLIP. Training pix2pix from "
        "scratch is another network with steps of its own. " + " ".join(lines),
        tables=[errors_table(results, names, measure) for measure in measures],
        images=pictures,
    )


def speed(results: Sequence[dict], name: str, targets: str) -> Reached:
    """How fast one kind of weights gets to the quality named `targets`."""
    curves = [curves_of(result, name) for result in results]
    return reached(curves, [result["targets"][targets] for result in results])


def speed_table(results: Sequence[dict], names: Sequence[str], targets: str) -> Table:
    """Steps and seconds to a quality; "never" where most concepts do not reach it."""
    reference = speed(results, targets, targets).seconds
    body = []
    for name in names:
        found = speed(results, name, targets)
        body.append(
            [
                INITS[name],
                f"{found.share:.0%}",
                _or_never(found.steps, "{:.0f}"),
                f"{np.mean([r['inits'][name]['prepare'] for r in results]):.3f}",
                f"{1000 * np.mean([r['inits'][name]['step'] for r in results]):.1f}",
                _or_never(found.seconds, "{:.2f}"),
                _ratio(reference, found.seconds),
            ]
        )
    return Table(
        ["Initial weights", "reach it", "steps", "s to make", "ms a step", "seconds", "speed"],
        body,
        caption=f"To the quality that {INITS[targets]} ends with, medians over the unseen concepts "
        f"of {_seeds(results)}",
        better=None,
    )


def ratios_table(results: Sequence[dict], names: Sequence[str]) -> Table:
    """How many times as fast as training from scratch each kind of weights gets to what that has
    after each measured number of steps; scratch is given the time of those steps."""
    names = [name for name in names if name not in ("scratch", "noise", *CONTROLS)]
    scratch = [curves_of(result, "scratch") for result in results]
    body = []
    for place, steps in enumerate(scratch[0].steps):
        if not steps:
            continue
        line: list[str] = [
            str(steps),
            f"{1000 * _mean([c.l1[:, place].mean() for c in scratch]):.1f}",
        ]
        for name in names:
            curves = [curves_of(result, name) for result in results]
            fast = reached(curves, [own.l1[:, place].tolist() for own in scratch]).seconds
            line.append(_ratio(_mean([c.seconds(steps) for c in scratch]), fast) or "never")
        body.append(line)
    return Table(
        ["Steps of scratch", "L1 x 1000", *(INITS[name] for name in names)],
        body,
        caption="Seconds of so many steps of pix2pix from scratch over the seconds to the same "
        f"quality, medians over the unseen concepts of {_seeds(results)}",
        better=None,
    )


def _speed(results: Sequence[dict], names: Sequence[str]) -> Section:
    return Section(
        "Steps and seconds",
        "For each unseen concept the quality to reach is the held-out L1 that a rival ends with "
        "after all its steps. Seconds are those of making the initial weights (text encoder, "
        "denoiser and predictor, compiled before) and of the steps, without measuring and without "
        "compilation. `never` says that fewer than half of the concepts got there.",
        tables=[
            *(speed_table(results, names, target) for target in ("scratch", "default")),
            ratios_table(results, names),
        ],
    )


def sentences(results: Sequence[dict], names: Sequence[str]) -> list[str]:
    """Who wins, as sentences that follow from the curves."""
    lines = []
    default = curves_of(results[0], "default").steps
    for own in GENERATED:
        if own not in names:
            continue
        for rival in (*BASELINES, *CONTROLS):
            if rival not in names:
                continue
            others = [curves_of(result, rival) for result in results]
            if others[0].steps != default:
                continue
            found = duel([curves_of(result, own) for result in results], others)
            lines.append(verdict(INITS[own], INITS[rival], found))
        fast, slow = (speed(results, name, "scratch").seconds for name in (own, "scratch"))
        if math.isfinite(fast):
            word = "at least" if slow / fast >= 15 else "less than"
            lines.append(
                f"{INITS[own]} reaches the quality that training from scratch ends with in "
                f"{fast:.2f} s instead of {slow:.2f} s: {slow / fast:.1f}x as fast, {word} the 15x "
                "of the paper."
            )
        else:
            lines.append(f"{INITS[own]} **does not reach** the quality of training from scratch.")
    return lines


def _winners(results: Sequence[dict], names: Sequence[str]) -> Section:
    return Section("Who wins", "\n".join(f"- {line}" for line in sentences(results, names)))


def ablation_table(results: Sequence[dict]) -> Table:
    """The settings that were tried, on validation concepts, and what was chosen in each seed."""
    steps = results[0]["ablation"]["steps"]
    body = []
    for name in results[0]["ablation"]["variants"]:
        found = [result["ablation"]["variants"][name] for result in results]
        chosen = sum(result["ablation"]["chosen"] == name for result in results)
        errors = zip(*(one["l1"] for one in found), strict=True)
        body.append(
            [
                name,
                *(Measure(tuple(column)) for column in errors),
                f"{np.mean([one['replaced'] for one in found]):.0%}",
                f"{chosen} of {len(results)}" if chosen else "",
            ]
        )
    return Table(
        ["Settings", *(f"L1 at {step}" for step in steps), "replaced", "chosen"],
        body,
        caption=f"Validation concepts: L1 x 1000{_spread(results)}",
        better="lower",
        scale=1000,
        digits=1,
    )


def _tried(results: Sequence[dict]) -> Section:
    return Section(
        "What was tried",
        "Settings of the generator, and the plain predictors beside them, compared on concepts "
        "that are neither trained on nor reported above. `replaced` is the share of concepts at "
        "which the guard of the norms took the fallback instead.",
        tables=[ablation_table(results)],
    )


def _honesty(results: Sequence[dict], names: Sequence[str]) -> Section:
    body, keys = [], ("nearest_train", "norm_low", "norm_high")
    for name in names:
        found = [result["weights"][name] for result in results if name in result["weights"]]
        if found:
            body.append([INITS[name], *(Measure(tuple(f[key] for f in found)) for key in keys)])
    trained = [result["weights"]["trained"] for result in results]
    body.append(["the collection's", *(Measure(tuple(f[key] for f in trained)) for key in keys)])
    table = Table(
        ["Weights", "to nearest", "least norm", "largest norm"],
        body,
        caption="Squared distance to the nearest LoRA of the collection (of its own: the nearest "
        "other), over the mean LoRA's to all; norms of layers over those of the collection"
        f"{_spread(results)}",
        better=None,
        digits=3,
        rules=[len(body) - 1],
    )
    replaced = sum(result["inits"]["one_step"]["replaced"] for result in results)
    total = sum(len(result["unseen"]) for result in results)
    return Section(
        "Controls and memory",
        "Generated from shuffled prompts (another unseen concept's) and random ones, weights "
        "should be worse: otherwise the text is not read. Weights that only repeat what was learnt "
        "lie on top of a LoRA of the collection (distance 0), as the nearest concept's do. The "
        f"guard of the norms replaced {replaced} of {total} generated sets of weights.",
        tables=[table],
    )


def _costs(results: Sequence[dict]) -> Section:
    body, lines = [], []
    keys = ("base", "collection", "generator")
    for key in keys:
        body.append([key, Measure(tuple(float(r["costs"][key]) for r in results))])
    spent = _mean([r["costs"]["collection"] + r["costs"]["generator"] for r in results])
    for own in GENERATED:
        if own not in results[0]["inits"]:
            continue
        for rival in ("scratch", "default"):
            fast, slow = (speed(results, name, rival).seconds for name in (own, rival))
            count = repaid_after(spent, fast, slow)
            said = (
                f"after {count:,.0f} concepts" if math.isfinite(count) else "never: it is no faster"
            )
            lines.append(
                f"- {INITS[own]} instead of {INITS[rival]}, to the quality that the latter ends "
                f"with: {said}."
            )
    return Section(
        "What it costs",
        "Seconds that were spent before the first unseen concept (compilation included; of the "
        "generators the chosen one alone). The base serves every kind of LoRA; the collection and "
        "the generator must be repaid by what they save:\n\n" + "\n".join(lines),
        tables=[Table(["Stage", "seconds"], body, better=None)],
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _ratio(reference: float, seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    return f"{reference / seconds:.1f}x" if seconds > 0 else "at once"


def _or_never(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "never"
