"""What the other kinds of adapters cost beside plain LoRA: one update of a frozen network.

Both sides are ours, on the same layers with the same rank, optimiser and batch: forward, backward
and AdamW, and nothing around it. Before anything is timed, the kind is held to its merged weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.bench.cases.networks import DITS, NETWORKS, random_dit, random_network
from jaxsynth.bench.cases.train_step import Stepper
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.step import init_state, make_train_step

LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "proj_in", "proj_out")
TOKENS = 77


@dataclass(frozen=True)
class AdapterCase:
    """One kind on a transformer's linear layers, or on a UNet's linear layers and convolutions."""

    name: str
    network: str
    kind: str
    batch_size: int
    rank: int = 8
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def images(self) -> int:
        return self.batch_size

    @property
    def detail(self) -> str:
        return f"batch {self.batch_size}, rank {self.rank}"


CASES = tuple(
    AdapterCase(f"{network} {kind}", network, kind, size)
    for network, size in (("dit-s2", 4), ("sd-shaped", 2))
    for kind in ("dora", "loha", "lokr")
)


class KindTraining:
    """Our side: `step()` is one update of the kind's factors, and waits for it."""

    def __init__(self, case: AdapterCase, kind: str, settings: dict[str, Any]):
        self.case = case
        self.model, self.inputs = network(case)
        linear_only = case.network in DITS
        targets = LINEAR if linear_only else (*LINEAR, *CONVOLUTIONS)
        config = registry.make_config(kind, targets=targets, **settings)
        model = registry.add(self.model, config, rngs=jax.random.key(0))
        self.adapted = inject.load_state(model, moved(inject.extract(model)))
        graphdef, trainable, frozen = nnx.split(self.adapted, inject.Trainable, ...)

        def loss(trainable, frozen, batch, _):
            out = nnx.merge(graphdef, trainable, frozen)(*batch)
            return jnp.mean(jnp.square(out.astype(jnp.float32))), {}

        config = TrainingConfig(learning_rate=1e-4, weight_decay=0.01, clip_norm=1.0)
        tx = make_optimizer(config)
        state = init_state(trainable, tx, jax.random.key(1), Rate.of(config))
        self._stepper = Stepper(make_train_step(loss, tx), state, frozen)

    def step(self) -> dict[str, np.ndarray]:
        return self._stepper(self.inputs)


def network(case: AdapterCase) -> tuple[nnx.Module, tuple[jax.Array, ...]]:
    """A network with random weights, and a batch for it: latents, timesteps, labels or words."""
    generator, size = np.random.default_rng(0), case.batch_size
    times = jnp.asarray(generator.integers(0, 1000, size))

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(generator.standard_normal(shape, np.float32))

    if case.network in DITS:
        config = DITS[case.network]()
        side = config.sample_size
        latents = normal(size, side, side, config.in_channels)
        return random_dit(config), (latents, times, jnp.zeros(size, jnp.int32))
    config = UNet2DConditionConfig.from_dict(NETWORKS[case.network]().unet)
    latents = normal(size, config.sample_size, config.sample_size, config.in_channels)
    words = normal(size, TOKENS, config.cross_attention_dim)
    return random_network(UNet2DCondition, config), (latents, times, words)


def moved(state: inject.AdapterState) -> inject.AdapterState:
    """The state with every factor a little off its start, so that all have an effect."""
    generator = np.random.default_rng(1)
    arrays = {
        name: value + 0.02 * generator.standard_normal(value.shape, np.float32)
        for name, value in state.arrays.items()
    }
    return inject.AdapterState(arrays, state.config)


def build(case: AdapterCase) -> KindTraining:
    """The kind's side."""
    return KindTraining(case, case.kind, {"rank": case.rank} | case.settings)


def connect(ours: KindTraining) -> KindTraining:
    """LoRA's side."""
    return KindTraining(ours.case, "lora", {"rank": ours.case.rank})


def compare(ours: KindTraining, _: list, __: KindTraining) -> float:
    """The difference of the adapted network's outputs from its merged weights', relative."""
    forward = nnx.jit(lambda model, inputs: model(*inputs))
    found = np.asarray(forward(ours.adapted, ours.inputs))
    merged = np.asarray(forward(inject.merge(ours.adapted), ours.inputs))
    return float(np.abs(found - merged).max() / np.abs(merged).max())


def peer_call(_: KindTraining, lora: KindTraining) -> Callable[[], object]:
    """What is timed beside `ours.step`."""
    return lora.step
