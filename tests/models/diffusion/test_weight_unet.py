"""The UNet over blocks of weights: shapes, what its output depends on, and its structure."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.models.diffusion.weight_unet import WeightUNet, WeightUNetConfig, _convolve
from tests.methods.small_base import random_network

CONFIG = WeightUNetConfig(
    sample_size=32,
    patch_size=4,
    block_out_channels=(8, 16, 16),
    attention_head_dim=8,
    cross_attention_dim=12,
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def model() -> WeightUNet:
    return random_network(WeightUNet, CONFIG, 0)


@jax.jit
def apply(model, *inputs):
    return model(*inputs)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(1), 2)
    blocks = jax.random.normal(keys[0], (5, 32))
    context = jax.random.normal(keys[1], (5, 6, 12))
    return blocks, jnp.array([0, 10, 300, 700, 999]), jnp.arange(5), context


def test_every_input_counts_and_rows_do_not_mix(model, inputs):
    out = apply(model, *inputs)
    assert out.shape == (5, 32) and out.dtype == jnp.float32
    order = jnp.array([3, 0, 4, 1, 2])
    for number in range(4):
        changed = list(inputs)
        changed[number] = inputs[number][order]
        other = apply(model, *changed)
        assert (jnp.abs(other - out).max(-1) > 1e-3).all(), f"input {number}"
    together = apply(model, *(x[order] for x in inputs))
    np.testing.assert_allclose(together, out[order], atol=1e-5)


def test_each_value_sees_the_whole_block(model, inputs):
    def one(values):
        return model(values[None], *(x[:1] for x in inputs[1:]))[0]

    reach = jnp.abs(jax.jit(jax.jacobian(one))(inputs[0][0]))
    assert (reach > 0).all()


@pytest.mark.heavy
def test_gradients_reach_every_parameter(model, inputs):
    graphdef, state = nnx.split(model)

    def loss(state):
        return jnp.square(nnx.merge(graphdef, state)(*inputs)).mean()

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        assert np.abs(gradient[...]).max() > 0, path


def test_three_resolutions_with_their_skips():
    model = nnx.eval_shape(lambda: WeightUNet(CONFIG, rngs=nnx.Rngs(0)))
    down, up = list(model.down_blocks), list(model.up_blocks)
    assert len(down) == len(up) == 2 and len(list(model.mid_block.resnets)) == 2
    assert model.position.shape == (8, 8)
    # What comes from below and the skip, side by side.
    assert [block.resnet.conv1.in_features for block in up] == [16 + 16, 16 + 8]
    assert model.mid_block.resnets[1].conv1.in_features == 16 + 16


def test_untrained_it_predicts_zeros(inputs):
    model = WeightUNet(CONFIG, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(apply(model, *inputs), 0)


def test_it_computes_in_sixteen_bits(inputs):
    half = WeightUNet(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    jaxpr = str(jax.make_jaxpr(lambda *x: half(*x))(*inputs))
    assert "bf16" in jaxpr
    assert jax.eval_shape(lambda *x: half(*x), *inputs).dtype == jnp.float32


@pytest.mark.parametrize("stride", [1, 2])
def test_the_product_is_the_convolution(key, stride):
    x = jax.random.normal(key, (3, 8, 5))
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (3, 5, 7))
    arguments = (x, kernel, (stride,), ((1, 1),))
    expected = jax.lax.conv_general_dilated(*arguments, dimension_numbers=("NHC", "HIO", "NHC"))
    np.testing.assert_allclose(jax.jit(partial(_convolve), static_argnums=(2, 3))(*arguments),
                               expected, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 24}, "sample_size 24 is not divisible by 16"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"block_out_channels": (8,)}, "expected at least two levels"),
        ({"norm_num_groups": 3}, "norm_num_groups: 3 does not divide 8"),
        ({"attention_head_dim": 5}, "attention_head_dim: 5 does not divide 8"),
    ],
)
def test_a_network_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_config_comes_from_json():
    values = dataclasses.asdict(CONFIG)
    assert WeightUNetConfig.from_dict(values | {"block_out_channels": [8, 16, 16]}) == CONFIG
    with pytest.raises(ValueError, match="unknown field 'width'"):
        WeightUNetConfig.from_dict(values | {"width": 3})
