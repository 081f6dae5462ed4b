"""Files that a run leaves and somebody may hand on: manifests, metrics, arrays, checkpoints."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsynth.data.splits import Shots, load_shots
from jaxsynth.generation import folder as pictures
from jaxsynth.quality import features
from jaxsynth.quality.metrics import Statistics
from jaxsynth.robustness import suite
from jaxsynth.runs import run
from jaxsynth.runs.stage import load_artifact, run_stage
from jaxsynth.tasks.latents import Latents
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.metrics import MetricsWriter, read_metrics
from tests.fuzz.cases import Case, below, touch


def documents(folder: Path) -> list[Case]:
    lists = (("a/1", "a/2"), ("b/1",))
    Shots("digits", ("a", "b"), 2, 0, lists, ((), ())).save(folder / "shots.json")
    with MetricsWriter(folder) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": 0.5 / step, "each": np.ones(2)})

    def build(path: Path) -> dict[str, Any]:
        (path / "file.txt").write_text("x")
        return {"images": 7}

    run_stage("make", folder / "stage", {"steps": 3}, {}, build)
    (folder / "run").mkdir()
    record = {"command": "jaxsynth run", "method": "datadream", "config": {}, "versions": {}}
    (folder / "run" / run.RUN_FILE).write_text(json.dumps(record))
    asked = ([pictures.Request("a dog")], 2, {"steps": 4, "base": "tiny"})
    pictures.begin(folder / "pictures", *asked)

    def artifact(path: Path) -> None:
        found = load_artifact(path)
        touch([found.digest, found.counts])
        found.verify()

    def again(path: Path) -> None:
        run_stage("make", path, {"steps": 3}, {}, build)

    def record_of(path: Path) -> None:
        found = run.read_record(path)
        assert isinstance(found["method"], str) and isinstance(found["config"], dict)

    def begun(path: Path) -> None:
        pictures.begin(path, *asked)

    return [
        Case("shots", folder / "shots.json", load_shots),
        Case("metrics", folder / "metrics.jsonl", read_metrics),
        Case("manifest", folder / "stage", artifact, ["manifest.json"]),
        Case("stage", folder / "stage", again, below(folder / "stage")),
        Case("run", folder / "run", record_of, [run.RUN_FILE]),
        Case("pictures", folder / "pictures", begun, [pictures.REQUEST_FILE]),
    ]


def arrays(folder: Path) -> list[Case]:
    answers = {
        "clean/logits": np.ones((4, 3), np.float32),
        "clean/labels": np.arange(4) % 3,
        "example/clean": np.zeros((8, 8, 3), np.float32),
    }
    suite.save_answers(folder / "answers.npz", answers)
    statistics = Statistics(np.zeros(4), np.eye(4), 10, "tiny")
    features.write_statistics(folder / "statistics.npz", statistics)
    np.savez(folder / "samples.npz", np.zeros((4, 8, 8, 3), np.uint8), np.arange(4))
    values = np.ones((3, 2, 4, 4, 2), np.float32)
    np.savez(folder / "latents.npz", mean=values, std=values, labels=np.arange(3))
    return [
        Case("answers", folder / "answers.npz", lambda p: touch(suite.load_answers(p))),
        Case("statistics", folder / "statistics.npz", features.read_statistics),
        Case("samples", folder / "samples.npz", features.read_images),
        Case("latents", folder / "latents.npz", Latents.load),
    ]


def checkpoints(folder: Path) -> list[Case]:
    state = {"weight": jnp.arange(12.0).reshape(3, 4), "count": jnp.zeros((), jnp.int32)}
    root = folder / "checkpoints"
    with Checkpoints(root, every=1, identity={"base": "x"}) as kept:
        kept.save(3, state, seen={"loss": 0.5})
    wanted = jax.tree.map(np.asarray, state)

    def read(path: Path) -> None:
        with Checkpoints(path, every=1, identity={"base": "x"}) as kept:
            if kept.latest is None:
                return
            found, _ = kept.restore(state)
        for name, value in wanted.items():
            assert (np.asarray(found[name]) == value).all(), "other numbers, without a word"

    return [Case("checkpoint", root, read, below(root))]
