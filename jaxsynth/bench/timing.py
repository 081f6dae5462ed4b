"""Timing two sides alternately, so that whatever else the machine does meets both of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# A single measurement repeats a short call until it takes this long, in seconds.
SHORTEST = 0.3


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


def _time(call: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats
