"""What a DataDream run found: results.json, a table on the terminal and one HTML page.

Everything is read from the stages' folders, so the page can be made again at any time and each
figure names the artifact it comes from.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.load import load_dataset
from jaxsynth.data.names import safe_name
from jaxsynth.data.splits import load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.datadream import alignment
from jaxsynth.methods.datadream.config import (
    MODES,
    PROMPTS,
    Config,
    Recipe,
    SetConfig,
    set_folder,
)
from jaxsynth.quality.filters import FilterConfig
from jaxsynth.report.grids import write_grid
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.plots import Series, plot_scores
from jaxsynth.report.tables import Measure, Table, to_markdown, to_rich
from jaxsynth.robustness.metrics.crossed import crossed_interval
from jaxsynth.robustness.metrics.limits import share_limits
from jaxsynth.runs.record import read_record
from jaxsynth.runs.results import how_it_was_made
from jaxsynth.runs.run import read_config
from jaxsynth.runs.stage import MANIFEST, load_artifact

COLUMNS_PER_SOURCE = 4
MAX_CLASSES = 10
# Of a row's errors.
MOST_CONFUSED = 10


@dataclass(frozen=True)
class Row:
    """A line of the table: what the classifier saw, and where its scores lie."""

    label: str
    folder: str  # below the run, with {shots} and {seed}
    mode: str = ""
    baseline: bool = False


def rows(modes: list[str], config: Config) -> list[Row]:
    """The table's lines, in order: those of the method, then the run's recipes."""
    lines = [
        Row("CLIP, zero-shot", "zero-shot"),
        Row("Real shots only", "shots{shots}-seed{seed}/real", baseline=True),
        Row("Synthetic, prompts only", "prompt-seed{seed}/synthetic"),
    ]
    for mode in modes:
        own = f"shots{{shots}}-seed{{seed}}/{mode}"
        lines.append(Row(f"Synthetic, {_title(mode)}", f"{own}/synthetic", mode))
        lines.append(Row(f"{_title(mode)} + real shots", f"{own}/both", mode))
    for name in config.recipes:
        below = "shots{shots}-seed{seed}" if config.depends_on_shots(name) else "prompt-seed{seed}"
        folder = f"{below}/recipes/{safe_name(name)}/classifier"
        lines.append(Row(name, folder, baseline=not config.recipes[name].sets))
    return lines


def _title(mode: str) -> str:
    """What a mode's images are called."""
    return {"loft": "LoFT", "chimera": "ChimeraLoRA"}.get(mode, f"DataDream {mode}")


def page_of(workdir: Path) -> Path:
    """Where `write` puts the page."""
    return workdir / "report.html"


