"""The page of a robustness run, made from the figures that it left."""

from pathlib import Path

import numpy as np

from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.core.words import counted
from jaxsynth.report.grids import write_grid
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.plots import Bars, Series, plot_bars, plot_reliability, plot_scores
from jaxsynth.report.tables import Table, to_markdown, to_rich
from jaxsynth.robustness import suite
from jaxsynth.robustness.metrics import table
from jaxsynth.robustness.metrics.details import FEATURE_SCORES
from jaxsynth.runs.results import check_stages, how_it_was_made

# Where a model's stage keeps what it predicted.
ANSWERS = "answers.npz"
# Of example images.
_IN_A_LINE = 4
# A figure's name starts so where it is the accuracy under a corruption.
_CORRUPTED = "corrupted "
_Found = dict[str, dict | None]


def report(workdir: Path) -> Path:
    """Prints the table and writes table.md and report.html from the stages below `workdir`."""
    workdir = Path(workdir)
    check_stages(workdir)
    found = read_json(workdir / "figures" / "figures.json", finite=False)
    mode = found["mode"]
    models: dict[str, _Found] = found["models"][mode]
    main = _table("Figures in per cent, with their 95 % intervals", _without(models, _CORRUPTED))
    console.print(to_rich(main))
    (workdir / "table.md").write_text(to_markdown(main), "utf-8")
    sections = [
        Section(
            "Robustness",
            "A bar's line is its 95 % interval: a bootstrap's (BCa) over the images, of one run "
            "with one seed. It tells what other images would change, not other trainings. Near the "
            "ends of a range it holds what so few images leave open (Clopper and Pearson's for a "
            "share), so that no figure looks certain. A figure that would divide by nothing is "
            "left out.\n\n"
            "- **accuracy**, **ECE**: share of clean images that are right; how far confidence is "
            "from accuracy. **AUROC**, **FPR95**: how well images of no class are told apart, by "
            "the maximum softmax probability.\n"
            "- **R_adv**, **R_cc**: share of accuracy that is left under attack and under "
            "corruption. **CB_k**: accuracy where k of time, weather and place are unusual, over "
            "that where none is.\n"
            "- **shape bias**: of images with the shape of one class and the texture of another, "
            "decided by shape. **IN-9**, **BG-Gap**: accuracy with the own background; what it "
            "loses on random ones.",
            images=_bars(workdir, _without(models, _CORRUPTED), "metrics", "%"),
            folded=[main, _counts(found["images"])],
        )
    ]
    if found["differences"]:
        differences = _without(found["differences"], _CORRUPTED)
        sections.append(
            Section(
                "Differences between the models",
                "Paired, image by image: what makes an image hard for both cancels. A line that "
                "crosses 0 leaves open which is better.",
                images=_bars(workdir, differences, "differences", "points"),
                folded=[_table("Paired differences in points", differences)],
            )
        )
    if any(found["by_severity"].values()):
        sections.append(_corruptions(workdir, found, models))
    details = found.get("details", {})
    sections += _attacks(workdir, details)
    sections += _calibration(workdir, details)
    sections += _strange(workdir, details)
    sections += [
        _protocols(found["models"]),
        how_it_was_made(workdir),
    ]
    return write_page(
        workdir / "report.html",
        "Robustness of classifiers",
        sections,
        facts=[("models", ", ".join(models)), ("mode", mode)],
    )


def _bars(workdir: Path, models: dict[str, _Found], name: str, unit: str) -> list[Picture]:
    """Every metric of every model with its interval."""
    labels = [x for x in _columns(models) if any(found.get(x) for found in models.values())]
    if not labels:
        return []
    groups = []
    for model, found in models.items():
        known = [found.get(label) or {} for label in labels]
        sides = (
            [100 * each.get(side, np.nan) for each in known] for side in ("value", "low", "high")
        )
        groups.append(Bars(model, *sides))
    path = plot_bars(workdir / f"{name}.png", labels, groups, xlabel=unit)
    return [Picture(path, "Bars with their 95 % intervals.")]


def _corruptions(workdir: Path, found: dict, models: dict[str, _Found]) -> Section:
    accuracies = _only(models, _CORRUPTED)
    tables = [
        _table("Accuracy under each corruption in per cent, mean over severities", accuracies)
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
        images=[
            *_strip(workdir, "corruption", "One image under each corruption, highest severity."),
            Picture(path, "Accuracy against severity, mean over the corruptions."),
            *_bars(workdir, accuracies, "by-corruption", "accuracy, %"),
        ],
        folded=tables,
    )


def _attacks(workdir: Path, details: dict) -> list[Section]:
    swept = {name: each["sweep"] for name, each in details.items() if "sweep" in each}
    if not swept:
        return []
    # Without the last, an eps of 0.5, which is there to show that the attack works.
    series = [
        Series(
            name,
            [255 * eps for eps in sweep["epsilons"][:-1]],
            [100 * each["value"] for each in sweep["accuracy"][:-1]],
            low=[100 * each["low"] for each in sweep["accuracy"][:-1]],
            high=[100 * each["high"] for each in sweep["accuracy"][:-1]],
        )
        for name, sweep in swept.items()
    ]
    path = plot_scores(
        workdir / "eps.png", series, xlabel="eps, in 255ths of the range", ylabel="accuracy, %"
    )
    signs = [f"- **{name}**: {text}" for name, each in details.items() for text in each["signs"]]
    told = (
        "Signs that these figures overstate robustness:\n\n" + "\n".join(signs)
        if signs
        else "No sign of masked gradients was found: none is zero or random, one step does no more "
        "than many, and at an eps of 0.5 nothing withstands."
    )
    first = next(iter(swept.values()))
    images = first["images"]
    table = Table(
        ["model", *(f"{255 * eps:g}/255" for eps in first["epsilons"])],
        [[name, *(each["text"] for each in sweep["accuracy"])] for name, sweep in swept.items()],
        caption=f"Accuracy in per cent under PGD at each eps, of {counted(images, 'image')}",
        better=None,
    )
    caption = "What each attack made of one image, and below how it changed each pixel (enlarged)."
    return [
        Section(
            "Attacks",
            f"PGD of 20 steps on {images} of the images, each eps from anew.\n\n{told}",
            images=[
                *_strip(workdir, "attack", caption),
                Picture(path, "Accuracy against eps, with 95 % intervals."),
            ],
            folded=[table],
        )
    ]


