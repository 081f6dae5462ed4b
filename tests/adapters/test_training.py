"""Kinds with an optimiser of their own, against peft or their algorithm step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx

from jaxsynth.adapters import inject, optim_hooks, registry
from jaxsynth.adapters.kinds.adalora import AdaLoRAConfig, budgeted, orthogonality
from jaxsynth.adapters.kinds.delta_lora import DeltaLoRAConfig, following
from jaxsynth.adapters.kinds.hypernetwork import HypernetworkConfig, shared
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.weights.adapters import factors
from tests.adapters import oracles
from tests.adapters.nets import scrambled
from tests.adapters.oracles import TARGETS


def parameter(wrapped, name: str) -> torch.nn.Parameter:
    layer, _, factor = name.rpartition(".")
    found = getattr(wrapped.model.get_submodule(layer), factor)["default"]
    return getattr(found, "weight", found)


def fill(wrapped, state: inject.AdapterState) -> None:
    with torch.no_grad():
        for name, value in state.arrays.items():
            target = parameter(wrapped, name)
            value = factors.to_torch(name.rpartition(".")[2], np.asarray(value))
            target.copy_(torch.from_numpy(np.array(value)).reshape(target.shape))


def of_peft(name: str, tensor: torch.Tensor, like: jax.Array) -> np.ndarray:
    """A torch value in our layout; the window of these is (2, 2) or none."""
    value = tensor.detach().numpy()
    if name.endswith("_E"):
        return value.reshape(like.shape)
    value = value.reshape(len(value), -1, *like.shape[:-2])
    return factors.from_torch("kernel", value)


def test_adalora_gives_ranks_as_peft_does():
    config = AdaLoRAConfig(
        rank=3, target_rank=1, warmup=1, final=2, interval=2, targets=TARGETS, alpha=5
    )
    model, plain = oracles.adapted(config)
    options = {"init_r": 3, "target_r": 1, "tinit": 1, "tfinal": 2, "deltaT": 2, "lora_alpha": 5}
    wrapped = peft.AdaLoraModel(
        plain,
        peft.AdaLoraConfig(**options, total_step=8, target_modules=list(TARGETS)),
        "default",
    )
    state = inject.extract(model)
    fill(wrapped, state)
    tx = budgeted(optax.sgd(0.1), config, total_steps=8)
    arrays = state.arrays
    opt_state = tx.init(nested(arrays))
    update = jax.jit(lambda grads, opt_state, params: tx.update(grads, opt_state, params))
    torch_tx = torch.optim.SGD([parameter(wrapped, name) for name in arrays], lr=0.1)
    counts = []
    for step in range(1, 9):
        grads = scrambled(state, 10 + step).arrays
        for name, value in grads.items():
            target = parameter(wrapped, name)
            value = factors.to_torch(name.rpartition(".")[2], np.asarray(value))
            target.grad = torch.from_numpy(np.array(value)).reshape(target.shape)
        torch_tx.step()
        wrapped.update_and_allocate(step)
        updates, opt_state = update(nested(grads), opt_state, nested(arrays))
        arrays = flat(optax.apply_updates(nested(arrays), updates))
        for name, value in arrays.items():
            expected = of_peft(name, parameter(wrapped, name), value)
            np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=f"{name}, step {step}")
        counts.append(sum(int((arrays[f"{name}.lora_E"] != 0).sum()) for name in TARGETS))
    # All six at first, two from the last allocation (step 6) on, fewer in between.
    assert counts[0] == 6 and counts[5:] == [2, 2, 2]

    expected = 0.0
    for name in TARGETS:
        for factor in ("lora_A", "lora_B"):
            matrix = parameter(wrapped, f"{name}.{factor}").detach().double()
            gram = matrix @ matrix.T if factor == "lora_A" else matrix.T @ matrix
            expected += float(torch.norm(gram - torch.eye(3))) / 4
    np.testing.assert_allclose(orthogonality(nested(arrays)), expected, rtol=1e-5)


def nested(arrays: dict) -> dict:
    """A state's arrays as the tree that `nnx.split` gives."""
    tree: dict = {}
    for name, value in arrays.items():
        layer, _, factor = name.rpartition(".")
        tree.setdefault(layer, {})[factor] = value
    return tree


