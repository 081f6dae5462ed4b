"""Many changed files for one reader, each read under limits; what came of them.

A file is either read or refused by a `UserError`. Anything else is a fault: another exception, more
than `MOST_SECONDS` of processor time, more than `MOST_MEGABYTES` of memory, a long message, or the
end of the process. Every file follows from the seed and its number, so that a fault can be made
again: `python -m tests.fuzz --reader=NAME --seed=SEED --only=NUMBER`.
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

from jaxsynth.core.errors import UserError
from tests.fuzz.cases import Case, make
from tests.fuzz.readers import READERS

MOST_SECONDS, MOST_MEGABYTES, MOST_LETTERS = 5.0, 500, 1500


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

    def add(self, other: "Figures") -> None:
        for name in ("executions", "accepted", "refused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults += other.faults
        self.first = {**other.first, **self.first}


def run(
    reader: str,
    numbers: range,
    seed: int,
    folder: Path,
    figures: Figures,
    *,
    loud: bool = False,
) -> None:
    """Executions of these numbers in this process; `folder` must be new.

    With `loud` what each file was and came to is printed, with the traceback of a fault.
    """
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
            kind = _execute(case, path, figures, loud=loud)
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


def _execute(case: Case, path: Path, figures: Figures, *, loud: bool) -> str:
    """Reads one file; what is wrong with how that ended, or ""."""
    _forget_peak()
    memory, start, kind = _peak(), time.process_time(), ""
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS + 1)
    try:
        case.read(path)
        figures.accepted += 1
    except Slow:
        kind = f"more than {MOST_SECONDS:g} s"
    except UserError as error:
        figures.refused += 1
        kind = f"more than {MOST_LETTERS} letters" if len(str(error)) > MOST_LETTERS else ""
        if loud:
            print(f"{case.name}: refused: {error}")
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/jaxsynth/" in frame.filename] or frames
        kind = f"{type(error).__name__} in {Path(own[-1].filename).name}, {own[-1].name}"
        if loud:
            traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if not kind and time.process_time() - start > MOST_SECONDS:
        kind = f"more than {MOST_SECONDS:g} s"
    if not kind and _peak() - memory > MOST_MEGABYTES:
        kind = f"more than {MOST_MEGABYTES} MB"
    return kind


def _stop(*_) -> None:
    raise Slow


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory (megabytes) that this process had since `_forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
