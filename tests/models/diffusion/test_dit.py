"""The transformer against diffusers' DiTTransformer2DModel, its initialisation, and adapters in
the scanned block."""

from functools import partial

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.models.diffusion.dit import DiT, DiTConfig, position_embedding
from jaxsynth.models.repeat import scan_stacked
from jaxsynth.training.sharding import DIT, make_mesh, shard, shard_batch
from jaxsynth.weights.models import describe
from tests.models.torch_parity import copy_weights, nchw, nhwc, randomise, relative_error

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "sample_size": 8,
    "out_channels": 8,
    "num_embeds_ada_norm": 5,
}
OTHER = {
    **TINY,
    "num_attention_heads": 3,
    "attention_head_dim": 4,
    "in_channels": 3,
    "out_channels": None,
    "num_layers": 2,
    "patch_size": 4,
    "sample_size": 16,
    "attention_bias": False,
    "norm_eps": 1e-2,
}
# Layers of every kind that an adapter wraps, inside the scan and outside.
TARGETS = ("to_q", "to_out.0", "ff.net.2", "norm1.linear", "proj_out_2", "pos_embed.proj")
LORA = LoRAConfig(rank=2, alpha=3, targets=TARGETS)


def tied(module: diffusers.DiTTransformer2DModel) -> diffusers.DiTTransformer2DModel:
    """The same embedders in all blocks, as in every trained network."""
    first = module.transformer_blocks[0].norm1.emb.state_dict()
    for block in module.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return module


def build(settings: dict):
    reference = tied(randomise(diffusers.DiTTransformer2DModel(**settings)))
    model = describe(DiT, DiTConfig.from_dict(dict(reference.config)))
    copy_weights(reference, model)
    return reference, model


def inputs(config: DiTConfig, batch: int = 3, size: int | None = None):
    rng = np.random.default_rng(0)
    size = size or config.sample_size
    x = rng.normal(size=(batch, size, size, config.in_channels)).astype(np.float32)
    t = np.array([0, 37, 999, 500][:batch], np.int32)
    return x, t, np.array([0, config.null_label, 3, 1][:batch], np.int32)


def apply_torch(module, x, t, labels):
    with torch.no_grad():
        out = module(nchw(x), torch.from_numpy(t), torch.from_numpy(labels).long()).sample
    return nhwc(out)


@partial(jax.jit, static_argnames="remat")
def apply(model, x, t, labels, condition=None, remat=None):
    return model(x, t, labels, condition=condition, remat=remat)


@pytest.fixture(scope="module")
def random_dit():
    """A network without a zero, so that nothing is hidden by adaLN-zero."""
    return random_network(DiTConfig.from_dict(TINY))


def random_network(config: DiTConfig) -> DiT:
    graphdef, state = nnx.split(describe(DiT, config))
    rng = np.random.default_rng(1)

    def draw(leaf):
        scale = 0.3 if leaf.ndim < 3 else leaf.shape[-2] ** -0.5
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


def adapted(model: DiT, config: LoRAConfig = LORA, seed: int = 2) -> DiT:
    """LoRA with random factors."""
    wrapped = add_lora(model, config, rngs=nnx.Rngs(0))
    state = inject.extract(wrapped)
    keys = jax.random.split(jax.random.key(seed), len(state.arrays))
    arrays = {
        name: 0.3 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, state.arrays.items(), strict=True)
    }
    return inject.load_state(wrapped, inject.AdapterState(arrays, state.config))


@pytest.mark.parametrize(
    ("settings", "size"), [(TINY, None), (TINY, 12), (OTHER, None)], ids=["tiny", "larger", "other"]
)
def test_same_as_diffusers(settings, size):
    reference, model = build(settings)
    arguments = inputs(model.config, size=size)
    expected = apply_torch(reference, *arguments)
    assert relative_error(apply(model, *arguments), expected) < 1e-4


