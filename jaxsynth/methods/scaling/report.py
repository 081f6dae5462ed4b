"""What a scaling study found: the figures' numbers, a table on the terminal and one HTML page.

Everything is read from the stages' folders, so the page can be made again at any time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.data.load import load_dataset
from jaxsynth.data.names import safe_name
from jaxsynth.methods.scaling import figures
from jaxsynth.methods.scaling import fit as laws
from jaxsynth.methods.scaling.claims import (
    Found,
    Judged,
    curves,
    equivalents,
    errors_of,
    observed,
    tested,
)
from jaxsynth.methods.scaling.config import Config
from jaxsynth.methods.scaling.points import settings, trainings
from jaxsynth.methods.scaling.trainings import FAILED_FILE, FIGURES_FILE, Answers, answers_of
from jaxsynth.report.figures import write_numbers
from jaxsynth.report.page import Section, write_page
from jaxsynth.report.tables import Measure, Table, to_markdown, to_rich
from jaxsynth.runs.results import how_it_was_made
from jaxsynth.runs.run import read_config
from jaxsynth.runs.stage import MANIFEST, load_artifact


def page_of(workdir: Path) -> Path:
    """Where `write` puts the page."""
    return workdir / "report.html"


def write(workdir: Path) -> Path:
    """Collects the errors, fits the curves and writes the page; returns the page's path."""
    config = read_config(workdir, Config)
    found: dict[str, list[Answers]] = {}
    for setting in settings(config):
        for folder in trainings(config, setting):
            if (workdir / folder / MANIFEST).is_file():
                found.setdefault(setting, []).extend(answers_of(workdir / folder))
    if not found:
        raise FileNotFoundError(f"{workdir}: no finished training of a setting")
    failed = read_json(workdir / FAILED_FILE, dict[str, str], optional=True)
    dataset = load_dataset(config.data)
    rows = [
        {"setting": setting, "seed": one.point.seed, "real": one.point.real,
         "synthetic": one.point.synthetic, "images": len(one.wrong), "error": one.error}
        for setting, answers in found.items() for one in answers
    ]  # fmt: skip
    write_json(workdir / "results.json", rows)
    fitted = {
        setting: laws.fit(errors_of(curve), resamples=config.resamples)
        for setting, curve in curves(found).items()
    }
    worths = equivalents(config, found)
    claims, judged = tested(config, found), _judged(workdir, config, found)
    tables = [_errors(config, found)]
    console.print(to_rich(tables[0]))
    (workdir / "table.md").write_text(to_markdown(tables[0]) + "\n", "utf-8")
    sections = [
        Section(
            "Error against the number of images",
            f"The share of {len(dataset.test)} test images ({dataset.split}) that is told wrong, "
            "by classifiers from scratch that all take as many updates. "
            f"{_seeds(config)} The test set chooses nothing: the last step is scored.\n\n"
            "A line is a law fitted to the points of its color, error = a n^-b + c, where the data "
            "tell one.",
            tables=tables,
            images=[figures.curve_figure(workdir, found, fitted)],
        ),
        Section("Laws", _laws_text(), tables=[_laws(fitted)]),
        Section(
            "What it was worth in real images",
            "The number of real images of a class on which a classifier makes as many errors, "
            "between the sizes that were measured; the interval is that of resampled seeds.",
            tables=[_worths(worths)] if worths else [],
        ),
        *figures.mixing(workdir, config, found),
        *figures.recognisability(workdir, config),
        *figures.against_guidance(workdir, config, found),
        *figures.costs(workdir, config, found),
        Section(
            "Claims",
            "Differences of error between settings at one size, paired by seed, with Student's "
            "95 % interval; below 0 the first makes fewer errors. Intervals are not widened for "
            f"the number of claims, {len(claims)}.",
            tables=[_claims(claims)],
        ),
        *_robustness(workdir, config, judged),
        *figures.against_size(workdir, judged),
        *_clones(workdir, config, len(dataset.train)),
        *figures.pictures(workdir, config, found, dataset),
        *([] if not failed else [Section("What failed", _failures(failed))]),
        how_it_was_made(workdir),
    ]
    write_numbers(
        workdir / "figures" / "worth",
        worths,
    )
    write_numbers(workdir / "figures" / "claims", claims)
    facts = [
        ("data set", dataset.name),
        ("classes", str(dataset.num_classes)),
        ("points", str(sum(map(len, found.values())))),
        ("seeds", ", ".join(map(str, config.seeds))),
    ]
    return write_page(
        page_of(workdir),
        f"Scaling study on {dataset.name}",
        sections,
        subtitle="What synthetic images are worth, by their number and by where they come from.",
        facts=facts,
    )


