"""Fuzz one reader, or all: python -m tests.fuzz --reader=NAME --executions=100000 --seed=0

Prints a line a reader, and a line a kind of fault. The files are read by child processes that are
started anew for each piece of them, so that one which dies or never comes back costs no more than
that and is counted. --only=NUMBER reads one file alone, and shows what became of it.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.readers import READERS
from tests.fuzz.run import Figures, run, run_in_child

_PIECE = 2000
# Seconds after which a child that tells nothing is taken for lost.
_PATIENCE = 3600


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
            found = Figures(executions=len(numbers))
            found.fault(f"the process ended with code {child.exitcode}", start)
        child.join()
        total.add(found)
        print(f"{reader}: {total.executions}", file=sys.stderr, flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--reader", choices=[*READERS, "all"], default="all")
    parser.add_argument("--executions", type=int, default=100_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--piece", type=int, default=_PIECE, help="executions a process")
    parser.add_argument("--only", type=int, help="the number of one file, of one reader")
    args = parser.parse_args()
    if args.only is not None:
        figures = Figures()
        with tempfile.TemporaryDirectory() as folder:
            numbers = range(args.only, args.only + 1)
            run(args.reader, numbers, args.seed, Path(folder) / "fuzz", figures, loud=True)
        print(figures)
        return 1 if figures.faults else 0
    faults = 0
    for reader in READERS if args.reader == "all" else [args.reader]:
        began = time.monotonic()
        found = fuzz(reader, args.executions, args.seed, args.piece)
        faults += found.faults.total()
        print(
            f"{reader}: {found.executions} executions, {found.accepted} accepted, "
            f"{found.refused} refused, {found.faults.total()} faults of {len(found.faults)} kinds, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        for kind, count in found.faults.most_common():
            print(f"  {json.dumps(kind)}: {count}, the first is number {found.first[kind]}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
