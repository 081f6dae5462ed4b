"""What a scaling study found: the figures' numbers, a table on the terminal and one HTML page.

Everything is read from the stages' folders, so the page can be made again at any time.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.core.words import counted
from jaxsynth.data.load import load_dataset
from jaxsynth.data.names import safe_name
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.scaling import fit as laws
from jaxsynth.methods.scaling.config import REAL, Config
from jaxsynth.methods.scaling.points import settings, source_of
from jaxsynth.methods.scaling.stages import FIGURES_FILE, Answers, answers_of
from jaxsynth.report.figures import write_numbers
from jaxsynth.report.grids import write_grid
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.plots import Series, plot_scaling, plot_scores
from jaxsynth.report.tables import Measure, Table, to_markdown, to_rich
from jaxsynth.runs.results import how_it_was_made
from jaxsynth.runs.run import read_config
from jaxsynth.runs.stage import MANIFEST, load_artifact

SHOWN = 6

Found = Mapping[str, list[Answers]]


def page_of(workdir: Path) -> Path:
    """Where `write` puts the page."""
    return workdir / "report.html"


def write(workdir: Path) -> Path:
    """Collects the errors, fits the curves and writes the page; returns the page's path."""
    config = read_config(workdir, Config)
    found = {
        setting: answers_of(folder)
        for setting in settings(config)
        if ((folder := workdir / safe_name(setting) / "training") / MANIFEST).is_file()
    }
    if not found:
        raise FileNotFoundError(f"{workdir}: no finished training of a setting")
    failed = read_json(workdir / "failed.json", dict[str, str], optional=True)
    dataset = load_dataset(config.data)
    rows = [
        {"setting": setting, "seed": one.point.seed, "real": one.point.real,
         "synthetic": one.point.synthetic, "images": len(one.wrong), "error": one.error}
        for setting, answers in found.items() for one in answers
    ]  # fmt: skip
    write_json(workdir / "results.json", rows)
    fitted = {
        setting: laws.fit(curve, resamples=config.resamples)
        for setting, curve in curves(found).items()
    }
    worths = equivalents(config, found)
    claims = tested(config, found)
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
            images=[_curve_figure(workdir, found, fitted)],
        ),
        Section("Laws", _laws_text(), tables=[_laws(fitted)]),
        Section(
            "What it was worth in real images",
            "The number of real images of a class on which a classifier makes as many errors, "
            "between the sizes that were measured; the interval is that of resampled seeds.",
            tables=[_worths(worths)] if worths else [],
        ),
        *_mixing(workdir, config, found),
        Section(
            "Claims",
            "Differences of error between settings at one size, paired by seed, with Student's "
            "95 % interval; below 0 the first makes fewer errors. Intervals are not widened for "
            f"the number of claims, {len(claims)}.",
            tables=[_claims(claims)],
        ),
        *_robustness(workdir, config, found),
        *_clones(workdir, config, len(dataset.train)),
        *_pictures(workdir, config, found, dataset),
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


def curves(found: Found) -> dict[str, dict[float, list[float]]]:
    """Errors of the seeds by size (images of a class), of each setting that is a curve."""
    out: dict[str, dict[float, list[float]]] = {}
    for setting, answers in found.items():
        if setting.endswith(", mixed"):
            continue
        curve = out.setdefault(setting, {})
        for one in answers:
            curve.setdefault(one.point.size, []).append(one.error)
    return {setting: dict(sorted(curve.items())) for setting, curve in out.items()}


def equivalents(config: Config, found: Found) -> list[dict[str, Any]]:
    """What each point of the curves was worth in real images of a class."""
    measured = curves(found)
    real = measured.get(REAL, {})
    rows = []
    if len(real) < 2 or len(config.seeds) < 2 or min(map(min, real.values())) <= 0:
        return rows
    for setting, curve in measured.items():
        if setting == REAL:
            continue
        for size, errors in curve.items():
            if min(errors) <= 0:
                continue
            estimate, words = laws.worth(errors, real, resamples=config.resamples)
            rows.append(
                {"setting": setting, "size": size, "worth": estimate.value, "low": estimate.low,
                 "high": estimate.high, "beyond": words}
            )  # fmt: skip
    return rows


