"""Several processes of one run: what process 0 found, in all of them."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsynth.core.errors import UserError
from jaxsynth.core.records import to_json

_MESSAGE = 4096


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


def barrier(name: str) -> None:
    """Wait for every process of a multi-process run; nothing to wait for in a single one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
