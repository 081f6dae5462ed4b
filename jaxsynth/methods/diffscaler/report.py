"""What a DiffScaler run found: results.json, tables on the terminal and one HTML page.

Everything is read from the stages' folders, so the page can be made again at any time and each
figure names the artifact it comes from.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.methods.diffscaler.recipes import RECIPES
from jaxsynth.quality.adherence import MEASURES
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.plots import Series, plot_scores
from jaxsynth.report.tables import Measure, Table, to_markdown, to_rich
from jaxsynth.runs.results import how_it_was_made
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.runs.sweep import best_results


def page_of(workdir: Path) -> Path:
    """Where `write` puts the page."""
    return workdir / "report.html"


def write(workdir: Path) -> Path:
    """Collects the figures, prints the tables and writes the page; returns the page's path."""
    results = collect(workdir)
    write_json(workdir / "results.json", results)
    names = list(dict.fromkeys(result["data"] for result in results))
    sections = []
    for name in names:
        own = [result for result in results if result["data"] == name]
        table = compared(own, name)
        console.print(to_rich(table))
        (workdir / f"table-{name}.md").write_text(to_markdown(table) + "\n", "utf-8")
        sections.append(
            Section(
                f"Recipes on {name}",
                "Mean squared error of the predicted noise on held-out images, at the same times "
                "and noises for every recipe; lower is better. The learning rate was chosen with "
                "the first seed on one half of the held-out images, the errors are of the other. "
                "Old classes: the error on what the base knew, with what was learnt in place, and "
                "with it switched off, where that can be done.",
                tables=[table, swept(own, name)],
                images=[_rates(workdir, own, name)],
            )
        )
    quality = _quality(workdir)
    if quality is not None:
        console.print(to_rich(quality))
        (workdir / "table-quality.md").write_text(to_markdown(quality) + "\n", "utf-8")
    sections.append(
        Section(
            "Images of every data set from one model",
            "Real images on the left; on the right what one transformer drew, each data set with "
            "its own parameters, all of them in one mixed batch. The table says which real images "
            "each distance is from. The floor is what real images get against other real images of "
            "the same number.",
            tables=[] if quality is None else [quality],
            images=[Picture(grid, pixelated=True) for grid in _grids(workdir)],
        )
    )
    if (conditions := _conditions(workdir)) is not None:
        sections.append(conditions)
    routing = workdir / "routing" / "routing.json"
    if routing.is_file():
        sections.append(Section("One batch, many data sets", _routing(routing)))
    sections.append(how_it_was_made(workdir))
    return write_page(
        page_of(workdir),
        "DiffScaler",
        sections,
        subtitle="One frozen diffusion transformer, many data sets.",
        facts=[("data sets", ", ".join(names)), ("runs", str(len(results)))],
    )


def collect(workdir: Path) -> list[dict]:
    """Every finished run of the study: what was trained, and its errors."""
    found = []
    for path in sorted(workdir.glob(f"study/*/*/*-seed*/{MANIFEST}")):
        stage = load_artifact(path.parent)
        config = stage.manifest["config"]
        found.append(
            {
                "data": path.parent.parent.parent.name,
                "recipe": config["adaptation"]["recipe"],
                "rate": config["train"]["learning_rate"],
                "seed": config["adaptation"]["seed"],
                **stage.counts,
                "seconds": stage.manifest["seconds"],
                "artifact": path.parent.relative_to(workdir).as_posix(),
            }
        )
    if not found:
        raise FileNotFoundError(f"{workdir}: no finished run (study/<data>/<recipe>/<rate>-seed*)")
    return found


def best(results: Sequence[dict], recipe: str) -> list[dict]:
    """A recipe's runs at the rate that its sweep chose."""
    return best_results([result for result in results if result["recipe"] == recipe])


def compared(results: Sequence[dict], name: str) -> Table:
    """A line for every recipe at its own best rate."""
    full = best(results, "full")
    reference = Measure(tuple(r["test"] for r in full)).mean if full else None
    body = []
    for recipe, made in RECIPES.items():
        runs = best(results, recipe)
        if not runs:
            continue
        error = Measure(tuple(r["test"] for r in runs))
        off = {r["old_off"] for r in runs if "old_off" in r}
        trained, whole = runs[0]["trainable"], runs[0]["whole"]
        body.append(
            [
                made.label,
                f"{trained:,}" + (f" ({trained / whole:.1%})" if trained < whole else ""),
                error,
                "" if reference is None else f"{error.mean / reference - 1:+.1%}",
                Measure(tuple(r["old"] for r in runs)),
                max(off) if off else None,
            ]
        )
    before = results[0]["old_before"]
    seeds = len({result["seed"] for result in results})
    return Table(
        ["Recipe", "trained", "error", "to full", "old classes", "off"],
        body,
        caption=f"{name}: error x 1000, mean ± standard deviation of {seeds} seeds; the base's own "
        f"on its classes is {1000 * before:.1f}",
        better="lower",
        scale=1000,
        digits=1,
    )


