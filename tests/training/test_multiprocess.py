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


def _run(verb: str, folder: Path, count: int, cache: Path, *more: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                verb,
                *map(str, (folder, port, i, count, *more)),
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
        _run("distributed", tmp_path / name, count, compilation_cache)
    one, two = (load_artifact(tmp_path / name) for name in ("one", "two"))
    assert one.counts == two.counts == {"steps": 6}
    # Two processes to step 3, then one with twice their devices, then two again.
    for count, devices, until in ((2, 4, 3), (1, 8, 5), (2, 4, 6)):
        _run("elastic", tmp_path / "elastic", count, compilation_cache, devices, until)
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "two", "elastic")
    ]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)
    notes = sorted((tmp_path / "two" / "checkpoints" / "6" / "run").glob("*.json"))
    assert [note.name for note in notes] == ["process_0_of_2.json", "process_1_of_2.json"]
    assert json.loads(notes[1].read_text())["data"] == {"json": {"index": 6}}
