"""Stages: made once, resumed, skipped, refused by name, and safe from a second process."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from rich.console import Console

from jaxsynth.core import preemption
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import write_json
from jaxsynth.core.records import to_json
from jaxsynth.runs import stage as stage_module
from jaxsynth.runs.stage import Source, StageError, load_artifact, lock_folder, run_stage, stage


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


def test_no_stage_begins_after_a_request_to_stop(tmp_path, monkeypatch):
    made = run_stage("one", tmp_path / "one", Config(), {}, _write(), console=_console())
    asked = threading.Event()
    asked.set()
    monkeypatch.setattr(preemption, "_asked", asked)
    again = run_stage("one", tmp_path / "one", Config(), {}, _write(), console=_console())
    assert again.digest == made.digest
    with pytest.raises(preemption.Preempted, match="stopped on SIGTERM before two"):
        run_stage("two", tmp_path / "two", Config(), {}, _write(), console=_console())
    assert not any(path.is_file() for path in (tmp_path / "two").rglob("*"))


def test_missing_and_altered_files_are_found(tmp_path):
    artifact = run_stage("make", tmp_path, Config(), {}, _write("hello"), console=_console())
    (tmp_path / "sub" / "file.txt").write_text("hullo")
    with pytest.raises(StageError, match=r"file\.txt is damaged or was changed"):
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


def test_a_stage_finished_while_the_lock_was_awaited_is_not_made_again(tmp_path, monkeypatch):
    """Another process may finish between the first look at the manifest and the lock."""
    calls = []
    real = stage_module.lock_folder

    @contextlib.contextmanager
    def late(folder):
        monkeypatch.setattr(stage_module, "lock_folder", real)
        run_stage("make", folder, {"a": 1}, {}, _write(calls=calls), console=_console())
        with real(folder):
            yield

    monkeypatch.setattr(stage_module, "lock_folder", late)
    run_stage("make", tmp_path / "s", {"a": 1}, {}, _write(calls=calls), console=_console())
    assert len(calls) == 1


@dataclasses.dataclass(frozen=True)
class Longer:
    """`Config` as a later release has it."""

    steps: int = 3
    inner: Inner = dataclasses.field(default_factory=Inner)
    ema: float = 0.0


def test_a_new_field_with_its_default_keeps_finished_stages(tmp_path):
    old = run_stage("make", tmp_path, {"train": Config()}, {}, _write(), console=_console())
    new = run_stage("make", tmp_path, {"train": Longer()}, {}, _write("no"), console=_console())
    assert old.digest == new.digest
    with pytest.raises(StageError, match=r"config\.train\.ema: 0\.0 -> 0\.5"):
        run_stage("make", tmp_path, {"train": Longer(ema=0.5)}, {}, _write(), console=_console())


def test_a_changed_source_is_refused_and_its_files_are_named(tmp_path):
    def photos(**files):
        return Source(lambda: files, lambda x: repr(sorted(x.items())), dict)

    use = {"photos": photos(a="1", b="2", c="3")}
    run_stage("make", tmp_path, Config(), use, _write(), console=_console())
    use = {"photos": photos(a="1", b="9", d="4")}
    with pytest.raises(StageError) as error:
        run_stage("make", tmp_path, Config(), use, _write(), console=_console())
    for line in ("photos: added d", "photos: removed c", "photos: changed b"):
        assert line in str(error.value)


def test_a_damaged_input_is_named_before_the_stage_begins(tmp_path):
    made = run_stage("make", tmp_path / "a", Config(), {}, _write("hello"), console=_console())
    (tmp_path / "a" / "sub" / "file.txt").write_text("hullo")
    calls = []
    with pytest.raises(StageError, match=r"file\.txt is damaged or was changed"):
        run_stage("use", tmp_path / "b", {}, {"made": made}, _write(calls=calls))
    assert not calls and not (tmp_path / "b").exists()


def test_a_stage_that_made_nothing_leaves_nothing(tmp_path):
    def fails(path):
        raise UserError("photos/a.jpg is no image")

    with pytest.raises(UserError):
        run_stage("make", tmp_path / "a", Config(), {}, fails)
    assert not (tmp_path / "a").exists()
    run_stage("make", tmp_path / "a", Config(steps=4), {}, _write(), console=_console())


def test_leftovers_of_a_killed_writer_are_no_part_of_the_artifact(tmp_path):
    whole = run_stage("make", tmp_path / "a", Config(), {}, _write(), console=_console())

    def killed(path):
        (path / "sub").mkdir()
        (path / "sub" / ".file.txt.0123.tmp").write_text("hel")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("make", tmp_path / "b", Config(), {}, killed)
    assert (tmp_path / "b" / "sub").is_dir()

    def again(path):
        assert not list(path.rglob("*.tmp"))
        shutil.rmtree(path / "sub")
        return _write()(path)

    resumed = run_stage("make", tmp_path / "b", Config(), {}, again, console=_console())
    assert resumed.digest == whole.digest and not list((tmp_path / "b").rglob("*.tmp"))


@stage(format=2)
def count_words(work, config: Config, *, text, other=None):
    (work.folder / "count.txt").write_text(str(len(text.split()) * config.steps))
    return {"words": len(text.split())}


def test_a_stage_function_sees_its_slice_and_its_inputs(tmp_path):
    text = Source(lambda: "a b c", lambda value: value)
    made = count_words(tmp_path, Config(), label="words", text=text, other=None)
    assert made.counts == {"words": 3} and made.manifest["stage"] == "count_words"
    assert made.manifest["format"] == 2 and made.manifest["inputs"] == {"text": "a b c"}
    with pytest.raises(StageError, match=r"config\.steps: 3 -> 4"):
        count_words(tmp_path, Config(steps=4), text=text)
    with pytest.raises(TypeError, match="frozen dataclass"):
        count_words(tmp_path, {"steps": 3}, text=text)


def test_a_stage_cannot_close_over_a_run():
    whole = Config()
    with pytest.raises(TypeError, match="a stage is a function of a module"):

        @stage()
        def sneaks(work, config):
            return {"steps": whole.steps}


def test_a_damaged_manifest_says_the_way_out(tmp_path):
    run_stage("make", tmp_path, Config(), {}, _write(), console=_console())
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StageError, match=rf"manifest\.json.*remove {tmp_path}"):
        run_stage("make", tmp_path, Config(), {}, _write(), console=_console())