def swept(results: Sequence[dict], name: str) -> Table:
    """The validation error of every rate that was tried."""
    rates = sorted({result["rate"] for result in results})
    first = min(result["seed"] for result in results)
    errors = {(r["recipe"], r["rate"]): r["validation"] for r in results if r["seed"] == first}
    body = [
        [made.label, *(errors.get((recipe, rate)) for rate in rates)]
        for recipe, made in RECIPES.items()
        if any(recipe == key for key, _ in errors)
    ]
    return Table(
        ["Recipe", *(f"{rate:g}" for rate in rates)],
        body,
        caption=f"{name}: validation error x 1000 at each learning rate, seed {first}",
        better="lower",
        scale=1000,
        digits=2,
    )


def _rates(workdir: Path, results: Sequence[dict], name: str) -> Picture:
    series = []
    for recipe, made in RECIPES.items():
        first = min(result["seed"] for result in results)
        own = sorted(
            (r["rate"], 1000 * r["validation"])
            for r in results
            if r["recipe"] == recipe and r["seed"] == first
        )
        if own:
            series.append(Series(made.label, *map(list, zip(*own, strict=True))))
    path = plot_scores(
        workdir / f"rates-{name}.png", series, xlabel="learning rate",
        ylabel="validation error x 1000", log_x=True,
    )  # fmt: skip
    return Picture(path, "Validation error against the learning rate.")


def _quality(workdir: Path) -> Table | None:
    """FID, KID and the rest of every set of images that was measured."""
    body, network = [], ""
    columns = ("fid", "kid", "precision", "recall", "density", "coverage")
    for path in sorted(workdir.glob(f"quality/*/*/{MANIFEST}")):
        found = read_json(path.parent / "quality.json", finite=False)
        network = found["features"]["network"]
        label, name = path.parent.parent.name, path.parent.name
        for part, title in (("matched", label), ("floor", "real against real")):
            if part == "floor" and any(row[0] == f"{name}: {title}" for row in body):
                continue
            values = [Measure(tuple(found[part][column]["values"])) for column in columns]
            counted = found["samples"]["matched"]
            body.append([f"{name}: {title}", found["reference"], counted, *values])
    if not body:
        return None
    body.sort(key=lambda row: (row[0].split(":")[0], "real against" in row[0], row[0]))
    return Table(
        ["Images", "against", "of each", *columns],
        body,
        caption=f"In features of {network}, mean ± standard deviation of repeated splits",
        better=None,
        digits=3,
    )


def _grids(workdir: Path) -> list[Path]:
    """Real and drawn images of every data set."""
    return sorted(workdir.glob("quality/routed/*/samples.png"))


def _conditions(workdir: Path) -> Section | None:
    """What learning to follow condition images brought."""
    errors, agreements, pictures = [], [], []
    for path in sorted(workdir.glob(f"conditions/*/*/following/{MANIFEST}")):
        kind, name = path.parent.parent.name, path.parent.parent.parent.name
        adapter = load_artifact(path.parent.parent / "adapter").counts
        found = read_json(path.parent / "following.json", finite=False)
        title = f"{kind} of {name}"
        columns = ("own", "another", "none", "plain")
        errors.append([title, f"{adapter['trainable']:,}", *(adapter[key] for key in columns)])
        columns = ("own", "another", "plain", "autoencoder")
        values = (found.get(key) for key in columns)
        agreements.append([title, MEASURES[kind], found["images"], *values])
        pictures.append(Picture(path.parent / "samples.png", f"{title}.", pixelated=True))
    if not errors:
        return None
    tables = [
        Table(
            ["Condition", "trained", "its own", "another's", "none", "set without"],
            errors,
            caption="Error x 1000 on held-out images, by the condition that the network is given",
            better=None,
            scale=1000,
            digits=2,
        ),
        Table(
            ["Condition", "measure", "images", "its own", "another's", "set without", "limit"],
            agreements,
            caption="How well drawn images agree with a condition; higher is better",
            better=None,
            digits=3,
        ),
    ]
    for table in tables:
        console.print(to_rich(table))
    text = "\n".join(map(to_markdown, tables))
    (workdir / "table-conditions.md").write_text(text, "utf-8")
    return Section(
        "Condition images",
        "A set of parameters each, trained as the data sets' own, that reads a condition image "
        "beside the latents. Errors are of the predicted noise: with an image's own condition, "
        "with that of another image of its class, with none, and of the data set's own parameters, "
        "which know no condition. Drawn images are compared with the condition that they were "
        "drawn for, with that of another image of the class, and so are images of the data set's "
        "own parameters; the limit is what the autoencoder leaves of the real images.",
        tables=tables,
        images=pictures,
    )


def _routing(path: Path) -> str:
    found = read_json(path, finite=False)
    return (
        f"- A batch that mixes all data sets differs from separate runs by at most "
        f"{found['mixed']:.1e} (outputs reach {found['scale']:.1f}).\n"
        f"- With the adapters off, outputs for the base's classes differ from the base's by "
        f"{found['off']:g}.\n"
        f"- Merged into plain weights, outputs differ by at most {found['merged']:.1e}.\n"
    )
