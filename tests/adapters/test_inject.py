"""The algebra of adapters: what holds for every kind, on LoRA and on a multiplicative kind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.affiner import AffinerConfig, add_affiner
from jaxsynth.adapters.kinds.lora import LoRA, LoRAConfig, add_lora, lora
from tests.adapters.nets import CONFIG, Net, randomised


class Gain(inject.AdapterLayer):
    """Multiplies a linear layer's outputs, bias included: not an added kernel."""

    kind = "gain"

    def __init__(self, layer, key):
        super().__init__(layer, "gain")
        size = layer.kernel.get_value().shape[-1]
        self.gain = inject.Trainable(jax.random.normal(key, (size,)))

    def factor(self):
        return 1 + self.strength * self.gain[...]

    def __call__(self, inputs):
        return self.base(inputs) * self.factor()

    def merged(self):
        return {
            "kernel": self.base.kernel[...] * self.factor(),
            "bias": self.base.bias[...] * self.factor(),
        }

    def unmerged(self, merged):
        return {name: value / self.factor() for name, value in merged.items()}


def with_gain(model):
    return inject.inject(
        model,
        lambda path, layer, key: Gain(layer, key),
        targets=["mix", "blocks.0"],
        rngs=nnx.Rngs(5),
    )


def with_lora(model, seed=0):
    adapted = add_lora(model, CONFIG, rngs=nnx.Rngs(seed))
    return inject.load_state(adapted, randomised(inject.extract(adapted), seed))


AFFINER = AffinerConfig(rank=2, targets=("down", "mix", "blocks.0"))


def with_affiner(model, seed=0, config=AFFINER):
    adapted = add_affiner(model, config, rngs=nnx.Rngs(seed))
    state = randomised(inject.extract(adapted), seed)
    # Scales lie around 1: one near 0 could not be undone.
    arrays = {
        name: 1 + 0.1 * value if name.endswith(".scale") else value
        for name, value in state.arrays.items()
    }
    return inject.load_state(adapted, inject.AdapterState(arrays, state.config))


@pytest.fixture
def net():
    return Net(rngs=nnx.Rngs(0))


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


ADAPT = pytest.mark.parametrize("adapt", [with_lora, with_gain, with_affiner])


@ADAPT
def test_injection_leaves_the_model_and_shares_its_weights(net, images, adapt):
    before = net(images)
    adapted = adapt(net)
    assert type(net.mix) is nnx.Conv
    assert adapted.mix.base.kernel is net.mix.kernel
    np.testing.assert_array_equal(net(images), before)
    assert np.abs(adapted(images) - before).max() > 0.1


@ADAPT
def test_scale_zero_is_the_base_exactly(net, images, adapt):
    adapted = adapt(net)
    forward = nnx.jit(lambda model: model(images))
    expected = forward(net)
    np.testing.assert_array_equal(forward(inject.with_scale(adapted, 0.0)), expected)
    np.testing.assert_array_equal(forward(inject.with_scale(adapted, jnp.float32(0))), expected)
    np.testing.assert_array_equal(
        forward(inject.with_scale(inject.with_scale(adapted, 0.0), 1.0)), forward(adapted)
    )
    merged = inject.merge(inject.with_scale(adapted, 0.0))
    np.testing.assert_array_equal(forward(merged), expected)


@ADAPT
@pytest.mark.parametrize("scale", [1.0, 0.35, -1.0])
def test_merging_gives_the_same_plain_network_and_can_be_undone(net, images, adapt, scale):
    adapted = inject.with_scale(adapt(net), scale)
    merged = inject.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(net)
    np.testing.assert_allclose(merged(images), adapted(images), atol=1e-5)
    back = inject.unmerge(merged, adapted)
    np.testing.assert_allclose(back.mix.base.kernel[...], net.mix.kernel[...], atol=1e-6)
    np.testing.assert_allclose(back(images), adapted(images), atol=1e-5)


@ADAPT
def test_scale_may_be_traced(net, images, adapt):
    adapted = adapt(net)
    graphdef, state = nnx.split(adapted)
    forward = jax.jit(lambda state, s: inject.with_scale(nnx.merge(graphdef, state), s)(images))
    for scale in (0.0, 0.5, 1.0):
        expected = inject.with_scale(adapted, scale)(images)
        np.testing.assert_allclose(forward(state, scale), expected, atol=1e-5)
    assert forward._cache_size() == 1


