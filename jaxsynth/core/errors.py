"""Errors a user can act on: the command prints them as one line instead of a traceback."""

from typing import Any


class UserError(Exception):
    """What a user did, or what their files hold, stops the run; the message says what to change."""


class UsageError(UserError):
    """The command line or the config is wrong, so nothing was started (exit code 2)."""


def quoted(value: Any, limit: int = 80) -> str:
    """A value from a file as an error message may show it: short, on one line, of any type.

    Texts are cut and their control and direction characters escaped; of containers only the type
    is said, because writing one that refers to its parts many times may never end.
    """
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}..."
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return (
            repr(value) if value.bit_length() <= 256 else f"a number of {value.bit_length()} bits"
        )
    kind = dict if isinstance(value, dict) else type(value)
    return f"a value of type {kind.__name__}"


def shown(value: Any, most: int = 8) -> str:
    """`quoted`, but a list of few values of which none is a container is written."""
    if isinstance(value, (list, tuple)) and len(value) <= most:
        return f"[{', '.join(map(quoted, value))}]"
    return quoted(value)
