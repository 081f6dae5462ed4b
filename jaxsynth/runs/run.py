"""A run's record: which method made a folder, with which config, by which command.

Stages hold what decided each of them; the record holds the whole config, for the page.
"""

import os
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxsynth.core.config import to_dataclass, to_dict
from jaxsynth.core.io import TEMPORARY, write_json
from jaxsynth.runs.record import RUN_FILE, read_record
from jaxsynth.runs.rehearsal import rehearsing
from jaxsynth.runs.stage import versions

_STALE = 60.0  # seconds

# What the user typed; empty where a run is started from Python.
COMMAND: ContextVar[str] = ContextVar("COMMAND", default="")

T = TypeVar("T")


def write_record(workdir: Path, method: str, config: Any) -> None:
    """Write `run.json`: the whole config, `COMMAND`, the hardware and the versions."""
    workdir.mkdir(parents=True, exist_ok=True)
    record = {
        "method": method,
        "config": to_dict(config),
        "command": COMMAND.get(),
        "hardware": {
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "cores": os.cpu_count(),
        },
        "versions": versions(),
    }
    write_json(workdir / RUN_FILE, record)
    for path in workdir.glob(f".*{TEMPORARY}"):
        # What a killed writer left; a file that is being written is seconds old at the most.
        if path.is_file() and time.time() - path.stat().st_mtime > _STALE:
            path.unlink(missing_ok=True)


def record_made(workdir: Path, config: Any) -> None:
    """Write the record of what has been made, before the page of it is written.

    Until then the record of an earlier run stays, so that one that is refused changes nothing.
    """
    if rehearsing() is None and jax.process_index() == 0:
        write_record(workdir, config.method, config)


def keep_record(workdir: Path, config: Any) -> None:
    """Write the record unless there is one: the command has written its own before the run.

    A rehearsal writes none.
    """
    if rehearsing() is not None:
        return
    if jax.process_index() == 0 and not (workdir / RUN_FILE).is_file():
        write_record(workdir, config.method, config)


def read_config(workdir: Path, kind: type[T]) -> T:
    """The config of a run, fields that it lacks at today's defaults."""
    values = dict(read_record(workdir)["config"])
    if "method" not in kind.__dataclass_fields__:
        values.pop("method", None)
    return to_dataclass(kind, values)
