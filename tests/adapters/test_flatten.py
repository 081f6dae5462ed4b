"""States as blocks: the exact round trip, groups and parts, and low-rank pairs made unique."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import flatten
from jaxsynth.adapters.flatten import Layout, layer_of, pairs
from jaxsynth.adapters.inject import AdapterState, extract, freeze, load_state
from jaxsynth.adapters.kinds.lora import add_lora
from tests.adapters.nets import CONFIG, Net, randomised

canonical = jax.jit(flatten.canonical)


@pytest.fixture(scope="module")
def adapted() -> Net:
    return add_lora(Net(rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def state(adapted) -> AdapterState:
    return randomised(extract(adapted), 2)


@pytest.mark.parametrize("block", [1, 7, 32, 256, 5000])
def test_blocks_hold_a_state_exactly(state, block):
    layout = Layout.of(state, block)
    cut = layout.to_blocks(state)
    assert cut.shape == (layout.num_blocks, block) and cut.dtype == jnp.float32
    found = layout.from_blocks(cut)
    assert found.config == state.config and list(found.arrays) == list(state.arrays)
    for name, value in state.arrays.items():
        assert found.arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(found.arrays[name], value, err_msg=name)
    # Every value once, and zeros in between.
    values = np.concatenate([np.asarray(x).ravel() for x in state.arrays.values()])
    assert layout.num_values == values.size == layout.mask.sum()
    np.testing.assert_array_equal(np.sort(np.asarray(cut)[layout.mask]), np.sort(values))
    assert not np.asarray(cut)[~layout.mask].any()


def test_sixteen_bits_and_scalars_come_back(key):
    arrays = {
        "b.norm.bias": jax.random.normal(key, (5,)).astype(jnp.bfloat16),
        "a.gate": jnp.float32(0.1),
        "a.rows": jax.random.normal(key, (2, 3)).astype(jnp.float16),
    }
    state = AdapterState(arrays)
    layout = Layout.of(state, 4)
    assert layout.groups == ("a", "b.norm") and layout.counts == (2, 2)
    found = layout.from_blocks(layout.to_blocks(state))
    for name, value in arrays.items():
        assert found.arrays[name].dtype == value.dtype and found.arrays[name].shape == value.shape
        np.testing.assert_array_equal(found.arrays[name], value)


def test_a_group_is_one_layer_and_starts_a_block(state):
    layout = Layout.of(state, 16)
    assert layout.groups == ("blocks.0", "blocks.1", "down", "mix")
    sizes = [
        sum(x.size for name, x in state.arrays.items() if layer_of(name) == group)
        for group in layout.groups
    ]
    assert layout.counts == tuple(-(-size // 16) for size in sizes)
    found = np.asarray(layout.to_blocks(state))
    own = found[layout.group_index == 2].ravel()
    first, second = state.arrays["down.lora_A"], state.arrays["down.lora_B"]
    np.testing.assert_array_equal(own[: first.size], np.ravel(first))
    np.testing.assert_array_equal(own[first.size :][: second.size], np.ravel(second))


def test_groups_can_be_joined(state):
    layout = Layout.of(state, 16, group=lambda name: name.split(".")[0])
    assert layout.groups == ("blocks", "down", "mix")
    np.testing.assert_array_equal(
        layout.from_blocks(layout.to_blocks(state)).arrays["mix.lora_B"], state.arrays["mix.lora_B"]
    )


def test_parts_number_groups_arrays_and_values(state):
    layout = Layout.of(state, 16)
    group, array, value = (layout.parts(per) for per in ("group", "array", "value"))
    np.testing.assert_array_equal(np.unique(group), np.arange(-1, 4))
    np.testing.assert_array_equal(np.unique(array), np.arange(-1, 8))
    np.testing.assert_array_equal(value[layout.mask], np.arange(layout.num_values))
    names = [entry.name for entry in layout.entries]
    picked = np.asarray(layout.to_blocks(state))[array == names.index("mix.lora_A")]
    np.testing.assert_array_equal(picked, np.ravel(state.arrays["mix.lora_A"]))
    with pytest.raises(ValueError, match="per is 'layer', expected one of group, array, value"):
        layout.parts("layer")


def test_a_layout_survives_json(state):
    layout = Layout.of(state, 16)
    assert Layout.from_json(layout.to_json(), state.config) == layout
    assert Layout.from_json(layout.to_json()) != layout  # the configuration is not in it


def test_what_does_not_fit_is_named(state):
    layout = Layout.of(state, 16)
    arrays = dict(state.arrays)
    with pytest.raises(ValueError, match=r"mix.lora_A has shape \(3,\), expected \(1, 1, 8, 2\)"):
        layout.to_blocks(AdapterState(arrays | {"mix.lora_A": jnp.zeros(3)}))
    extra = arrays.pop("mix.lora_A")
    with pytest.raises(ValueError, match=r"missing keys \['mix.lora_A'\], unknown keys \['x'\]"):
        layout.to_blocks(AdapterState(arrays | {"x": extra}))
    with pytest.raises(ValueError, match=r"from_blocks: shape \(2, 16\), expected \(\d+, 16\)"):
        layout.from_blocks(jnp.zeros((2, 16)))
    with pytest.raises(ValueError, match=r"a\.count is int32, expected floats"):
        Layout.of(AdapterState({"a.count": jnp.zeros(2, jnp.int32)}))
    with pytest.raises(ValueError, match="block is 0"):
        Layout.of(state, 0)


def turned(state: AdapterState, seed: int) -> AdapterState:
    """Other factors of the same products."""
    arrays = dict(state.arrays)
    for number, (name_a, name_b) in enumerate(pairs(list(arrays))):
        a, b = arrays[name_a], arrays[name_b]
        turn = jax.random.normal(jax.random.key(seed + number), (a.shape[-1],) * 2)
        turn = turn + 2 * jnp.eye(a.shape[-1])
        arrays[name_a], arrays[name_b] = a @ turn, jnp.linalg.inv(turn) @ b
    return AdapterState(arrays, state.config)


@pytest.mark.parametrize("referred", [False, True])
def test_states_that_do_the_same_become_the_same(adapted, state, referred):
    reference = canonical(randomised(state, 3)) if referred else None
    other = turned(state, 4)
    first, second = canonical(state, reference), canonical(other, reference)
    for name, value in first.arrays.items():
        assert np.abs(state.arrays[name] - other.arrays[name]).max() > 0.1
        np.testing.assert_allclose(second.arrays[name], value, atol=2e-4, err_msg=name)
    images = jax.random.normal(jax.random.key(5), (2, 8, 8, 3))
    expected = load_state(adapted, state)(images)
    np.testing.assert_allclose(load_state(adapted, first)(images), expected, atol=1e-4)
    for name_a, name_b in pairs(list(first.arrays)):
        a, b = first.arrays[name_a], first.arrays[name_b]
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[-2:])
        np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-3)  # balanced


def test_a_reference_keeps_neighbours_together(state):
    # Two equal singular values: the slightest change turns the factors, unless there is a reference
    a, b = jnp.eye(4, 2), jnp.eye(2, 5)
    near = {"x.lora_A": a @ jnp.array([[1.0, 1e-3], [-1e-3, 1.001]]), "x.lora_B": b}
    states = [AdapterState({"x.lora_A": a, "x.lora_B": b}), AdapterState(near)]
    reference = canonical(states[0])
    apart, close = (
        max(
            np.abs(one - other).max()
            for one, other in zip(*(canonical(s, ref).arrays.values() for s in states), strict=True)
        )
        for ref in (None, reference)
    )
    assert close < 5e-3 < 0.1 < apart


def test_a_layer_smaller_than_the_rank_keeps_its_shapes(key):
    a, b = jax.random.normal(key, (2, 4)), jax.random.normal(key, (4, 3))
    found = canonical(AdapterState({"x.lora_A": a, "x.lora_B": b})).arrays
    assert found["x.lora_A"].shape == a.shape and found["x.lora_B"].shape == b.shape
    np.testing.assert_allclose(found["x.lora_A"] @ found["x.lora_B"], a @ b, atol=1e-5)


def test_states_without_pairs_are_refused():
    with pytest.raises(ValueError, match="no low-rank pair"):
        canonical(AdapterState({"x.bias": jnp.zeros(2)}))
    stacked = {"x.lora_A": jnp.ones((3, 4, 2)), "x.lora_B": jnp.ones((3, 2, 4))}
    with pytest.raises(ValueError, match=r"x.lora_B has shape \(3, 2, 4\), a stack of pairs"):
        canonical(AdapterState(stacked))


def test_half_a_pair_can_be_left_as_it_starts(adapted):
    half = freeze(adapted, ["lora_A"])
    found, whole = extract(half), extract(adapted)
    assert set(found.arrays) == {name for name in whole.arrays if name.endswith("lora_B")}
    images = jax.random.normal(jax.random.key(5), (2, 8, 8, 3))
    other = {name: value + 0.3 for name, value in found.arrays.items()}
    changed = load_state(half, AdapterState(other, found.config))
    expected = load_state(adapted, AdapterState(whole.arrays | other, whole.config))
    np.testing.assert_array_equal(changed(images), expected(images))
    assert np.abs(changed(images) - adapted(images)).max() > 1e-3
    with pytest.raises(ValueError, match=r"freeze: patterns \['down'\] match no trainable"):
        freeze(adapted, ["down"])
