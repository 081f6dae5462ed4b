"""Kill a run at random moments, go on with it, and compare what it left with an undisturbed one.

A process is killed after a random time, or at the moment when it has just written: a temporary
file, a checkpoint, a shard or a manifest is new. Started again until it is through, the run must
have the stages of the undisturbed one: the same digests (config, inputs and every file's SHA-256),
counts and metrics, and nothing that a killed writer left.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from jaxsynth.core.io import TEMPORARY
from jaxsynth.runs.stage import MANIFEST

ROOT = Path(__file__).parents[2]
# What the times of a machine are part of: the figures of how fast weights are made.
TIMED = {"prepare", "step", "costs"}
_POLL = 0.01


@dataclasses.dataclass
class Figures:
    """How a method's kills went."""

    kills: int = 0
    runs: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)


def command(method: str, workdir: Path, more: Sequence[str] = ()) -> list[str]:
    return [
        sys.executable, "-m", "jaxsynth", "run", f"--config={ROOT}/configs/{method}.py:smoke",
        f"--workdir={workdir}", *(f"--config.{field}" for field in more),
    ]  # fmt: skip


def undisturbed(line: Sequence[str], environment: dict[str, str]) -> float:
    """Run a command to its end; the seconds that it took. RuntimeError where it fails."""
    began = time.monotonic()
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"ended with code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        )
    return time.monotonic() - began


def killed(line: Sequence[str], workdir: Path, random: Random, seconds: float, log: Path) -> bool:
    """Start a command and kill it; False where it was through before. RuntimeError for a failure.

    `seconds` is what an undisturbed run takes.
    """
    writes = random.randrange(1, 12) if random.random() < 0.6 else 0
    limit = random.uniform(0.1, 1.0) * seconds * (3 if writes else 1)
    with log.open("w") as out:
        process = subprocess.Popen(line, env=_environment(), stdout=out, stderr=out)
        began, seen = time.monotonic(), _names(workdir)
        while process.poll() is None:
            if writes and (now := _names(workdir)) - seen:
                seen |= now
                writes -= 1
                if not writes:
                    time.sleep(random.choice((0, 0, 0.003, 0.02)))
                    break
            if time.monotonic() - began > limit:
                break
            time.sleep(_POLL)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
    if code == 0:
        return False
    if code != -signal.SIGKILL:
        raise RuntimeError(f"ended with code {code} after a kill: {log.read_text()[-2000:]}")
    return True


def kill_often(
    method: str, kills: int, seed: int, folder: Path, more: Sequence[str] = ()
) -> Figures:
    """Kill a method's smoke run so often; runs that came through are compared and begun again."""
    whole, cut = folder / "whole", folder / "cut"
    seconds = undisturbed(command(method, whole, more), _environment())
    random, figures, line = Random(f"{seed} {method}"), Figures(), command(method, cut, more)
    while True:
        through = figures.kills >= kills
        if through:
            undisturbed(line, _environment())
        elif killed(line, cut, random, seconds, folder / "log"):
            figures.kills += 1
            continue
        figures.runs += 1
        figures.differences += compare(whole, cut)
        if through:
            return figures
        shutil.rmtree(cut)


def compare(whole: Path, cut: Path) -> list[str]:
    """What a run left otherwise than another; none where all is the same."""
    one, two = (_stages(folder) for folder in (whole, cut))
    found = [f"{name}: made by one run alone" for name in one.keys() ^ two.keys()]
    for name in one.keys() & two.keys():
        for part in one[name].keys() | two[name].keys():
            if one[name].get(part) != two[name].get(part):
                found.append(f"{name}: {part} differs")
    left = [path for path in cut.rglob("*") if path.name.endswith((TEMPORARY, ".partial"))]
    found += [f"{path.relative_to(cut)} was left behind" for path in left]
    return sorted(found)


def _stages(workdir: Path) -> dict[str, dict[str, Any]]:
    """What identifies each finished stage, and its metrics."""
    found = {}
    for path in sorted(workdir.rglob(MANIFEST)):
        manifest = json.loads(path.read_text())
        kept: dict[str, Any] = {key: manifest[key] for key in ("config", "inputs", "counts")}
        files = dict(manifest["files"])
        for name in files:
            if name.endswith(".json"):
                content = json.loads((path.parent / name).read_text())
                files[name] = _without_times(content)
        kept["files"] = files
        for metrics in sorted(path.parent.rglob("metrics.jsonl")):
            kept[str(metrics.relative_to(path.parent))] = metrics.read_text()
        found[path.parent.relative_to(workdir).as_posix()] = kept
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(x) for key, x in value.items() if key not in TIMED}
    return [_without_times(x) for x in value] if isinstance(value, list) else value


def _names(folder: Path) -> set[str]:
    """The paths of all files below a folder, which changes meanwhile."""
    return {os.path.join(root, name) for root, _, names in os.walk(folder) for name in names}


def _environment() -> dict[str, str]:
    return {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": str(ROOT)}