def tested(config: Config, found: Found) -> list[dict[str, Any]]:
    """The claims of the studies, each a difference of errors with its interval."""
    measured, rows = curves(found), []

    def add(claim: str, one: Sequence[float], other: Sequence[float]) -> None:
        if len(one) > 1 and len(one) == len(other):
            apart = laws.difference(one, other)
            holds = "yes" if apart.high < 0 else "no" if apart.low > 0 else "not told"
            rows.append(
                {"claim": claim, "difference": apart.value, "low": apart.low, "high": apart.high,
                 "holds": holds}
            )  # fmt: skip

    for name in config.sources:
        curve, both = measured.get(name, {}), measured.get(f"{name} + real", {})
        sizes = list(curve)
        if len(sizes) > 1:
            add(f"{name}: {sizes[-1]} images a class err less than {sizes[0]}",
                curve[sizes[-1]], curve[sizes[0]])  # fmt: skip
            for below, above in itertools.pairwise(sizes):
                add(f"{name}: {above} err less than {below}", curve[above], curve[below])
        for size in sizes:
            if size in both:
                add(f"{name} + {config.added_real} real err less than {name}, {size} images",
                    both[size], curve[size])  # fmt: skip
        real = measured.get(REAL, {})
        if config.added_real in real and both:
            last = list(both)[-1]
            add(f"{name}, {last} images + {config.added_real} real err less than "
                f"{config.added_real} real alone", both[last], real[config.added_real])  # fmt: skip
    names = [name for name in config.sources if name in measured]
    names.sort(key=lambda name: config.sources[name].shots)
    for one, other in ((a, b) for i, a in enumerate(names) for b in names[:i]):
        for size in measured[one]:
            add(f"{one} err less than {other}, {size} images", measured[one][size],
                measured[other].get(size, []))  # fmt: skip
    return rows


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
        [setting, *(Measure(tuple(curve[size])) if size in curve else None for size in sizes)]
        for setting, curve in measured.items()
    ]
    return Table(
        ["Images of each class", *(f"{size:g}" for size in sizes)],
        body,
        caption="Error in %, mean ± standard deviation over seeds",
        better="lower",
        scale=100,
    )


def _curve_figure(workdir: Path, found: Found, fitted: Mapping[str, laws.Law]) -> Picture:
    measured = curves(found)
    series, drawn, rows = [], {}, []
    for setting, curve in measured.items():
        sizes = list(curve)
        errors = [100 * float(np.mean(own)) for own in curve.values()]
        spread = [100 * float(np.std(own, ddof=1)) if len(own) > 1 else np.nan
                  for own in curve.values()]  # fmt: skip
        series.append(Series(setting, sizes, errors, spread, dashed=setting == REAL))
        if not fitted[setting].refused:
            x = np.geomspace(sizes[0], sizes[-1], 60)
            drawn[setting] = (x, 100 * fitted[setting].at(x))
        rows += [
            {"setting": setting, "size": size, "error": float(np.mean(own)),
             "std": float(np.std(own, ddof=1)) if len(own) > 1 else None, "seeds": len(own)}
            for size, own in curve.items()
        ]  # fmt: skip
    folder = workdir / "figures"
    write_numbers(folder / "error", rows, laws={k: x.as_json() for k, x in fitted.items()})
    path = plot_scaling(
        folder / "error.png", series, drawn, xlabel="images of each class", ylabel="error, %"
    )
    return Picture(path, "Error against images of each class; figures/error.json and .csv.")


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


def _claims(rows: Sequence[Mapping[str, Any]]) -> Table:
    body = [
        [
            row["claim"],
            f"{100 * row['difference']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
            row["holds"],
        ]
        for row in rows
    ]
    return Table(["Claim", "difference of errors, points", "holds"], body, better=None)


