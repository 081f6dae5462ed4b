"""Runs the cases of a benchmark, prints the table and writes the figures."""

import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import rich.box
from rich.console import Console
from rich.table import Table

from jaxsynth.bench.cases import (
    accelerator,
    adapters,
    attacks,
    clones,
    corruptions,
    dit_train_step,
    generate,
    points,
    routing,
    supervised_step,
    train_step,
)
from jaxsynth.bench.timing import SHORTEST, Timing, Watch, alternate, cores
from jaxsynth.core.errors import UsageError
from jaxsynth.core.io import write_json
from jaxsynth.runs.stage import versions
from jaxsynth.training.speed import PEAKS

# Beyond rounding: two libraries sum a thousand products in different orders.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
# Beyond either, a quotient would say more about the machine than about the two sides: the share of
# the cores' time that other processes had, and half the range of a side's measurements.
MOST_OTHERS = 0.1
MOST_SPREAD = 0.3
# Whose versions head the table.
SHOWN = (
    "jax",
    "torch",
    "diffusers",
    "peft",
    "foolbox",
    "torchattacks",
    "imagecorruptions",
    "scikit-image",
)


@dataclass(frozen=True)
class Benchmark:
    """What is timed: our side, and another that does the same.

    `build(case)` gives our side, whose `step()` does the work and waits for it, and which may say
    in `memory` how many bytes that takes an image and in `work` how many operations a call is, by
    how they are counted. `connect(ours, peer)` gives the other, or None where nobody does the same,
    and `call(ours, other)` what it does in `step`'s place. `compare(ours, found, other)` is the
    difference of both sides' results, `found` those of our first two steps, or None where they are
    not meant to be the same. `peers` are those that the other can be, timed on request. Without any
    the other is our own: `names` head the sides' columns, it is always timed, and it counts as what
    ours costs more than it. `default` names the cases that are timed where none is asked for, and
    `same_bits(case, found)` tells whether a second run ends with the bits of the first.
    """

    cases: Sequence[Any]
    build: Callable[[Any], Any]
    connect: Callable[[Any, str], Any]
    compare: Callable[[Any, list, Any], float | None]
    call: Callable[[Any, Any], Callable[[], object]]
    peers: tuple[str, ...] = ()
    names: tuple[str, str] = ("jaxsynth", "")
    default: Callable[[], list[str]] | None = None
    same_bits: Callable[[Any, list], bool] | None = None


def _of_peers(module: ModuleType, *peers: str) -> Benchmark:
    """A module whose `connect` is told which of several peers."""
    parts = (module.CASES, module.build, module.connect, module.compare, module.peer_call)
    return Benchmark(*parts, peers=peers)


def _of_torch(module: ModuleType) -> Benchmark:
    return replace(_of_peers(module, "torch"), connect=lambda ours, _: module.connect(ours))


def _of_ours(module: ModuleType, *names: str) -> Benchmark:
    return replace(_of_torch(module), peers=(), names=names)


BENCHES = {
    "train-step": _of_torch(train_step),
    "generate": _of_torch(generate),
    "dit-train-step": _of_torch(dit_train_step),
    "supervised-step": _of_torch(supervised_step),
    "clones": _of_ours(clones, "method", "SimCLR"),
    "points": _of_ours(points, "together", "in turn"),
    "routing": _of_ours(routing, "mixed", "one set"),
    "adapters": _of_ours(adapters, "kind", "LoRA"),
    "attacks": _of_peers(attacks, "foolbox", "torchattacks"),
    "corruptions": _of_peers(corruptions, "imagecorruptions"),
    "accelerator": replace(
        _of_peers(accelerator, "torch"),
        default=accelerator.default,
        same_bits=accelerator.same_bits,
    ),
}


def _prepare(peer: str, *, accelerator: bool) -> dict[str, str]:
    """Imports a peer, gives it its cores, and returns the versions; UserError if it is missing."""
    if peer == "foolbox":
        from jaxsynth.bench.peers import foolbox as module
    elif peer == "torchattacks":
        from jaxsynth.bench.peers import torchattacks as module
    elif peer == "imagecorruptions":
        from jaxsynth.bench.peers import imagecorruptions as module
    else:
        from jaxsynth.bench.peers import diffusers

        return diffusers.prepare(accelerator=accelerator)
    return module.prepare()


