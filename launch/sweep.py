#!/usr/bin/env python3
"""Runs a grid of settings: every combination of the values, each a run of its own.

    launch/sweep.py --config=configs/datadream.py:tiny --workdir=runs/sweep \\
        --grid shots 1 4 16 --grid seed 0 1 2 [--config.FIELD=VALUE ...]

makes runs/sweep/shots=1,seed=0 and so on, one after another. Points take finished stages from each
other where they are the same (`jaxsynth run --reuse`), a finished point is passed over, and a point
that fails is named at the end while the others go on; the same command tries it again. Standard
output and errors of a point are in point.log in its folder. runs/sweep/sweep.json then has the
settings, state and results.json of every point.

    --start=slurm [-- SBATCH ARGUMENTS]   submits the points as one job array
    --start=kubernetes --image=IMAGE      prints the Indexed Job of them, for `kubectl apply -f -`
    --only=N                              runs point N alone; what the arrays call

Points of an array run side by side, so each makes an early stage that no point has finished yet.
Run it by the environment's Python: `.venv/bin/python launch/sweep.py`.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jaxsynth.cli.main import METHODS, named_values
from jaxsynth.cli.paths import local_path
from jaxsynth.core import schema
from jaxsynth.core.checks import check_config
from jaxsynth.core.config import load_config, to_dict
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import json_digest, write_json

STATE, LOG, SUMMARY = "point.json", "point.log", "sweep.json"
# Linux takes names of 255 bytes.
LONGEST = 120


@dataclass(frozen=True)
class Point:
    """One combination: the fields that it sets, with their values as typed."""

    settings: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        parts = (f"{field.rsplit('.', 1)[-1]}={value}" for field, value in self.settings)
        name = quote(",".join(parts), safe="=,.+- ()[]")
        return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{json_digest(name)[:8]}"


@dataclass(frozen=True)
class Sweep:
    """All points of a grid below one folder, from one config."""

    config: str
    workdir: Path
    points: tuple[Point, ...]
    common: tuple[tuple[str, str], ...]

    def command(self, point: Point) -> list[str]:
        """What runs a point."""
        return [
            sys.executable, "-m", "jaxsynth", "run", f"--config={self.config}",
            f"--workdir={self.workdir / point.name}", f"--reuse={self.workdir}",
            *(f"--config.{field}={value}" for field, value in (*self.common, *point.settings)),
        ]  # fmt: skip

    def check(self) -> None:
        """UserError for a field that the config does not have, or a value that it cannot take."""
        for point in self.points:
            name, values = named_values(self.config, [*self.common, *point.settings])
            check_config(schema.check(METHODS[name], values), self.workdir / point.name)

    def identity(self, point: Point) -> str:
        """The digest of what decides a point: the config file's values and those set."""
        return json_digest([to_dict(load_config(self.config)), self.common, point.settings])

    def state(self, point: Point) -> dict:
        """What a point's last run left, {} where it has not run with this config."""
        path = self.workdir / point.name / STATE
        found = json.loads(path.read_text()) if path.is_file() else {}
        return found if found.get("config") == self.identity(point) else {}

    def run(self, point: Point) -> dict:
        """Run a point; its state, which its folder keeps too."""
        folder = self.workdir / point.name
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with open(folder / LOG, "w", encoding="utf-8") as log:
            code = subprocess.run(
                self.command(point), stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        state = {
            "config": self.identity(point),
            "settings": dict(point.settings),
            "exit_code": code,
            "seconds": round(time.monotonic() - began, 1),
        }
        write_json(folder / STATE, state)
        return state

    def summarize(self) -> None:
        """Write the summary of all points: their settings, how they ended and what they found."""
        rows = []
        for point in self.points:
            results = self.workdir / point.name / "results.json"
            rows.append(
                {
                    "point": point.name,
                    "settings": dict(point.settings),
                    "exit_code": self.state(point).get("exit_code"),
                    "results": json.loads(results.read_text()) if results.is_file() else None,
                }
            )
        write_json(self.workdir / SUMMARY, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Start what the arguments ask for; the exit code is 1 where a point failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        sweep, args = parse(argv)
        sweep.check()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.start == "slurm":
        return submit(sweep, argv, args.more)
    if args.start == "kubernetes":
        print(json.dumps(indexed_job(sweep, argv, args.image), indent=2))
        return 0
    return run_here(sweep, None if args.only is None else [sweep.points[args.only]])


def run_here(sweep: Sweep, points: Sequence[Point] | None) -> int:
    """Run the points one after another, by default all, and say how each ended."""
    chosen, failed = sweep.points if points is None else points, []
    for number, point in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {point.name}", end="  ", flush=True)
        if sweep.state(point).get("exit_code") == 0:
            print("finished before, skipped")
            continue
        state = sweep.run(point)
        if state["exit_code"] == 0:
            print(f"{state['seconds']:.0f} s")
            continue
        lines = (sweep.workdir / point.name / LOG).read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        print(f"failed (exit code {state['exit_code']}): {last.strip()}")
        failed.append(point)
    if points is None:
        sweep.summarize()
        print(f"{len(chosen) - len(failed)} of {len(chosen)} points: {sweep.workdir / SUMMARY}")
    return 1 if failed else 0


def submit(sweep: Sweep, argv: Sequence[str], more: Sequence[str]) -> int:
    """Hand all points to SLURM as one array."""
    sweep.workdir.mkdir(parents=True, exist_ok=True)
    script = str(Path(__file__).resolve())
    one = f"{shlex.join([sys.executable, script, *own(argv)])} --only=$SLURM_ARRAY_TASK_ID"
    return subprocess.run(
        [
            "sbatch", f"--array=0-{len(sweep.points) - 1}", "--requeue", "--job-name=sweep",
            f"--output={sweep.workdir / 'slurm-%A-%a.log'}", *more, f"--wrap={one}",
        ],
        check=False,
    ).returncode  # fmt: skip


def indexed_job(sweep: Sweep, argv: Sequence[str], image: str) -> dict:
    """The Job of all points, as `kubectl` reads it; its volume is kubernetes.yaml's."""
    words = [".venv/bin/python", "launch/sweep.py", *own(argv)]
    one = f"{shlex.join(words)} --only=$JOB_COMPLETION_INDEX"
    volume = {"name": "runs", "persistentVolumeClaim": {"claimName": "jaxsynth-runs"}}
    container = {
        "name": "point",
        "image": image,
        "workingDir": "/jaxsynth",
        "command": ["/bin/sh", "-c", f"exec {one}"],
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "jaxsynth-sweep"},
        "spec": {
            "completionMode": "Indexed",
            "completions": len(sweep.points),
            "parallelism": len(sweep.points),
            # A point that fails leaves the others alone.
            "backoffLimitPerIndex": 3,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [container],
                    "volumes": [volume],
                }
            },
        },
    }


