"""Fuzz one reader, or all: python -m tests.fuzz --reader=NAME --executions=100000 --seed=0

The files are read by child processes that are started anew for each thousand, so that one which
dies or never comes back costs no more than that and is counted.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys

from tests.fuzz.readers import READERS
from tests.fuzz.run import Figures, run_in_child

_PIECE = 1000
# Seconds after which a child that tells nothing is taken for lost.
_PATIENCE = 1800


def fuzz(reader: str, executions: int, seed: int, piece: int) -> Figures:
    """What came of all executions of a reader."""
    context = multiprocessing.get_context("spawn")
    total = Figures()
    for start in range(0, executions, piece):
        numbers = range(start, min(start + piece, executions))
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=run_in_child, args=(reader, numbers, seed, theirs))
        child.start()
        theirs.close()
        found = None
        with contextlib.suppress(EOFError):  # a child that died
            found = ours.recv() if ours.poll(_PATIENCE) else None
        if found is None:
            child.kill()
            child.join()
            total.executions += len(numbers)
            total.fault(f"the process ended with code {child.exitcode}", start)
            continue
        child.join()
        for name in ("executions", "accepted", "refused"):
            setattr(total, name, getattr(total, name) + getattr(found, name))
        total.faults += found.faults
        total.first = {**found.first, **total.first}
        print(f"{reader}: {total.executions}", file=sys.stderr, flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--reader", choices=[*READERS, "all"], default="all")
    parser.add_argument("--executions", type=int, default=100_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--piece", type=int, default=_PIECE, help="executions a process")
    args = parser.parse_args()
    faults = 0
    for reader in READERS if args.reader == "all" else [args.reader]:
        found = fuzz(reader, args.executions, args.seed, args.piece)
        faults += found.faults.total()
        print(
            f"{reader}: {found.executions} executions, {found.accepted} accepted, "
            f"{found.refused} refused, {found.faults.total()} faults of {len(found.faults)} kinds",
            flush=True,
        )
        for kind, count in found.faults.most_common():
            print(f"  {json.dumps(kind)}: {count}, the first is number {found.first[kind]}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