@dataclass(frozen=True)
class Row:
    """One case.

    `images` are those of a call, `first` the seconds of our first call, compilation included,
    `memory` our bytes an image besides the arguments if known, and `difference` that of both sides'
    results (relative for losses). `others` is the share of the cores' time that other processes had
    during the measurements, None where it is unknown. `work` is what `Benchmark` says of it, and
    `same_bits` whether a second run ended with the same bits, None where that was not tried.
    """

    case: str
    detail: str
    images: int
    first: float
    ours: Timing
    peer: Timing | None = None
    difference: float | None = None
    others: float | None = None
    memory: int | None = None
    work: dict[str, float] | None = None
    same_bits: bool | None = None

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

    @property
    def overhead(self) -> float | None:
        """The share by which our side takes longer than the other."""
        return self.ours.median / self.peer.median - 1 if self.peer else None

    @property
    def disturbed(self) -> str:
        """Why the two sides' times should not be compared; "" where they may be."""
        if self.others is not None and self.others > MOST_OTHERS:
            return f"other processes took {self.others:.0%} of the cores' time"
        spread = max(timing.spread for timing in (self.ours, self.peer) if timing)
        if spread > MOST_SPREAD:
            return f"the measurements of one side spread by ±{spread:.0%}"
        return ""


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

    `peer` "" times our side alone (or both, where both are ours); one of the benchmark's peers also
    that one's, after checking that it computes the same. Where the machine was busy with something
    else meanwhile, no ratio is printed or written.
    """
    bench = BENCHES[name]
    known = {case.name: case for case in bench.cases}
    if unknown := [case for case in cases if case not in known]:
        raise UsageError(f"bench {name}: no case {unknown[0]!r}, expected {', '.join(known)}")
    if reps < 1:
        raise UsageError(f"bench {name}: --reps is {reps}, expected at least 1")
    if peer and not bench.peers:
        raise UsageError(f"bench {name}: compares two of our own programs, and takes no --peer")
    if peer and peer not in bench.peers:
        raise UsageError(f"bench {name}: --peer={peer}, expected {' or '.join(bench.peers)}")
    if peer and name == "accelerator":
        # Else JAX takes three quarters of a GPU's memory, and nothing is left for the other side.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    record = environment() | {"dtype": "bfloat16" if name == "accelerator" else "float32"}
    if peer:
        record["versions"] |= _prepare(peer, accelerator=name == "accelerator")
    for line in _header(record):
        console.print(line, markup=False)
    rows = []
    for case in [known[case] for case in cases or (bench.default or known.keys)()]:
        with console.status(f"{name}: {case.name}"):
            rows.append(measure(name, case, peer=peer, reps=reps, shortest=shortest))
        # A case's networks are large; the next one's must not stand beside them.
        gc.collect()
    _show(console, name, rows, peer)
    if json is not None:
        record |= {"bench": name, "peer": peer, "reps": reps}
        record["rows"] = [_figures(row) for row in rows]
        write_json(json, record)
    return rows


def measure(name: str, case: Any, *, peer: str, reps: int, shortest: float) -> Row:
    """One case's row, with the other side's times if there is a `peer` or it is our own."""
    bench = BENCHES[name]
    ours = bench.build(case)
    began = time.perf_counter()
    found = [ours.step()]
    row = {
        "case": case.name,
        "detail": case.detail,
        "images": case.images,
        "first": time.perf_counter() - began,
        "memory": getattr(ours, "memory", None),
        "work": getattr(ours, "work", None),
    }
    found.append(ours.step())
    calls = {"ours": ours.step}
    other = bench.connect(ours, peer) if peer or not bench.peers else None
    if other is not None:
        difference = bench.compare(ours, found, other)
        most = TOLERANCE[getattr(case, "dtype", "float32")]
        if difference is not None and not difference < most:
            raise RuntimeError(
                f"bench {name}, {case.name}: the two sides' results differ by {difference:.2g}, "
                f"expected less than {most}; nothing was timed"
            )
        row["difference"] = difference
        calls["peer"] = bench.call(ours, other)
    watch = Watch()
    times = alternate(calls, reps, shortest=shortest)
    others = watch.others()
    if bench.same_bits is not None:
        del ours, other, calls  # a second network must not stand beside them
        row["same_bits"] = bench.same_bits(case, found)
    return Row(**row, **times, others=others)


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": _processor(),
        "cores": len(cores()),
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
    names = [name for name in SHOWN if name in found]
    lines = [
        f"{record['device']}, {record['processor']}, cores: {record['cores']}, {record['dtype']}",
        ", ".join(f"{name} {found[name]}" for name in names),
    ]
    return lines + ([f"XLA_FLAGS={record['xla_flags']}"] if record["xla_flags"] else [])


def _show(console: Console, name: str, rows: Sequence[Row], peer: str) -> None:
    """Prints the table; 80 columns are enough for it, and all there are in a pipe."""
    title = f"bench {name}: median of {len(rows[0].ours.seconds)} measurements"
    if any(row.peer is not None for row in rows):
        title += ", taken in turn"
    # Lines that are too long go on in the next: those of a run's console do not.
    console.print(title, "", sep="\n", markup=False, soft_wrap=False)
    console.print(_table(BENCHES[name], rows, peer), soft_wrap=False)
    for line in _notes(rows):
        console.print(line, markup=False, soft_wrap=False)


def _table(bench: Benchmark, rows: Sequence[Row], peer: str) -> Table:
    """Two lines a case: milliseconds a call (median, +- half the range), and images a second."""
    table = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("case", no_wrap=True)
    measured = any(row.memory is not None for row in rows)
    columns = ["first call\nmemory" if measured else "first\ncall", bench.names[0]]
    if any(row.peer is not None for row in rows):
        columns += [peer, "ratio"] if peer else [bench.names[1], "overhead"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        first = f"{row.first:.1f} s"
        if row.memory is not None:
            large = row.memory >= 1e6
            first += f"\n{_short(row.memory / 1e6)} MB" if large else f"\n{row.memory / 1e3:.0f} kB"
        cells = [f"{row.case}\n  {row.detail}", first, _cell(row, row.ours)]
        if row.peer is not None:
            found = _ratio(row) if peer else _overhead(row)
            cells += [_cell(row, row.peer), "busy" if row.disturbed else found]
        table.add_row(*cells)
    return table


def _cell(row: Row, timing: Timing) -> str:
    return (
        f"{_short(timing.median * 1e3)} ms ±{timing.spread:.0%}\n"
        f"{_short(row.images / timing.median)} images/s"
    )


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(row: Row) -> str:
    return f"{row.ratio:.2f}x\n{row.ratios[0]:.2f}-{row.ratios[-1]:.2f}"


def _overhead(row: Row) -> str:
    ratios = row.ratios
    least, most = (100 * (1 / ratio - 1) for ratio in (ratios[-1], ratios[0]))
    return f"{row.overhead:+.1%}\n{least:+.0f} to {most:+.0f}%"


def _notes(rows: Sequence[Row]) -> list[str]:
    """What does not fit in the table."""
    differences = [row.difference for row in rows if row.difference is not None]
    lines = []
    if differences:
        lines.append(f"Largest difference of the two sides' results: {max(differences):.0e}")
    if any(row.memory is not None for row in rows):
        lines.append("Memory: outputs and temporaries of our largest program, an image")
    if alone := [row.case for row in rows if row.peer is not None and row.difference is None]:
        lines.append(f"Not the same by intent, so only their speed is compared: {', '.join(alone)}")
    for row in rows:
        lines += _work(row)
        if row.same_bits is not None:
            same = "the same bits" if row.same_bits else "other bits"
            lines.append(f"{row.case}: a second run of ours gives {same}")
    for row in rows:
        if row.disturbed and row.peer is not None:
            lines.append(f"{row.case}: not compared, {row.disturbed}; run it on an idle machine")
        elif row.disturbed:
            lines.append(f"{row.case}: {row.disturbed}")
    return lines


def _work(row: Row) -> list[str]:
    """Operations an image and a second, and their share of the device's peak where it is known."""
    lines = []
    for way, flops in (row.work or {}).items():
        rate = flops / row.ours.median
        line = f"{row.case}: {flops / row.images / 1e9:.4g} GFLOP an image by {way}'s count, "
        line += f"{rate / 1e12:.3g} TFLOP/s"
        peak = PEAKS.get(jax.devices()[0].device_kind)
        lines.append(line + (f", {rate / peak:.0%} of the device's peak" if peak else ""))
    return lines


def _figures(row: Row) -> dict[str, Any]:
    compared = row.peer is not None and not row.disturbed
    return asdict(row) | {
        "ratio": row.ratio if compared else None,
        "ratios": row.ratios if compared else [],
        "overhead": row.overhead if compared else None,
        "disturbed": row.disturbed,
    }
