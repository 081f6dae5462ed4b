"""Methods as two processes: one writer, the same result as one process, no work done twice."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsynth.cli.main import METHODS
from jaxsynth.runs.stage import MANIFEST

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

ROOT = Path(__file__).parents[2]
# Counts that a rounding may move, and those of time.
LOOSE = 0.05
# What of a smoke config would only take longer here.
SMALLER = {
    "controlled": ("base={base}", "ways=affiner"),
    "customize": ("base={base}", "clip={base}/clip"),
    "datadream": (
        "modes=dset", "base={base}", "clip={base}/clip", "finetune.batch_size=4",
        "data.class_names=1,4,7", "finetune.rank=2", "classify.rank=2",
    ),
    # A recipe's own images are drawn as those of the sets are.
    "diffscaler": (
        "vae={base}", "features={base}/clip", "recipes=affiner_zero", "draw=", "together=False",
        "data.digits.class_names=1,4,7",
        "pretrain.train.steps=4", "pretrain.train.steps_per_call=2", "train.steps=4",
        "train.steps_per_call=2",
    ),
    "robustness": ("models.original.clip={base}/clip", "image_size=16"),
    "scaling": (
        "base={base}", "finetune.rank=2", "seeds=0", "fractions=()", "mixed_size=0",
        "judge.sizes=()", "sizes=2,4", "real_sizes=2,4",
    ),
    "tiny_base": (
        "corpus.photos.source=digits", "corpus.photos.class_names=1,7", "corpus.digits=6",
        "corpus.shapes=6", "unet_channels=16,16", "unet_heads=2", "vae_channels=8,8", "width=16",
        "text_layers=1", "vision_layers=1", "vocab_size=560", "max_length=12", "clip.steps=2",
        "vae.steps=2", "unet.steps=2",
    ),
    "weightgen": ("text={base}",),
}  # fmt: skip


def run(method: str, workdir: Path, count: int, base: Path, cache: Path) -> list[str]:
    """The outputs of `count` processes with two devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = [field.format(base=base) for field in SMALLER.get(method, ())]
    command = [
        sys.executable, "-m", "jaxsynth", "run", f"--config={ROOT}/configs/{method}.py:smoke",
        f"--workdir={workdir}", *(f"--config.{field}" for field in more),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(2 // count),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    if count > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
        }
    processes = [
        subprocess.Popen(
            command,
            env={**environment, **({"JAX_PROCESS_ID": str(i)} if count > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=900)[0])
            assert process.returncode == 0, outputs[-1][-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return outputs


def manifests(workdir: Path) -> dict[str, dict]:
    return {
        path.parent.relative_to(workdir).as_posix(): json.loads(path.read_text())
        for path in workdir.rglob(MANIFEST)
    }


def close(one, two) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(close, one, two))
    if isinstance(one, float):
        return bool(np.isclose(one, two, rtol=LOOSE, atol=LOOSE))
    return one == two


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_do_what_one_does(method, tmp_path, request, compilation_cache):
    # Ways to control a base adapt layers of every kind.
    base = request.getfixturevalue("deeper_folder" if method == "controlled" else "base_folder")
    for name, count in (("one", 1), ("two", 2)):
        outputs = run(method, tmp_path / name, count, base, compilation_cache)
    # The second process says nothing of its own.
    assert "skipped" not in outputs[0] and "Done" in outputs[0] and "Done" not in outputs[1]
    one, two = (manifests(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and one
    for stage, manifest in one.items():
        assert manifest["config"] == two[stage]["config"], stage
        assert manifest["files"].keys() == two[stage]["files"].keys(), stage
        assert close(manifest["counts"], two[stage]["counts"]), stage