def write(workdir: Path) -> Path:
    """Collects the scores, prints the table and writes the page; returns the page's path."""
    found = _stages(workdir)
    shots = sorted({s for s, _ in found})
    seeds = sorted({s for _, s in found})
    modes = [
        m for m in MODES if any((f / m / "images" / MANIFEST).is_file() for f in found.values())
    ]
    config = read_config(workdir, Config)
    lines = rows(modes, config)
    results = [
        {"row": row.label, "shots": k, "seed": seed, **_scores(workdir, row, k, seed)}
        for row in lines
        for k in shots
        for seed in seeds
        if _folder(workdir, row, k, seed) is not None
    ]
    write_json(workdir / "results.json", results)
    dataset = load_dataset(config.data)
    labels = np.asarray(dataset.test.labels)
    tables = [_table(results, lines, shots, seeds, "top1")]
    apart = [_differences(workdir, row, lines, shots, seeds, labels) for row in _baselines(lines)]
    if len(shots) == 1:
        tables.append(_per_class(results, lines))
    console.print(to_rich(tables[0]))
    (workdir / "table.md").write_text(to_markdown(tables[0]) + "\n", "utf-8")

    grid = _grid(workdir, dataset, shots[-1], seeds[0], modes)
    sets = _set_folders(workdir, config, modes, shots[-1], seeds)
    sections = [
        Section(
            "Accuracy on the test set",
            f"Top-1 in per cent on {len(dataset.test)} test images ({dataset.split}). "
            + _seeds_note(seeds, results, len(dataset.test))
            + _modes_note(modes)
            + " Differences are paired, by seed and test image, with 95 % intervals of both "
            "together (with one seed, of the images alone): one that holds 0 tells nothing."
            " Every trained classifier starts from the same CLIP and takes the same number of "
            "steps. The test set chooses nothing: " + _chosen(found),
            tables=[*tables, *apart[:1]],
            folded=apart[1:],
            images=_curve(workdir, results, lines, shots, seeds),
        ),
        Section(
            "What the generator drew",
            f"From left to right: real shots, images from the prompt alone, and images of the "
            f"fine-tuned generator ({counted(shots[-1], 'shot')}, seed {seeds[0]}), one class per "
            "row. "
            "Images at the same place of the two generated groups started from the same noise.",
            images=[Picture(grid, _grid_caption(dataset), pixelated=True)],
        ),
        *_recipes(config),
        *alignment.section(workdir, dataset, sets),
        *_training_samples(workdir),
        *_errors(workdir, dataset, lines, shots[-1], seeds[0]),
        Section("What it cost", _made_by(workdir), tables=[_costs(workdir)]),
        how_it_was_made(workdir),
    ]
    facts = [
        ("data set", dataset.name),
        ("classes", str(dataset.num_classes)),
        ("shots", ", ".join(map(str, shots))),
        ("seeds", ", ".join(map(str, seeds))),
    ]
    return write_page(
        page_of(workdir),
        f"DataDream on {dataset.name}",
        sections,
        subtitle="A few-shot guided synthetic data set, and what training on it is worth.",
        facts=facts,
    )


def _training_samples(workdir: Path) -> list[Section]:
    """What the generator drew while it learned, where `finetune.sample_every` asked for it."""
    pictures = [
        Picture(path, f"{path.parents[2].parent.name}, step {int(path.stem)}", pixelated=True)
        for path in sorted(workdir.glob("shots*/*/adapter/.training/samples/*.png"))
    ]
    if not pictures:
        return []
    return [Section("While the generator learned", "The first prompts, step by step.",
                    images=pictures)]  # fmt: skip


def _set_folders(
    workdir: Path, config: Config, modes: list[str], shots: int, seeds: list[int]
) -> dict[str, list[Path]]:
    """Each set's folders, one a seed, by the name that the page gives it."""
    names = {"prompts only": PROMPTS}
    names |= {_title(mode): mode for mode in modes} | {name: name for name in config.sets}
    return {
        title: [set_folder(config, workdir, name, shots, seed) for seed in seeds]
        for title, name in names.items()
    }


def _errors(
    workdir: Path, dataset: Dataset, lines: list[Row], shots: int, seed: int
) -> list[Section]:
    """Which classes are taken for which others, by the rows that see real shots."""
    labels, tables = np.asarray(dataset.test.labels), []
    for row in lines:
        folder = _folder(workdir, row, shots, seed)
        if folder is None or not ("real" in row.label.lower() or "/recipes/" in row.folder):
            continue
        guessed = np.load(folder / "logits.npy").argmax(-1)
        count = dataset.num_classes
        table = np.bincount(labels * count + guessed, minlength=count**2).reshape(count, count)
        wrong = table - np.diag(np.diag(table))
        body: list[list] = []
        for place in np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSED]:
            true, told = np.unravel_index(place, wrong.shape)
            if wrong[true, told]:
                names = dataset.display_names
                share = float(wrong[true, told] / table[true].sum())
                body.append([names[true], names[told], int(wrong[true, told]), share])
        columns = ["class", "taken for", "images", "of the class, %"]
        tables.append(Table(columns, body, caption=row.label, better=None, scale=100))
    text = f"The errors made most often with {shots} shots a class, seed {seed}."
    return [Section("Which classes are confused", text, folded=tables)] if tables else []