def flat(tree: dict) -> dict:
    return {f"{layer}.{name}": value for layer, own in tree.items() for name, value in own.items()}


def test_adalora_says_what_it_needs():
    config = AdaLoRAConfig(warmup=3, final=5)
    with pytest.raises(ValueError, match="8 steps, of which 3 warm up and 5 are final"):
        budgeted(optax.sgd(0.1), config, total_steps=8)
    tx = budgeted(optax.sgd(0.1), config, total_steps=9)
    with pytest.raises(ValueError, match="no lora_A, lora_B and lora_E"):
        tx.init({"linear": {"lora_A": jnp.ones((2, 2))}})
    for field, value in (("target_rank", 13), ("interval", 0), ("beta1", 1.0)):
        with pytest.raises(ValueError, match=field):
            AdaLoRAConfig(**{field: value})


def test_delta_lora_moves_the_weight_as_its_algorithm_does():
    """Against LoRA whose base weight is moved after each step but the first `start`."""
    start, ratio, rate = 1, 0.7, 0.05
    options = {"rank": 2, "alpha": 3, "targets": TARGETS}
    model, _ = oracles.adapted(DeltaLoRAConfig(**options, ratio=ratio))
    plain, _ = oracles.adapted(LoRAConfig(**options))
    fresh = inject.extract(model).arrays
    for name in TARGETS:
        for factor in "AB":
            fresh[f"{name}.start_{factor}"] = fresh[f"{name}.lora_{factor}"]
    model = inject.load_state(model, inject.AdapterState(fresh))
    shapes = inject.extract(plain).arrays
    pair = {name: value.reshape(shapes[name].shape) for name, value in fresh.items()
            if "lora_" in name}  # fmt: skip
    plain = inject.load_state(plain, inject.AdapterState(pair))

    def loss(graphdef, trainable, frozen):
        out = nnx.merge(graphdef, trainable, frozen)(oracles.images())
        return ((out - 1) ** 2).sum(), out

    tx = following(optax.sgd(rate), start)
    graphdef, trainable, frozen = nnx.split(model, inject.Trainable, ...)
    ours = jax.jit(jax.value_and_grad(functools.partial(loss, graphdef), has_aux=True))
    opt_state = tx.init(trainable)
    other_def, other, weights = nnx.split(plain, inject.Trainable, ...)
    theirs = jax.jit(jax.value_and_grad(functools.partial(loss, other_def), has_aux=True))
    products = jax.jit(lambda t, w: {
        name: inject.layers(nnx.merge(other_def, t, w))[name].delta() for name in TARGETS
    })  # fmt: skip
    for step in range(1, 5):
        (_, found), grads = ours(trainable, frozen)
        (_, expected), other_grads = theirs(other, weights)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        before = products(other, weights)
        other = jax.tree.map(lambda p, g: p - rate * g, other, other_grads)
        after = products(other, weights)
        if step > start:
            for name in TARGETS:
                kernel = weights[name]["base"]["kernel"]
                kernel.set_value(kernel.get_value() + ratio * (after[name] - before[name]))
    merged = inject.layers(inject.merge(nnx.merge(graphdef, trainable, frozen)))
    for name in TARGETS:
        expected = weights[name]["base"]["kernel"].get_value() + after[name]
        np.testing.assert_allclose(merged[name].kernel[...], expected, atol=1e-5)


