"""Eight fake devices against one, and the tables against every path of the real networks."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_net
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxsynth.models.clip import CLIPConfig, CLIPModel
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.loop import fit
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.sharding import (
    CLIP,
    UNET,
    VAE,
    dotted,
    make_mesh,
    replicate,
    shard,
    shard_batch,
    shardings_for,
)
from jaxsynth.training.step import init_state, make_train_step

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]


CONFIG = TrainingConfig(learning_rate=1e-2, eps=1e-3, weight_decay=0.01, clip_norm=1.0)
RATE = Rate.of(CONFIG)


def _parts():
    graphdef, params = small_net.make()
    return graphdef, params, make_optimizer(CONFIG)


def _specs(tree, mesh, table, **options):
    paths = jax.tree_util.tree_leaves_with_path(shardings_for(tree, mesh, table, **options))
    return {dotted(path): sharding.spec for path, sharding in paths}


@pytest.mark.parametrize("shape", MESHES)
def test_many_devices_train_as_one_does(key, shape):
    graphdef, params, tx = _parts()
    step = make_train_step(small_net.make_loss(graphdef, 0.1), tx, ema_decay=0.9)
    one, losses = init_state(params, tx, key, RATE, ema=True), []
    for i in range(2):
        one, metrics = jax.jit(step)(one, None, small_net.batch(i))
        losses.append(metrics["loss"])

    mesh = make_mesh(*shape)
    many = shard(init_state(params, tx, key, RATE, ema=True), mesh, UNET, min_size=64)
    run = jax.jit(step)
    for i in range(2):
        many, metrics = run(many, None, shard_batch(small_net.batch(i), mesh))
        np.testing.assert_allclose(metrics["loss"], losses[i], rtol=1e-5)
    for tree in ("trainable", "ema", "opt_state"):
        chex.assert_trees_all_close(getattr(many, tree), getattr(one, tree), rtol=1e-5, atol=1e-5)


def test_the_loop_keeps_shardings_and_checkpoints_restore_them(tmp_path, key):
    graphdef, params, tx = _parts()
    step = make_train_step(small_net.make_loss(graphdef), tx)

    def run(mesh, steps, folder):
        state = shard(init_state(params, tx, key, RATE), mesh, UNET, min_size=64)
        before = jax.tree.map(lambda x: x.sharding, state)
        with Checkpoints(tmp_path / folder, every=2) as checkpoint:
            state = fit(
                state,
                None,
                small_net.Batches(),
                step,
                steps=steps,
                place=partial(shard_batch, mesh=mesh),
                checkpoint=checkpoint,
            )
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, before)
        assert all(jax.tree.leaves(same))
        return state

    whole = run(make_mesh(2, 4, 1), 4, "whole")
    run(make_mesh(2, 4, 1), 2, "moved")
    moved = run(make_mesh(2, 2, 2), 4, "moved")  # restored onto another mesh
    chex.assert_trees_all_close(whole.trainable, moved.trainable, rtol=1e-5, atol=1e-5)


def test_accumulation_over_a_sharded_batch(key):
    graphdef, params, tx = _parts()
    step = make_train_step(small_net.make_loss(graphdef), tx, accumulate=2)
    one, _ = jax.jit(step)(init_state(params, tx, key, RATE), None, small_net.batch(0, 16))
    mesh = make_mesh(8)
    many = replicate(init_state(params, tx, key, RATE), mesh)
    many, _ = jax.jit(step)(many, None, shard_batch(small_net.batch(0, 16), mesh))
    chex.assert_trees_all_close(many.trainable, one.trainable, rtol=1e-5, atol=1e-5)


def test_the_clip_table_covers_the_network():
    shapes = nnx.state(nnx.eval_shape(lambda: CLIPModel(CLIPConfig(), rngs=nnx.Rngs(0))))
    specs = _specs(shapes, make_mesh(2, 2, 2), CLIP)
    layer = "text_model.encoder.layers.3."
    assert specs[layer + "self_attn.q_proj.kernel"] == P("fsdp", "tensor")
    assert specs[layer + "self_attn.out_proj.kernel"] == P("tensor", "fsdp")
    assert specs[layer + "mlp.fc1.bias"] == P("tensor")
    assert specs[layer + "layer_norm1.scale"] == P(None)
    assert specs["text_model.embeddings.token_embedding.embedding"] == P("fsdp", None)
    assert specs["logit_scale"] == P()


def test_the_unet_table_covers_the_network():
    def make():
        return UNet2DCondition(UNet2DConditionConfig(layers_per_block=1), rngs=nnx.Rngs(0))

    specs = _specs(nnx.state(nnx.eval_shape(make)), make_mesh(2, 2, 2), UNET)
    block = "mid_block.attentions.0.transformer_blocks.0."
    assert specs[block + "attn2.to_v.kernel"] == P("fsdp", "tensor")
    assert specs[block + "attn1.to_out.0.kernel"] == P("tensor", "fsdp")
    assert specs[block + "ff.net.0.proj.kernel"] == P("fsdp", "tensor")
    assert specs[block + "norm1.scale"] == P(None)
    assert specs["down_blocks.0.downsamplers.0.conv.kernel"] == P(None, None, None, "fsdp")


def test_the_vae_table_covers_the_network():
    shapes = nnx.state(
        nnx.eval_shape(lambda: AutoencoderKL(AutoencoderKLConfig(), rngs=nnx.Rngs(0)))
    )
    specs = _specs(shapes, make_mesh(2, 2, 2), VAE, min_size=256)
    assert specs["encoder.mid_block.attentions.0.to_q.kernel"] == P("fsdp", "tensor")
    assert specs["decoder.mid_block.resnets.0.conv1.kernel"] == P(None, None, None, "fsdp")


def test_rules_that_do_not_divide_and_small_arrays_are_left_whole():
    mesh = make_mesh(2, 2, 2)
    tree = {"attn": {"to_q": {"kernel": jnp.zeros((6, 7))}, "to_k": {"kernel": jnp.zeros((4, 4))}}}
    specs = _specs(tree, mesh, UNET, min_size=30)
    assert specs["attn.to_q.kernel"] == P("fsdp", None)
    assert specs["attn.to_k.kernel"] == P(None, "tensor")


def test_unknown_paths_are_an_error():
    tree = {"attn": {"to_q": {"kernel": jnp.zeros((4, 4)), "gate": jnp.zeros((4, 4))}}}
    with pytest.raises(
        ValueError, match=r"no sharding rule for 1 paths, such as \['attn.to_q.gate"
    ):
        shardings_for(tree, make_mesh(), UNET)


def test_meshes_and_batches_that_do_not_fit():
    assert make_mesh(fsdp=4).shape == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=1 do not make 8 devices"):
        make_mesh(3)
    with pytest.raises(ValueError, match=r"batch\['x'\] has 6 rows"):
        shard_batch(small_net.batch(0, 6), make_mesh())