def own(argv: Sequence[str]) -> list[str]:
    """This script's arguments for one point of an array."""
    before = list(argv[: argv.index("--")] if "--" in argv else argv)
    left = ("--start", "--image")
    return [
        word
        for i, word in enumerate(before)
        if not word.startswith(left) and not (i and before[i - 1] in left)
    ]


def parse(argv: Sequence[str]) -> tuple[Sweep, argparse.Namespace]:
    """The sweep that the arguments describe. UserError for one that describes none."""
    more = list(argv[argv.index("--") + 1 :]) if "--" in argv else []
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]")
    parser.add_argument("--workdir", required=True, type=local_path, metavar="DIR")
    parser.add_argument(
        "--grid", action="append", nargs="+", required=True, metavar=("FIELD", "VALUE"),
        help="a field of the config and the values that it takes; once for each field",
    )  # fmt: skip
    parser.add_argument("--start", choices=("here", "slurm", "kubernetes"), default="here")
    parser.add_argument("--image", default="", help="of the repository, for --start=kubernetes")
    parser.add_argument("--only", type=int, metavar="N", help="run this point alone, from 0")
    given = [word for word in argv[: len(argv) - len(more)] if word != "--"]
    common = [word for word in given if word.startswith("--config.")]
    args = parser.parse_args([word for word in given if word not in common])
    args.more = more
    settings = []
    for word in common:
        field, sign, value = word.removeprefix("--config.").partition("=")
        if not sign or not field:
            raise UserError(f"{word}: expected --config.FIELD=VALUE")
        settings.append((field, value))
    fields = [field for field, *_ in args.grid]
    for field, *values in args.grid:
        if not values:
            raise UserError(f"--grid {field}: expected at least one value")
        if len({*values}) < len(values):
            raise UserError(f"--grid {field}: {' '.join(values)} has a value twice")
    for field in fields:
        if fields.count(field) > 1 or field in dict(settings):
            raise UserError(f"--grid {field}: the field is set twice")
    if args.start == "kubernetes" and not args.image:
        raise UserError("--start=kubernetes needs --image=IMAGE, of the repository with its .venv")
    if more and args.start != "slurm":
        raise UserError(f"-- {' '.join(more)}: only --start=slurm takes arguments of sbatch")
    points = tuple(
        Point(tuple(zip(fields, values, strict=True)))
        for values in itertools.product(*(values for _, *values in args.grid))
    )
    if args.only is not None and not 0 <= args.only < len(points):
        raise UserError(f"--only={args.only}: the points are 0 to {len(points) - 1}")
    return Sweep(args.config, args.workdir, points, tuple(settings)), args


if __name__ == "__main__":
    sys.exit(main())