def _mixing(workdir: Path, config: Config, found: Found) -> list[Section]:
    """Error against the share of real images at one size."""
    series, rows, measured = [], [], curves(found)
    for name in config.sources:
        answers = found.get(f"{name}, mixed")
        if not answers:
            continue
        shares: dict[float, list[float]] = {}
        for one in answers:
            share = one.point.real / (one.point.real + one.point.synthetic)
            shares.setdefault(share, []).append(one.error)
        for share, setting in ((0.0, name), (1.0, REAL)):
            ends = measured.get(setting, {})
            if config.mixed_size in ends:
                shares[share] = ends[config.mixed_size]
        shares = dict(sorted(shares.items()))
        means = [100 * float(np.mean(own)) for own in shares.values()]
        spread = [100 * float(np.std(own, ddof=1)) if len(own) > 1 else np.nan
                  for own in shares.values()]  # fmt: skip
        series.append(Series(name, list(shares), means, spread))
        rows += [
            {"source": name, "real_share": share, "error": float(np.mean(own)),
             "std": float(np.std(own, ddof=1)) if len(own) > 1 else None}
            for share, own in shares.items()
        ]  # fmt: skip
    if not series:
        return []
    write_numbers(workdir / "figures" / "mixing", rows)
    path = plot_scores(
        workdir / "figures" / "mixing.png", series, xlabel="share of real images",
        ylabel="error, %",
    )  # fmt: skip
    text = (
        f"The same number of images of each class, {config.mixed_size}, of which a share is real."
    )
    return [
        Section("Mixing real and synthetic images", text,
                images=[Picture(path, "Error against the share of real images.")])
    ]  # fmt: skip


def _robustness(workdir: Path, config: Config, found: Found) -> list[Section]:
    """The suite's figures, a row for each setting and size."""
    rows: list[dict[str, Any]] = []
    for setting in found:
        folder = workdir / safe_name(setting) / "robustness"
        if (folder / MANIFEST).is_file():
            rows += read_json(folder / FIGURES_FILE, list)
    if not rows:
        return []
    flat = [
        {key: row[key] for key in ("setting", "seed", "real", "synthetic")} | row["figures"]
        for row in rows
    ]
    write_numbers(workdir / "figures" / "robustness", flat)
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    grouped: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        label = f"{row['setting']}: {row['synthetic'] or row['real']}"
        grouped.setdefault(label, []).append(row["figures"])
    body = []
    for label, own in grouped.items():
        values = [[one[name] for one in own if one[name] is not None] for name in names]
        body.append([label, *(Measure(tuple(each)) if each else None for each in values)])
    text = (
        f"The robustness suite at {', '.join(map(str, config.judge.sizes))} images of each class: "
        f"attacks of radius {255 * config.judge.eps:g}/255, "
        f"{', '.join(config.judge.corruptions.asked) or 'no corruptions'} made of the test "
        "images, drawn textures as images of no class. Means and standard deviations over seeds, "
        "in %."
    )
    shown = Table(["Setting: images", *names], body, better=None, scale=100)
    return [Section("Robustness", text, tables=[shown])]


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
    body.append(["random start", *(_measured(start, x, 100) for x in ("linear", "neighbors")),
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
    rows += [{"clone": "random start", "seed": seed, **own} for seed, own in start.items()]
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


def _measured(own: Mapping[int, Mapping[str, float]], name: str, scale: float = 1) -> Measure:
    return Measure(tuple(scale * own[seed][name] for seed in sorted(own)))


def _pictures(workdir: Path, config: Config, found: Found, dataset) -> list[Section]:
    """The first images of each source, classes below each other."""
    stores = {
        name: workdir / safe_name(name) / f"seed{config.seeds[0]}" / "images"
        for name in dict.fromkeys(source_of(setting) for setting in found if setting != REAL)
    }
    stores = {name: path for name, path in stores.items() if (path / MANIFEST).is_file()}
    if not stores:
        return []
    opened = {name: ImageStore(path) for name, path in stores.items()}
    count = min(dataset.num_classes, 10)
    lines = []
    for label in range(count):
        line = []
        for store in opened.values():
            own = np.flatnonzero(store.labels == label)[:SHOWN]
            line += [store[int(i)].image for i in own] + [None] * (SHOWN - len(own))
        lines.append(line)
    headings = [text for name in opened for text in (name, *[""] * (SHOWN - 1))]
    path = write_grid(
        workdir / "samples.png", lines, list(dataset.display_names[:count]), tile=64,
        headings=headings,
    )  # fmt: skip
    drawn = [load_artifact(path).counts["images"] for path in stores.values()]
    text = (
        f"Seed {config.seeds[0]}; {counted(sum(drawn), 'image')} in all, which every size takes "
        "its first of."
    )
    return [Section("What was drawn", text, images=[Picture(path, pixelated=True)])]


def _failures(failed: Mapping[str, str]) -> str:
    return "\n".join(f"- **{setting}**: {why}" for setting, why in failed.items())
