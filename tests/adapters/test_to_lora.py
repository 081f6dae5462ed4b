"""Adapters of other kinds as LoRA, and their files in diffusers' format."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.to_lora import as_lora
from jaxsynth.weights.adapters.diffusers import read_diffusers, write_diffusers
from tests.adapters.nets import scrambled
from tests.adapters.oracles import TARGETS, Pair, images

RANKED = {"rank": 2, "alpha": 5, "targets": TARGETS}
# Settings, and the ranks of the convolution and of the linear layer.
CASES = {
    "loha": (RANKED | {"use_tucker": True}, (4, 4)),
    "lokr": (RANKED | {"rank": 1, "factor": 2}, (2, 2)),
    "lokr-both": (RANKED | {"rank": 1, "use_tucker": True, "decompose_both": True}, (1, 1)),
    "lokr-full": (RANKED | {"full_matrix": True, "factor": 2}, (12, 8)),
    "doha": (RANKED, (4, 4)),
    "locon": (RANKED, (2, 2)),
    "pissa": (RANKED, (4, 4)),
    "vera": (RANKED, (2, 2)),
    "delta_lora": (RANKED | {"ratio": 0.5}, (4, 4)),
    "glora": (RANKED, (10, 4)),
}


@pytest.fixture(scope="module")
def net():
    return Pair(rngs=nnx.Rngs(0))


def adapted(net, name):
    config = registry.make_config(name.partition("-")[0], **CASES[name][0])
    model = registry.add(net, config, rngs=jax.random.key(0))
    state = inject.extract(model)
    moved = scrambled(state, 1).arrays
    arrays = {key: value + moved[key] for key, value in state.arrays.items()}
    return inject.load_state(model, inject.AdapterState(arrays, state.config))


@pytest.mark.parametrize("name", CASES)
def test_a_kind_is_lora_of_its_rank_exactly(net, name, tmp_path):
    model = adapted(net, name)
    plain = as_lora(model)
    assert (plain.conv.lora_A.shape[-1], plain.linear.lora_A.shape[-1]) == CASES[name][1]
    forward = jax.jit(lambda models: [model(images()) for model in models])
    expected, found = forward([model, plain])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    if name == "doha":
        return
    # The file that diffusers reads holds the same.
    path = tmp_path / "lora.safetensors"
    write_diffusers(path, {"unet": inject.extract(plain)})
    state = read_diffusers(path)["unet"]
    again = registry.add(net, state.config, rngs=jax.random.key(1))
    found = inject.extract(inject.load_state(again, state)).arrays
    jax.tree.map(np.testing.assert_array_equal, found, inject.extract(plain).arrays)


def test_pruned_ranks_are_left_out(net):
    config = registry.make_config("adalora", **RANKED | {"rank": 3}, target_rank=1)
    model = registry.add(net, config, rngs=jax.random.key(0))
    arrays = inject.extract(model).arrays
    arrays["conv.lora_E"] = np.array([0.0, 2.0, 0.0], np.float32)
    model = inject.load_state(model, inject.AdapterState(arrays, config))
    plain = as_lora(model)
    assert plain.conv.lora_A.shape[-1] == plain.linear.lora_A.shape[-1] == 1
    expected = model.conv.delta()
    np.testing.assert_allclose(plain.conv.delta(), expected, atol=1e-7)
    assert not np.any(plain.linear.delta())


def test_what_is_no_lora_is_named(net):
    with pytest.raises(ValueError, match="holds no adapters"):
        as_lora(net)
    model = registry.add(
        net, registry.make_config("ia3", targets=("linear",)), rngs=jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"linear: a \(IA\)\^3 layer adds no kernel"):
        as_lora(model)
