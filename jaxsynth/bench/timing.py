"""Timing two sides alternately, so that whatever else the machine does meets both of them.

What it does besides is watched too: where another process takes a core, threads that wait for each
other at every operation lose far more than that share, and not both sides' do so alike.
"""

import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

# A single measurement repeats a short call until it takes this long, in seconds.
SHORTEST = 0.3
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one value a measurement."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range between the fastest and the slowest, relative to the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


def alternate(
    calls: Mapping[str, Callable[[], object]], reps: int, *, shortest: float = SHORTEST
) -> dict[str, Timing]:
    """Times every call `reps` times in turn: A B A B ... Each call must wait for its own result.

    One untimed call beforehand says how often a short one is repeated within a measurement; what
    compiles must have been called before.
    """
    repeats = {name: max(1, round(shortest / max(_time(c, 1), 1e-6))) for name, c in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(reps):
        for name, call in calls.items():
            seconds[name].append(_time(call, repeats[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


class Watch:
    """How much of this process's cores others use from now on (Linux; unknown elsewhere)."""

    def __init__(self):
        self._cores = cores()
        self._busy, self._own = _busy(self._cores), time.process_time()
        self._began = time.perf_counter()

    def others(self) -> float | None:
        """The share of the cores' time so far that other processes took, 0 to 1."""
        if self._busy is None:
            return None
        passed = (time.perf_counter() - self._began) * len(self._cores)
        busy = _busy(self._cores) - self._busy
        return max(busy - (time.process_time() - self._own), 0.0) / passed


def cores() -> set[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def busy_seconds(stat: str, cores: Collection[int], ticks: int) -> float | None:
    """For how long `cores` have worked, from the text of /proc/stat in 1/`ticks` seconds.

    None where it does not list them. Time that a hypervisor gave to other machines counts.
    """
    found = {}
    for line in stat.splitlines():
        name, *values = line.split()
        if name[:3] == "cpu" and name[3:].isdigit():
            # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user.
            found[int(name[3:])] = sum(map(int, (*values[:3], *values[5:8])))
    if not found.keys() >= set(cores):
        return None
    return sum(found[core] for core in cores) / ticks


def _busy(cores: Collection[int]) -> float | None:
    try:
        text = _STAT.read_text(encoding="ascii")
    except OSError:
        return None
    return busy_seconds(text, cores, os.sysconf("SC_CLK_TCK"))


def _time(call: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats
