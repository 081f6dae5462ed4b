"""New input channels beside a frozen convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.adapters.surgery.input_channels import extend_input
from tests.adapters.nets import Net


@pytest.fixture
def net():
    return Net(rngs=nnx.Rngs(0))


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (2, 8, 8, 5))


def filled(extended):
    keys = jax.random.split(jax.random.key(2), 2)
    arrays = {
        name: jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, inject.extract(extended).arrays.items(), strict=False)
    }
    return inject.load_state(extended, inject.AdapterState(arrays))


def gated(net):
    return extend_input(net, "down", 2, gate=True, rngs=nnx.Rngs(3))


def test_untrained_channels_change_nothing(net, images):
    extended = extend_input(net, "down", 2)
    np.testing.assert_array_equal(extended(images), net(images[..., :3]))
    assert inject.extract(extended).arrays["down.side.kernel"].shape == (3, 3, 2, 8)
    assert extended.down.base.kernel is net.down.kernel
    with pytest.raises(ValueError, match="expected 5 input channels, found 3"):
        extended(images[..., :3])


def test_gradients_reach_the_new_channels_alone(net, images):
    graphdef, trainable, frozen = nnx.split(extend_input(net, "down", 2), inject.Trainable, ...)
    grads = jax.grad(lambda t: nnx.merge(graphdef, t, frozen)(images).sum())(trainable)
    (grad,) = jax.tree.leaves(grads)
    assert grad.shape == (3, 3, 2, 8) and np.abs(grad).min() > 0


def test_a_gate_of_zero_is_the_start_of_a_random_kernel(net, images):
    extended = gated(net)
    np.testing.assert_array_equal(extended(images), net(images[..., :3]))
    arrays = inject.extract(extended).arrays
    assert arrays.keys() == {"down.gate", "down.side.kernel"} and arrays["down.gate"] == 0
    wide = extend_input(net, "down", 64, gate=True, rngs=nnx.Rngs(3)).down.side.kernel[...]
    np.testing.assert_allclose(wide.std(), np.sqrt(2 / (3 * 3 * 64)), rtol=0.05)
    again, other = gated(net), extend_input(net, "down", 2, gate=True, rngs=nnx.Rngs(4))
    np.testing.assert_array_equal(again.down.side.kernel[...], extended.down.side.kernel[...])
    assert np.abs(other.down.side.kernel[...] - extended.down.side.kernel[...]).max() > 0.1

    graphdef, trainable, frozen = nnx.split(extended, inject.Trainable, ...)
    grads = jax.grad(lambda t: nnx.merge(graphdef, t, frozen)(images).sum())(trainable)
    assert np.abs(grads.down.gate[...]) > 0 and not np.abs(grads.down.side.kernel[...]).any()
    with pytest.raises(ValueError, match="down: a gated kernel is random, and needs `rngs`"):
        extend_input(net, "down", 2, gate=True)


@pytest.mark.parametrize("extend", [lambda net: extend_input(net, "down", 2), gated])
def test_strength_merge_and_unmerge(extend, net, images):
    trained = filled(extend(net))
    assert np.abs(trained(images) - net(images[..., :3])).max() > 0.1
    off = inject.with_scale(trained, 0.0)
    np.testing.assert_array_equal(off(images), net(images[..., :3]))
    forward = nnx.jit(lambda model, x: model(x))
    none = forward(inject.with_scale(trained, jnp.float32(0)), images)
    np.testing.assert_array_equal(none, forward(net, images[..., :3]))
    half = inject.with_scale(trained, 0.5)
    merged = inject.merge(half)
    assert type(merged.down) is nnx.Conv and merged.down.kernel.shape == (3, 3, 5, 8)
    assert merged.down.in_features == 5 and trained.down.base.in_features == 3
    np.testing.assert_allclose(merged(images), half(images), atol=1e-5)
    back = inject.unmerge(merged, half)
    np.testing.assert_array_equal(back(images), half(images))


def test_it_stands_beside_other_adapters(net, images):
    both = add_lora(extend_input(net, "down", 2), LoRAConfig(targets=("mix",)), rngs=nnx.Rngs(0))
    state = inject.extract(both)
    assert state.config.targets == ("mix",)
    assert {name.split(".")[0] for name in state.arrays} == {"down", "mix"}
    np.testing.assert_array_equal(both(images), net(images[..., :3]))


def test_wrong_layers_are_named(net):
    with pytest.raises(TypeError, match=r"blocks\.0: only nnx\.Conv gets channels, found Linear"):
        extend_input(net, "blocks.0", 2)
    with pytest.raises(ValueError, match="down: 0 new channels"):
        extend_input(net, "down", 0)
    with pytest.raises(ValueError, match="match no layer"):
        extend_input(net, "up", 1)
