"""The algebra of adapters, the same for every kind: one table, one program for each of its rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsynth.adapters import base, kinds
from jaxsynth.weights.states import read_state, write_state
from tests.adapters.nets import quick_jit, randomised
from tests.adapters.oracles import Pair

RANKED = {"rank": 2, "alpha": 5, "targets": ("conv", "linear")}
PLAIN = {"targets": ("conv", "linear")}
TABLE = {
    "lora": RANKED,
    "pissa": RANKED,
    "locon": RANKED,
    "dora": RANKED,
    "dora-input": RANKED | {"decompose": "input", "detach_norm": False},
    "loha": RANKED | {"dropout": 0.1},
    "loha-whole": RANKED | {"rank": 9, "use_tucker": True},
    "doha": RANKED,
    "lokr": RANKED | {"rank": 1, "factor": 2},
    "lokr-full": RANKED | {"full_matrix": True},
    "dokr": RANKED | {"rank": 1, "factor": 2, "use_tucker": True, "decompose_both": True},
    "vera": RANKED,
    "adalora": RANKED | {"target_rank": 1},
    "delta_lora": RANKED | {"ratio": 0.5},
    "glora": RANKED,
    "glora-hadamard": {"rank": 2, "targets": ("linear",), "form": "hadamard"},
    "oft": PLAIN | {"block_size": 4},
    "oft-output": PLAIN | {"block_size": 4, "side": "output", "rescale": True},
    "boft": PLAIN | {"block_size": 2, "side": "output"},
    "ia3": PLAIN | {"feedforward": ("linear",)},
    "full": PLAIN,
    "affiner": {"rank": 2} | PLAIN,
    "prefix": {"targets": ("linear",), "tokens": 2},
    "hypernetwork": {"targets": ("linear",), "activation": "tanh", "layer_norm": True},
}
UNMERGEABLE = ("prefix", "hypernetwork")
# Kinds that a seed or the base gives something else than zero to start with.
STARTS_ELSEWHERE = ("prefix",)
COUNT = 3
IMAGES = np.random.default_rng(1).standard_normal((COUNT, 2, 4, 5, 4), np.float32)
# As many tokens as a prefix adds, so that outputs with and without one can be averaged alike.
TX = optax.adam(3e-2)


@functools.cache
def net() -> Pair:
    return Pair(rngs=nnx.Rngs(0))


@functools.cache
def plain_outputs() -> np.ndarray:
    graphdef, state = nnx.split(net())
    forward = quick_jit(lambda state, images: nnx.merge(graphdef, state)(images))
    return np.stack([forward(state, images) for images in IMAGES])


class Case:
    """A kind on the net, with its two programs: one adapter, and many side by side."""

    def __init__(self, name: str):
        self.name = name
        kind = name.partition("-")[0]
        self.config = kinds.make_config(kind, **TABLE[name])
        self.model = kinds.add(net(), self.config, rngs=jax.random.key(3))
        self.graphdef, self.start, self.frozen = nnx.split(self.model, base.Trainable, ...)
        self.single = quick_jit(functools.partial(self._step, merging=name not in UNMERGEABLE))
        self.many = quick_jit(
            jax.vmap(functools.partial(self._step, merging=False), in_axes=(0, 0, None, 0, 0))
        )

    def _step(self, trainable, opt_state, frozen, images, scale, *, merging):
        """Outputs and loss, the trainable values after an update, what merging gives."""

        def build(t):
            model = nnx.merge(self.graphdef, t, frozen)
            return model if self.name == "prefix" else base.with_scale(model, scale)

        def loss(t):
            out = build(t)(images)
            return ((out - 1) ** 2).mean(), out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, opt_state = TX.update(grads, opt_state, trainable)
        result = {"out": out, "loss": value, "opt_state": opt_state}
        result["trainable"] = optax.apply_updates(trainable, updates)
        if merging:
            merged = base.merge(build(trainable))
            back = base.layers(base.unmerge(merged, build(trainable)))
            result["merged"] = merged(images)
            result["merged_params"] = [nnx.state(x) for x in base.layers(merged).values()]
            result["back"] = [nnx.state(x.base) for x in back.values() if hasattr(x, "base")]
        return result

    def run(self, trainable, images=IMAGES[0], scale=1.0):
        opt_state = TX.init(trainable)
        return self.single(trainable, opt_state, self.frozen, images, jnp.float32(scale))

    def random(self, seed: int):
        """Trainable values of which none is where it started."""
        state = base.extract(self.model)
        moved = randomised(state, seed).arrays
        arrays = {name: state.arrays[name] + 0.5 * moved[name] for name in moved}
        model = base.load_state(self.model, base.AdapterState(arrays, state.config))
        return nnx.split(model, base.Trainable, ...)[1]


@functools.cache
def case(name: str) -> Case:
    return Case(name)


EACH = pytest.mark.parametrize("name", TABLE)


@EACH
def test_a_kind_obeys_the_algebra(name, tmp_path):
    own = case(name)
    expected = plain_outputs()
    # Untrained it is the base.
    start = own.run(own.start)
    if name not in STARTS_ELSEWHERE:
        np.testing.assert_allclose(start["out"], expected[0], atol=1e-5)
    states = [own.random(seed) for seed in range(COUNT)]
    found = [own.run(state, images) for state, images in zip(states, IMAGES, strict=True)]

    # At scale 0 it is the base to the bit, traced and not; merged too.
    static = base.with_scale(nnx.merge(own.graphdef, states[0], own.frozen), 0.0)
    np.testing.assert_array_equal(static(IMAGES[0]), net()(IMAGES[0]))
    if name != "prefix":
        assert np.abs(found[0]["out"] - expected[0]).max() > 1e-2
        off = own.run(states[0], scale=0.0)
        np.testing.assert_array_equal(off["out"], expected[0])

    # What merging gives computes the same, and can be undone.
    if name in UNMERGEABLE:
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            base.merge(own.model)
    else:
        kernels = [nnx.state(layer) for layer in base.layers(net()).values()]
        for off_params, kernel in zip(off["merged_params"], kernels, strict=True):
            jax.tree.map(np.testing.assert_array_equal, off_params, kernel)
        half = own.run(states[0], scale=0.4)
        for result in (found[0], half):
            bound = 1e-5 * np.abs(result["out"]).max()
            np.testing.assert_allclose(result["merged"], result["out"], atol=bound)
            bound = 1e-4 if "hadamard" in name else 1e-5
            for one, kernel in zip(result["back"], kernels[-len(result["back"]) :], strict=True):
                jax.tree.map(
                    lambda a, b, bound=bound: np.testing.assert_allclose(a, b, atol=bound),
                    one, kernel,
                )  # fmt: skip

    # Side by side in one program: an update and the outputs of each equal those of its own run,
    # whichever adapter which batch is routed to.
    index = jnp.array([2, 0, 1])
    routed = base.route(base.stack(states), index)
    opt_state = jax.vmap(TX.init)(routed)
    together = own.many(routed, opt_state, own.frozen, IMAGES[index], jnp.ones(COUNT))
    for row, i in enumerate(index):
        bound = 2e-5 * np.abs(found[i]["out"]).max()
        np.testing.assert_allclose(together["out"][row], found[i]["out"], atol=bound)
        after = jax.tree.map(lambda x, row=row: x[row], together["trainable"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), after, found[i]["trainable"]
        )

    # Swapping values or strength compiles nothing.
    assert own.single._cache_size() == 1

    # It learns a tiny batch.
    trainable, opt_state = own.start, TX.init(own.start)
    for _ in range(25):
        result = own.single(trainable, opt_state, own.frozen, IMAGES[0], jnp.float32(1))
        trainable, opt_state = result["trainable"], result["opt_state"]
    assert result["loss"] < 0.9 * start["loss"]

    # Its state survives a file, with the configuration it was made from.
    trained = nnx.merge(own.graphdef, trainable, own.frozen)
    path = tmp_path / "state.safetensors"
    write_state(path, base.extract(trained))
    state = read_state(path)
    assert state.config == own.config
    fresh = kinds.add(net(), state.config, rngs=jax.random.key(3))
    again = nnx.split(base.load_state(fresh, state), base.Trainable, ...)[1]
    jax.tree.map(np.testing.assert_array_equal, again, trainable)


def test_names_and_settings():
    with pytest.raises(ValueError, match=r"adapter 'lorra': expected one of lora, dora"):
        kinds.make_config("lorra")
    with pytest.raises(ValueError, match=r"adapter ia3: no setting \['rank'\], expected some of"):
        kinds.make_config("ia3", rank=4)
    with pytest.raises(TypeError, match="cannot make adapters of a dict"):
        kinds.maker({})
    assert kinds.make_config("dora", rank=2).decompose == "output"
    assert {kind.config for kind in kinds.KINDS.values()} == set(kinds.MAKERS)