def _seeds(config: Config) -> str:
    seeds = ", ".join(map(str, config.seeds))
    if len(config.seeds) == 1:
        return f"One seed ({seeds}), so nothing tells the spread."
    return (
        f"Means over seeds {seeds}, each with its own real images, adapters, synthetic images and "
        "start; bars are standard deviations."
    )


def _errors(config: Config, found: Found) -> Table:
    measured = curves(found)
    sizes = sorted({size for curve in measured.values() for size in curve})
    body = [
        [
            setting,
            *(Measure(tuple(curve[size].values())) if size in curve else None for size in sizes),
        ]
        for setting, curve in measured.items()
    ]
    return Table(
        ["Images of each class", *(f"{size:g}" for size in sizes)],
        body,
        caption="Error in %, mean ± standard deviation over seeds",
        better="lower",
        scale=100,
    )


def _laws_text() -> str:
    return (
        "error = a n^-b + c, n being images of a class; intervals are 95 % of a bootstrap over "
        "seeds. The offset c is what more images of the same source do not take away. It saturates "
        "where a n^-b has fallen to a tenth of c, where c is told from 0. The test images are the "
        "same throughout, so that their choice is in no interval."
    )


def _laws(fitted: Mapping[str, laws.Law]) -> Table:
    body = []
    for setting, law in fitted.items():
        if law.refused or law.exponent is None or law.offset is None or law.scale is None:
            body.append([setting, f"no law: {law.refused}", "–", "–", "–"])
            continue
        until = "not told" if law.saturates is None else f"{law.saturates:.0f}"
        body.append([setting, law.exponent.text(), law.scale.text(), law.offset.text(3), until])
    return Table(
        ["Setting", "exponent b", "scale a", "offset c", "saturates at"], body, better=None
    )


def _worths(rows: Sequence[Mapping[str, Any]]) -> Table:
    body = [
        [
            row["setting"],
            f"{row['size']:g}",
            f"{row['beyond']} {row['worth']:.0f}".strip(),
            f"{row['low']:.0f} to {row['high']:.0f}",
        ]
        for row in rows
    ]
    return Table(
        ["Setting", "synthetic images of a class", "equivalent real images", "95 % interval"],
        body,
        better=None,
    )


def _claims(rows: Sequence[Mapping[str, Any]], what: str = "Claim") -> Table:
    body = [
        [
            row["claim"],
            f"{100 * row['difference']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
            row["holds"],
        ]
        for row in rows
    ]
    return Table([what, "difference, points", "holds"], body, better=None)


KEYS = ("setting", "seed", "real", "synthetic", "size")


def _judged(workdir: Path, config: Config, found: Found) -> list[dict[str, Any]]:
    """The suite's figures of every point that was judged."""
    rows = []
    for setting in found:
        for folder in trainings(config, setting):
            judged = workdir / folder.parent / "robustness"
            if (judged / MANIFEST).is_file():
                for one in read_json(judged / FIGURES_FILE, list):
                    point = {key: one[key] for key in KEYS[:-1]}
                    size = one["synthetic"] or one["real"]
                    rows.append(point | {"size": size} | one["figures"])
    return rows


