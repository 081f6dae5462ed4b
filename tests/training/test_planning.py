"""Plans of a small program: its batch that fits, its bounds, and the TPU compiler where it is."""

import dataclasses
import importlib.util

import jax
import pytest

from jaxsynth.core.errors import UsageError, UserError
from jaxsynth.ops.backend import compiling_for
from jaxsynth.training.chips import CHIPS, slice_of
from jaxsynth.training.planning import fits, largest_batch, smaller_batch
from jaxsynth.training.sharding import make_mesh
from tests.training.linear import EXAMPLES, WIDTH, linear_program

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs pip install 'jaxsynth[tpu]'"
)


def test_the_largest_batch_fits_and_a_larger_one_does_not():
    program = linear_program(make_mesh(data=2, devices=jax.devices()[:2]))
    limit = program.of(512).bytes
    batch, plan = largest_batch(program, limit)
    assert 512 <= batch < 560 and fits(plan, limit) and plan == program.of(batch)
    assert not fits(program.of(batch + batch // 8), limit)
    halved, plan = smaller_batch(dataclasses.replace(program, batch=1500), limit)
    assert halved == 376 and fits(plan, limit)
    assert largest_batch(dataclasses.replace(program, batch=4096), limit)[0] == 512
    assert largest_batch(program, 1000) == smaller_batch(program, 1000) == (2, None)


def test_a_program_takes_at_least_its_slowest_part():
    plan = linear_program(make_mesh()).compile()
    chip = CHIPS["v5e"]
    bounds = plan.bounds(chip)
    # Forward and the gradient to the weights.
    assert plan.flops == 2 * 2 * 64 * WIDTH * WIDTH and plan.images == 64
    assert bounds["compute"] == plan.flops / 8 / chip.flops
    weights = WIDTH * WIDTH * 4
    assert bounds["memory"] > 5 * weights / chip.bandwidth  # weights, moments and what is new
    reduced = next(one for one in plan.collectives if one.kind == "all-reduce")
    assert reduced.bytes >= weights and bounds["links"] == plan.received / chip.links
    assert plan.arguments >= 3 * weights + EXAMPLES * WIDTH * 4 / 8


def test_a_batch_that_does_not_divide_is_refused_with_the_field():
    message = r"linear: batch_size: 12 is .* next that is: 16 \(--config.batch_size=\)"
    with pytest.raises(UserError, match=message):
        linear_program(make_mesh(), 12).compile()


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "no such chip, expected KIND:SHAPE with one of v5e, v6e, v5p"),
        ("v5e", "no such slice, expected v5e: and one of 1x1, 2x2, 2x4"),
        ("v5e:3x3", "no such slice, expected v5e: and one of 1x1, 2x2, 2x4"),
        ("v5e:2x2x1", "no such slice"),
        ("v5p:4x4", "no such slice, expected v5p: and one of 2x2x1"),
        ("v5p:64x64x64", "no such slice, expected v5p"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(topology, message):
    with pytest.raises(UsageError, match=f"--topology={topology}: {message}"):
        slice_of(topology)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_the_compiler_its_package_is_named():
    with pytest.raises(UsageError, match=r"pip install 'jaxsynth\[tpu\]'"):
        slice_of("v5e:2x2")


@needs_libtpu
def test_a_program_is_compiled_for_a_slice_that_is_not_here():
    chip, devices = slice_of("v5e:2x2")
    mesh = make_mesh(devices=devices)
    with compiling_for("tpu"):
        plan = linear_program(mesh).compile()
        whole = dataclasses.replace(linear_program(mesh), batch=2**24).compile()
    assert plan.devices == 4 and fits(plan, chip.memory) and not plan.refused
    assert plan.flops == 2 * 2 * 64 * WIDTH * WIDTH and plan.moved > 0
    assert any(one.kind in ("all-reduce", "reduce-scatter") for one in plan.collectives)
    assert not fits(whole, chip.memory) and whole.bytes > chip.memory
    with pytest.raises(UsageError, match="no such slice"):
        slice_of("v5p:3x3x3")
