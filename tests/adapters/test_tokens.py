"""Prefixes and hypernetworks around the keys and values of an attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.hypernetwork import HypernetworkConfig
from jaxsynth.models.diffusion.transformer2d import Attention
from tests.adapters.nets import scrambled


@pytest.fixture(scope="module")
def layer():
    return Attention(8, heads=2, context_dim=6, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape, np.float32) for shape in ((2, 5, 8), (2, 4, 6))]


def attend(q, k, v):
    """Attention of two heads, in float64."""
    q, k, v = (np.asarray(x, np.float64).reshape(*x.shape[:2], 2, -1) for x in (q, k, v))
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnqk,bknd->bqnd", weights, v).reshape(*q.shape[:2], -1)


def test_a_prefix_is_further_keys_and_values(layer, inputs):
    x, context = inputs
    model = registry.add(layer, registry.make_config("prefix", tokens=3), rngs=nnx.Rngs(1))
    state = scrambled(inject.extract(model), 1)
    model = inject.load_state(model, state)
    rows = {name: np.tile(value, (2, 1, 1)) for name, value in state.arrays.items()}
    k = np.concatenate([rows["to_k.prefix"], layer.to_k(context)], axis=1)
    v = np.concatenate([rows["to_v.prefix"], layer.to_v(context)], axis=1)
    expected = layer.to_out[0](jnp.asarray(attend(layer.to_q(x), k, v), jnp.float32))
    np.testing.assert_allclose(model(x, context), expected, atol=1e-5)
    off = inject.with_scale(model, 0.0)
    np.testing.assert_array_equal(off(x, context), layer(x, context))
    with pytest.raises(NotImplementedError, match="a prefix of a traced strength"):
        inject.with_scale(model, jnp.float32(1))(x, context)


def test_a_prefix_of_a_table_is_a_prompt():
    table = nnx.Sequential(nnx.Embed(7, 4, rngs=nnx.Rngs(0)))
    config = registry.make_config("prefix", targets=("layers.0",), tokens=2)
    model = registry.add(table, config, rngs=nnx.Rngs(1))
    found = model(jnp.array([[1, 2, 3]]))
    np.testing.assert_array_equal(found[0, :2], model.layers[0].prefix[...])
    np.testing.assert_array_equal(found[:, 2:], table(jnp.array([[1, 2, 3]])))


@pytest.mark.parametrize("output", [False, True])
def test_a_hypernetwork_changes_what_keys_and_values_are_made_of(layer, inputs, output):
    x, context = inputs
    config = HypernetworkConfig(
        structure=(1, 1.5, 2, 1), activation="relu", layer_norm=True, activate_output=output
    )
    model = registry.add(layer, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(x, context), layer(x, context), atol=1e-6)
    state = scrambled(inject.extract(model), 1)
    model = inject.with_scale(inject.load_state(model, state), 0.7)

    def changed(name):
        own = {key.rpartition(".")[2]: np.asarray(value, np.float64)
               for key, value in state.arrays.items() if key.startswith(name)}  # fmt: skip
        hidden = np.asarray(context, np.float64)
        for i in range(3):
            hidden = hidden @ own[f"kernel_{i}"] + own[f"bias_{i}"]
            hidden = np.maximum(hidden, 0) if i < 2 or output else hidden
            mean, variance = hidden.mean(-1, keepdims=True), hidden.var(-1, keepdims=True)
            hidden = (hidden - mean) / np.sqrt(variance + 1e-5)
            hidden = hidden * own[f"norm_{i}"] + own[f"shift_{i}"]
        return jnp.asarray(context + 0.7 * hidden, jnp.float32)

    k, v = layer.to_k(changed("to_k")), layer.to_v(changed("to_v"))
    expected = layer.to_out[0](jnp.asarray(attend(layer.to_q(x), k, v), jnp.float32))
    np.testing.assert_allclose(model(x, context), expected, atol=2e-5)


def test_settings():
    with pytest.raises(ValueError, match=r"structure is .* the first and the last 1"):
        HypernetworkConfig(structure=(1, 2))
    with pytest.raises(ValueError, match="activation is 'gelu', expected one of"):
        HypernetworkConfig(activation="gelu")
    with pytest.raises(ValueError, match="tokens is 0"):
        registry.make_config("prefix", tokens=0)


def test_ranks_and_whole_layers_are_dropped():
    """In training, with a key, and each sample has ranks of its own to lose."""
    layer = nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(0))
    inputs = np.random.default_rng(0).standard_normal((40, 3, 6), np.float32)

    def found(**options):
        config = registry.make_config("lora", targets=("layers.0",), rank=3, **options)
        model = registry.add(nnx.Sequential(layer), config, rngs=nnx.Rngs(0))
        model = inject.load_state(model, scrambled(inject.extract(model), 1))
        plain = model(inputs) - layer(inputs)
        seeded = [inject.seed_dropout(model, jax.random.key(seed)) for seed in range(12)]
        return model.layers[0], plain, [own(inputs) - layer(inputs) for own in seeded]

    own, plain, dropped = found(module_dropout=0.5)
    kept = [np.allclose(change, plain, atol=1e-5) for change in dropped]
    lost = [np.allclose(change, 0, atol=1e-5) for change in dropped]
    assert all(a != b for a, b in zip(kept, lost, strict=True)) and 0 < sum(kept) < 12

    own, plain, dropped = found(rank_dropout=0.5)
    low = inputs @ own.lora_A[...]
    # Each sample's change is that of some of its ranks, twice as large.
    masks = np.array([[a, b, c] for a in (0, 2) for b in (0, 2) for c in (0, 2)], np.float32)
    each = np.stack([(low * mask) @ own.lora_B[...] for mask in masks])
    close = np.abs(each - dropped[0]).max((-1, -2)) < 1e-5
    assert close.any(0).all() and len(set(close.argmax(0))) > 4
    assert np.abs(np.mean(dropped, (0, 1)) - plain.mean(0)).max() < 0.5