def _calibration(workdir: Path, details: dict) -> list[Section]:
    diagrams = {
        f"{model}: {name}": diagram
        for model, each in details.items()
        for name, diagram in each["reliability"].items()
    }
    if not diagrams:
        return []
    path = plot_reliability(workdir / "reliability.png", diagrams)
    columns = (
        "ece", "adaptive", "classwise", "debiased", "nll", "brier", "ece_scaled", "nll_scaled"
    )  # fmt: skip
    rows = [
        [f"{model}: {name}", *(found.get(column) for column in columns)]
        for model, each in details.items()
        for name, found in each["calibration"].items()
    ]
    temperatures = ", ".join(
        f"{name} {each['temperature']:.3g}"
        for name, each in details.items()
        if "temperature" in each
    )
    fitted = (
        f" One temperature, fitted on the clean images ({temperatures}), gives the last two "
        "columns of the table on the other sets."
        if temperatures
        else ""
    )
    table = Table(
        ["set", *columns],
        rows,
        caption="Calibration errors (fractions), negative log likelihood in nats, Brier score",
        better=None,
        digits=3,
    )
    return [
        Section(
            "Calibration",
            "A dot above the diagonal is a bin of confidence that is right more often than it "
            f"says; its size is the bin's share of the images.{fitted}",
            images=[Picture(path, "Reliability diagrams, 15 bins.")],
            folded=[table],
        )
    ]


def _strange(workdir: Path, details: dict) -> list[Section]:
    """Scores of images of no class."""
    sections = []
    for name in sorted({name for each in details.values() for name in each["ood"]}):
        models = {
            model: {
                f"{column}, {score}": both[column]
                for column in ("AUROC", "FPR95")
                for score, both in each["ood"].get(name, {}).items()
            }
            for model, each in details.items()
        }
        scores = {score for each in details.values() for score in each["ood"].get(name, {})}
        missing = ", ".join(score for score in FEATURE_SCORES if score not in scores)
        left = f" Left out, as they need features of training images: {missing}."
        sections.append(
            Section(
                f"Images of no class: {name}",
                "AUROC: how often a clean image scores higher than one of no class (50 % is "
                "chance). FPR95: the share of images of no class that pass where 95 % of clean "
                f"ones do; lower is better.{left if missing else ''}",
                images=_bars(workdir, models, f"ood-{name}", "%"),
                folded=[_table(f"{name}: by each score, in per cent", models)],
            )
        )
    return sections


def _strip(workdir: Path, kind: str, caption: str) -> list[Picture]:
    """What attacks or corruptions made of the first clean image, of the first model with any."""
    for path in sorted(workdir.glob(f"*/answers/{ANSWERS}")):
        stored = suite.load_answers(path)
        names = [name for name in stored if name.startswith("example/")]
        made = {name.removeprefix("example/"): stored[name] for name in names}
        attacks = {name.split("/")[1] for name in stored if name.startswith("attack/")}
        clean = made.pop("clean", None)
        shown = {n: x for n, x in made.items() if (n in attacks) == (kind == "attack")}
        if clean is None or not shown:
            continue
        images = [clean, *shown.values()]
        names = ["clean", *(name.replace("_", " ") for name in shown)]
        if kind == "attack":
            changes = [None, *(_change(image, clean) for image in shown.values())]
            grid = write_grid(
                workdir / "attack-examples.png", [images, changes], tile=128, headings=names
            )
            return [Picture(grid, caption, pixelated=True)]
        # A few in a line, each under its name, so that a phone shows them in a readable size.
        return [
            Picture(
                write_grid(
                    workdir / f"corruption-examples-{start}.png",
                    [images[start : start + _IN_A_LINE]],
                    tile=112,
                    headings=names[start : start + _IN_A_LINE],
                ),
                caption if start + _IN_A_LINE >= len(images) else "",
                alt=", ".join(names[start : start + _IN_A_LINE]),
                pixelated=True,
            )
            for start in range(0, len(images), _IN_A_LINE)
        ]
    return []


def _change(image: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """The change of each pixel around mid-grey, the largest of them at full contrast."""
    change = image.astype(np.float64) - clean
    most = np.abs(change).max()
    return np.round(127.5 + 127.5 * change / (most or 1)).astype(np.uint8)


def _columns(models: dict[str, _Found]) -> list[str]:
    return list(dict.fromkeys(name for found in models.values() for name in found))


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
    rows = [[name, *(_text(x, name) for x in found.values())] for name in _columns(found)]
    return Table(["figure", *found], rows, caption=caption, better=None)


def _counts(images: dict[str, int]) -> Table:
    return Table(
        ["set", "images"], list(images.items()), better=None, caption="How many images were asked"
    )
