"""Several processes of one run: what process 0 found, in all of them."""

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import TEMPORARY, write_json
from jaxsynth.core.records import to_json

_MESSAGE = 4096
# Seconds between two looks at the shared storage.
_POLL = 0.2


class ProcessError(UserError):
    """Process 0 of a multi-process run stopped; the message says why."""


def agree(take: Callable[[], str] | None) -> str:
    """What process 0 found, in every process; its refusal is raised in all, so that none waits."""
    if jax.process_count() == 1:
        assert take is not None
        return take()
    return agree_value(take)


def agree_value(compute: Callable[[], Any] | None) -> Any:
    """Process 0 computes; every process gets its JSON value, or raises its error's message."""
    failed: BaseException | None = None
    message = {}
    if jax.process_index() == 0:
        assert compute is not None
        try:
            message = {"value": to_json(compute())}
        except Exception as error:
            failed = error
            message = {"error": f"{type(error).__name__}: {error}"[: _MESSAGE // 4]}
    text = json.dumps(message).encode()
    if len(text) > _MESSAGE:  # counts that do not fit stand in the manifest
        text = b'{"value": null}'
    sent = np.zeros(_MESSAGE, np.uint8)
    sent[: len(text)] = np.frombuffer(text, np.uint8)
    got = bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).rstrip(b"\0")
    if failed is not None:
        raise failed
    found = json.loads(got)
    if "error" in found:
        raise ProcessError(f"process 0 stopped: {found['error']}")
    return found["value"]


def compute_first(compute: Callable[[], Any], folder: Path) -> Any:
    """Process 0 computes, for hours if it must; the others look for its result in `folder`.

    A collective would do the same, but those that wait in one give up after minutes. The folder
    is on storage that all processes share.
    """
    first = jax.process_index() == 0
    token = agree_value((lambda: uuid.uuid4().hex) if first else None)
    path = folder / f".result-{token}{TEMPORARY}"
    if first:
        try:
            value = compute()
            write_json(path, {"value": to_json(value)})
        except Exception as error:
            write_json(path, {"error": f"{type(error).__name__}: {error}"})
            raise
        return value
    while not path.is_file():
        time.sleep(_POLL)
    found = read_json(path)
    if "error" in found:
        raise ProcessError(f"process 0 stopped: {found['error']}")
    return found["value"]


def barrier(name: str) -> None:
    """Wait for every process of a multi-process run; nothing to wait for in a single one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
