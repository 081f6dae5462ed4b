"""A run without its work: which stages are finished, which would be made, what disk they need.

`rehearse` calls what makes a run's stages while `run_stage` makes none of them: a finished stage is
found as in a run, one that was made by other settings is refused as in a run, and of the others
only their names, folders and needs are noted. Nothing is written.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxsynth.core.errors import UserError
from jaxsynth.runs.artifact import Artifact

State = Literal["finished", "begun", "to do"]


@dataclass(frozen=True)
class Step:
    """A stage of a run.

    Args:
        seconds: how long a finished stage took, None for others.
        bytes: the most that an unfinished stage adds on the disk; None where it is known only when
            the stages before it are made. Stages of lists, scores and tables count nothing.
    """

    name: str
    folder: Path
    state: State
    seconds: float | None = None
    bytes: int | None = 0


class NotMade(UserError):
    """A stage's files are wanted, and a rehearsal has not made them."""


class Unmade(Artifact):
    """A stage that a rehearsal does not make: its files are not there, its scores not known."""

    def __init__(self, name: str, folder: Path):
        manifest = {"digest": f"{_UNKNOWN} {folder}", "counts": _Unknown(name), "files": {}}
        object.__setattr__(self, "manifest", manifest)
        object.__setattr__(self, "_name", name)

    @property
    def path(self) -> Path:  # pyrefly: ignore[bad-override]
        raise NotMade(f"{self._name} is yet to be made, and what follows depends on it")


class _Unknown(dict):
    """Counts of a stage that is not made."""

    def __init__(self, name: str):
        self._name = name

    def __missing__(self, key: str) -> Any:
        raise NotMade(f"{self._name} is yet to be made, and what follows depends on it")


# Begins the digest of what is not made.
_UNKNOWN = "(not made)"
_steps: ContextVar[list[Step] | None] = ContextVar("steps", default=None)


def rehearsing() -> list[Step] | None:
    """The steps noted so far, where a rehearsal is under way."""
    return _steps.get()


def is_unknown(digest: str) -> bool:
    """Whether a digest depends on a stage that is not made."""
    return digest.startswith(_UNKNOWN)


@contextmanager
def _noting() -> Iterator[list[Step]]:
    steps: list[Step] = []
    token = _steps.set(steps)
    try:
        yield steps
    finally:
        _steps.reset(token)


def rehearse(make: Callable[[], Any]) -> tuple[list[Step], str]:
    """The stages that `make` would make, in their order, and what keeps later ones unknown ("").

    Raises:
        UserError: as the run, where data, weights or settings are not as it needs them.
    """
    with _noting() as steps:
        try:
            make()
        except NotMade as error:
            return steps, str(error)
    return steps, ""


def needed(steps: list[Step]) -> int:
    """Bytes that the unfinished steps add at the most, as far as they are known."""
    return sum(step.bytes or 0 for step in steps if step.state != "finished")