@ADAPT
def test_a_step_changes_only_trainable_bits(net, images, adapt):
    adapted = adapt(net)
    graphdef, trainable, frozen = nnx.split(adapted, inject.Trainable, ...)
    names = {path[-1] for path, _ in nnx.to_flat_state(trainable)}
    assert names <= {"lora_A", "lora_B", "gain", "scale", "shift", "down", "up", "gate"}
    assert not jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam))
    assert len(jax.tree.leaves(nnx.state(adapted, nnx.Param))) == len(jax.tree.leaves(net))
    before = jax.tree.map(np.array, frozen)
    tx = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def step(trainable, frozen, opt_state):
        def loss(t):
            return (nnx.merge(graphdef, t, frozen)(images) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    opt_state = tx.init(trainable)
    first = None
    for _ in range(5):
        trainable, opt_state, value = step(trainable, frozen, opt_state)
        first = value if first is None else first
    assert value < first
    trained = nnx.merge(graphdef, trainable, frozen)
    after = nnx.split(trained, inject.Trainable, ...)[2]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


@ADAPT
def test_state_round_trip(net, images, adapt):
    adapted = adapt(net)
    state = inject.extract(adapted)
    assert list(state.arrays) == sorted(state.arrays)
    assert not any("base" in name for name in state.arrays)
    other = inject.load_state(adapted, jax.tree.map(jnp.zeros_like, state))
    np.testing.assert_array_equal(inject.load_state(other, state)(images), adapted(images))


def test_state_names_and_config(net):
    state = inject.extract(with_lora(net))
    assert state.config is CONFIG
    assert {name: value.shape for name, value in state.arrays.items()} == {
        "blocks.0.lora_A": (8, 3),
        "blocks.0.lora_B": (3, 8),
        "blocks.1.lora_A": (8, 3),
        "blocks.1.lora_B": (3, 6),
        "down.lora_A": (3, 3, 3, 3),
        "down.lora_B": (1, 1, 3, 8),
        "mix.lora_A": (1, 1, 8, 2),
        "mix.lora_B": (1, 1, 2, 8),
    }


def test_load_state_names_what_does_not_fit(net):
    adapted = with_lora(net)
    arrays = inject.extract(adapted).arrays
    fewer = {name: value for name, value in arrays.items() if name != "mix.lora_A"}
    with pytest.raises(ValueError, match=r"missing keys \['mix.lora_A'\], unknown keys \[\]"):
        inject.load_state(adapted, inject.AdapterState(fewer))
    more = {**arrays, "mix.lora_C": arrays["mix.lora_A"]}
    with pytest.raises(ValueError, match=r"unknown keys \['mix.lora_C'\]"):
        inject.load_state(adapted, inject.AdapterState(more))
    wrong = {**arrays, "mix.lora_A": jnp.zeros((1, 1, 8, 9))}
    with pytest.raises(ValueError, match=r"mix.lora_A has shape \(1, 1, 8, 9\), expected .*8, 2"):
        inject.load_state(adapted, inject.AdapterState(wrong))
    with pytest.raises(ValueError, match="nothing in the network is trainable"):
        inject.extract(net)


@pytest.mark.parametrize(
    ("targets", "wrapped"),
    [
        (["down"], {"down"}),
        (["0"], {"blocks.0"}),
        (["blocks.1", "mix"], {"blocks.1", "mix"}),
        ([r"blocks\..*"], {"blocks.0", "blocks.1"}),
        (["^mix$"], {"mix"}),
    ],
)
def test_targets(net, targets, wrapped):
    adapted = inject.inject(net, lora(LoRAConfig(rank=2)), targets=targets, rngs=nnx.Rngs(0))
    found = inject.layers(adapted)
    assert {
        path for path, layer in found.items() if isinstance(layer, inject.AdapterLayer)
    } == wrapped
    assert set(found) == {"down", "mix", "blocks.0", "blocks.1"}


def test_injection_errors(net):
    make = lora(CONFIG)
    with pytest.raises(ValueError, match=r"\['to_q'\] match no layer.*'blocks.0'.*'down', 'mix'"):
        inject.inject(net, make, targets=["mix", "to_q"], rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="found the string 'mix'"):
        inject.inject(net, make, targets="mix", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mix: already wrapped by a LoRA adapter"):
        inject.inject(with_lora(net), make, targets=["mix"], rngs=nnx.Rngs(0))
    norm = nnx.Sequential(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"layers.0: LoRA adapts .* found LayerNorm"):
        inject.inject(norm, make, targets=["layers.0"], rngs=nnx.Rngs(0))
    net.mix2 = net.mix
    with pytest.raises(ValueError, match="the same layer object"):
        inject.inject(net, make, targets=["down"], rngs=nnx.Rngs(0))


def test_initial_values_depend_on_the_path_alone(net):
    key = jax.random.key(3)
    alone = inject.inject(net, lora(CONFIG), targets=["mix"], rngs=key)
    together = inject.inject(net, lora(CONFIG), targets=["down", "mix"], rngs=key)
    np.testing.assert_array_equal(alone.mix.lora_A[...], together.mix.lora_A[...])


def test_abstract_injection():
    def build():
        return add_lora(Net(rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))

    abstract = nnx.eval_shape(build)
    assert isinstance(abstract.down, LoRA)
    assert isinstance(abstract.blocks[0], LoRA)
    assert abstract.down.lora_A.get_value().shape == (3, 3, 3, 3)


def test_stacked_training_equals_separate_runs(net, images):
    graphdef, _, frozen = nnx.split(with_lora(net), inject.Trainable, ...)
    runs = [nnx.split(with_lora(net, seed), inject.Trainable, ...)[1] for seed in range(3)]
    batches = jax.random.normal(jax.random.key(7), (3, *images.shape))
    tx = optax.adam(1e-2)

    def train(trainable, batch):
        def loss(t):
            return ((nnx.merge(graphdef, t, frozen)(batch) - 1) ** 2).mean()

        opt_state = tx.init(trainable)
        for _ in range(3):
            updates, opt_state = tx.update(jax.grad(loss)(trainable), opt_state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        return trainable

    together = inject.unstack(jax.jit(jax.vmap(train))(inject.stack(runs), batches))
    one = jax.jit(train)
    for run, batch, found in zip(runs, batches, together, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, one(run, batch)
        )


def test_a_batch_of_different_adapters_equals_separate_runs(net, images):
    adapted = [with_lora(net, seed) for seed in range(3)]
    graphdef, _, frozen = nnx.split(adapted[0], inject.Trainable, ...)
    stacked = inject.stack([nnx.split(model, inject.Trainable, ...)[1] for model in adapted])
    index = jnp.array([2, 0, 2, 1])

    @jax.jit
    def run(stacked, frozen, index, images):
        def one(trainable, frozen, image):
            return nnx.merge(graphdef, trainable, frozen)(image[None])[0]

        return jax.vmap(one, in_axes=(0, None, 0))(inject.route(stacked, index), frozen, images)

    found = run(stacked, frozen, index, images)
    expected = jnp.stack([adapted[i](x[None])[0] for i, x in zip(index, images, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_stacked_states_load_under_vmap(net, images):
    adapted = [with_lora(net, seed) for seed in range(2)]
    states = inject.stack([inject.extract(model) for model in adapted])
    found = jax.vmap(lambda state: inject.load_state(adapted[0], state)(images))(states)
    np.testing.assert_allclose(found, jnp.stack([m(images) for m in adapted]), atol=1e-5)
    again = inject.unstack(states)
    assert again[1].config is CONFIG
    np.testing.assert_array_equal(again[1].arrays["mix.lora_A"], adapted[1].mix.lora_A[...])


def test_stack_errors(net):
    state = inject.extract(with_lora(net))
    with pytest.raises(ValueError, match="no states"):
        inject.stack([])
    arrays = dict(state.arrays)
    with pytest.raises(ValueError, match=r"mix.lora_A.* has shape \(1,\) in state 1"):
        inject.stack([state, inject.AdapterState({**arrays, "mix.lora_A": jnp.ones(1)}, CONFIG)])
    arrays.pop("mix.lora_A")
    with pytest.raises(ValueError, match="state 1 has other keys"):
        inject.stack([state, inject.AdapterState(arrays, CONFIG)])


def test_mark_trainable(net, images):
    everything = inject.mark_trainable(net)
    _, trainable, frozen = nnx.split(everything, inject.Trainable, ...)
    assert len(jax.tree.leaves(trainable)) == 7
    assert not jax.tree.leaves(frozen)
    np.testing.assert_array_equal(everything(images), net(images))
    assert not inject.trainable_variables(net)

    biases = inject.mark_trainable(net, ["bias"])
    assert list(inject.trainable_variables(biases)) == ["blocks.0.bias", "down.bias", "mix.bias"]
    state = inject.extract(biases)
    assert state.config is None
    shifted = inject.load_state(biases, jax.tree.map(lambda x: x + 1, state))
    np.testing.assert_array_equal(shifted.mix.bias[...], net.mix.bias[...] + 1)
    assert shifted.mix.kernel is net.mix.kernel

    with_biases = inject.mark_trainable(with_lora(net), ["mix.bias"])
    assert "mix.bias" in inject.extract(with_biases).arrays
    with pytest.raises(ValueError, match=r"\['norm.bias'\] match no parameter"):
        inject.mark_trainable(net, ["norm.bias"])
