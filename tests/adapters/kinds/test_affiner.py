"""The Affiner's formula, its identity at the start, its merged form and its places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.affiner import Affiner, AffinerConfig, add_affiner
from tests.adapters.nets import Net, randomised
from tests.adapters.test_inject import with_affiner


def wrapped(layer, seed=1, **options):
    """One layer in an Affiner whose every factor is random."""
    model = nnx.Sequential(layer)
    config = AffinerConfig(**{"rank": 2, "targets": ("layers.0",)} | options)
    return with_affiner(model, seed, config)


def linear(use_bias=True, **options):
    return nnx.Linear(5, 4, use_bias=use_bias, bias_init=nnx.initializers.normal(), **options)


@pytest.mark.parametrize("form", ["merging", "relu"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_formula(form, side):
    layer = linear(rngs=nnx.Rngs(0))
    model = wrapped(layer, form=form, scale_side=side)
    a, b, down, up, s = (
        np.asarray(getattr(model.layers[0], name)[...], np.float64)
        for name in ("scale", "shift", "down", "up", "gate")
    )
    W, b0 = (np.asarray(v[...], np.float64) for v in (layer.kernel, layer.bias))
    x = np.random.default_rng(0).normal(size=(3, 5))
    low = x @ down
    if form == "relu":
        low = np.maximum(low, 0)
    full = (x * a) @ W + b0 if side == "input" else (x @ W + b0) * a
    np.testing.assert_allclose(model(x.astype(np.float32)), full + b + s * low @ up, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"form": "relu"}, {"gate": False}, {"rank": 0}], ids=str)
def test_untrained_it_is_the_base_to_the_bit(options):
    net = Net(rngs=nnx.Rngs(0))
    config = AffinerConfig(**{"rank": 3, "targets": ("down", "mix", "blocks.0")} | options)
    adapted = add_affiner(net, config, rngs=nnx.Rngs(1))
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    np.testing.assert_array_equal(adapted(images), net(images))


def test_a_pattern_sets_the_rank_of_some_layers():
    config = AffinerConfig(
        rank=3, targets=("down", "mix", "blocks.0"), rank_pattern={"mix": 2, r"blocks\.\d": 0}
    )
    net = add_affiner(Net(rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    ranks = {
        path: layer.down.get_value().shape[-1] if layer.down is not None else 0
        for path, layer in inject.layers(net).items()
        if isinstance(layer, Affiner)
    }
    assert ranks == {"down": 3, "mix": 2, "blocks.0": 0}


def test_initial_factors_are_kaiming_normal_and_the_gate_moves_first():
    layer = nnx.Linear(256, 128, rngs=nnx.Rngs(0))
    config = AffinerConfig(rank=64, targets=("layers.0",))
    model = add_affiner(nnx.Sequential(layer), config, rngs=nnx.Rngs(1))
    own = model.layers[0]
    assert float(own.down[...].std()) == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert float(own.up[...].std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    graphdef, trainable, frozen = nnx.split(model, inject.Trainable, ...)
    x = jax.random.normal(jax.random.key(0), (8, 256))
    grads = jax.grad(lambda t: (nnx.merge(graphdef, t, frozen)(x) ** 2).sum())(trainable)
    found = inject.extract(nnx.merge(graphdef, grads, frozen)).arrays
    assert not found["layers.0.down"].any() and not found["layers.0.up"].any()
    assert all(found[f"layers.0.{name}"].any() for name in ("scale", "shift", "gate"))


@pytest.mark.parametrize("side", ["input", "output", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 3), "padding": ((1, 1), (1, 1))},
        {"kernel_size": (3, 3), "padding": ((0, 1), (0, 1)), "strides": 2},
        {"kernel_size": (5, 3), "padding": "SAME", "strides": (2, 1)},
        {"kernel_size": (3, 3), "padding": 2, "kernel_dilation": (1, 2)},
        {"kernel_size": (1, 1), "padding": 0, "use_bias": False},
        {"kernel_size": (2, 2), "padding": "VALID", "strides": 2},
        {"kernel_size": (3,), "padding": "SAME", "strides": 2},
        {"kernel_size": (3, 1, 3), "padding": 1, "strides": (1, 2, 1)},
    ],
    ids=str,
)
def test_convolutions_equal_their_merged_kernel(options, side):
    layer = nnx.Conv(4, 6, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0), **options)
    model = wrapped(layer, scale_side=side)
    sizes = (9, 8, 5)[: len(options["kernel_size"])]
    images = jax.random.normal(jax.random.key(0), (2, *sizes, 4))
    merged = inject.merge(model)
    np.testing.assert_allclose(model(images), merged(images), atol=1e-5)
    assert np.abs(model(images) - layer(images)).max() > 0.1
    back = inject.unmerge(merged, model).layers[0].base
    np.testing.assert_allclose(back.kernel[...], layer.kernel[...], atol=1e-5)


def test_a_layer_without_bias_gets_one_and_loses_it_again():
    layer = linear(use_bias=False, rngs=nnx.Rngs(0))
    model = wrapped(layer)
    x = jax.random.normal(jax.random.key(0), (3, 5))
    merged = inject.merge(model)
    assert merged.layers[0].use_bias
    np.testing.assert_allclose(merged(x), model(x), atol=1e-5)
    back = inject.unmerge(merged, model)
    assert back.layers[0].base.bias is None
    np.testing.assert_allclose(back(x), model(x), atol=1e-5)
    plain = inject.merge(wrapped(layer, shift=False))
    assert plain.layers[0].bias is None


def test_stacked_layers_equal_single_ones():
    """A scanned block's layer has a leading axis of layers; so have its factors."""

    def build(key):
        return wrapped(linear(rngs=nnx.Rngs(key)), seed=3)

    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(build)(keys)
    x = jax.random.normal(jax.random.key(1), (2, 5))
    merged = jax.vmap(lambda model, x: model(x), in_axes=(0, None))(inject.merge(stacked), x)
    np.testing.assert_allclose(
        merged, jax.vmap(lambda model, x: model(x), in_axes=(0, None))(stacked, x), atol=1e-5
    )

    @jax.vmap
    def layer_of(key):
        return linear(rngs=nnx.Rngs(key))

    model = add_affiner(
        nnx.Sequential(layer_of(keys)),
        AffinerConfig(rank=2, targets=("layers.0",)),
        rngs=nnx.Rngs(0),
    )
    shapes = {name: value.shape for name, value in inject.extract(model).arrays.items()}
    assert shapes == {
        "layers.0.down": (3, 5, 2),
        "layers.0.gate": (3,),
        "layers.0.scale": (3, 5),
        "layers.0.shift": (3, 4),
        "layers.0.up": (3, 2, 4),
    }


