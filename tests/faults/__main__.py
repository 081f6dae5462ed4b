"""Kill runs of every method: python -m tests.faults --kills=100 --seed=0 [--method=NAME]

Prints a line a method, and a line for each stage that differs from an undisturbed run's. Ends with
code 1 where there is any, or where a run that was killed could not go on.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from jaxsynth.cli.main import METHODS
from tests.faults.kills import kill_often

# What a smoke config leaves out, so that a run needs no data set to be downloaded.
GIVEN = {"tiny_base": ("corpus.photos.source=digits", "corpus.photos.class_names=()")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of all methods together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, action="append", help="default: every method")
    args = parser.parse_args()
    methods, faults = args.method or sorted(METHODS), 0
    for number, method in enumerate(methods):
        own = len(range(number, args.kills, len(methods)))
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = kill_often(method, own, args.seed, Path(folder), GIVEN.get(method, ()))
            except RuntimeError as error:
                faults += 1
                print(f"{method}: {error}", flush=True)
                continue
        faults += len(found.differences)
        print(
            f"{method}: {found.kills} kills, {found.runs} runs compared, "
            f"{len(found.differences)} differences, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        for line in found.differences:
            print(f"  {line}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
