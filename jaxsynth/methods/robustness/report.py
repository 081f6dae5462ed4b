"""The page of a robustness run, made from the figures that it left."""

from pathlib import Path

import numpy as np

from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.plots import Series, plot_scores
from jaxsynth.report.tables import Table, to_markdown, to_rich
from jaxsynth.robustness.metrics import table
from jaxsynth.runs.results import stage_details

# A figure's name starts so where it is the accuracy under a corruption.
_CORRUPTED = "corrupted "
_Found = dict[str, dict | None]


def report(workdir: Path) -> Path:
    """Prints the table and writes table.md and report.html from the stages below `workdir`."""
    workdir = Path(workdir)
    found = read_json(workdir / "figures" / "figures.json", finite=False)
    mode = found["mode"]
    models: dict[str, _Found] = found["models"][mode]
    main = _table("Figures in per cent, with their 95 % intervals", _without(models, _CORRUPTED))
    console.print(to_rich(main))
    (workdir / "table.md").write_text(to_markdown(main), "utf-8")
    sections = [
        Section(
            "Robustness",
            "An interval is a bootstrap's (BCa) over the images, of one run with one seed: it "
            "tells what other images would change, not other trainings. Where all images agree it "
            "is Clopper and Pearson's. A figure that would divide by nothing is left out.",
            tables=[main, _counts(found["images"])],
        )
    ]
    if found["differences"]:
        differences = _without(found["differences"], _CORRUPTED)
        sections.append(
            Section(
                "Differences between the models",
                "Paired, image by image: what makes an image hard for both cancels.",
                tables=[_table("Paired differences in points", differences)],
            )
        )
    if any(found["by_severity"].values()):
        sections.append(_corruptions(workdir, found, models))
    sections += [
        _protocols(found["models"]),
        Section("How it was made", details=stage_details(workdir)),
    ]
    return write_page(
        workdir / "report.html",
        "Robustness of classifiers",
        sections,
        facts=[("models", ", ".join(models)), ("mode", mode)],
    )


def _corruptions(workdir: Path, found: dict, models: dict[str, _Found]) -> Section:
    tables = [
        _table(
            "Accuracy under each corruption in per cent, mean over severities",
            _only(models, _CORRUPTED),
        )
    ]
    if found["differences"]:
        tables.append(
            _table("Paired differences in points", _only(found["differences"], _CORRUPTED))
        )
    curves = found["by_severity"]
    severities = sorted({s for rows in curves.values() for row in rows.values() for s in row})
    for name, rows in curves.items():
        tables.append(
            Table(
                ["corruption", *severities],
                [[kind, *(row.get(s) for s in severities)] for kind, row in rows.items()],
                caption=f"{name}: accuracy in per cent by severity, without the mode's changes",
                scale=100,
                better=None,
            )
        )
    path = plot_scores(
        workdir / "corruptions.png",
        [
            Series(
                name,
                [0, *map(int, severities)],
                [
                    100 * models[name]["accuracy"]["value"],
                    *(100 * np.mean([x[s] for x in rows.values() if s in x]) for s in severities),
                ],
            )
            for name, rows in curves.items()
        ],
        xlabel="severity (0: clean)",
        ylabel="accuracy, %",
    )
    divisor = found["baseline"]
    mce = (
        f" mCE is the error over {'AlexNet' if divisor == 'alexnet' else divisor}'s, mean over "
        "those of ImageNet-C's fifteen test corruptions that were asked about; relative mCE takes "
        "how far each rises above the clean error."
        if divisor
        else ""
    )
    return Section(
        "Corruptions",
        "R_cc is the mean over corruptions of their accuracies, over the clean accuracy. Every "
        f"model met the same corrupted pictures.{mce}",
        tables=tables,
        images=[Picture(path, "Accuracy against severity, mean over the corruptions.")],
    )


def _protocols(modes: dict[str, dict[str, _Found]]) -> Section:
    """Both modes beside each other, for what is not the same in both."""
    corrected, paper = modes["corrected"], modes["paper"]
    names = list(dict.fromkeys(k for found in corrected.values() for k in found))
    changed = [
        name
        for name in names
        if any(_text(corrected[model], name) != _text(paper[model], name) for model in corrected)
    ]
    tables = [
        Table(
            ["figure", "corrected", "paper"],
            [[name, _text(corrected[model], name), _text(paper[model], name)] for name in changed],
            caption=f"{model}: both modes of the same answers, where they differ",
            better=None,
        )
        for model in (corrected if changed else ())
    ]
    faults = "\n".join(f"- **{name}**: {text}" for name, text in table.PAPER_FAULTS.items())
    left = "\n".join(f"- {text}" for text in table.PAPER_FAULTS_LEFT)
    return Section(
        "The published protocol",
        f"`mode=paper` follows the published code (arXiv 2405.20469) in these:\n\n{faults}\n\n"
        f"Of its other departures nothing is followed, here in either mode:\n\n{left}",
        tables=tables,
    )


def _text(found: _Found, name: str) -> str | None:
    figure = found.get(name)
    return None if figure is None else figure["text"]


def _only(models: dict[str, _Found], start: str) -> dict[str, _Found]:
    """The figures whose names start so, without the start."""
    return {
        model: {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
        for model, found in models.items()
    }


def _without(models: dict[str, _Found], start: str) -> dict[str, _Found]:
    return {
        model: {k: v for k, v in found.items() if not k.startswith(start)}
        for model, found in models.items()
    }


def _table(caption: str, found: dict[str, _Found]) -> Table:
    """A row for each figure, a column for each model: figures are many."""
    columns = list(next(iter(found.values())))
    rows = [[column, *(_text(x, column) for x in found.values())] for column in columns]
    return Table(["figure", *found], rows, caption=caption, better=None)


def _counts(images: dict[str, int]) -> Table:
    return Table(
        ["set", "images"], list(images.items()), better=None, caption="How many images were asked"
    )
