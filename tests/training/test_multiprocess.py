"""Two processes with two devices each train as one process with four does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsynth.runs.stage import load_artifact
from jaxsynth.training.metrics import read_metrics

WORKER = Path(__file__).parent / "worker.py"


def _run(folder: Path, count: int, cache: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                "distributed",
                str(folder),
                str(port),
                str(i),
                str(count),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, compilation_cache):
    for name, count in (("one", 1), ("two", 2)):
        _run(tmp_path / name, count, compilation_cache)
    one, two = (load_artifact(tmp_path / name) for name in ("one", "two"))
    assert one.counts == two.counts == {"steps": 6}
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    notes = sorted((tmp_path / "two" / "checkpoints" / "6" / "run").glob("*.json"))
    assert [note.name for note in notes] == ["process_0_of_2.json", "process_1_of_2.json"]
    assert json.loads(notes[1].read_text())["data"] == {"json": {"index": 6}}
