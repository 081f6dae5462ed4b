"""The package's own adapter format: any kind of state, there and back, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxsynth.adapters.inject import AdapterState, extract, load_state, mark_trainable
from jaxsynth.adapters.kinds.affiner import AffinerConfig, add_affiner
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.adapters.surgery.class_rows import extend_table
from jaxsynth.core.errors import UserError
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.weights.adapters.native import read_state, write_state
from tests.adapters.nets import randomised
from tests.methods.small_base import random_network

DIT = DiTConfig(
    num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=4, num_embeds_ada_norm=3
)
TARGETS = ("to_q", "pos_embed.proj", "proj_out_2")
TABLE = "class_embedder.embedding_table"
LORA = LoRAConfig(rank=2, alpha=5.0, targets=TARGETS, rank_pattern={"proj_out_2": 1})
AFFINER = AffinerConfig(rank=3, targets=TARGETS, scale_side="output", form="relu")
KINDS = {
    "lora": lambda model: add_lora(model, LORA, rngs=nnx.Rngs(0)),
    "affiner": lambda model: add_affiner(
        extend_table(model, TABLE, 2, start=3), AFFINER, rngs=nnx.Rngs(0)
    ),
    "biases": lambda model: mark_trainable(model, [".*bias"]),
    "rows": lambda model: extend_table(model, TABLE, 2, start=3),
    "whole": mark_trainable,
}
CONFIGS = {"lora": LORA, "affiner": AFFINER}


@pytest.fixture(scope="module")
def base() -> DiT:
    return random_network(DiT, DIT, 0)


@jax.jit
def apply(model: DiT, label: int):
    """The output for an old class and for another label."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    return model(x, jnp.array([3, 700]), jnp.array([1, label]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_as_it_was(base, tmp_path, kind):
    empty = KINDS[kind](base)
    state = randomised(extract(empty), 1)
    path = tmp_path / "adapter.safetensors"
    write_state(path, state)
    found = read_state(path)
    assert found.config == state.config == CONFIGS.get(kind)
    assert found.arrays.keys() == state.arrays.keys()
    for name, value in state.arrays.items():
        assert found.arrays[name].dtype == value.dtype and found.arrays[name].shape == value.shape
        np.testing.assert_array_equal(found.arrays[name], value, err_msg=name)
    label = 4 if kind in ("affiner", "rows") else 2
    out = apply(load_state(empty, found), label)
    np.testing.assert_array_equal(out, apply(load_state(empty, state), label))
    assert np.abs(out - apply(empty, label)).max() > 1e-3
    # The same state gives the same bytes, and nothing is left beside them.
    before = path.read_bytes()
    write_state(path, found)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    state = AdapterState({"a.bias": jnp.arange(3.0, dtype=jnp.bfloat16), "b.gate": jnp.ones(())})
    write_state(tmp_path / "x.safetensors", state)
    found = read_state(tmp_path / "x.safetensors")
    assert found.arrays["a.bias"].dtype == jnp.bfloat16 and found.arrays["b.gate"].shape == ()
    np.testing.assert_array_equal(found.arrays["a.bias"], state.arrays["a.bias"])


def test_a_file_says_what_it_is(base, tmp_path):
    path = tmp_path / "x.safetensors"
    write_state(path, extract(KINDS["affiner"](base)))
    with safe_open(path, framework="numpy") as handle:
        metadata, names = handle.metadata(), set(handle.keys())
    assert (metadata["format"], metadata["kind"]) == ("jaxsynth.adapter", "AffinerConfig")
    assert json.loads(metadata["config"])["targets"] == list(TARGETS)
    assert {f"{TABLE}.rows", "transformer_blocks.attn1.to_q.gate", "proj_out_2.up"} <= names


def metadata(**changes) -> dict[str, str]:
    good = {"format": "jaxsynth.adapter", "kind": "AffinerConfig", "config": '{"rank": 2}'}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "format None, expected 'jaxsynth.adapter'; .* weights.adapters"),
        ({"format": "pt"}, "format 'pt', expected"),
        ({"kind": "DoRAConfig"}, r"kind 'DoRAConfig', expected one of \['AdaLoRAConfig', 'Affiner"),
        ({"kind": None}, "kind None, expected one of"),
        ({"config": '{"rnak": 2}'}, "config of AffinerConfig: .*rnak"),
        ({"config": '{"rank": -2}'}, "config of AffinerConfig: .*rank is -2"),
        ({"config": "{"}, "config of AffinerConfig: "),
        ({"config": None}, "config of AffinerConfig: "),
    ],
)
def test_a_file_that_is_no_such_adapter_is_named(tmp_path, changes, message):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, path, metadata=metadata(**changes))
    with pytest.raises(UserError, match=f"x.safetensors: {message}"):
        read_state(path)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"x\.safetensors: no such file"):
        read_state(path)
    save_file({"a": np.zeros(2, np.float32)}, path, metadata=metadata())
    assert read_state(path).config == AffinerConfig(rank=2)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_state(path)


def test_a_state_of_another_network_is_refused(base, tmp_path):
    path = tmp_path / "x.safetensors"
    write_state(path, extract(KINDS["rows"](base)))
    wider = extend_table(base, TABLE, 4, start=3)
    with pytest.raises(ValueError, match=r"rows has shape \(2, 16\), expected \(4, 16\)"):
        load_state(wider, read_state(path))
    with pytest.raises(ValueError, match=r"missing keys .* unknown keys"):
        load_state(KINDS["lora"](base), read_state(path))


def test_integers_are_refused(tmp_path):
    state = AdapterState({"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.int32)})
    with pytest.raises(TypeError, match="b: int32, expected one of"):
        write_state(tmp_path / "x.safetensors", state)


def test_a_configuration_without_a_format_is_refused(tmp_path):
    with pytest.raises(TypeError, match="no format for DiTConfig, expected one of"):
        write_state(tmp_path / "x.safetensors", AdapterState({"a": jnp.zeros(2)}, DIT))
    assert not list(tmp_path.iterdir())
