"""Collections of weights: statistics, the file there and back, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxsynth.adapters.flatten import PER, Layout
from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.errors import UserError
from jaxsynth.methods.weightgen.collection import (
    Statistics,
    WeightCollection,
    read_collection,
    write_collection,
)

STATE = AdapterState(
    {
        "down.lora_A": jnp.zeros((3, 2)),
        "down.lora_B": jnp.zeros((2, 4)),
        "up.lora_A": jnp.zeros((4, 2)),
        "up.bias": jnp.zeros(3),
    }
)
LAYOUT = Layout.of(STATE, 4)
TEXTS = (("a mosaic",), ("blurred", "out of focus"), ("red hair — 赤い",))
FAMILIES = ("artistic", "artistic", "facial")


def collected(seed: int = 0) -> WeightCollection:
    rng = np.random.default_rng(seed)
    states = [
        [
            AdapterState(
                {
                    name: jnp.asarray(rng.normal(2.0, 3.0, value.shape), jnp.float32)
                    for name, value in STATE.arrays.items()
                }
            )
            for _ in range(2)
        ]
        for _ in TEXTS
    ]
    return WeightCollection.of(states, TEXTS, FAMILIES, LAYOUT, "base-digest")


@pytest.mark.parametrize("per", PER)
def test_statistics_are_those_of_their_parts(per):
    made = collected()
    statistics = made.statistics(per)
    parts = LAYOUT.parts(per)
    for number in range(parts.max() + 1):
        own = made.blocks[:, :, parts == number]
        assert statistics.mean[number] == pytest.approx(own.mean(), rel=1e-5)
        assert statistics.std[number] == pytest.approx(own.std(), rel=1e-5)
    normal = statistics.normalised(made.blocks, LAYOUT)
    for number in range(parts.max() + 1):
        own = normal[:, :, parts == number]
        assert own.mean() == pytest.approx(0, abs=1e-5) and own.std() == pytest.approx(1, rel=1e-4)
    assert not normal[..., ~LAYOUT.mask].any()
    np.testing.assert_allclose(statistics.restored(normal, LAYOUT), made.blocks, atol=1e-5)


def test_a_part_that_never_varies_keeps_its_value():
    blocks = np.ones((5, LAYOUT.num_blocks, 4), np.float32) * LAYOUT.mask
    statistics = Statistics.of(blocks, LAYOUT, "array")
    np.testing.assert_array_equal(statistics.std, 1)
    np.testing.assert_array_equal(statistics.normalised(blocks, LAYOUT), 0)
    np.testing.assert_array_equal(statistics.restored(0 * blocks, LAYOUT), blocks)


def test_a_collection_comes_back(tmp_path):
    made = collected()
    path = tmp_path / "weights.safetensors"
    write_collection(path, made)
    found = read_collection(path, LAYOUT, "base-digest")
    np.testing.assert_array_equal(found.blocks, made.blocks)
    assert (found.texts, found.families, found.layout) == (TEXTS, FAMILIES, LAYOUT)
    before = path.read_bytes()
    write_collection(path, found)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="numpy") as handle:
        np.testing.assert_array_equal(handle.get_tensor("std"), made.statistics().std)


def test_another_base_or_layout_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_collection(path, collected())
    with pytest.raises(UserError, match=r"weights.safetensors: .* base base-digest, .* is other"):
        read_collection(path, LAYOUT, "other")
    with pytest.raises(UserError, match="blocks of 4 values, expected 8"):
        read_collection(path, Layout.of(STATE, 8), "base-digest")
    arrays = dict(STATE.arrays) | {"up.bias": jnp.zeros(2)}
    with pytest.raises(
        UserError, match=r"layout: up.bias of shape \(\d,\) is (missing|unexpected)"
    ):
        read_collection(path, Layout.of(AdapterState(arrays), 4), "base-digest")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    made = collected()
    blocks = made.blocks.copy()
    blocks[1, 1, -1, 0] = value
    with pytest.raises(ValueError, match=r"'blurred', checkpoint 1: the weights of up are not fin"):
        WeightCollection(blocks, TEXTS, FAMILIES, LAYOUT, "base-digest")
    path = tmp_path / "weights.safetensors"
    write_collection(path, made)
    rewrite(path, blocks=blocks)
    with pytest.raises(UserError, match=r"weights.safetensors: blocks: holds NaN or inf"):
        read_collection(path, LAYOUT, "base-digest")


def rewrite(path, metadata=None, **tensors):
    """The file with other tensors (None removes one) or metadata."""
    with safe_open(path, framework="numpy") as handle:
        old = {key: handle.get_tensor(key) for key in sorted(handle.keys())}
        found = handle.metadata() | (metadata or {})
    kept = {name: value for name, value in (old | tensors).items() if value is not None}
    save_file(kept, path, metadata=found)


def note(**changes) -> dict[str, str]:
    value = {"texts": TEXTS, "families": FAMILIES, "layout": LAYOUT.to_json(), "base": "b"}
    value = {name: x for name, x in (value | changes).items() if x is not None}
    return {"collection": json.dumps(value)}


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"format": "pt"}, {}, "format 'pt', expected 'jaxsynth.weights'"),
        ({"collection": "{"}, {}, "collection: not valid JSON"),
        (note(base=None), {}, "collection: base is missing"),
        (note(layout={"block": 4}), {}, "collection: entries is missing"),
        (note(families=("artistic",)), {}, "1 family for 3 concepts"),
        (note(texts=(("a",), (), ("b",))), {}, "concept 1 has no text"),
        (note(), {"blocks": None}, "blocks is missing"),
        (note(), {"blocks": np.zeros((3, 2, 1, 4), np.float32)}, "blocks have shape"),
        (note(), {"std": np.full(2, 9, np.float32)}, "std is not that of the blocks"),
    ],
)
def test_a_file_that_is_no_collection_is_named(tmp_path, metadata, tensors, message):
    path = tmp_path / "weights.safetensors"
    write_collection(path, collected())
    rewrite(path, note() | metadata, **tensors)
    with pytest.raises(UserError, match=f"weights.safetensors: {message}"):
        read_collection(path, LAYOUT, "b")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors: no such file"):
        read_collection(tmp_path / "none.safetensors", LAYOUT, "b")