def test_gradients_same_as_diffusers():
    reference, model = build(TINY)
    x, t, labels = inputs(model.config)
    torch_x = nchw(x).requires_grad_()
    out = reference(torch_x, torch.from_numpy(t), torch.from_numpy(labels).long()).sample
    out.square().mean().backward()
    graphdef, params = nnx.split(model)

    @jax.jit
    def gradients(params, x):
        return jax.grad(
            lambda p, x: jnp.square(nnx.merge(graphdef, p)(x, t, labels)).mean(), argnums=(0, 1)
        )(params, x)

    grads, x_grad = gradients(params, x)
    assert relative_error(x_grad, nhwc(torch_x.grad)) < 1e-4
    blocks = reference.transformer_blocks
    for ours, theirs in (
        (grads["transformer_blocks"]["attn1"]["to_k"], [b.attn1.to_k for b in blocks]),
        (grads["transformer_blocks"]["norm1"]["linear"], [b.norm1.linear for b in blocks]),
    ):
        expected = np.stack([layer.weight.grad.numpy().T for layer in theirs])
        assert relative_error(ours["kernel"][...], expected) < 1e-4
    # One table here, a copy in every block there: the gradients of the copies add up.
    copies = [block.norm1.emb.class_embedder.embedding_table for block in blocks]
    expected = sum(copy.weight.grad.numpy() for copy in copies)
    found = grads["class_embedder"]["embedding_table"]["embedding"][...]
    assert relative_error(found, expected) < 1e-4


def test_parts_of_a_batch_give_the_same(random_dit):
    x, t, labels = inputs(random_dit.config, batch=4)
    whole = apply(random_dit, x, t, labels)
    parts = [apply(random_dit, x[i : i + 2], t[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.1


def test_oblong_latents_and_positions(random_dit):
    """Patches in reading order: a picture and its transpose see transposed positions."""
    x, t, labels = inputs(random_dit.config)
    out = apply(random_dit, x[:, :4], t, labels)
    assert out.shape == (3, 4, 8, 8)
    table = position_embedding(2, 3, 8, 4).reshape(2, 3, 8)
    turned = position_embedding(3, 2, 8, 4).reshape(3, 2, 8)
    np.testing.assert_array_equal(table[..., :4], turned.swapaxes(0, 1)[..., 4:])
    # By hand: the patch at row 1 of 2, column 2 of 3, in a network trained with 4 a side.
    row, column = 1 * 4 / 2, 2 * 4 / 3
    expected = [f(p * w) for p in (column, row) for f in (np.sin, np.cos) for w in (1, 0.01)]
    np.testing.assert_allclose(table[1, 2], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "count"),
    [("S", 32_963_360), ("B", 130_512_416), ("L", 458_102_816), ("XL", 675_129_632)],
)
def test_published_sizes(size, count):
    config = DiTConfig.preset(f"DiT-{size}/2")
    model = describe(DiT, config)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model)))
    # The published counts include the fixed positions of 16 x 16 patches.
    assert parameters + 256 * config.hidden_size == count
    assert config.channels_out == 8 and config.freq_shift == 0 and config.norm_eps == 1e-6
    assert DiTConfig.preset(f"DiT-{size}/8", sample_size=64, num_layers=1).patch_size == 8


def test_initialisation_is_the_authors():
    config = DiTConfig.from_dict({**TINY, "attention_head_dim": 64, "num_embeds_ada_norm": 99})
    model = DiT(config, rngs=nnx.Rngs(0))
    width = 128
    blocks = model.transformer_blocks

    def bound(linear):
        return float(jnp.abs(linear.kernel[...]).max())

    for linear, fans in (
        (blocks.attn1.to_q, width + 3 * width),
        (blocks.attn1.to_v, width + 3 * width),
        (blocks.attn1.to_out[0], 2 * width),
        (blocks.ff.net[0].proj, 5 * width),
        (blocks.ff.net[2], 5 * width),
        (model.pos_embed.proj, 2 * 2 * 4 + width),
    ):
        assert bound(linear) == pytest.approx((6 / fans) ** 0.5, rel=1e-2)
        assert not linear.bias[...].any()
    kernels = blocks.attn1.to_q.kernel[...]
    assert kernels.shape == (3, width, width) and not jnp.array_equal(kernels[0], kernels[1])
    for zero in (blocks.norm1.linear, model.proj_out_1, model.proj_out_2):
        assert not zero.kernel[...].any() and not zero.bias[...].any()
    for table in (
        model.class_embedder.embedding_table.embedding,
        model.time_embedder.linear_1.kernel,
        model.time_embedder.linear_2.kernel,
    ):
        assert float(jnp.std(table[...])) == pytest.approx(0.02, rel=0.05)


