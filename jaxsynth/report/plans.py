"""The tables of what programs need, for `jaxsynth plan`."""

from collections.abc import Sequence

from jaxsynth.report.tables import Table
from jaxsynth.training.chips import Chip
from jaxsynth.training.planning import Plan

MIB, GIB = 2**20, 2**30


def memory_table(plans: Sequence[Plan], limit: float = 0) -> Table:
    """MiB on each device, and the share of `limit` bytes where there is one."""
    rows = []
    for one in plans:
        sizes = (
            one.arguments, one.unread, one.frozen, one.outputs, one.temporaries, one.bytes
        )  # fmt: skip
        share = [f"{one.bytes / limit:.0%}"] if limit else []
        rows.append([one.name, *(size / MIB for size in sizes), *share])
    columns = ["Program", "arguments", "unread", "frozen", "outputs", "temporary", "sum"]
    caption = "MiB on each device"
    if limit:
        columns, caption = [*columns, "share"], f"MiB on each device of {limit / GIB:.4g} GiB"
    return Table(columns, rows, caption=caption, better=None)


def work_table(plans: Sequence[Plan], chip: Chip | None = None) -> Table:
    """Work and traffic of one update or batch; with a chip the time that they take at the least."""
    rows = []
    for one in plans:
        row = [one.name, _short(one.flops / one.devices / 1e9)]
        row += ["–", "–"] if one.refused else [_size(one.moved), _size(one.received)]
        if chip is not None and one.refused:
            row += ["–"] * 3
        elif chip is not None:
            bounds, seconds = one.bounds(chip), one.seconds(chip)
            what = max(bounds, key=bounds.__getitem__)
            rate = _short(one.images / seconds) if one.images and seconds else "–"
            row += [_short(1e3 * seconds), what, rate]
        rows.append(row)
    columns = ["Program", "GFLOP", "moved", "received"]
    caption = "Each device, one update or batch"
    if chip is not None:
        columns += ["ms at least", "bound by", "images/s at most"]
        caption += "; images a second are of all chips together"
    return Table(columns, rows, caption=caption, better=None)


def run_table(plans: Sequence[Plan], chip: Chip | None = None) -> Table | None:
    """The updates and batches of a whole run, with a chip its hours; None where none are known."""
    if not any(one.updates for one in plans):
        return None
    rows, total = [], 0.0
    for one in plans:
        row = [one.name, f"{one.updates:,}" if one.updates else "–"]
        if chip is not None:
            hours = 0.0 if one.refused else one.updates * one.seconds(chip) / 3600
            total += hours
            row.append(_short(hours) if hours else "–")
        rows.append(row)
    columns, caption = ["Program", "updates or batches"], "The whole run"
    if chip is not None:
        columns.append("hours at least")
        rows.append(["all", "", _short(total)])
        caption += ", without compiling, reading and writing; – is not counted"
    return Table(columns, rows, caption=caption, better=None)


def slices_table(slices: Sequence[tuple[str, Chip, Sequence[Plan]]]) -> Table:
    """Every program on each slice: memory of a chip, the least time, and what that makes a run."""
    rows = []
    for where, chip, plans in slices:
        for one in plans:
            row = [one.name, where, f"{one.images:,}" if one.images else "–", _size(one.bytes)]
            if one.refused:
                row += ["–"] * 4
            else:
                bounds, seconds = one.bounds(chip), one.seconds(chip)
                rate = one.images / seconds if seconds else 0.0
                hours = one.updates * seconds / 3600
                row += [_short(1e3 * seconds), max(bounds, key=bounds.__getitem__)]
                row += [_short(rate) if rate else "–", _short(hours) if hours else "–"]
            rows.append(row)
    columns = ["Program", "slice", "batch", "memory of a chip", "ms at least", "bound by"]
    columns += ["images/s at most", "hours of a run at least"]
    return Table(columns, rows, caption="Every slice", better=None)


def collectives_table(plans: Sequence[Plan]) -> Table | None:
    """The collectives of one update or batch by kind; None where there are none."""
    rows = []
    for one in plans:
        largest = dict(one.largest)
        for each in one.collectives:
            size, shape = _size(each.bytes), largest[each.kind]
            rows.append([one.name, each.kind, _short(each.count), size, shape])
    if not rows:
        return None
    columns = ["Program", "collective", "number", "size", "largest array"]
    return Table(columns, rows, caption="Between devices, one update or batch", better=None)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