def _robustness(workdir: Path, config: Config, rows: Judged) -> list[Section]:
    """The suite's figures, a row for each setting and size, and the observations that hold."""
    if not rows:
        return []
    write_numbers(workdir / "figures" / "robustness", rows)
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in KEYS]
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(f"{row['setting']}: {row['size']:g}", []).append(row)
    body = []
    for label, own in grouped.items():
        values = [[one[name] for one in own if one.get(name) is not None] for name in names]
        body.append([label, *(Measure(tuple(each)) if each else None for each in values)])
    text = (
        f"The robustness suite at {', '.join(map(str, config.judge.sizes))} images of each class: "
        f"attacks of radius {255 * config.judge.eps:g}/255, "
        f"{', '.join(config.judge.corruptions.asked) or 'no corruptions'} made of the test "
        "images, drawn textures as images of no class. Means and standard deviations over seeds, "
        "in %."
    )
    shown = Table(["Setting: images", *names], body, better=None, scale=100)
    sections = [Section("Robustness", text, tables=[shown])]
    if held := observed(config, rows):
        write_numbers(workdir / "figures" / "observations", held)
        text = (
            "Observations of the study of synthetic clones (arXiv 2405.20469), as differences of "
            "the suite's figures at one size, paired by seed, with Student's 95 % interval; the "
            "first is the side that the observation calls lower, so below 0 it holds. Intervals "
            f"are not widened for their number, {len(held)}."
        )
        sections.append(
            Section("Which observations hold", text, tables=[_claims(held, "Observation")])
        )
    return sections


def _clones(workdir: Path, config: Config, images: int) -> list[Section]:
    """What each clone's features tell, beside its random start's."""
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for name in ("start", *config.clones):
        for seed in config.seeds:
            folder = workdir / "clones" / safe_name(name) / f"seed{seed}"
            if (folder / "probe" / MANIFEST).is_file():
                own = dict(load_artifact(folder / "probe").counts)
                if name != "start":
                    counts = load_artifact(folder / "backbone").counts
                    own |= {key: counts[key] for key in ("feature_std", "effective_rank")}
                scores.setdefault(name, {})[seed] = own
    if len(scores) < 2:
        return []
    start, body, rows = scores.pop("start"), [], []
    body.append([_start_name(config), *(_measured(start, x, 100) for x in ("linear", "neighbors")),
                 "–", None, None])  # fmt: skip
    for name, own in scores.items():
        seeds = sorted(own)
        apart = None
        if len(seeds) > 1:
            apart = laws.difference(
                [own[seed]["linear"] for seed in seeds], [start[seed]["linear"] for seed in seeds]
            )
        more = "–" if apart is None else (
            f"{100 * apart.value:+.1f} [{100 * apart.low:.1f}, {100 * apart.high:.1f}]"
        )  # fmt: skip
        body.append(
            [name, _measured(own, "linear", 100), _measured(own, "neighbors", 100), more,
             _measured(own, "feature_std"), _measured(own, "effective_rank")]
        )  # fmt: skip
        rows += [{"clone": name, "seed": seed, **own[seed]} for seed in seeds]
    rows += [{"clone": _start_name(config), "seed": seed, **own} for seed, own in start.items()]
    write_numbers(workdir / "figures" / "clones", rows)
    text = (
        f"Backbones trained without classes on the images of {config.clone_source!r}, whose "
        f"prompts are their captions; then heads on their features of {images} real training "
        "images, the rate chosen on a held-out part of these. Accuracies in %, on the test "
        "images. Both measures of collapse are those at the end of training: the deviation of "
        "features (1 is spread evenly, 0 collapsed) and their effective rank."
    )
    columns = ["Backbone", "linear probe", "nearest neighbors", "probe less its start's [95 %]",
               "feature deviation", "effective rank"]  # fmt: skip
    return [Section("Clones", text, tables=[Table(columns, body, better=None)])]


def _start_name(config: Config) -> str:
    return "checkpoint" if config.backbone else "random start"


def _measured(own: Mapping[int, Mapping[str, float]], name: str, scale: float = 1) -> Measure:
    return Measure(tuple(scale * own[seed][name] for seed in sorted(own)))


def _failures(failed: Mapping[str, str]) -> str:
    return "\n".join(f"- **{setting}**: {why}" for setting, why in failed.items())
