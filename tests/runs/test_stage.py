"""Stages: made once, resumed, skipped, refused by name, and safe from a second process."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from jaxsynth.runs.stage import (StageError, load_artifact, lock_folder, run_stage, to_json, write_json)


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    shape: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    inner: Inner = dataclasses.field(default_factory=Inner)


def _write(text="hello", calls=None):
    def build(path):
        (path / "sub").mkdir(exist_ok=True)
        (path / "sub" / "file.txt").write_text(text)
        (path / "metrics.jsonl").write_text("{}\n")
        if calls is not None:
            calls.append(path)
        return {"images": np.int64(7)}

    return build


def _console():
    return Console(file=io.StringIO(), soft_wrap=True)


def test_a_stage_is_made_once(tmp_path):
    calls, out = [], _console()
    first = run_stage("make", tmp_path / "a", Config(), {}, _write(calls=calls), console=out)
    again = run_stage("make", tmp_path / "a", Config(), {}, _write(calls=calls), console=out)
    assert len(calls) == 1 and first.digest == again.digest and first.counts == {"images": 7}
    assert list(first.manifest["files"]) == ["sub/file.txt"]
    assert first.manifest["config"] == {"steps": 3, "inner": {"rate": 0.1, "shape": [1, 2]}}
    assert set(first.manifest["versions"]) >= {"jax", "python", "flax"}
    lines = out.file.getvalue().splitlines()
    assert "images 7" in lines[0] and "skipped" in lines[1]
    assert not (tmp_path / "a" / ".started.json").exists()
    first.verify()


def test_the_digest_follows_content_and_inputs(tmp_path):
    one = run_stage("make", tmp_path / "a", Config(), {}, _write(), console=_console())
    same = run_stage("make", tmp_path / "b", Config(), {}, _write(), console=_console())
    other = run_stage("make", tmp_path / "c", Config(), {}, _write("bye"), console=_console())
    assert one.digest == same.digest != other.digest
    run_stage("use", tmp_path / "d", {}, {"data": one}, _write(), console=_console())
    with pytest.raises(StageError, match=r"inputs\.data"):
        run_stage("use", tmp_path / "d", {}, {"data": other}, _write(), console=_console())


def test_changed_fields_are_named(tmp_path):
    run_stage("make", tmp_path, Config(), {}, _write(), console=_console())
    changed = Config(steps=4, inner=Inner(rate=0.2))
    with pytest.raises(StageError) as error:
        run_stage("make", tmp_path, changed, {}, _write(), console=_console())
    assert "config.steps: 3 -> 4" in str(error.value)
    assert "config.inner.rate: 0.1 -> 0.2" in str(error.value)
    assert "shape" not in str(error.value)


def test_an_interrupted_stage_resumes_in_its_folder(tmp_path):
    def fails(path):
        (path / "part").write_text("done before")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("make", tmp_path, Config(), {}, fails, console=_console())
    with pytest.raises(StageError, match=r"config\.steps: 3 -> 9"):
        run_stage("make", tmp_path, Config(steps=9), {}, fails, console=_console())
    out = _console()
    found = []
    run_stage("make", tmp_path, Config(), {}, lambda p: found.extend(p.glob("part")), console=out)
    assert len(found) == 1 and "resumed" in out.file.getvalue()


def test_missing_and_altered_files_are_found(tmp_path):
    artifact = run_stage("make", tmp_path, Config(), {}, _write("hello"), console=_console())
    (tmp_path / "sub" / "file.txt").write_text("hullo")
    with pytest.raises(StageError, match=r"file\.txt: found"):
        artifact.verify()
    (tmp_path / "sub" / "file.txt").write_text("longer than before")
    with pytest.raises(StageError, match=r"file\.txt has 18 bytes, the manifest says 5"):
        load_artifact(tmp_path)
    (tmp_path / "sub" / "file.txt").unlink()
    with pytest.raises(StageError, match=r"file\.txt is in the manifest of stage 'make'"):
        run_stage("make", tmp_path, Config(), {}, _write(), console=_console())
    with pytest.raises(StageError, match="holds no finished stage"):
        load_artifact(tmp_path / "sub")


HOLD = """
import sys, time
from jaxsynth.runs.stage import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.multiprocess
def test_a_second_process_is_refused_and_a_killed_one_is_forgotten(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StageError, match=rf"in use by another process \(pid {holder.pid}\)"):
            run_stage("make", tmp_path, Config(), {}, _write(), console=_console())
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with lock_folder(tmp_path):
        pass


def test_json_forms(tmp_path):
    assert to_json({"a": (1, np.float32(0.5)), "b": tmp_path}) == {
        "a": [1, 0.5],
        "b": str(tmp_path),
    }
    assert to_json(float("inf")) == "inf"
    with pytest.raises(TypeError, match=r"config\.fn: function has no JSON form"):
        to_json({"fn": _write})
    write_json(tmp_path / "x.json", {"ü": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"ü": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