def _costs(workdir: Path) -> Table:
    """The seconds of each kind of stage; those taken from another run took theirs there."""
    seconds: dict[str, list[float]] = {}
    for path in sorted(workdir.rglob(MANIFEST)):
        manifest = load_artifact(path.parent).manifest
        seconds.setdefault(manifest["stage"].replace("_", " "), []).append(manifest["seconds"])
    body: list[list] = [[name, len(own), sum(own), max(own)] for name, own in seconds.items()]
    body.append(["all", sum(row[1] for row in body), sum(row[2] for row in body), None])
    columns = ["stage", "times", "seconds in all", "the longest"]
    return Table(columns, body, better=None, rules=(len(body) - 1,))


def _made_by(workdir: Path) -> str:
    """The command, the devices and the versions, as the run's record has them."""
    record = read_record(workdir)
    lines = [f"`{record['command']}`"] if record.get("command") else []
    if hardware := record.get("hardware"):
        lines.append(", ".join(f"{name}: {value}" for name, value in hardware.items()))
    found = record.get("versions", {})
    lines.append(", ".join(f"{name} {version}" for name, version in found.items()))
    return "\n\n".join(lines)


def _recipes(config: Config) -> list[Section]:
    """What each recipe is."""
    if not config.recipes:
        return []
    body = []
    for name, recipe in config.recipes.items():
        sets = [f"{one} ({share:g})" for one, share in recipe.sets.items()]
        plain = FilterConfig()
        keep = {k: x for k, x in vars(recipe.keep).items() if x != getattr(plain, k)}
        body.append(
            [
                name,
                ", ".join(sets) or "none",
                "yes" if recipe.real else "no",
                json.dumps(keep) if keep else "all",
                _classifier_words(recipe),
            ]
        )
    columns = ["Recipe", "Images (shares)", "Real shots", "Kept", "Classifier"]
    text = (
        "The rows below the method's own. Each classifier takes as many steps as the others, from "
        "the same CLIP, a student as many as its own settings say, from its checkpoint. "
    ) + " ".join(f"`{name}`: {_set_words(one)}." for name, one in config.sets.items())
    return [Section("What the recipes are", text, tables=[Table(columns, body, better=None)])]


def _classifier_words(recipe: Recipe) -> str:
    if recipe.student:
        return f"student {recipe.student}"
    return json.dumps(recipe.classify) if recipe.classify else "as published"


def _set_words(one: SetConfig) -> str:
    if one.kind == "retrieved":
        where = f"photos of {one.pool}" if one.pool else "training images that are no shots"
        return f"the {where} that are nearest to a class's {one.query}, labels unseen"
    if one.kind == "edited":
        strength = "IsSynth's for their number" if one.strength is None else f"{one.strength:g}"
        told = ", each told by another shot's caption" if one.captioned else ""
        return f"drawn by the untouched base beginning with the shots, strength {strength}{told}"
    return f"drawn by the untouched base from {', '.join(one.prompts.weights)}"


def _chosen(found: dict[tuple[int, int], Path]) -> str:
    """Which of a classifier's steps is scored."""
    kept = [load_artifact(folder / "shots").counts["validation"] for folder in found.values()]
    if not any(kept):
        return "the last step is scored."
    return "where real shots are seen, those kept for validation choose the step that is scored."


def _stages(workdir: Path) -> dict[tuple[int, int], Path]:
    """The folders of each (shots, seed), of those with a classifier where there are some."""
    found: dict[tuple[int, int], Path] = {}
    for folder in workdir.glob("shots*-seed*"):
        shots, seed = folder.name.removeprefix("shots").split("-seed")
        if (folder / "shots" / MANIFEST).is_file():
            found[int(shots), int(seed)] = folder
    if not found:
        raise FileNotFoundError(f"{workdir}: no finished shots stage (shots*-seed*/shots)")
    # Shots are drawn for all seeds before the first training.
    scored = {key: path for key, path in found.items() if any(path.rglob("scores.json"))}
    return scored or found


