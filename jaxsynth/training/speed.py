"""How fast a training runs, and how much of the machine it uses.

Written beside the metrics, not into them: `metrics.jsonl` is the same in every run, speeds are not.
"""

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import jax
from jaxtyping import PyTree

# Peak bfloat16 operations a second of a device, by the name that JAX gives it. TPUs: as
# `training.chips`; GPUs: NVIDIA's figures without sparsity.
PEAKS = {
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def host_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


class Meter:
    """The speed of a loop of steps between two reports.

    The loop calls `queued` when it has given the devices a step and `waits` before it prepares the
    next one. Between the two the devices should still be at work; where they were seen to have
    finished, all the time since they were last seen working counts as idle. So the idle share is an
    upper bound, of this process's devices.

    Args:
        examples: of one step; 0: unknown.
        flops: of one step of a program on all devices, called once for each; None: unknown.
    """

    def __init__(
        self, step: int, examples: int = 0, flops: Callable[[Hashable], float] | None = None
    ):
        self._step, self._examples = step, examples
        self._flops = None if flops is None else cache(flops)
        self._calls: Counter[Hashable] = Counter()
        self._began = self._working = time.perf_counter()
        self._idle = 0.0
        self._result: PyTree = None

    def look(self) -> None:
        """Note whether the devices still work on the last step."""
        if self._result is not None and not _is_ready(self._result):
            self._working = time.perf_counter()

    def queued(self, result: PyTree, program: Hashable = None) -> None:
        """The devices have been given a step of a program that ends with `result`."""
        now = time.perf_counter()
        self._calls[program] += 1
        if self._result is not None and _is_ready(self._result):
            self._idle += now - self._working
        self._working, self._result = now, result

    def pause(self) -> None:
        """Leave out the time until now since the devices were last seen working: an evaluation."""
        self._result, self._working = None, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """What happened since the last call, at an earlier step.

        `steps_per_second`, `examples_per_second`, `flops_per_second` and `mfu` (of all devices;
        only where they are known), `idle` (share of the time, at most), `host_bytes` (the most
        so far).
        """
        now = time.perf_counter()
        passed = now - self._began
        rate = (step - self._step) / passed
        found: dict[str, Any] = {"steps_per_second": rate}
        if self._examples:
            found["examples_per_second"] = rate * self._examples
        if self._flops is not None and self._calls:
            # The mean of the programs that ran, which differ where examples have several shapes.
            done = sum(times * self._flops(one) for one, times in self._calls.items())
            work = done / self._calls.total()
            now = time.perf_counter()  # counting is no part of the training
            peak = PEAKS.get(jax.devices()[0].device_kind)
            if work:
                found["flops_per_second"] = rate * work
            if work and peak is not None:
                found["mfu"] = rate * work / (peak * jax.device_count())
        self._calls.clear()
        found["idle"] = min(self._idle / passed, 1.0)
        found["host_bytes"] = host_memory()
        self._step, self._began, self._idle = step, now, 0.0
        return found


def _is_ready(result: PyTree) -> bool:
    return all(leaf.is_ready() for leaf in jax.tree.leaves(result))
