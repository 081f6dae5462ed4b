"""The table of what programs need, for `jaxsynth plan`."""

from collections.abc import Sequence

from jaxsynth.report.tables import Table
from jaxsynth.training.planning import Plan


def plan_table(plans: Sequence[Plan]) -> Table:
    """A row for each program: MiB on each device, and GFLOP of one update on all together."""
    rows = []
    for one in plans:
        sizes = (one.arguments, one.frozen, one.outputs, one.temporaries, one.bytes)
        rows.append([one.name, *(size / 2**20 for size in sizes), _gflop(one.flops)])
    columns = ["Program", "arguments", "frozen", "outputs", "temporary", "sum", "GFLOP"]
    caption = "MiB on each device; GFLOP of one update, all devices together"
    return Table(columns, rows, caption=caption, better=None)


def _gflop(flops: float) -> str:
    value = flops / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