def _folder(workdir: Path, row: Row, shots: int, seed: int) -> Path | None:
    folder = workdir / row.folder.format(shots=shots, seed=seed)
    return folder if (folder / MANIFEST).is_file() else None


def _scores(workdir: Path, row: Row, shots: int, seed: int) -> dict:
    folder = _folder(workdir, row, shots, seed)
    scores = read_json(folder / "scores.json", finite=False)
    return {**scores, "artifact": folder.relative_to(workdir).as_posix()}


def _measure(results: list[dict], label: str, shots: int, score: str) -> Measure | None:
    values = [r[score] for r in results if r["row"] == label and r["shots"] == shots]
    # The zero-shot row is one number, not one per seed.
    distinct = values[:1] if label == "CLIP, zero-shot" else values
    return Measure(tuple(distinct)) if values else None


def _table(results, lines: list[Row], shots: list[int], seeds: list[int], score: str) -> Table:
    columns = ["Trained on", *(counted(k, "shot") for k in shots)]
    body = [[row.label, *(_measure(results, row.label, k, score) for k in shots)] for row in lines]
    if len(shots) == 1:
        columns.append("mean over classes")
        for line, row in zip(body, lines, strict=True):
            line.append(_measure(results, row.label, shots[0], "macro"))
    spread = f", mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else ""
    return Table(
        columns, body, caption=f"Top-1 accuracy in %{spread}", scale=100, rules=_rules(lines)
    )


def _baselines(lines: list[Row]) -> list[Row]:
    """The rows that differences are from: those of real shots alone."""
    return [row for row in lines if row.baseline]


def _differences(
    workdir: Path, base: Row, lines: list[Row], shots: list[int], seeds: list[int], labels
) -> Table:
    """Each row's accuracy less that of a baseline, in points, with its interval."""

    def right(row: Row, k: int, seed: int) -> np.ndarray | None:
        folder = _folder(workdir, row, k, seed)
        return None if folder is None else np.load(folder / "logits.npy").argmax(-1) == labels

    body = []
    for row in lines:
        cells: list[str | None] = []
        for k in shots:
            pairs = [(right(row, k, seed), right(base, k, seed)) for seed in seeds]
            known = [a.astype(float) - b for a, b in pairs if a is not None and b is not None]
            cells.append(crossed_interval(np.stack(known)).text() if known else None)
        if row is not base:
            body.append([row.label, *cells])
    columns = ["Trained on", *(counted(k, "shot") for k in shots)]
    return Table(columns, body, caption=f"Points more than: {base.label}", better=None)


def _rules(lines: list[Row]) -> tuple[int, ...]:
    """The rows above which a line is drawn: the first of DataDream, and the first recipe."""
    first = next((i for i, row in enumerate(lines) if "/recipes/" in row.folder), len(lines))
    return (3, first)


def _per_class(results: list[dict], lines: list[Row]) -> Table:
    names = list(results[0]["per_class"])
    body = []
    for row in lines:
        own = [r["per_class"] for r in results if r["row"] == row.label]
        known = [[r[name] for r in own if r[name] is not None] for name in names]
        body.append([row.label, *(float(np.mean(values)) if values else None for values in known)])
    return Table(
        ["Trained on", *names], body, caption="Per class, in %", scale=100, rules=_rules(lines)
    )


