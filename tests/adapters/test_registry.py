"""The algebra of adapters, the same for every kind: one table, one program for each of its rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.weights.adapters.native import read_state, write_state
from tests.adapters.nets import scrambled
from tests.adapters.oracles import Pair

RANKED = {"rank": 2, "alpha": 5, "targets": ("conv", "linear")}
PLAIN = {"targets": ("conv", "linear")}
TABLE = {
    "lora": RANKED,
    "locon": RANKED,
    "lora-bias": RANKED | {"bias": ("linear",)},
    "pissa": RANKED,
    "olora": RANKED,
    "dora": RANKED | {"bias": True},
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
    "oft-input": PLAIN | {"block_size": 4, "cayley": "neumann"},
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
# To what share the loss falls; (IA)^3 and rotations have few ways to go.
FALLS = {"ia3": 0.9, "oft-input": 0.75}
COUNT = 3
IMAGES = np.random.default_rng(1).standard_normal((COUNT, 2, 4, 5, 4), np.float32)


@functools.cache
def net() -> Pair:
    return Pair(rngs=nnx.Rngs(0))


@functools.cache
def plain_outputs() -> np.ndarray:
    graphdef, state = nnx.split(net())
    forward = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    return np.stack([forward(state, images) for images in IMAGES])


class Case:
    """A kind on the net, with its two programs: one adapter, and many side by side."""

    def __init__(self, name: str):
        self.name = name
        kind = name.partition("-")[0]
        self.config = registry.make_config(kind, **TABLE[name])
        self.model = registry.add(net(), self.config, rngs=jax.random.key(3))
        self.graphdef, self.start, self.frozen = nnx.split(self.model, inject.Trainable, ...)
        self.single = jax.jit(self._merging)
        self.many = jax.jit(jax.vmap(self._gradient, in_axes=(0, None, 0, 0)))

    def _build(self, trainable, frozen, scale):
        model = nnx.merge(self.graphdef, trainable, frozen)
        return model if self.name == "prefix" else inject.with_scale(model, scale)

    def _gradient(self, trainable, frozen, images, scale):
        """Outputs, loss and gradient."""

        def loss(t):
            out = self._build(t, frozen, scale)(images)
            return ((out - 1) ** 2).mean(), out

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return {"out": out, "loss": value, "grads": grads}

    def _merging(self, trainable, frozen, images, scale):
        """The same, and what merging and its inverse give."""
        result = self._gradient(trainable, frozen, images, scale)
        if self.name in UNMERGEABLE:
            return result
        adapted = self._build(trainable, frozen, scale)
        merged = inject.merge(adapted)
        back = inject.layers(inject.unmerge(merged, adapted))
        return result | {
            "merged": merged(images),
            "params": [nnx.state(layer) for layer in inject.layers(merged).values()],
            "back": [nnx.state(layer.base) for layer in back.values() if hasattr(layer, "base")],
        }

    def run(self, trainable, images=IMAGES[0], scale=1.0):
        return self.single(trainable, self.frozen, images, jnp.float32(scale))

    def random(self, seed: int):
        """Trainable values of which none is where it started."""
        state = inject.extract(self.model)
        moved = scrambled(state, seed).arrays
        arrays = {name: state.arrays[name] + 0.5 * moved[name] for name in moved}
        model = inject.load_state(self.model, inject.AdapterState(arrays, state.config))
        return nnx.split(model, inject.Trainable, ...)[1]


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
    static = inject.with_scale(nnx.merge(own.graphdef, states[0], own.frozen), 0.0)
    np.testing.assert_array_equal(static(IMAGES[0]), net()(IMAGES[0]))
    if name != "prefix":
        assert np.abs(found[0]["out"] - expected[0]).max() > 1e-2
        off = own.run(states[0], scale=0.0)
        np.testing.assert_array_equal(off["out"], expected[0])

    # What merging gives computes the same, and can be undone.
    if name in UNMERGEABLE:
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            inject.merge(own.model)
    else:
        kernels = [nnx.state(layer) for layer in inject.layers(net()).values()]
        # Merged it is the base's own program, and as fast.
        assert nnx.split(inject.merge(own.model))[0] == nnx.split(net())[0]
        for off_params, kernel in zip(off["params"], kernels, strict=True):
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

    # Side by side in one program the outputs and gradients of each, whatever is routed to it, equal
    # those of its own run, and so do training steps.
    index = jnp.array([2, 0, 1])
    routed = inject.route(inject.stack(states), index)
    together = own.many(routed, own.frozen, IMAGES[index], jnp.ones(COUNT))
    for row, i in enumerate(index):
        for key in ("out", "grads"):
            alone = jax.tree.leaves(found[i][key])
            for one, other in zip(jax.tree.leaves(together[key]), alone, strict=True):
                bound = 3e-5 * max(1.0, np.abs(other).max())
                np.testing.assert_allclose(one[row], other, atol=bound)

    # It over-fits a tiny batch, by steps against the sign of the gradient, around a frozen base.
    trainable = own.start
    for step in range(60):
        result = own.run(trainable)
        rate = np.float32(0.03 * (1 - step / 60))
        trainable = jax.tree.map(
            lambda p, g, rate=rate: jnp.asarray(p - rate * np.sign(g)), trainable, result["grads"]
        )
    assert result["loss"] < FALLS.get(name, 0.6) * start["loss"]
    trained = nnx.merge(own.graphdef, trainable, own.frozen)
    bases = [getattr(layer, "base", layer) for layer in inject.layers(trained).values()]
    for one, other in zip(bases, inject.layers(net()).values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))

    # Swapping values or strength compiles nothing.
    assert own.single._cache_size() == 1

    # Its state survives a file, with the configuration it was made from.
    path = tmp_path / "state.safetensors"
    write_state(path, inject.extract(trained))
    state = read_state(path)
    assert state.config == own.config
    fresh = registry.add(net(), state.config, rngs=jax.random.key(3))
    again = nnx.split(inject.load_state(fresh, state), inject.Trainable, ...)[1]
    jax.tree.map(np.testing.assert_array_equal, again, trainable)


def dropping(name: str) -> list[str]:
    """The settings of dropout that a row's kind has, as it is configured there."""
    kind = registry.kind_of(name.partition("-")[0])
    fields = ("dropout", "module_dropout", "rank_dropout")
    exempt = {"delta_lora": ("dropout",), "glora-hadamard": fields}.get(name, ())
    return [field for field in fields if field in kind.fields and field not in exempt]


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name in TABLE for setting in dropping(name)]
)
def test_dropout_leaves_out_what_it_says(name, setting):
    rate = 0.9 if setting == "module_dropout" else 0.5
    plain = {"dropout": 0.0} if "dropout" in dropping(name) else {}
    config = registry.make_config(name.partition("-")[0], **TABLE[name] | plain | {setting: rate})
    model = registry.add(net(), config, rngs=jax.random.key(3))
    moved = {
        key: value + 0.5 * scrambled(inject.extract(model), 5).arrays[key]
        for key, value in inject.extract(model).arrays.items()
    }
    model = inject.load_state(model, inject.AdapterState(moved, config))
    seeded = [inject.seed_dropout(model, jax.random.key(seed)) for seed in range(12)]
    inputs = {"conv": IMAGES[0], "linear": IMAGES[0].repeat(3, axis=-1)}
    for place in config.targets:
        base = np.asarray(getattr(net(), place)(inputs[place]))
        full = np.asarray(getattr(model, place)(inputs[place]))
        assert np.abs(full - base).max() > 1e-2
        found = [np.asarray(getattr(one, place)(inputs[place])) for one in seeded]
        if setting != "module_dropout":
            assert len({one.tobytes() for one in found}) > 1
            assert max(np.abs(one - full).max() for one in found) > 1e-2
            continue
        # A step leaves out all of an update, DoRA's new directions with it, or nothing.
        off = [np.abs(one - base).max() < 1e-5 for one in found]
        on = [np.abs(one - full).max() < 1e-4 for one in found]
        assert all(a != b for a, b in zip(off, on, strict=True)) and sum(off) > len(off) / 2


