"""One program for adapters of several ranks."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.surgery.rank_padding import padded
from tests.adapters.nets import scrambled
from tests.adapters.oracles import TARGETS, Pair, images

CASES = {
    "lora": {"rank_pattern": {"conv": 2}},
    "rslora": {},
    "locon": {},
    "dora": {},
    "loha": {"use_tucker": True},
    "lokr": {"factor": 2, "decompose_both": True, "use_tucker": True},
    "adalora": {"target_rank": 1},
    "glora": {},
}


@pytest.fixture(scope="module")
def net():
    return Pair(rngs=nnx.Rngs(0))


def adapted(net, kind, seed, **settings):
    config = registry.make_config(kind, targets=TARGETS, **settings)
    model = registry.add(net, config, rngs=jax.random.key(0))
    state = inject.extract(model)
    moved = scrambled(state, seed).arrays
    arrays = {key: value + moved[key] for key, value in state.arrays.items()}
    return inject.load_state(model, inject.AdapterState(arrays, config))


@pytest.mark.parametrize("kind", CASES)
def test_swapping_compiles_nothing(net, kind):
    most = 2 if kind == "lokr" else 4
    large = adapted(net, kind, 1, rank=most, alpha=5, **CASES[kind] | {"rank_pattern": {}})
    graphdef, trainable, frozen = nnx.split(large, inject.Trainable, ...)
    run = jax.jit(lambda t, f: nnx.merge(graphdef, t, f)(images()))
    run(trainable, frozen)
    for rank, alpha in ((1, 3), (2, None)):
        small = adapted(net, kind, rank, rank=rank, alpha=alpha, **CASES[kind])
        swapped = inject.load_state(large, padded(inject.extract(small), large.conv.config))
        found = run(nnx.state(swapped, inject.Trainable), frozen)
        expected = small(images())
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert run._cache_size() == 1


def test_what_cannot_be_padded_is_named(net):
    lora = registry.make_config("lora", targets=TARGETS, rank=1)
    for kind, rank, message in (
        ("vera", 1, "VeRA as LoRA, expected one kind of LoRA, LoHa"),
        ("loha", 1, "LoHa as LoRA"),
        ("pissa", 1, "init 'pissa' starts from as many parts"),
        ("lora", 2, "conv has rank 2, more than 1"),
    ):
        state = inject.extract(adapted(net, kind, 0, rank=rank))
        with pytest.raises(ValueError, match=message):
            padded(state, lora)
