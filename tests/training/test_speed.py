"""What is written of a training's speed, and what a page says of it."""

import time

import jax
import jax.numpy as jnp
import pytest

from jaxsynth.runs.results import how_it_was_made
from jaxsynth.runs.stage import run_stage
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.speed import Meter, host_memory


def test_waiting_for_the_host_is_idle_time():
    meter, result = Meter(0), jax.block_until_ready(jnp.ones(()))
    meter.queued(result)
    began = time.perf_counter()
    time.sleep(0.05)
    meter.look()
    meter.queued(result)
    waited = time.perf_counter() - began
    found = meter.read(1)
    assert 0.05 * found["steps_per_second"] <= found["idle"] <= 1
    assert found["idle"] / found["steps_per_second"] <= waited + 1e-6
    meter.queued(result)
    time.sleep(0.05)
    meter.pause()  # as after an evaluation, which is the device's own work
    meter.queued(result)
    found = meter.read(2)
    assert found["idle"] / found["steps_per_second"] < 0.05


def test_work_is_counted_once_and_memory_in_bytes():
    calls, result = [], jax.block_until_ready(jnp.ones(()))
    meter = Meter(4, examples=8, flops=lambda program: calls.append(program) or 1e9)
    found = []
    for step in (5, 7):
        meter.queued(result)
        found.append(meter.read(step))
    first, second = found
    assert calls == [None]
    for found in (first, second):
        assert found["flops_per_second"] == pytest.approx(found["steps_per_second"] * 1e9)
        assert found["examples_per_second"] == pytest.approx(found["steps_per_second"] * 8)
        assert "mfu" not in found  # a CPU's peak is not known
    held = jnp.ones((1 << 24,)).block_until_ready()
    assert first["host_bytes"] <= host_memory() and host_memory() >= held.nbytes


def test_work_is_the_mean_of_the_programs_that_ran():
    result = jax.block_until_ready(jnp.ones(()))
    meter = Meter(0, flops=lambda program: {"wide": 1e9, "square": 4e9}[program])
    for program in ("wide", "square", "square"):
        meter.queued(result, program)
    found = meter.read(3)
    assert found["flops_per_second"] == pytest.approx(found["steps_per_second"] * 3e9)
    meter.queued(result, "wide")
    found = meter.read(4)
    assert found["flops_per_second"] == pytest.approx(found["steps_per_second"] * 1e9)


def test_a_page_says_how_fast_the_trainings_of_a_stage_were(tmp_path):
    def train(folder):
        with MetricsWriter(folder / ".training") as metrics:
            metrics.resume(0)
            for step, rate in ((1, 1.0), (2, 10.0), (3, 30.0), (4, 20.0)):
                values = {"examples_per_second": rate, "flops_per_second": 2e12, "idle": 0.25}
                metrics.write_speed(step, values | {"host_bytes": 3 * 2**30})
        return {}

    run_stage("adapter", tmp_path / "shots1" / "adapter", {}, {}, train)
    run_stage("score", tmp_path / "shots1" / "scores", {}, {}, lambda folder: {})
    section = how_it_was_made(tmp_path)
    (table,) = section.folded
    assert list(table.columns) == [
        "stage", "time", "images/s", "TFLOP/s", "idle % at most", "host GiB",
    ]  # fmt: skip
    trained, scored = table.rows
    assert trained[0] == "shots1/adapter" and trained[2:] == [20.0, 2.0, 25.0, 3.0]
    assert scored[0] == "shots1/scores" and scored[2:] == [None] * 4
    assert len(section.details) == 2 and "median" in section.text
