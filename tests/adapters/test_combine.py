"""Weighted sums of what adapters changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.combine import combine
from jaxsynth.adapters.kinds.affiner import AffinerConfig
from jaxsynth.adapters.surgery.class_rows import extend_table
from tests.adapters.nets import Net, scrambled
from tests.adapters.oracles import Pair
from tests.adapters.test_inject import with_affiner, with_lora


@pytest.fixture
def net():
    return Net(rngs=nnx.Rngs(0))


@pytest.mark.heavy
def test_one_adapter_at_weight_one_is_its_merged_network(net):
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    for adapted in (with_lora(net), with_affiner(net)):
        found = combine(net, [adapted], [1.0])
        np.testing.assert_allclose(found(images), adapted(images), atol=1e-5)
        np.testing.assert_allclose(combine(net, [adapted], [0.0])(images), net(images), atol=1e-6)


def test_kernels_are_weighted_sums(net):
    first, second = with_lora(net, 1), with_affiner(net, 2)
    found = combine(net, [first, second], [0.3, 0.6]).down.kernel[...]
    old = net.down.kernel[...]
    changes = [inject.merge(model).down.kernel[...] - old for model in (first, second)]
    np.testing.assert_allclose(found, old + 0.3 * changes[0] + 0.6 * changes[1], atol=1e-6)


def test_kinds_are_mixed_by_sum_average_and_at_random():
    """Sums, averages and Dirichlet mixtures of what three kinds change."""
    net = Pair(rngs=nnx.Rngs(0))
    models = []
    for seed, kind in enumerate(("lokr", "dora", "ia3")):
        settings = {} if kind == "ia3" else {"rank": 2}
        config = registry.make_config(kind, targets=("conv", "linear"), **settings)
        model = registry.add(net, config, rngs=jax.random.key(seed))
        state = inject.extract(model)
        moved = scrambled(state, seed).arrays
        arrays = {name: value + moved[name] for name, value in state.arrays.items()}
        models.append(inject.load_state(model, inject.AdapterState(arrays, config)))
    kernels = [inject.layers(inject.merge(model))["linear"].kernel[...] for model in models]
    old = net.linear.kernel[...]
    for weights in ([1.0] * 3, [1 / 3] * 3, [0.6, 0.3, 0.1]):
        found = combine(net, models, weights).linear.kernel[...]
        changes = sum(w * (kernel - old) for w, kernel in zip(weights, kernels, strict=True))
        np.testing.assert_allclose(found, old + changes, atol=1e-5)


def test_a_bias_that_only_one_adapter_adds(net):
    config = AffinerConfig(rank=1, targets=("blocks.1",))
    adapted = with_affiner(net, 3, config)
    found = combine(net, [with_lora(net), adapted], [1.0, 0.5]).blocks[1]
    assert found.use_bias
    np.testing.assert_allclose(found.bias[...], 0.5 * adapted.blocks[1].shift[...], atol=1e-6)


def test_new_rows_stand_one_after_the_other():
    table = nnx.Sequential(nnx.Embed(4, 3, rngs=nnx.Rngs(0)))
    sets = []
    for count, value in ((2, 1.0), (1, 2.0)):
        extended = extend_table(table, "layers.0", count, start=0)
        rows = inject.AdapterState({"layers.0.rows": jnp.full((count, 3), value)})
        sets.append(inject.load_state(extended, rows))
    joined = combine(table, sets, [0.5, 0.5]).layers[0].embedding[...]
    np.testing.assert_array_equal(joined[:4], table.layers[0].embedding[...])
    np.testing.assert_array_equal(joined[4:, 0], [1.0, 1.0, 2.0])


def test_what_does_not_fit_is_said(net):
    with pytest.raises(ValueError, match="1 weights for 2 adapted"):
        combine(net, [net, net], [1.0])
    with pytest.raises(ValueError, match=r"network 0 and the base differ in"):
        combine(net, [nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))], [1.0])
    wide = Net(rngs=nnx.Rngs(0))
    wide.mix.kernel = nnx.Param(jnp.zeros((1, 1, 8, 9)))
    with pytest.raises(ValueError, match=r"mix.kernel has shape \(1, 1, 8, 9\)"):
        combine(net, [wide], [1.0])
