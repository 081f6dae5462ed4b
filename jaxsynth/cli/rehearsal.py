"""`jaxsynth run --dry-run`: the stages of a run, what they need and what is there."""

from pathlib import Path
from types import ModuleType
from typing import Any


def rehearse(method: ModuleType, config: Any, workdir: Path) -> None:
    """Print the stages that `method.make` would make; nothing is written.

    Raises:
        UserError: as the run, for data, weights and settings that are not as it needs them, and
            where the disk has no room for what is still to be made.
    """
    from jaxsynth.core.console import console, file_size
    from jaxsynth.core.space import check_space, free_bytes
    from jaxsynth.report.tables import to_rich
    from jaxsynth.runs import rehearsal

    steps, unknown = rehearsal.rehearse(lambda: method.make(config, workdir))
    console.print(to_rich(_table(steps, workdir)))
    if unknown:
        console.print(f"Not listed: {unknown}", markup=False)
    needs, free = rehearsal.needed(steps), free_bytes(workdir)
    if any(step.bytes is None for step in steps):
        console.print("?: known when the stages before are made", markup=False)
    console.print(
        f"To be made: at most {file_size(needs)}; free at {workdir}: {file_size(free)}",
        markup=False,
    )
    check_space("the run", workdir, needs)


def _table(steps: list, workdir: Path) -> Any:
    from jaxsynth.core.console import duration, file_size
    from jaxsynth.report.tables import Table

    rows = []
    for step in steps:
        took = "" if step.seconds is None else duration(step.seconds)
        needs = "?" if step.bytes is None else file_size(step.bytes) if step.bytes else ""
        folder = step.folder.relative_to(workdir).as_posix()
        rows.append([step.name, folder, step.state, took, needs])
    return Table(["Stage", "folder", "state", "took", "needs at most"], rows, better=None)