@EACH
def test_every_array_is_trainable_constant_or_the_base_s(name):
    config = registry.make_config(name.partition("-")[0], **TABLE[name])
    model = registry.add(net(), config, rngs=jax.random.key(3))
    _, trainable, constant, rest = nnx.split(model, inject.Trainable, inject.Constant, ...)
    base = {id(leaf) for leaf in jax.tree.leaves(nnx.split(net())[1])}
    assert {id(leaf) for leaf in jax.tree.leaves(rest)} == base
    assert jax.tree.leaves(trainable)
    start = name in ("vera", "pissa", "olora")
    assert bool(jax.tree.leaves(constant)) == start


SETTINGS = sorted({field for kind in registry.KINDS.values() for field in kind.fields})
NEEDED = {"delta_lora": {"ratio": 0.5}}


@pytest.mark.parametrize("name", registry.KINDS)
def test_a_setting_that_a_kind_has_not_is_refused_and_named(name):
    kind = registry.kind_of(name)
    choice = registry.AdapterChoice(name, NEEDED.get(name, {}))
    for setting in SETTINGS:
        if setting in kind.fields:
            continue
        with pytest.raises(ValueError, match=rf"adapter {name}: no setting \['{setting}'\]"):
            registry.make_config(name, **{setting: 1}, **NEEDED.get(name, {}))
        with pytest.raises(ValueError, match=f"{setting} is 1, and adapters of kind {name} have"):
            choice.config(targets=("x",), given={setting: 1})
        # What a method proposes and nobody asked for is left out.
        assert choice.config(targets=("x",), defaults={setting: 1})
    if "rank" in kind.fields:
        twice = registry.AdapterChoice(name, NEEDED.get(name, {}) | {"rank": 9})
        with pytest.raises(ValueError, match=r"rank is given twice, 3 and 9 \(adapter.rank\)"):
            twice.config(targets=("x",), given={"rank": 3})