def test_compute_dtype_is_the_base_layers():
    layer = linear(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = wrapped(layer)
    assert model.layers[0].down.get_value().dtype == jnp.float32
    x = jnp.ones((2, 5), jnp.bfloat16)
    assert model(x).dtype == jnp.bfloat16
    assert inject.merge(model).layers[0].kernel[...].dtype == jnp.bfloat16


def test_what_cannot_be_done_is_said():
    model = wrapped(linear(rngs=nnx.Rngs(0)), form="relu")
    with pytest.raises(NotImplementedError, match="ReLU between its factors"):
        inject.merge(model)
    with pytest.raises(ValueError, match="rank is -1"):
        AffinerConfig(rank=-1)
    with pytest.raises(ValueError, match="mix is -2"):
        AffinerConfig(rank_pattern={"mix": -2})
    with pytest.raises(ValueError, match="scale_side is 'left'"):
        AffinerConfig(scale_side="left")
    with pytest.raises(ValueError, match="nothing to train"):
        AffinerConfig(rank=0, scale_side="none", shift=False)
    with pytest.raises(TypeError, match=r"wraps nnx.Linear and nnx.Conv, found LayerNorm"):
        wrapped(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    grouped = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Affiner on a convolution needs feature_group_count 1"):
        wrapped(grouped)


def test_rank_zero_has_scale_and_shift_alone():
    model = wrapped(linear(rngs=nnx.Rngs(0)), rank=0)
    assert isinstance(model.layers[0], Affiner)
    assert set(inject.extract(model).arrays) == {"layers.0.scale", "layers.0.shift"}
    state = randomised(inject.extract(model), 5)
    again = inject.load_state(model, state)
    x = jax.random.normal(jax.random.key(0), (3, 5))
    np.testing.assert_allclose(inject.merge(again)(x), again(x), atol=1e-5)
