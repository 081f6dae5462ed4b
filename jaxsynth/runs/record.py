"""Reading a run's record, `run.json`, without JAX: a mistaken folder is told at once."""

from pathlib import Path
from typing import Any

from jaxsynth.core.documents import read_json, take
from jaxsynth.core.errors import UsageError, UserError

RUN_FILE = "run.json"


def read_record(workdir: Path) -> dict[str, Any]:
    """The record of a run's folder. UsageError where there is none, UserError for a damaged one."""
    path = workdir / RUN_FILE
    if not path.is_file():
        raise UsageError(_no_run(workdir))
    try:
        found = read_json(path)
        take(found, "method", str, path)
        take(found, "config", dict, path)
    except UserError as error:
        raise UserError(
            f"{error}; remove it, and the same `jaxsynth run` command writes it again"
        ) from error
    return found


def _no_run(workdir: Path) -> str:
    """Why a path is no run's folder, and which run is near."""
    near = [*workdir.absolute().parents[:4]]
    if workdir.is_dir():
        near += sorted(path for path in workdir.iterdir() if path.is_dir())
        kind = "holds no run"
    else:
        kind = "is a file, not a run's folder" if workdir.exists() else "does not exist"
    runs = [str(folder) for folder in near if (folder / RUN_FILE).is_file()]
    hint = f"; there are runs at {', '.join(runs[:8])}" if runs[1:] else ""
    hint = f"; there is a run at {runs[0]}" if len(runs) == 1 else hint
    return f"{workdir} {kind}: {RUN_FILE} is missing{hint}"
