"""What a run prints: one shared rich console, progress with rate and ETA, one line per stage.

A terminal gets a live bar. A log file or a pipe gets a plain line about every ten seconds instead,
because a bar's control codes make such a file unreadable.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxsynth.core.words import counted

console = Console(highlight=False, soft_wrap=True)

PLAIN_INTERVAL = 10.0  # seconds between two lines where the output is no terminal


def set_quiet(quiet: bool) -> None:
    """Silence the shared console: every process but the first of a multi-process run wants this."""
    console.quiet = quiet


class Ticker:
    """What `progress` yields. `completed` counts items since the work's beginning."""

    def __init__(self, description: str, total: int | None, start: int, out: Console):
        self.description = description
        self.total = total
        self.completed = start
        self._start = start
        self._out = out
        self._began = time.monotonic()
        self._spoke = self._began
        self._bar: Progress | None = None
        self._task = None

    @property
    def rate(self) -> float:
        """Items per second since this process began the work; 0 before the first."""
        seconds = time.monotonic() - self._began
        return (self.completed - self._start) / seconds if seconds > 0 else 0.0

    def update(self, completed: int, note: str = "") -> None:
        """Say that `completed` items are done; `note` (such as "loss 0.123") stands at the end."""
        self.completed = completed
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, note=f"{_rate(self.rate)}  {note}")
        elif time.monotonic() - self._spoke >= PLAIN_INTERVAL:
            self._spoke = time.monotonic()
            self._out.print(self._line(note), markup=False)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that `count` more items are done."""
        self.update(self.completed + count, note)

    def _line(self, note: str) -> str:
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.description}: {self.completed}{of}", _rate(self.rate)]
        if self.total is not None and self.rate > 0:
            parts.append(f"ETA {duration((self.total - self.completed) / self.rate)}")
        return "  ".join([*parts, note]).rstrip()


@contextmanager
def progress(
    description: str, total: int | None = None, *, start: int = 0, out: Console | None = None
) -> Iterator[Ticker]:
    """Show progress while the block runs; `start` items were done by an earlier process."""
    out = console if out is None else out
    ticker = Ticker(description, total, start, out)
    # Of a dumb terminal no line can be drawn again.
    if not out.is_terminal or out.is_dumb_terminal or out.quiet:
        yield ticker
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=out, transient=True, refresh_per_second=4) as bar:
        ticker._bar = bar
        ticker._task = bar.add_task(escape(description), total=total, completed=start, note="")
        yield ticker


def stage_line(name: str, seconds: float, note: str = "", *, out: Console | None = None) -> None:
    """Print the one line that a finished (or skipped) stage leaves behind."""
    line = f"{name:<28} {duration(seconds):>8}  {note}".rstrip()
    (console if out is None else out).print(line, markup=False)


def duration(seconds: float) -> str:
    """Seconds as people say them: "0.4 s", "12 s", "3:05", "1:02:03"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def file_size(count: int) -> str:
    """Bytes as disks are sold: "12 bytes", "3.1 MB", "1.2 GB"."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return counted(count, "byte")


def _rate(rate: float) -> str:
    return f"{1 / rate:.1f} s/it" if 0 < rate < 1 else f"{rate:.1f} it/s"
