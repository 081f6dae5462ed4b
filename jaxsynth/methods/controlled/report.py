"""What a comparison of ways to follow conditions found: results.json, tables and one HTML page."""

from pathlib import Path

import jax

from jaxsynth.core.console import console
from jaxsynth.core.io import write_json
from jaxsynth.methods.controlled.ways import WAYS
from jaxsynth.quality.adherence import MEASURES
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.tables import Measure, Table, to_markdown, to_rich
from jaxsynth.runs.results import check_stages, how_it_was_made
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.runs.sweep import best_results


def report(workdir: Path) -> Path:
    """Writes results.json, the table and report.html from the finished stages."""
    workdir = Path(workdir)
    check_stages(workdir)
    results = []
    for path in sorted(workdir.glob(f"ways/*/*-seed*/{MANIFEST}")):
        stage = load_artifact(path.parent)
        config = stage.manifest["config"]
        results.append(
            {
                "way": config["way"]["name"],
                "rate": config["train"]["learning_rate"],
                "seed": config["way"]["seed"],
                **stage.counts,
                "seconds": stage.manifest["seconds"],
                "artifact": path.parent.relative_to(workdir).as_posix(),
            }
        )
    if not results:
        raise FileNotFoundError(f"{workdir}: no finished run (ways/<way>/<rate>-seed<n>)")
    page = workdir / "report.html"
    if jax.process_index():
        return page
    write_json(workdir / "results.json", results)
    kind = load_artifact(workdir / "triples").manifest["config"]["kind"]
    tables = [compared(results, kind), followed(results, kind)]
    for table in tables:
        console.print(to_rich(table))
    (workdir / "table.md").write_text("\n\n".join(map(to_markdown, tables)) + "\n", "utf-8")
    pictures = [
        Picture(
            workdir / best(results, way)[0]["artifact"] / "samples.png",
            f"{label}.",
            pixelated=True,
        )
        for way, (label, _) in WAYS.items()
        if best(results, way)
    ]
    return write_page(
        page,
        "Following conditions",
        [
            Section(
                f"Ways to follow {kind}",
                "Mean squared error of the predicted noise on held-out images, at the same times "
                "and noises for every way: with an image's own condition, with another image's, "
                "and with none. The learning rate was chosen with the first seed on one half of "
                "the held-out images, the errors are of the other. Drawn images are compared with "
                "the condition that they were drawn for and with that of another.",
                tables=tables,
                images=pictures,
            ),
            how_it_was_made(workdir),
        ],
        subtitle="Adapters inside the base against a network beside it.",
        facts=[("condition", kind), ("runs", str(len(results)))],
    )


def best(results: list[dict], way: str) -> list[dict]:
    """A way's runs at the rate that its sweep chose."""
    return best_results([result for result in results if result["way"] == way])


def compared(results: list[dict], kind: str) -> Table:
    """What each way learns, and its errors."""
    body = []
    for way, (label, _) in WAYS.items():
        if not (runs := best(results, way)):
            continue
        errors = (Measure(tuple(run[key] for run in runs)) for key in ("own", "another", "none"))
        share = runs[0]["trainable"] / runs[0]["whole"]
        body.append(
            [label, f"{runs[0]['trainable']:,}", f"{share:.1%}", f"{runs[0]['rate']:g}", *errors]
        )
    return Table(
        ["Way", "trained", "of base", "rate", "own", "another's", "none"],
        body,
        caption=f"{kind}: error x 1000 by the condition given, mean ± standard deviation of seeds",
        better="lower",
        scale=1000,
        digits=1,
    )


def followed(results: list[dict], kind: str) -> Table:
    """How closely drawn images follow their conditions."""
    body = []
    for way, (label, _) in WAYS.items():
        if runs := best(results, way):
            keys = ("follows", "follows_another")
            body.append([label, *(Measure(tuple(run[key] for run in runs)) for key in keys)])
    return Table(
        ["Way", "its own", "another's"],
        body,
        caption=f"{MEASURES[kind]} of drawn images with a condition; higher is better for its own",
        better=None,
        digits=3,
    )
