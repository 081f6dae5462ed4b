"""The loop: what it reports, when it stops, and that an interrupted run ends with the same bits."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_net
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jaxsynth.core import preemption
from jaxsynth.training import checkpoint as checkpoints
from jaxsynth.training.checkpoint import CheckpointError, Checkpoints
from jaxsynth.training.loop import Constant, NonFiniteError, fit
from jaxsynth.training.metrics import MetricsWriter, read_metrics
from jaxsynth.training.step import (
    init_stacked,
    init_state,
    make_train_step,
    scan_steps,
    stacked,
)

TX = optax.adam(1e-2)
OUT = Console(file=io.StringIO())


def _loss(trainable, frozen, batch, key):
    error = batch["x"] @ trainable["w"] - frozen["shift"] + 0.1 * jax.random.normal(key)
    return (error**2).mean(), {"bias": error.mean()}


STEP = make_train_step(_loss, TX)
FROZEN = {"shift": jnp.ones(())}


def _state(key):
    return init_state({"w": jnp.ones((3,))}, TX, key)


class Rows(small_net.Batches):
    def __next__(self):
        return {"x": super().__next__()["x"][:, 0, 0, :]}


def _fit(state, batches, steps, **options):
    return fit(state, FROZEN, batches, STEP, steps=steps, console=OUT, **options)


def _same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_it_trains_and_reports_means(tmp_path, key):
    with MetricsWriter(tmp_path) as metrics:
        state = _fit(_state(key), Rows(), 10, metrics=metrics, log_every=4)
    assert int(state.step) == 10
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10]
    plain, losses, batches = _state(key), [], Rows()
    for _ in range(10):
        plain, values = jax.jit(STEP)(plain, FROZEN, next(batches))
        losses.append(float(values["loss"]))
    _same(plain.trainable, state.trainable)
    np.testing.assert_allclose(lines[1]["loss"], np.mean(losses[4:8]), rtol=1e-6)
    assert set(lines[0]) == {"step", "loss", "grad_norm", "bias", "learning_rate"}
    speeds = read_metrics(tmp_path / "speed.jsonl")
    assert [line["step"] for line in speeds] == [4, 8, 10]
    assert all(line["steps_per_second"] > 0 for line in speeds)
    # A product of (n, 3) and (3,) and its gradient: at least 2 x 3 n operations a step.
    assert all(line["flops_per_second"] >= 6 * line["steps_per_second"] for line in speeds)
    assert all(0 <= line["idle"] <= 1 and line["host_bytes"] > 0 for line in speeds)


def test_resumed_equals_uninterrupted(tmp_path, key):
    whole = _fit(_state(key), Rows(), 9)
    for steps in (4, 6, 9):
        with Checkpoints(tmp_path / "c", every=3) as checkpoint, MetricsWriter(tmp_path) as metrics:
            state = _fit(
                _state(key), Rows(), steps, checkpoint=checkpoint, metrics=metrics, log_every=2
            )
    _same(whole, state)
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 9


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path, compilation_cache):
    def run(name, die_at):

        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        script = Path(__file__).parent / "worker.py"
        return subprocess.run(
            [sys.executable, str(script), "resume", str(tmp_path / name), "20", str(die_at)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("whole", -1)
    assert done.returncode == 0, done.stderr
    for die_at in (7, 15):  # between two checkpoints, and while one may still be on its way
        assert run("killed", die_at).returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "manifest.json").exists()
    done = run("killed", -1)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout
    with (
        np.load(tmp_path / "whole" / "state.npz") as one,
        np.load(tmp_path / "killed" / "state.npz") as two,
    ):
        assert one.files == two.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name])
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]


def test_a_nan_stops_at_its_step(tmp_path, key):
    class Bad(Rows):
        def __next__(self):
            batch = super().__next__()
            return {"x": batch["x"] * (np.nan if self.index == 6 else 1)}

    with (
        Checkpoints(tmp_path / "c", every=2) as checkpoint,
        pytest.raises(NonFiniteError, match="loss is not finite at step 6"),
    ):
        _fit(_state(key), Bad(), 20, checkpoint=checkpoint)
    with Checkpoints(tmp_path / "c", every=2) as checkpoint:
        assert checkpoint.latest == 4


def test_scanned_steps_in_the_loop(tmp_path, key):
    data = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8, 3)), jnp.float32)

    def batch_fn(step, data):
        return {"x": data[step % 5]}

    class Cycle:
        index = -1

        def __next__(self):
            self.index += 1
            return batch_fn(self.index, data)

    options = {"steps": 12, "console": OUT}
    plain = fit(_state(key), FROZEN, Cycle(), STEP, **options)
    scanned = scan_steps(STEP, batch_fn, 4)
    options["steps_per_call"] = 4
    with MetricsWriter(tmp_path) as metrics:
        fast = fit(
            _state(key), FROZEN, Constant(data), scanned, metrics=metrics, log_every=6, **options
        )
    np.testing.assert_allclose(plain.trainable["w"], fast.trainable["w"], rtol=1e-5)
    assert [x["step"] for x in read_metrics(tmp_path / "metrics.jsonl")] == [8, 12]
    with pytest.raises(NonFiniteError, match="one of the steps 1 to 4"):
        fit(_state(key), FROZEN, Constant(data * jnp.nan), scanned, **options)
    with pytest.raises(ValueError, match="12 steps left, not divisible by steps_per_call=5"):
        fit(_state(key), FROZEN, Constant(data), scanned, **{**options, "steps_per_call": 5})


def test_stacked_adapters_in_the_loop(tmp_path, key):
    state = init_stacked({"w": jnp.ones((2, 3))}, TX, jax.random.split(key, 2))
    step = stacked(STEP, batch_axis=None)
    with Checkpoints(tmp_path / "c", every=2) as checkpoint, MetricsWriter(tmp_path) as metrics:
        options = {"steps": 4, "log_every": 2, "console": OUT, "metrics": metrics}
        state = fit(state, FROZEN, Rows(), step, checkpoint=checkpoint, **options)
    assert state.step.tolist() == [4, 4]
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"]) == 2
    bad = init_stacked({"w": jnp.array([[1.0] * 3, [jnp.inf] * 3])}, TX, jax.random.split(key, 2))
    with pytest.raises(NonFiniteError, match=r"loss of adapters \[1\] is not finite at step 1"):
        fit(bad, FROZEN, Rows(), step, steps=2, console=OUT)


def test_a_request_to_stop_saves_the_newest_step(tmp_path, key, monkeypatch):
    """SIGTERM: the step under way ends, is saved, and the same call goes on from there."""
    whole = _fit(_state(key), Rows(), 9)
    monkeypatch.setattr(preemption, "_asked", threading.Event())
    previous = signal.getsignal(signal.SIGTERM)
    preemption.install()

    class Terminated(Rows):
        def __next__(self):
            if self.index == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    try:
        with (
            Checkpoints(tmp_path / "c", every=100) as checkpoint,
            pytest.raises(preemption.Preempted, match="after step 5 of 9, which is saved"),
        ):
            _fit(_state(key), Terminated(), 9, checkpoint=checkpoint)
    finally:
        signal.signal(signal.SIGTERM, previous)
    monkeypatch.setattr(preemption, "_asked", threading.Event())
    with Checkpoints(tmp_path / "c", every=100) as checkpoint:
        assert checkpoint.latest == 5
        _same(whole, _fit(_state(key), Rows(), 9, checkpoint=checkpoint))


def test_metrics_of_a_resumed_run_are_those_of_an_undisturbed_one(tmp_path, key, monkeypatch):
    """Also the report in whose middle it was killed."""

    def run(name):
        with (
            Checkpoints(tmp_path / name / "c", every=1) as checkpoint,
            MetricsWriter(tmp_path / name) as metrics,
        ):
            _fit(_state(key), Rows(), 9, checkpoint=checkpoint, metrics=metrics, log_every=3)

    run("whole")
    save = Checkpoints.save

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.setattr(Checkpoints, "save", save)
    run("cut")
    files = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert files[0] == files[1] and files[0].count("\n") == 3


def test_an_interrupt_leaves_a_whole_checkpoint(tmp_path, key, monkeypatch, interruptible):
    state = _state(key)
    with (
        pytest.raises(KeyboardInterrupt),
        Checkpoints(tmp_path / "c", every=2) as checkpoint,
    ):
        begin = checkpoint._orbax.save_checkpointables_async

        def interrupted(*args, **options):
            os.kill(os.getpid(), signal.SIGINT)
            return begin(*args, **options)

        monkeypatch.setattr(checkpoint._orbax, "save_checkpointables_async", interrupted)
        checkpoint.save(2, state)
    with Checkpoints(tmp_path / "c", every=2) as checkpoint:
        assert checkpoint.latest == 2
        _same(state, checkpoint.restore(_state(key))[0])


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path, key, small, monkeypatch):
    monkeypatch.setattr(checkpoints, "SMALL", small)
    with Checkpoints(tmp_path / "c", every=2) as checkpoint:
        _fit(_state(key), Rows(), 2, checkpoint=checkpoint)
    folder = tmp_path / "c" / "2" / ("small" if small else "state")
    files = [path for path in folder.rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    for place in range(0, len(content), max(len(content) // 12, 1)):
        flipped = bytearray(content)
        flipped[place] ^= 4
        data.write_bytes(flipped)
        with Checkpoints(tmp_path / "c", every=2) as checkpoint:
            try:
                state, _ = checkpoint.restore(_state(key), Rows())
            except CheckpointError as error:
                assert "remove that folder" in str(error)
                continue
        # Not every byte of the file is one of an array.
        data.write_bytes(content)
        with Checkpoints(tmp_path / "c", every=2) as checkpoint:
            _same(state, checkpoint.restore(_state(key), Rows())[0])


def test_small_and_large_arrays_are_restored_to_any_placing(tmp_path, monkeypatch):
    mesh = jax.make_mesh((4,), ("fsdp",))
    whole, cut = (jax.sharding.NamedSharding(mesh, P(*axes)) for axes in ((), ("fsdp",)))
    monkeypatch.setattr(checkpoints, "SMALL", 64)
    state = {
        "half": jnp.arange(8, dtype=jnp.bfloat16),
        "key": jax.random.key(3),
        "large": jax.device_put(jnp.arange(64.0), whole),
        "small": jax.device_put(jnp.arange(4.0), whole),
        "cut": jax.device_put(jnp.arange(8.0), cut),
    }
    with Checkpoints(tmp_path / "c", every=1) as checkpoint:
        checkpoint.save(1, state)
    assert (tmp_path / "c" / "1" / "small" / "arrays.bin").stat().st_size == 2 * 8 + 8 + 4 * 4
    moved = {
        **state,
        "cut": jax.device_put(jnp.zeros(8), whole),
        "small": jax.device_put(jnp.zeros(4), cut),
    }
    with Checkpoints(tmp_path / "c", every=1) as checkpoint:
        restored, _ = checkpoint.restore(moved)
    _same(state, restored)
    assert all(restored[name].sharding == moved[name].sharding for name in state)


def test_a_checkpoint_without_a_file_of_small_arrays_is_read(tmp_path, key, monkeypatch):
    monkeypatch.setattr(checkpoints, "SMALL", 0)
    with Checkpoints(tmp_path / "c", every=2) as checkpoint:
        state = _fit(_state(key), Rows(), 2, checkpoint=checkpoint)
    (note,) = (tmp_path / "c" / "2" / "run").glob("*.json")
    value = json.loads(note.read_text())
    del value["small"], value["sha256"]
    note.write_text(json.dumps(value))
    with Checkpoints(tmp_path / "c", every=2) as checkpoint:
        _same(state, checkpoint.restore(_state(key), Rows())[0])


def test_batches_that_end_early_are_an_error(key):
    with pytest.raises(RuntimeError, match="the batches ended at step 3 of 5"):
        _fit(_state(key), Rows(end=3), 5)


def test_the_same_step_function_is_compiled_once(key):
    traces = []

    def counted(trainable, frozen, batch, key):
        traces.append(1)
        return _loss(trainable, frozen, batch, key)

    step = make_train_step(counted, TX)
    for _ in range(2):
        fit(_state(key), FROZEN, Rows(), step, steps=2, console=OUT)
    assert len(traces) == 1


def test_another_base_or_another_state_is_refused(tmp_path, key):
    def open_with(identity):
        return Checkpoints(tmp_path / "c", every=1, identity=identity)

    with open_with({"base": "abc"}) as checkpoint:
        _fit(_state(key), Rows(), 2, checkpoint=checkpoint)
    with (
        open_with({"base": "xyz"}) as checkpoint,
        pytest.raises(CheckpointError, match=r'identity\.base: "abc" -> "xyz"'),
    ):
        _fit(_state(key), Rows(), 4, checkpoint=checkpoint)
    wide = init_state({"w": jnp.ones((4,))}, TX, key)
    with (
        open_with({"base": "abc"}) as checkpoint,
        pytest.raises(CheckpointError, match=r'trainable.w: "float32\[3\]" -> "float32\[4\]"'),
    ):
        checkpoint.restore(wide, Rows())
    with (
        open_with({"base": "abc"}) as checkpoint,
        pytest.raises(CheckpointError, match="have no set_state"),
    ):
        checkpoint.restore(_state(key), iter([]))


def test_only_the_newest_checkpoints_stay(tmp_path, key):
    with Checkpoints(tmp_path / "c", every=1, keep=2) as checkpoint:
        _fit(_state(key), Rows(), 5, checkpoint=checkpoint)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["4", "5"]


@pytest.mark.parametrize("size", [300, 600])
def test_a_save_that_fails_is_raised_once_and_not_logged_by_every_thread(tmp_path, caplog, size):
    noise = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = Checkpoints(tmp_path / "c", every=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises((OSError, ValueError), match="File too large"), checkpoint:
            checkpoint.save(1, {"noise": jnp.asarray(noise)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [record for record in caplog.records if record.exc_info]
