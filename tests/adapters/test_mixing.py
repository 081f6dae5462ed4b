"""Sums of LoRA adapters as one LoRA: what they change is the weighted sum of what each changes."""

import dataclasses
import itertools

import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.combine import combine
from jaxsynth.adapters.mixing import check_mixes, mix, mixed_config
from jaxsynth.adapters.registry import attach, make_config
from jaxsynth.generation.mixtures import dirichlet_of, pair_of
from tests.adapters.nets import CONFIG, Net, randomised
from tests.adapters.test_inject import with_lora


@pytest.fixture
def net():
    return Net(rngs=nnx.Rngs(0))


def kernels(model) -> dict[str, np.ndarray]:
    return {
        path: np.asarray(layer.kernel[...])
        for path, layer in inject.layers(inject.merge(model)).items()
        if hasattr(layer, "kernel")
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_sum_changes_what_its_parts_do(net, rslora, shared):
    state = inject.extract(with_lora(net))
    config = dataclasses.replace(state.config, use_rslora=rslora)
    states = [inject.AdapterState(randomised(state, k).arrays, config) for k in range(3)]
    if shared:
        downs = {n: x for n, x in states[0].arrays.items() if n.endswith("lora_A")}
        states = [inject.AdapterState(own.arrays | downs, config) for own in states]
    weights = [0.2, 0.5, -0.4]
    found = mix(states, weights)
    assert found.config == mixed_config(config, 1 if shared else 3)
    assert found.config.rank == (3 if shared else 9)
    expected = combine(net, [attach(net, own) for own in states], weights)
    for path, kernel in kernels(attach(net, found)).items():
        np.testing.assert_allclose(kernel, kernels(expected)[path], atol=2e-6, err_msg=path)


def test_two_halves_of_one_are_it(net):
    state = randomised(inject.extract(with_lora(net)), 0)
    both = mix([state, state], (0.5, 0.5))
    for path, kernel in kernels(attach(net, both)).items():
        np.testing.assert_allclose(kernel, kernels(attach(net, state))[path], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("lokr", {}, "LoKrConfig: its sum is no adapter of its kind"),
        ("dora", {}, "decompose: sums of several adapters are of plain LoRA"),
        ("lora", {"init": "pissa"}, "init: sums of several"),
        ("lora", {"use_tucker": True}, "use_tucker: sums of several"),
        ("lora", {"bias": True}, "bias: sums of several"),
    ],
)
def test_what_cannot_be_summed_is_refused(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        check_mixes(make_config(kind, targets=("down",), **settings))


def test_adapters_of_two_shapes_are_refused(net):
    state = inject.extract(with_lora(net))
    other = inject.AdapterState(state.arrays, dataclasses.replace(CONFIG, alpha=1.0))
    for states, weights, words in (
        ([state, other], (0.5, 0.5), "adapter 1 is of another configuration"),
        ([state], (0.5, 0.5), "2 weights for 1 adapters"),
        ([], (), "0 weights"),
    ):
        with pytest.raises(ValueError, match=words):
            mix(states, weights)


def test_pairs_and_weights():
    seen = [pair_of(0, 2, i, 5) for i in range(20)]
    pairs = [tuple(which) for which, _ in seen]
    assert sorted(pairs[:10]) == list(itertools.combinations(range(5), 2))
    assert pairs[:10] == pairs[10:] and all(w == (0.5, 0.5) for _, w in seen)
    assert pairs[:10] != [tuple(pair_of(0, 3, i, 5)[0]) for i in range(10)]
    assert pair_of(0, 0, 7, 1)[0] == (0, 0)
    weights = np.array([dirichlet_of(1, 0, i, 4)[1] for i in range(400)])
    np.testing.assert_allclose(weights.sum(1), 1)
    # Uniform on the simplex: each weight has mean 1/4 and variance 3/80.
    np.testing.assert_allclose(weights.mean(0), 0.25, atol=0.03)
    np.testing.assert_allclose(weights.var(0), 3 / 80, atol=0.01)
