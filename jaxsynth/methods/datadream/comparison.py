"""Several DataDream runs on one page: their tables, sets and samples side by side."""

from collections.abc import Sequence
from pathlib import Path

from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.records import differences, to_json
from jaxsynth.core.words import counted
from jaxsynth.methods.datadream.config import Config
from jaxsynth.report.page import Details, Picture, Section, write_page
from jaxsynth.report.tables import Measure, Table
from jaxsynth.runs.run import read_config

PAGE = "comparison.html"


def compare(workdirs: Sequence[Path]) -> Path:
    """Writes a page of runs whose own pages are made, in the first run's folder; returns its path.

    UserError where a folder is given twice.
    """
    folders = [Path(workdir) for workdir in workdirs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("report: the same run is given twice")
    results = {_name(x, folders): read_json(x / "results.json", list) for x in folders}
    configs = {_name(x, folders): read_config(x, Config) for x in folders}
    rows = list(dict.fromkeys(one["row"] for found in results.values() for one in found))
    tables = []
    for shots in sorted({one["shots"] for found in results.values() for one in found}):
        body: list[list] = []
        for row in rows:
            values = [
                tuple(x["top1"] for x in found if x["row"] == row and x["shots"] == shots)
                for found in results.values()
            ]
            body.append([row, *(Measure(own) if own else None for own in values)])
        caption = f"Top-1 accuracy in %, {counted(shots, 'shot')}"
        tables.append(Table(["Trained on", *results], body, caption=caption, scale=100))
    images = sorted({(one["images"]) for found in results.values() for one in found})
    text = (
        f"Each run on its own test images ({' and '.join(map(str, images))} of them), mean ± "
        "standard deviation over its seeds. Runs that differ in data, seeds or steps compare no "
        "methods: what differs is below."
    )
    first, *others = configs
    details = [
        Details(
            f"{name}, against {first}",
            "\n".join(differences(to_json(configs[first]), to_json(configs[name]))) or "the same",
        )
        for name in others
    ]
    grids = [
        Picture(folder / "samples.png", name, pixelated=True)
        for name, folder in zip(results, folders, strict=True)
    ]
    sections = [
        Section("Accuracy on the test set", text, tables=tables),
        Section("What differs", details=details),
        Section("What the generators drew", images=grids),
    ]
    return write_page(folders[0] / PAGE, "DataDream runs side by side", sections)


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """A run's folder, by its own name where no other has it."""
    alike = [other for other in folders if other.resolve().name == folder.resolve().name]
    return folder.resolve().name if len(alike) == 1 else str(folder)
