"""Many changed files for one reader, each read under limits; what came of them.

A file is either read or refused by an error for users. Anything else is a fault: another exception,
more than `MOST_SECONDS` of processor time, more than `MOST_MEGABYTES` of memory, or the end of the
process. Every file follows from the seed and its number, so that a fault can be made again.
"""

import collections
import dataclasses
import signal
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from jaxsynth.cli.main import _is_for_users
from tests.fuzz.readers import READERS, make

MOST_SECONDS, MOST_MEGABYTES = 5.0, 500


class Slow(BaseException):
    """The time of an execution is over. No `Exception`, so that no reader takes it for its own."""


@dataclasses.dataclass
class Figures:
    """What came of the executions; faults by kind with the number of the first file of each."""

    executions: int = 0
    accepted: int = 0
    refused: int = 0
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, int] = dataclasses.field(default_factory=dict)

    def fault(self, kind: str, number: int) -> None:
        self.faults[kind] += 1
        self.first.setdefault(kind, number)


def run(reader: str, numbers: range, seed: int, folder: Path, figures: Figures) -> None:
    """Executions of these numbers in this process; `folder` must be new."""
    seeds = folder / "seeds"
    seeds.mkdir(parents=True)
    cases = READERS[reader](seeds)
    for case in cases:  # unchanged, all must be read
        case.read(case.root)
    before = signal.signal(signal.SIGVTALRM, _stop)
    try:
        for number in numbers:
            random = Random(f"{seed} {reader} {number}")
            case = random.choice(cases)
            path = make(random, case, folder / "changed")
            kind = _execute(case, path, figures)
            figures.executions += 1
            if kind:
                figures.fault(f"{case.name}: {kind}", number)
    finally:
        signal.signal(signal.SIGVTALRM, before)


def run_in_child(reader: str, numbers: range, seed: int, pipe: Connection) -> None:
    """`run` in a process of its own, which sends its figures."""
    warnings.simplefilter("ignore")
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        run(reader, numbers, seed, Path(folder) / "fuzz", figures)
    pipe.send(figures)


def _execute(case, path: Path, figures: Figures) -> str:
    """Reads one file; what is wrong with how that ended, or ""."""
    _forget_peak()
    memory, start, kind = _peak(), time.process_time(), ""
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS + 1)
    try:
        case.read(path)
        figures.accepted += 1
    except Slow:
        kind = f"more than {MOST_SECONDS:g} s"
    except Exception as error:
        if _is_for_users(error):
            figures.refused += 1
            kind = _leak(str(error))
        else:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "/jaxsynth/" in frame.filename] or frames
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
            kind = f"{type(error).__name__} at {place} ({own[-1].name})"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if not kind and time.process_time() - start > MOST_SECONDS:
        kind = f"more than {MOST_SECONDS:g} s"
    if not kind and _peak() - memory > MOST_MEGABYTES:
        kind = f"more than {MOST_MEGABYTES} MB"
    return kind


def _leak(message: str) -> str:
    """An error shows a name, not a file's contents."""
    return "a message of more than 2000 letters" if len(message) > 2000 else ""


def _stop(*_) -> None:
    raise Slow


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory (megabytes) that this process had since `_forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
