"""Parts that the pages of all methods have in common."""

import statistics
from pathlib import Path

from jaxsynth.core.console import duration
from jaxsynth.report.page import Details, Section
from jaxsynth.report.tables import Table
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.training.metrics import read_metrics


def check_stages(workdir: Path) -> None:
    """StageError naming a file below a run's folder that is not as its finished stage left it.

    Digests of unchanged files are remembered. A page must not be made of damaged figures.
    """
    for path in sorted(workdir.rglob(MANIFEST)):
        load_artifact(path.parent).verify()


def how_it_was_made(workdir: Path) -> Section:
    """What each stage took and how fast its trainings ran; the manifests are folded away."""
    rows, measured = [], False
    for path in sorted(workdir.rglob(MANIFEST)):
        stage = load_artifact(path.parent)
        speed = _speed(path.parent)
        measured |= bool(speed)
        where = path.parent.relative_to(workdir).as_posix()
        rows.append(
            (where, duration(stage.manifest["seconds"]), *(speed.get(key) for key in _SPEEDS))
        )
    columns = ("stage", "time", *_SPEEDS.values())
    # A column that no stage fills says nothing.
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i] is not None for row in rows)]
    table = Table(
        [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], better=None, digits=2
    )
    text = (
        "Of each training the median over its reports, the first left out, in which the program is "
        "compiled. `TFLOP/s` counts matrix products and convolutions; `MFU` is their share of the "
        "devices' bfloat16 peak, where that is known; `idle` the largest share of the time in "
        "which the devices can have had nothing to do."
    )
    return Section(
        "How it was made", text if measured else "", folded=[table], details=_details(workdir)
    )


# What `speed.Meter.read` measures, and its column; a unit of the column where it is not one.
_SPEEDS = {
    "examples_per_second": "images/s",
    "flops_per_second": "TFLOP/s",
    "mfu": "MFU %",
    "idle": "idle % at most",
    "host_bytes": "host GiB",
}
_UNITS = {"flops_per_second": 1e12, "mfu": 0.01, "idle": 0.01, "host_bytes": 2**30}


def _speed(folder: Path) -> dict[str, float]:
    """The median speed of the trainings below a stage's folder; {} where it trained nothing."""
    lines = []
    for path in sorted(folder.rglob("speed.jsonl")):
        found = read_metrics(path)
        lines += found[1:] or found
    return {
        key: statistics.median(values) / _UNITS.get(key, 1)
        for key in _SPEEDS
        if (values := [line[key] for line in lines if key in line])
    }


def _details(workdir: Path) -> list[Details]:
    """The manifest of every finished stage below a run's folder, folded away."""
    found = []
    for path in sorted(workdir.rglob(MANIFEST)):
        stage = load_artifact(path.parent)
        shown = {key: value for key, value in stage.manifest.items() if key != "files"}
        where = path.parent.relative_to(workdir).as_posix()
        found.append(Details(f"{stage.manifest['label']} ({where})", shown))
    return found
