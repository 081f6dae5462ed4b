"""Runs the cases of a benchmark, prints the table and writes the figures."""

import gc
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import rich.box
from rich.console import Console
from rich.table import Table

from jaxsynth.bench import generate, train_step
from jaxsynth.bench.networks import NETWORKS, random_pipeline
from jaxsynth.bench.timing import SHORTEST, Timing, alternate
from jaxsynth.errors import UsageError
from jaxsynth.methods.datadream import write_adapter
from jaxsynth.training.artifact import versions, write_json
from jaxsynth.weights.hf import StableDiffusion, save_pipeline

CASES = {
    "train-step": {case.name: case for case in train_step.CASES},
    "generate": {case.name: case for case in generate.CASES},
}
# Beyond rounding: two libraries sum a thousand products in different orders.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Row:
    """One case.

    `images` are those of a call, `first` the seconds of our first call, compilation included, and
    `difference` that of both sides' results (relative for losses).
    """

    case: str
    detail: str
    images: int
    first: float
    ours: Timing
    peer: Timing | None = None
    difference: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster we are: the quotient of the medians."""
        return self.peer.median / self.ours.median if self.peer else None

    @property
    def ratios(self) -> list[float]:
        """The quotient of each pair of neighbouring measurements, sorted."""
        if self.peer is None:
            return []
        pairs = zip(self.peer.seconds, self.ours.seconds, strict=True)
        return sorted(theirs / mine for theirs, mine in pairs)


def run(
    name: str,
    *,
    peer: str = "",
    cases: Sequence[str] = (),
    reps: int = 5,
    json: Path | None = None,
    shortest: float = SHORTEST,
    console: Console,
) -> list[Row]:
    """Time the cases (all by default) of the benchmark `name` and print them as a table.

    `peer` "" times our side alone; "torch" also torch's, after checking that it computes the same.
    """
    known = CASES[name]
    if unknown := [case for case in cases if case not in known]:
        raise UsageError(f"bench {name}: no case {unknown[0]!r}, expected {', '.join(known)}")
    if reps < 1:
        raise UsageError(f"bench {name}: --reps is {reps}, expected at least 1")
    record = environment()
    if peer:
        from jaxsynth.bench import torch_peer

        record["versions"] |= torch_peer.prepare()
    for line in _header(record):
        console.print(line, markup=False)
    rows = []
    for case in [known[case] for case in cases or known]:
        pipeline = random_pipeline(NETWORKS[case.networks]())
        with console.status(f"{name}: {case.name}"):
            rows.append(measure(name, case, pipeline, peer=peer, reps=reps, shortest=shortest))
        # A case's networks are large; the next one's must not stand beside them.
        del pipeline
        gc.collect()
    console.print(_table(name, rows, peer))
    if json is not None:
        record |= {"bench": name, "peer": peer, "reps": reps}
        record["rows"] = [asdict(row) | {"ratio": row.ratio, "ratios": row.ratios} for row in rows]
        write_json(json, record)
    return rows


def measure(
    name: str, case: Any, pipeline: StableDiffusion, *, peer: str, reps: int, shortest: float
) -> Row:
    """One case's row."""
    module, side = {
        "train-step": (train_step, train_step.Training),
        "generate": (generate, generate.Generation),
    }[name]
    ours = side(pipeline, case)
    began = time.perf_counter()
    found = [ours.step()]
    row = {
        "case": case.name,
        "detail": case.detail,
        "images": case.images,
        "first": time.perf_counter() - began,
    }
    found.append(ours.step())
    if not peer:
        return Row(**row, ours=alternate({"ours": ours.step}, reps, shortest=shortest)["ours"])
    other = _torch(name, case, pipeline, ours)
    difference = module.compare(ours, found, other)
    if not difference < TOLERANCE:
        raise RuntimeError(
            f"bench {name}, {case.name}: the two sides' results differ by {difference:.2g}, "
            f"expected less than {TOLERANCE}; nothing was timed"
        )
    calls = {"ours": ours.step, "peer": module.peer_call(ours, other)}
    times = alternate(calls, reps, shortest=shortest)
    return Row(**row, ours=times["ours"], peer=times["peer"], difference=difference)


def _torch(name: str, case: Any, pipeline: StableDiffusion, ours: Any) -> Any:
    """torch's side with our weights, which it reads from a folder as users' weights are."""
    from jaxsynth.bench.torch_peer import TorchGeneration, TorchTraining

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_pipeline(pipeline, folder)
        if name == "train-step":
            return TorchTraining(folder, train_step.FINETUNE)
        adapters = [folder / f"adapter{number}" for number in range(len(ours.states))]
        for path, state in zip(adapters, ours.states, strict=True):
            write_adapter(path, state)
        return TorchGeneration(
            folder, ours.prompts, adapters, steps=case.steps, guidance=generate.GUIDANCE
        )


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _header(record: dict[str, Any]) -> list[str]:
    found = record["versions"]
    names = [name for name in ("jax", "torch", "diffusers", "peft") if name in found]
    return [
        f"{record['device']}, {record['processor']}, {record['cores']} cores, float32; "
        + ", ".join(f"{name} {found[name]}" for name in names),
        f"XLA_FLAGS={record['xla_flags']}",
    ]


def _table(name: str, rows: Sequence[Row], peer: str) -> Table:
    """Milliseconds a call (median, +- half the range) and images a second."""
    table = Table(
        title=f"bench {name}: median of {len(rows[0].ours.seconds)} measurements"
        + (", taken in turn" if peer else ""),
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    columns = ["first call s", "ms", "images/s"]
    if peer:
        columns += [f"{peer} ms", f"{peer} images/s", "ratio", "(lowest-highest)", "difference"]
    table.add_column("case")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row.case, row.detail, f"{row.first:.1f}", *_cells(row, row.ours)]
        if row.peer is not None:
            cells += _cells(row, row.peer)
            cells += [
                f"{row.ratio:.2f}x",
                f"{row.ratios[0]:.2f}-{row.ratios[-1]:.2f}",
                f"{row.difference:.0e}",
            ]
        table.add_row(*cells)
    return table


def _cells(row: Row, timing: Timing) -> list[str]:
    digits = 1 if timing.median < 1 else 0
    return [
        f"{timing.median * 1e3:.{digits}f} ±{timing.spread:.0%}",
        f"{row.images / timing.median:.1f}",
    ]