def test_copies_of_a_hypernetwork_stay_equal():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Dict(to_k=nnx.Linear(4, n, rngs=rngs)) for n in (3, 5)])

        def __call__(self, x):
            return jnp.concatenate([block["to_k"](x) for block in self.blocks], -1)

    config = HypernetworkConfig(targets=("to_k",), structure=(1, 2, 1), activation="relu")
    model = registry.add(Two(nnx.Rngs(0)), config, rngs=nnx.Rngs(0))
    graphdef, trainable, frozen = nnx.split(model, inject.Trainable, ...)
    x = oracles.images()

    @jax.jit
    def grad(trainable):
        return jax.grad(lambda t: ((nnx.merge(graphdef, t, frozen)(x) - 1) ** 2).mean())(trainable)

    def train(tx):
        values, opt_state = trainable, tx.init(trainable)
        for _ in range(3):
            updates, opt_state = tx.update(grad(values), opt_state, values)
            values = optax.apply_updates(values, updates)
        return inject.extract(nnx.merge(graphdef, values, frozen)).arrays

    tied, free = train(shared(optax.sgd(0.5), config.targets)), train(optax.sgd(0.5))
    for name in ("kernel_0", "kernel_1", "bias_1"):
        first, second = f"blocks.0.to_k.{name}", f"blocks.1.to_k.{name}"
        np.testing.assert_array_equal(tied[first], tied[second])
    assert np.abs(free["blocks.0.to_k.bias_1"] - free["blocks.1.to_k.bias_1"]).max() > 1e-4
    # The sum of the gradients is that of the network that both use.
    start = inject.extract(model).arrays
    one = flatten(grad(trainable), graphdef, frozen)
    moved = start["blocks.0.to_k.bias_1"] - 0.5 * (
        one["blocks.0.to_k.bias_1"] + one["blocks.1.to_k.bias_1"]
    )
    tx = shared(optax.sgd(0.5), config.targets)
    updates, _ = tx.update(grad(trainable), tx.init(trainable), trainable)
    first = flatten(optax.apply_updates(trainable, updates), graphdef, frozen)
    np.testing.assert_allclose(first["blocks.1.to_k.bias_1"], moved, atol=1e-6)


def flatten(trainable, graphdef, frozen) -> dict:
    return inject.extract(nnx.merge(graphdef, trainable, frozen)).arrays


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("adalora", {"target_rank": 1}), ("delta_lora", {"ratio": 0.5, "start": 2}), ("lokr", {})],
)
def test_training_side_by_side_and_resumed_from_a_checkpoint(tmp_path, kind, settings):
    """With the kind's own optimiser and loss: stacked as separate, resumed as uninterrupted."""
    config = registry.make_config(kind, rank=2, alpha=5, targets=TARGETS, **settings)
    net = oracles.Pair(rngs=nnx.Rngs(0))
    models = [registry.add(net, config, rngs=jax.random.key(seed)) for seed in range(2)]
    graphdef, _, frozen = nnx.split(models[0], inject.Trainable, ...)
    starts = [nnx.state(model, inject.Trainable) for model in models]
    tx = optim_hooks.optimiser(config, optax.adam(3e-2), 6)

    def loss(trainable):
        return ((nnx.merge(graphdef, trainable, frozen)(oracles.images()) - 1) ** 2).mean(), {}

    loss = optim_hooks.penalised(loss, config)

    def step(state):
        grads = jax.grad(lambda t: loss(t)[0])(state[0])
        updates, opt_state = tx.update(grads, state[1], state[0])
        return optax.apply_updates(state[0], updates), opt_state

    one, many = jax.jit(step), jax.jit(jax.vmap(step))

    def run(function, state, steps):
        for _ in range(steps):
            state = function(state)
        return state

    halves = [run(one, (start, tx.init(start)), 3) for start in starts]
    apart = [run(one, state, 3) for state in halves]
    together = inject.stack(starts)
    together = run(many, (together, jax.vmap(tx.init)(together)), 6)
    for number, state in enumerate(apart):
        for found, expected in zip(
            jax.tree.leaves(together[0]), jax.tree.leaves(state[0]), strict=True
        ):
            np.testing.assert_allclose(found[number], expected, atol=2e-4)
    # A pruned rank of AdaLoRA is exactly gone, and W has moved with Delta-LoRA's factors.
    arrays = flatten(apart[0][0], graphdef, frozen)
    if kind == "adalora":
        assert sum(int((arrays[f"{name}.lora_E"] == 0).sum()) for name in TARGETS) == 2
    if kind == "delta_lora":
        assert np.any(arrays["conv.start_B"] != 0)

    with Checkpoints(tmp_path, every=1, keep=1, identity={"kind": kind}) as checkpoints:
        checkpoints.save(3, halves[0])
    with Checkpoints(tmp_path, every=1, keep=1, identity={"kind": kind}) as checkpoints:
        restored, _ = checkpoints.restore((starts[0], tx.init(starts[0])))
    again = run(one, restored, 3)
    jax.tree.map(np.testing.assert_array_equal, again, apart[0])