def _seeds_note(seeds: list[int], results: list[dict], images: int) -> str:
    if len(seeds) == 1 and results:
        best = max(result["top1"] for result in results)
        limits = share_limits(best * images, images, 0.95)
        return (
            f"One seed ({seeds[0]}), so the test images alone tell how sure a figure is: of "
            f"{images} of them, {100 * best:.1f} % has the 95 % interval {100 * limits.low:.1f} to "
            f"{100 * limits.high:.1f} (Clopper and Pearson); another training may differ by more."
        )
    made: dict[str, set[int]] = {}
    for result in results:
        made.setdefault(result["row"], set()).add(result["seed"])
    fewer = [f"{row} ({len(own)})" for row, own in made.items() if len(own) < len(seeds)]
    note = f" Rows of fewer seeds: {', '.join(fewer)}." if fewer else ""
    return f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}.{note}"


def _modes_note(modes: list[str]) -> str:
    meaning = {
        "dset": "one adapter for the whole data set",
        "cls": "one adapter for each class",
        "stacked": "one for each class on top of that for the data set",
        "loft": "one for each shot, of which sums of two of a class draw (LoFT)",
        "chimera": "one for each class with a head for each shot, of which sums draw (ChimeraLoRA)",
    }
    return "".join(f" `{mode}` is {meaning[mode]}." for mode in modes)


def _grid_caption(dataset: Dataset) -> str:
    shown, count = min(dataset.num_classes, MAX_CLASSES), dataset.num_classes
    hidden = f" {shown} of the {counted(count, 'class')}, evenly spread." if shown < count else ""
    return f"Real, prompt-only and DataDream images.{hidden}"


def _curve(workdir: Path, results, lines: list[Row], shots: list[int], seeds) -> list[Picture]:
    """Accuracy against the number of shots, where there are several."""
    if len(shots) < 2:
        return []
    series = []
    for row in lines:
        measures = {k: _measure(results, row.label, k, "top1") for k in shots}
        done = {k: m for k, m in measures.items() if m is not None}  # of a run under way
        if done:
            series.append(
                Series(
                    row.label,
                    list(done),
                    [100 * m.mean for m in done.values()],
                    [100 * (m.std or 0.0) for m in done.values()] if len(seeds) > 1 else None,
                    dashed="{shots}" not in row.folder,
                )
            )
    path = plot_scores(
        workdir / "accuracy.png",
        series,
        xlabel="real images per class",
        ylabel="top-1 accuracy, %",
        log_x=True,
    )
    return [Picture(path, "Accuracy against the number of real images per class.")]


def _first(source: ImageSource, label: int, count: int) -> list[np.ndarray]:
    """The first `count` images of a class."""
    found = np.flatnonzero(np.asarray(source.labels) == label)[:count]
    return [source[int(i)].image for i in found]


def _grid(workdir: Path, dataset: Dataset, shots: int, seed: int, modes: list[str]) -> Path:
    folder = workdir / f"shots{shots}-seed{seed}"
    drawn = load_shots(folder / "shots" / "shots.json").train_source(dataset)
    sources: list[tuple[str, ImageSource]] = [("real", drawn)]
    stores = {"prompt only": workdir / f"prompt-seed{seed}" / "images"}
    for mode in modes:
        stores[_title(mode) if len(modes) > 1 else "DataDream"] = folder / mode / "images"
    for name, path in stores.items():
        if (path / MANIFEST).is_file():  # a page can be made while the run is under way
            sources.append((name, ImageStore(path)))
    count = dataset.num_classes
    labels = np.unique(np.linspace(0, count - 1, min(count, MAX_CLASSES)).round().astype(int))
    sides = COLUMNS_PER_SOURCE
    lines = []
    for label in labels:
        line: list[np.ndarray | None] = []
        for _, source in sources:
            images = _first(source, int(label), sides)
            line += images + [None] * (sides - len(images))
        lines.append(line)
    headings = [text for name, _ in sources for text in (name, *[""] * (sides - 1))]
    names = [dataset.display_names[label] for label in labels]
    return write_grid(workdir / "samples.png", lines, names, tile=64, headings=headings)
