"""Scanned layers give what unrolled ones give: values and gradients, with every kind of adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.models import repeat
from jaxsynth.models.clip import CLIPEncoder, CLIPTextConfig
from jaxsynth.models.layers import conv2d
from jaxsynth.models.repeat import run_layers
from tests.adapters.nets import scrambled
from tests.adapters.test_registry import TABLE

DEPTH = 2
WIDTH = 8
X = np.random.default_rng(0).standard_normal((2, 3, 3, WIDTH), np.float32)


class Block(nnx.Module):
    """A layer of each type that adapters wrap, as a residual."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = conv2d(WIDTH, WIDTH, 1, dtype=jnp.float32, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        rows = self.linear(jnp.tanh(self.conv(x)))
        # A prefix puts rows before them.
        return x + rows[..., -x.shape[-2] :, :] + rows.mean(-2, keepdims=True)


class Net(nnx.Module):
    def __init__(self, depth: int = DEPTH):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(Block(rngs=rngs) for _ in range(depth))

    def __call__(self, x):
        return run_layers(self.layers, x, lambda layer, x: layer(x), remat="block")


def both(model, x, key, monkeypatch):
    """Every layer's outputs and the gradient to what trains, scanned and unrolled, of one program.

    The adapters' strength is traced and their dropout has keys, as in a training.
    """
    graphdef, trainable, frozen = nnx.split(model, inject.Trainable, ...)

    def loss(trainable, *strength):
        merged = nnx.merge(graphdef, trainable, frozen)
        for value in strength:
            merged = inject.with_scale(merged, value)
        states = inject.seed_dropout(merged, key)(x)
        return jnp.square(states[-1]).mean(), states

    def gradients(*arguments):
        found = []
        for fewest in (DEPTH, DEPTH + 1):
            monkeypatch.setattr(repeat, "FEWEST", fewest)
            # Another function for each: JAX keeps what it has traced.
            own = jax.value_and_grad(lambda *args: loss(*args), has_aux=True)
            found.append(own(*arguments))
        return found

    # Tokens of a prefix are there or not.
    strength = () if "prefix" in trainable_names(model) else (jnp.float32(0.7),)
    traced = jax.jit(gradients).trace(trainable, *strength)
    return str(traced.jaxpr), *traced.lower().compile()(trainable, *strength)


def trainable_names(model) -> set[str]:
    return {path.rpartition(".")[2] for path in inject.trainable_variables(model)}


# Those that are quick, and of each sort: factors, a constant beside them, a norm of the weight.
QUICK = ("lora", "vera", "dora")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TABLE],
)
def test_a_scan_gives_what_unrolled_layers_give(name, monkeypatch):
    config = registry.make_config(name.partition("-")[0], **TABLE[name])
    model = registry.add(Net(), config, rngs=jax.random.key(1))
    state = inject.extract(model)
    model = inject.load_state(model, scrambled(state, 2))
    text, scanned, unrolled = both(model, X, jax.random.key(3), monkeypatch)
    # Forward and backward.
    assert text.count("scan[") == 2 and len(scanned[0][1]) == DEPTH
    for one, other in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        scale = max(float(jnp.abs(other).max()), 1e-3)
        np.testing.assert_allclose(one / scale, other / scale, atol=3e-6)


def test_layers_adapted_otherwise_are_unrolled_between_scans(monkeypatch):
    config = registry.make_config("lora", rank=2, targets=("layers.2.linear",))
    monkeypatch.setattr(repeat, "FEWEST", 2)
    plain = Net(5)
    model = registry.add(plain, config, rngs=jax.random.key(1))
    traced = str(jax.make_jaxpr(model)(X))
    assert traced.count("scan[") == 2  # layers 0 and 1, and 3 and 4
    monkeypatch.setattr(repeat, "FEWEST", 6)
    expected = jax.jit(lambda x: plain(x))(X)
    for one, other in zip(jax.jit(lambda x: model(x))(X), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_a_tower_recomputes_what_remat_names(remat, monkeypatch):
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=DEPTH, num_attention_heads=2
    )
    encoder = CLIPEncoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = X.reshape(2, -1, WIDTH)

    def gradient(fewest, remat):
        monkeypatch.setattr(repeat, "FEWEST", fewest)
        loss = lambda x: jnp.square(encoder(x, causal=True, remat=remat)[-1]).sum()  # noqa: E731
        traced = jax.jit(jax.grad(loss)).trace(x)
        return str(traced.jaxpr), traced.lower().compile()(x)

    text, scanned = gradient(DEPTH, remat)
    assert "remat" in text and "scan[" in text
    np.testing.assert_allclose(scanned, gradient(DEPTH + 1, None)[1], rtol=1e-5, atol=1e-6)
