"""Stopping in order when the machine is taken away: SIGTERM, as SLURM, Kubernetes and TPUs send it.

Whatever works for long asks `requested` between two pieces of work that it can save, saves, and
raises `Preempted`; the same command then goes on from there. Of several processes all stop at the
same step, which JAX's coordination service agrees on.

SIGINT (Ctrl-C) ends a run at once, but not in the middle of a save (`uninterrupted`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jaxsynth.core.errors import UserError

EXIT_CODE = 128 + signal.SIGTERM
_asked = threading.Event()


class Preempted(UserError):
    """The run was asked to stop and has saved its work; the command's exit code is 143."""


def install() -> None:
    """Take SIGTERM as a request; a second one ends the process at once."""

    def ask(number, frame):
        _asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ask)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have a SIGINT wait for the end of the block; a second one does not wait.

    Only the main thread sees signals; in others, and where SIGINT is already taken otherwise, the
    block just runs.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield
        return
    asked = False

    def note(number, frame):
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def requested(step: int | None = None) -> bool:
    """Whether to stop now; with `step`, at the step that all processes agree on."""
    import jax

    if jax.process_count() > 1:
        if step is None:
            return False
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
    return _asked.is_set()


def stop_if_requested(when: str) -> None:
    """Raise `Preempted` in a single process that was asked to stop; all before `when` is saved."""
    if requested():
        raise Preempted(f"stopped on SIGTERM {when}; what was made is kept, run it again to go on")
