"""The short form of the kills: python -m tests.faults is the long one."""

import json
import shutil

import pytest

from jaxsynth.runs.stage import run_stage
from tests.faults.kills import compare, kill_often


def test_what_counts_as_a_difference(tmp_path):
    def build(folder):
        (folder / "a.txt").write_text("x")
        (folder / "figures.json").write_text(json.dumps({"l1": 0.5, "step": 0.1}))
        training = folder / ".training"
        training.mkdir()
        (training / "metrics.jsonl").write_text('{"step": 1}\n')
        return {"images": 1}

    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("made", "more"):
        run_stage("make", one / name, {"steps": 3}, {}, build)
    shutil.copytree(one, two)
    (two / "made" / "figures.json").write_text(json.dumps({"l1": 0.5, "step": 0.2}))  # a time
    assert compare(one, two) == []
    (two / "made" / "figures.json").write_text(json.dumps({"l1": 0.6, "step": 0.1}))
    (two / "made" / ".training" / "metrics.jsonl").write_text('{"step": 2}\n')
    (two / "made" / ".a.txt.0.tmp").write_text("")
    shutil.rmtree(two / "more")
    assert compare(one, two) == [
        "made/.a.txt.0.tmp was left behind",
        "made: .training/metrics.jsonl differs",
        "made: files differs",
        "more: made by one run alone",
    ]


@pytest.mark.slow
def test_a_killed_run_leaves_what_an_undisturbed_one_leaves(
    tmp_path, monkeypatch, base_folder, compilation_cache
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilation_cache))
    small = (f"models.original.clip={base_folder}/clip", "image_size=16")
    found = kill_often("robustness", 3, 0, tmp_path, small)
    assert found.kills == 3 and found.runs >= 1 and found.differences == []
