"""Kinds on every layer that they wrap: tables, 1-D and 3-D convolutions, layers stacked to scan."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from tests.adapters.nets import scrambled
from tests.models.torch_parity import randomise

RANKED = {"rank": 2, "alpha": 5}
SETTINGS = {
    "lora": RANKED,
    "dora": RANKED,
    "pissa": RANKED,
    "locon": RANKED | {"decompose": "input", "detach_norm": False},
    "loha": RANKED | {"use_tucker": True},
    "lokr": RANKED | {"rank": 1, "factor": 2, "use_tucker": True, "decompose_both": True},
    "lokr-full": RANKED | {"full_matrix": True, "decompose": "input"},
    "vera": RANKED,
    "adalora": RANKED | {"target_rank": 1},
    "delta_lora": RANKED | {"ratio": 0.5},
    "glora": RANKED,
    "oft": {"block_size": 2, "side": "output"},
    "boft": {"block_size": 2, "side": "output", "rescale": True},
    "ia3": {"feedforward": ()},
    "full": {},
}
# The kinds that have code of their own for each place.
TABLES = ("dora", "locon", "loha", "lokr", "lokr-full", "boft", "ia3", "full")
WINDOWS = ("locon", "loha", "lokr", "lokr-full", "glora", "boft")
STACKED = ("pissa", "locon", "loha", "lokr", "vera", "adalora", "glora", "boft", "ia3")


def wrapped(layer, name: str):
    """One layer in an adapter with random factors."""
    options = {"targets": ("layers.0",)} | SETTINGS[name]
    config = registry.make_config(name.partition("-")[0], **options)
    model = registry.add(nnx.Sequential(layer), config, rngs=jax.random.key(0))
    state = inject.extract(model)
    moved = scrambled(state, 1).arrays
    arrays = {key: value + moved[key] for key, value in state.arrays.items()}
    return inject.load_state(model, inject.AdapterState(arrays, state.config))


def check(model, inputs, expected_change=1e-2) -> None:
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)
        merged = inject.merge(model)
        back = inject.unmerge(merged, model)
        return model(inputs), merged(inputs), inject.with_scale(model, 0.0)(inputs), back(inputs)

    found, merged, plain, back = run(state)
    bound = 2e-5 * np.abs(found).max()
    np.testing.assert_allclose(merged, found, atol=bound)
    np.testing.assert_allclose(back, found, atol=10 * bound)
    assert np.abs(found - plain).max() > expected_change


@pytest.mark.parametrize("name", TABLES)
def test_a_table(name):
    layer = nnx.Embed(12, 4, rngs=nnx.Rngs(0))
    check(wrapped(layer, name), jnp.array([[0, 11, 5], [3, 3, 7]]))


@pytest.mark.parametrize("name", WINDOWS)
def test_convolutions_of_one_and_three_axes(name):
    """Both at once, in one program."""

    class Both(nnx.Module):
        def __init__(self, rngs):
            self.line = nnx.Conv(4, 4, (2,), strides=2, padding="VALID", rngs=rngs)
            self.volume = nnx.Conv(4, 4, (1, 2, 1), padding=((0, 0), (1, 0), (0, 0)), rngs=rngs)

        def __call__(self, x):
            return self.volume(self.line(x.reshape(2, 8, 4)).reshape(2, 1, 2, 2, 4))

    options = {"targets": ("line", "volume")} | SETTINGS[name]
    config = registry.make_config(name.partition("-")[0], **options)
    model = registry.add(Both(nnx.Rngs(0)), config, rngs=jax.random.key(0))
    state = inject.extract(model)
    moved = scrambled(state, 1).arrays
    arrays = {key: value + moved[key] for key, value in state.arrays.items()}
    model = inject.load_state(model, inject.AdapterState(arrays, state.config))
    check(model, np.random.default_rng(0).standard_normal((2, 2, 4, 4), np.float32))


@pytest.mark.parametrize("name", STACKED)
def test_layers_stacked_for_a_scan(name):
    build = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
    adapted = wrapped(build(nnx.Rngs(0).split(3)), name)
    merged = inject.merge(adapted)
    assert merged.layers[0].kernel.shape == (3, 4, 4)
    back = inject.unmerge(merged, adapted).layers[0].base.kernel
    np.testing.assert_allclose(back[...], adapted.layers[0].base.kernel[...], atol=1e-4)

    @jax.jit
    def run(models):
        def through(stacked):
            graphdef, state = nnx.split(stacked)

            def body(x, s):
                return jnp.tanh(nnx.merge(graphdef, s)(x)), None

            return jax.lax.scan(body, jnp.ones((2, 4)), state)[0]

        return [through(model.layers[0]) for model in models]

    found, expected = run([adapted, merged])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_lora_on_a_table_equals_peft():
    plain = randomise(torch.nn.Sequential(torch.nn.Embedding(7, 4)))
    layer = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
    layer.embedding = nnx.Param(jnp.asarray(plain[0].weight.detach().numpy()))
    for decompose in ("none", "output"):
        config = LoRAConfig(rank=2, alpha=5, targets=("layers.0",), decompose=decompose)
        model = add_lora(nnx.Sequential(layer), config, rngs=nnx.Rngs(0))
        assert not np.any(model.layers[0].lora_embedding_A[...])
        state = scrambled(inject.extract(model), 3)
        model = inject.load_state(model, state)
        options = {"r": 2, "lora_alpha": 5, "target_modules": ["0"]}
        peft_config = peft.LoraConfig(**options, use_dora=decompose != "none")
        wrapped = peft.LoraModel(randomise(torch.nn.Sequential(torch.nn.Embedding(7, 4))),
                                 peft_config, "default")  # fmt: skip
        module = wrapped.model[0]
        with torch.no_grad():
            for name, value in state.arrays.items():
                factor = name.rpartition(".")[2]
                if factor == "magnitude":
                    target = module.lora_magnitude_vector["default"].weight
                    target.copy_(torch.from_numpy(np.array(value)).reshape(target.shape))
                else:
                    getattr(module, factor)["default"].copy_(torch.from_numpy(np.array(value.T)))
        ids = np.array([[0, 6, 3]])
        expected = wrapped.model(torch.from_numpy(ids)).detach()
        np.testing.assert_allclose(model(jnp.asarray(ids)), expected, atol=1e-5)


def test_what_a_kind_does_not_wrap_is_named():
    model = nnx.Sequential(nnx.Embed(6, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    for name, layer, message in (
        ("lora", "layers.1", "LoRA adapts nnx.Linear, nnx.Conv and nnx.Embed, found LayerNorm"),
        ("glora", "layers.0", "GLoRA adapts nnx.Linear and nnx.Conv, found Embed"),
        ("prefix", "layers.1", "a prefix stands before nnx.Linear and nnx.Embed, found LayerNorm"),
        ("hypernetwork", "layers.0", "a hypernetwork stands before nnx.Linear, found Embed"),
    ):
        with pytest.raises(TypeError, match=rf"{layer}: {message}"):
            registry.add(model, registry.make_config(name, targets=(layer,)), rngs=nnx.Rngs(0))
    for name, options, message in (
        ("oft", {}, "a table has no inputs to rotate"),
        ("oft", {"side": "output"}, "block_size 32 with butterfly 0 does not fit 4 output"),
        ("ia3", {"feedforward": ("layers.0",)}, "a table has no inputs to rescale"),
        ("pissa", {"rank": 5}, "rank 5, but a kernel of 6 rows and 4 columns has 4 principal"),
    ):
        config = registry.make_config(name, targets=("layers.0",), **options)
        with pytest.raises(ValueError, match=message):
            registry.add(model, config, rngs=nnx.Rngs(0))


def test_a_full_difference_changes_norms_too():
    norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 4), np.float32)
    config = registry.make_config("full", targets=("layers.0",), parameters="bias")
    model = registry.add(nnx.Sequential(norm), config, rngs=nnx.Rngs(0))
    assert list(inject.extract(model).arrays) == ["layers.0.diff_b"]
    shift = inject.AdapterState({"layers.0.diff_b": jnp.arange(4.0)}, config)
    shifted = inject.load_state(model, shift)
    np.testing.assert_allclose(shifted(x), norm(x) + np.arange(4), atol=1e-6)
    with pytest.raises(ValueError, match="Linear has no bias"):
        bare = nnx.Sequential(nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)))
        registry.add(bare, config, rngs=nnx.Rngs(0))
