"""What a compiled program moves: loops in full, slices alone, collectives with their bytes."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxsynth.training.hlo import traffic
from jaxsynth.training.sharding import make_mesh


def compiled(function, *shapes) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    def layers(count, weights, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights, length=count)[0]

    one, ten = (
        traffic(compiled(partial(layers, count), (count, 256, 256), (8, 256))) for count in (1, 10)
    )
    weight = 256 * 256 * 4
    assert one.unknown == ten.unknown == 0 and not ten.collectives
    # Each layer's slice is read at least once; the whole stack never in each of them.
    assert 10 * weight <= ten.bytes < 60 * weight
    assert ten.bytes > 5 * one.bytes


def test_collectives_are_counted_with_their_bytes():
    mesh = make_mesh(data=4, fsdp=2)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec(("data", "fsdp")),
        out_specs=PartitionSpec(("data", "fsdp")),
    )
    def exchange(x):
        def body(carry, _):
            return jax.lax.psum(carry, "data") / jnp.max(carry), None

        summed, _ = jax.lax.scan(body, jax.lax.pcast(x, (), to="varying"), length=5)
        return jax.lax.ppermute(summed, "data", [(0, 1), (1, 0)])

    found = traffic(compiled(exchange, (8, 1024)))
    kinds = {one.kind: one for one in found.collectives}
    reduced, moved = kinds["all-reduce"], kinds["collective-permute"]
    assert (reduced.count, reduced.bytes) == (5, 5 * 4096)
    assert reduced.received == pytest.approx(2 * 3 / 4 * reduced.bytes)
    assert (moved.count, moved.bytes) == (1, 4096)
    assert dict(found.largest)["all-reduce"] == "f32[1,1024]"
    assert found.received == reduced.received + moved.received
    assert reduced.divided(5).count == 1


# As the TPU compiler writes: memory spaces, no length of a loop, groups by axes of a mesh.
TPU = """
HloModule jit_f

%sliced (p.0: f32[10,512,128], p.1: s32[]) -> f32[1,512,128] {
  %p.0 = f32[10,512,128]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,512,128]{2,1,0:T(8,128)S(1)} dynamic-slice(%p.0, %p.1, %zero, %zero), x={1}
}

%body (arg: (s32[], f32[10,512,128])) -> (s32[], f32[10,512,128]) {
  %arg = (s32[]{:T(128)}, f32[10,512,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %w = f32[10,512,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %own = f32[1,512,128]{2,1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%sliced
  %all = f32[1,512,512]{2,1,0:T(8,128)S(1)} all-gather(%own), replica_groups=mesh['a'=1,'b'=4] {'b'}
  ROOT %out = (s32[]{:T(128)}, f32[10,512,128]{2,1,0:T(8,128)}) tuple(%i, %w)
}

%stop (arg.1: (s32[], f32[10,512,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(10)
  %arg.1 = (s32[]{:T(128)}, f32[10,512,128]{2,1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

ENTRY %main (p: f32[10,512,128]) -> f32[10,512,128] {
  %p = f32[10,512,128]{2,1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)S(6)} constant(0)
  %t = (s32[]{:T(128)}, f32[10,512,128]{2,1,0:T(8,128)}) tuple(%start, %p)
  %loop = (s32[]{:T(128)}, f32[10,512,128]{2,1,0:T(8,128)}) while(%t), condition=%stop, body=%body
  ROOT %done = f32[10,512,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_what_stays_on_the_chip_is_not_moved():
    found = traffic(TPU)
    assert found.bytes == 10 * 512 * 128 * 4 and found.unknown == 0
    (gathered,) = found.collectives
    assert (gathered.kind, gathered.count) == ("all-gather", 10)
    assert gathered.received == pytest.approx(gathered.bytes * 3 / 4)
    assert gathered.bytes == 10 * 512 * 512 * 4


def test_a_loop_of_unknown_length_counts_once():
    found = traffic(TPU.replace("%limit = s32[]{:T(128)} constant(10)", "%limit = s32[] add(%n)"))
    assert found.unknown == 1 and found.bytes == 512 * 128 * 4
