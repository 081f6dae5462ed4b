"""Parts that the pages of all methods have in common."""

from pathlib import Path

from jaxsynth.report.page import Details
from jaxsynth.runs.stage import MANIFEST, load_artifact


def check_stages(workdir: Path) -> None:
    """StageError naming a file below a run's folder that is not as its finished stage left it.

    Digests of unchanged files are remembered. A page must not be made of damaged figures.
    """
    for path in sorted(workdir.rglob(MANIFEST)):
        load_artifact(path.parent).verify()


def stage_details(workdir: Path) -> list[Details]:
    """The manifest of every finished stage below a run's folder, folded away."""
    found = []
    for path in sorted(workdir.rglob(MANIFEST)):
        stage = load_artifact(path.parent)
        shown = {key: value for key, value in stage.manifest.items() if key != "files"}
        where = path.parent.relative_to(workdir).as_posix()
        found.append(Details(f"{stage.manifest['label']} ({where})", shown))
    return found
