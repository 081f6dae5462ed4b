"""Two gloo processes fine-tune, generate and classify what one process does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsynth.data.store import ImageStore
from jaxsynth.tasks.clip_predictions import predict
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import load_clip
from tests.methods import distributed

SCRIPT = Path(__file__).parent / "distributed.py"


def run(folder: Path, count: int, base: Path, cache: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": str(SCRIPT.parent.parent.parent),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, str(port), str(i), str(count), base],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # closes its pipes


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, base_folder, compilation_cache):
    for name, count in (("one", 1), ("two", 2)):
        run(tmp_path / name, count, base_folder, compilation_cache)
    for name in ("dset", "0", "1"):
        one, two = (
            adapter_io.load(tmp_path / n / "adapters" / name / "pytorch_lora_weights.safetensors")
            for n in ("one", "two")
        )
        assert one.arrays.keys() == two.arrays.keys()
        for factor in ("lora_A", "lora_B"):
            values = [
                np.concatenate([np.ravel(s.arrays[k]) for k in one.arrays if k.endswith(factor)])
                for s in (one, two)
            ]
            assert np.abs(values[0]).max() > 0
            assert np.abs(values[0] - values[1]).max() < 1e-5 * np.abs(values[0]).max(), name
    stores = [ImageStore(tmp_path / name / "images") for name in ("one", "two")]
    assert stores[0].ids == stores[1].ids and len(stores[0]) == 8
    one, two = (np.stack([s[i].image for i in range(8)]).astype(int) for s in stores)
    assert np.abs(one - two).max() <= 1 and (one != two).mean() < 0.01
    logits = [
        np.load(tmp_path / name / "classifier" / f"logits{process}.npy")
        for name, process in (("one", 0), ("two", 0), ("two", 1))
    ]
    np.testing.assert_array_equal(logits[1], logits[2])
    clip = load_clip(base_folder / "clip")
    untrained = predict(clip, clip.model, distributed.PROMPTS, distributed.images())
    moved = np.abs(logits[0] - untrained).max()
    # Adam turns the rounding of gradients near zero into steps of their own.
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * moved
