"""Which errors are for the user to read, and in which words; the others are bugs."""

import contextlib
import errno
import os
import traceback
from pathlib import Path

import jaxsynth
from jaxsynth.core.errors import UserError, quoted

# Of collectives between processes (Gloo on CPUs, NCCL on GPUs), and of JAX's coordination service.
_OF_PEERS = ("Gloo ", "external/gloo", "NCCL operation", "CoordinationServiceError")


def is_for_users(error: Exception) -> bool:
    """Whether the error is one that this package raises to be read by a user.

    That is every exception class of its own, every failure to open a file, and a ValueError or a
    FloatingPointError whose last frame lies in the package. JAX shortens its tracebacks so that
    its errors seem to come from the caller, but marks those with a note.
    """
    if isinstance(error, UserError) or type(error).__module__.startswith("jaxsynth."):
        return True
    if _is_out_of_space(error) or _is_of_a_peer(error) or _is_out_of_memory(error):
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if not isinstance(error, (ValueError, FloatingPointError, FileNotFoundError)):
        return False
    if any("JAX" in note for note in getattr(error, "__notes__", ())):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(jaxsynth.__file__).parent) + os.sep
    return bool(frames) and frames[-1].filename.startswith(package)


def _is_out_of_space(error: BaseException) -> bool:
    """Whether a full disk is at the bottom of an error, whichever library was writing."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return any(
        (isinstance(one, OSError) and one.errno in codes)
        or any(os.strerror(code) in str(one) for code in codes)
        for one in _behind(error)
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or one of its devices, has less memory than was asked for."""
    return any(
        isinstance(one, MemoryError) or "RESOURCE_EXHAUSTED" in str(one) for one in _behind(error)
    )


def _is_of_a_peer(error: BaseException) -> bool:
    """Whether another process of the run is gone: what the libraries between them say then."""
    return any(word in str(one) for one in _behind(error) for word in _OF_PEERS)


def _behind(error: BaseException) -> list[BaseException]:
    """An error with all that it was raised from."""
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return seen


def message(error: Exception) -> str:
    """The one line that the user reads of an error that `is_for_users`."""
    if _is_out_of_space(error):
        named = getattr(error, "filename", None)
        where = f"{named}: " if named else ""
        return (
            f"{where}no space left on the disk (or in a quota). Free some, or choose another "
            "--workdir; the same command goes on where this one stopped"
        )
    if not isinstance(error, UserError) and _is_out_of_memory(error):
        said = next(iter(str(error).splitlines()), "") or "no more is free"
        return (
            f"out of memory ({quoted(said, 200)[1:-1]}). Make a batch_size smaller, cut it by "
            "accumulate, or compute again by remat=block; `jaxsynth plan` says what each needs"
        )
    if not isinstance(error, UserError) and _is_of_a_peer(error):
        return (
            "another process of this run has ended, or cannot be reached any more; its own output "
            "says why. Start them all again: the same commands go on where they stopped"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    with contextlib.suppress(IndexError):
        text = text or f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1]}"
    return text