def test_condition_joins_the_patches(random_dit):
    """Its kernel rows are extra inputs: with zeros there, the network is the one without."""
    config = DiTConfig.from_dict({**TINY, "condition_channels": 2})
    wide = random_network(config)
    x, t, labels = inputs(config)
    condition = np.random.default_rng(1).normal(size=(*x.shape[:3], 2)).astype(np.float32)
    assert wide.pos_embed.proj.kernel.shape == (2, 2, 6, 16)
    first, second = (apply(wide, x, t, labels, c) for c in (condition, condition + 1))
    assert np.abs(first - second).max() > 0.01
    for path, variable in nnx.to_flat_state(nnx.state(random_dit)):
        if path != ("pos_embed", "proj", "kernel"):
            nnx.update(wide, nnx.from_flat_state([(path, variable)]))
    kernel = jnp.pad(random_dit.pos_embed.proj.kernel[...], ((0, 0), (0, 0), (0, 2), (0, 0)))
    wide.pos_embed.proj.kernel.set_value(kernel)
    found = apply(wide, x, t, labels, condition)
    np.testing.assert_allclose(found, apply(random_dit, x, t, labels), atol=1e-5)
    with pytest.raises(ValueError, match=r"condition has shape None, expected \(3, 8, 8, 2\)"):
        wide(x, t, labels)
    with pytest.raises(ValueError, match=r"condition has shape \(3, 8, 8, 2\), expected None"):
        random_dit(x, t, labels, condition=condition)


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_recomputing_changes_neither_output_nor_gradients(random_dit, remat):
    graphdef, state = nnx.split(adapted(random_dit))
    x, t, labels = inputs(random_dit.config)

    def loss(state, remat):
        return jnp.square(nnx.merge(graphdef, state)(x, t, labels, remat=remat)).mean()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    chex.assert_trees_all_close(grad(state, None), grad(state, remat), rtol=1e-4, atol=3e-5)
    program = str(jax.make_jaxpr(lambda s: jax.grad(loss)(s, remat))(state))
    assert "remat" in program or "checkpoint" in program


def test_bfloat16_is_close_to_float32(random_dit):
    half = describe(DiT, random_dit.config, jnp.bfloat16)
    nnx.update(half, nnx.state(random_dit))
    arguments = inputs(random_dit.config)
    out = apply(half, *arguments)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), apply(random_dit, *arguments)) < 5e-2