@pytest.mark.parametrize(
    "name", [name for name, kind in registry.KINDS.items() if "alpha" in kind.fields]
)
def test_an_alpha_that_nobody_gives_is_one_scale_at_every_rank(name):
    ranks = {"rank": 6, "rank_pattern": {"few": 2}} | NEEDED.get(name, {})
    ranks |= {"target_rank": 1} if name == "adalora" else {}
    stable = {"few": 2**0.5, "many": 6**0.5} if name == "rslora" else {"few": 1, "many": 1}
    for scale in (1.0, 2.0):
        for where in ({"settings": ranks}, {"settings": NEEDED.get(name, {})}):
            choice = registry.AdapterChoice(name, **where)
            given = {key: value for key, value in ranks.items() if key not in choice.settings}
            config = choice.config(targets=("x",), given=given, scale=scale)
            for path, expected in stable.items():
                assert config.scaling_at(path) == pytest.approx(scale * expected)
    fixed = registry.AdapterChoice(name, ranks).config(
        targets=("x",), given={"alpha": 3.0}, scale=2.0
    )
    assert (fixed.alpha_at("few"), fixed.alpha_at("many")) == (3, 3)


def test_lora_and_the_affiner_can_start_from_one_scale():
    wide = nnx.Linear(256, 4, rngs=nnx.Rngs(0))
    for kind, own, factor in (("lora", 3**-0.5, "lora_A"), ("affiner", 2**0.5, "down")):
        more = {"init": "gaussian"} if kind == "lora" else {}
        for scale, expected in ((None, own), (0.8, 0.8)):
            settings = {"rank": 64, "targets": ("",)} | ({} if scale is None else more)
            config = registry.make_config(kind, **settings, initial_scale=scale)
            layer = registry.maker(config)("", wide, jax.random.key(0))
            deviation = np.asarray(getattr(layer, factor)[...]).std() * 16
            assert deviation == pytest.approx(expected, rel=0.03)
    uniform = registry.make_config("lora", rank=64, initial_scale=0.8)
    layer = registry.maker(uniform)("", wide, jax.random.key(0))
    assert np.asarray(layer.lora_A[...]).std() * 16 == pytest.approx(0.8, rel=0.03)
    with pytest.raises(ValueError, match="LoRAConfig: init 'pissa' has no initial_scale"):
        registry.make_config("pissa", initial_scale=1.0)
    with pytest.raises(ValueError, match=r"initial_scale is 0, expected more than 0"):
        registry.make_config("affiner", initial_scale=0)


def test_names_and_settings():
    with pytest.raises(ValueError, match=r"adapter 'lorra': expected one of lora, dora"):
        registry.make_config("lorra")
    with pytest.raises(ValueError, match=r"adapter ia3: no setting \['rank'\], expected some of"):
        registry.make_config("ia3", rank=4)
    with pytest.raises(TypeError, match="cannot make adapters of a dict"):
        registry.maker({})
    assert registry.make_config("dora", rank=2).decompose == "output"
    assert {kind.config for kind in registry.KINDS.values()} == set(registry.MAKERS)