def test_adapters_in_the_stack_follow_their_algebra(random_dit):
    arguments = inputs(random_dit.config)
    plain = apply(random_dit, *arguments)
    fresh = add_lora(random_dit, LORA, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(apply(fresh, *arguments), plain, atol=1e-6)
    wrapped = adapted(random_dit)
    factor = wrapped.transformer_blocks.attn1.to_q.lora_A
    assert factor.shape == (3, 16, 2)
    out = apply(wrapped, *arguments)
    assert np.abs(out - plain).max() > 0.1
    merged = inject.merge(wrapped)
    np.testing.assert_allclose(apply(merged, *arguments), out, atol=2e-4)
    back = inject.unmerge(merged, wrapped)
    np.testing.assert_allclose(apply(back, *arguments), out, atol=2e-4)


def test_a_traced_strength_is_shared_by_all_layers(random_dit):
    arguments = inputs(random_dit.config)
    wrapped = adapted(random_dit)
    scaled = jax.jit(lambda model, s: inject.with_scale(model, s)(*arguments))
    np.testing.assert_allclose(scaled(wrapped, 0.0), apply(random_dit, *arguments), atol=1e-5)
    np.testing.assert_allclose(scaled(wrapped, 1.0), apply(wrapped, *arguments), atol=1e-5)
    static = inject.with_scale(wrapped, 0.4)
    np.testing.assert_allclose(scaled(wrapped, 0.4), apply(static, *arguments), atol=1e-5)


def test_every_layer_drops_other_inputs(key):
    """The scan against a loop over layers whose dropped inputs are drawn by hand."""
    config = DiTConfig.from_dict({**TINY, "num_layers": 2})
    wrapped = adapted(
        random_network(config), LoRAConfig(rank=2, dropout=0.5, targets=("norm1.linear",))
    )
    blocks = wrapped.transformer_blocks
    tokens = jax.random.normal(key, (1, 4, 16))
    embedded = jnp.ones((1, 16))

    def layer_masks(seed):
        seeded = inject.seed_dropout(wrapped, jax.random.key(seed))
        drop_key = seeded.transformer_blocks.norm1.linear.dropout_key
        return [jax.random.bernoulli(jax.random.fold_in(drop_key, i), 0.5, (1, 16)) for i in (0, 1)]

    def by_hand(masks):
        """The loop over layers, each with its dropped inputs put into the low-rank path."""
        x = tokens
        for i, mask in enumerate(masks):
            leaves, treedef = jax.tree.flatten(
                blocks, is_leaf=lambda node: isinstance(node, nnx.Variable)
            )
            sliced = [leaf.replace(leaf[...][i]) for leaf in leaves]
            block = jax.tree.unflatten(treedef, sliced)
            linear = block.norm1.linear
            dropped = jnp.where(mask, embedded / 0.5, 0)
            update = dropped @ linear.lora_A[...] @ linear.lora_B[...] * linear.scaling
            block.norm1.linear = lambda c, update=update, plain=linear.base: plain(c) + update
            x = block(x, embedded)
        return x

    masks = layer_masks(3)
    assert not jnp.array_equal(*masks)
    seeded = inject.seed_dropout(wrapped, jax.random.key(3))

    def scanned(blocks):
        return scan_stacked(blocks, 2, tokens, lambda block, x: block(x, embedded))

    found = scanned(seeded.transformer_blocks)
    np.testing.assert_allclose(found, by_hand(masks), atol=1e-5)
    same = by_hand([masks[0]] * 2)
    assert np.abs(found - same).max() > 1e-3
    other = inject.seed_dropout(wrapped, jax.random.key(4)).transformer_blocks
    assert np.abs(found - scanned(other)).max() > 1e-3


def test_one_adapter_a_sample(random_dit):
    """Mapped over samples with factors of their own, one base: as separate runs."""
    x, t, labels = inputs(random_dit.config)
    models = [adapted(random_dit, seed=seed) for seed in range(3)]
    graphdef, _, frozen = nnx.split(models[0], inject.Trainable, ...)
    factors = inject.stack([nnx.state(model, inject.Trainable) for model in models])

    @jax.jit
    def mapped(factors, x, t, labels):
        def one(factors, x, t, label):
            return nnx.merge(graphdef, factors, frozen)(x[None], t[None], label[None])[0]

        return jax.vmap(one)(factors, x, t, labels)

    found = mapped(inject.route(factors, jnp.array([2, 0, 1])), x, t, labels)
    for i, which in enumerate([2, 0, 1]):
        alone = apply(models[which], x[i : i + 1], t[i : i + 1], labels[i : i + 1])
        np.testing.assert_allclose(found[i], alone[0], atol=1e-4)


def test_a_variable_without_the_layers_axis_is_named(random_dit):
    wrapped = adapted(random_dit)
    wrapped.transformer_blocks.attn1.to_q.lora_A = inject.Trainable(jnp.zeros((16, 2)))
    with pytest.raises(ValueError, match=r"Trainable of shape \(16, 2\); expected a first axis"):
        wrapped(*inputs(random_dit.config))


def test_many_devices_compute_as_one(random_dit):
    x, t, labels = (np.concatenate([a] * 4)[:8] for a in inputs(random_dit.config))
    graphdef, state = nnx.split(random_dit)

    @jax.jit
    def gradient(state, x, t, labels):
        def loss(state):
            return jnp.square(nnx.merge(graphdef, state)(x, t, labels)).mean()

        return jax.value_and_grad(loss)(state)

    one = gradient(state, x, t, labels)
    mesh = make_mesh(2, 2, 2)
    placed = shard(state, mesh, DIT, min_size=64)
    kernel = placed["transformer_blocks"]["attn1"]["to_q"]["kernel"].get_value()
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    many = gradient(placed, *shard_batch((x, t, labels), mesh))
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "layer_norm"}, "norm_type: expected 'ada_norm_zero', got 'layer_norm'"),
        ({"activation_fn": "geglu"}, "activation_fn: expected 'gelu-approximate'"),
        ({"caption_channels": 8}, "caption_channels: expected None"),
        ({"class_dropout": 0.1}, "unknown field 'class_dropout'"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm.*: expected an int"),
        ({"patch_size": 3}, "patch_size: 3 does not divide sample_size 8"),
        ({"attention_head_dim": 3}, "2 heads of 3 make 6 channels, expected a multiple of 4"),
        ({"freq_shift": 2}, "freq_shift: expected 0 or 1, got 2"),
    ],
)
def test_config_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig.from_dict({**TINY, **change})


def test_calls_that_do_not_fit_are_refused(random_dit):
    x, t, labels = inputs(random_dit.config)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7, 8, 4\), expected"):
        random_dit(x[:, :7], t, labels)
    with pytest.raises(ValueError, match=r"x has shape \(3, 8, 8, 3\), expected \(b, h, w, 4\)"):
        random_dit(x[..., :3], t, labels)
    with pytest.raises(ValueError, match=r"remat: expected None or one of \['block', 'dots'\]"):
        random_dit(x, t, labels, remat="all")
    with pytest.raises(ValueError, match=r"'DiT-XXL/2', expected DiT-<S\|B\|L\|XL>/<2\|4\|8>"):
        DiTConfig.preset("DiT-XXL/2")
