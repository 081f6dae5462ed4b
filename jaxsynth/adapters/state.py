"""The values of adapters without their network: read, filled in, stacked and routed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from jaxsynth.adapters.layer import AdapterLayer, Trainable, matches
from jaxsynth.adapters.tree import layers, map_variables, trainable_variables

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterState:
    """The trainable values of an adapted network, without the network.

    `arrays` maps "<module path>.<factor>" to an array; `config` is the kind's configuration, a
    `MixedConfig` of several, or None where no layer is wrapped (biases or a whole network trained
    in place). A pytree, so states can be stacked, averaged and flattened.
    """

    arrays: dict[str, Array]
    config: Any = None


jax.tree_util.register_dataclass(AdapterState, data_fields=["arrays"], meta_fields=["config"])


@dataclass(frozen=True)
class MixedConfig:
    """Adapters of several configurations, each on layers of its own, as many files hold them."""

    parts: tuple[Any, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(target for part in self.parts for target in part.targets)

    def at(self, path: str) -> Any:
        """The part whose layer stands at a dotted path: the first with a target for it."""
        for part in self.parts:
            if any(matches(target, path) for target in part.targets):
                return part
        raise ValueError(f"{path}: among the targets of no part of the configuration")


def configs_of(config: Any) -> tuple[Any, ...]:
    """The single configurations in one: none of None, the parts of a mixed one."""
    if config is None:
        return ()
    return config.parts if isinstance(config, MixedConfig) else (config,)


def extract(model: nnx.Module) -> AdapterState:
    """The trainable values of `model` and the configuration that its adapters share."""
    arrays = {path: variable.get_value() for path, variable in trainable_variables(model).items()}
    if not arrays:
        raise ValueError("extract: nothing in the network is trainable")
    return AdapterState(arrays, config_of(model))


def config_of(model: nnx.Module) -> Any:
    """The configuration of the network's adapters, None where there are none.

    Of several it is a `MixedConfig`; ValueError where their targets do not tell which is whose.
    """
    found = {
        path: layer.config
        for path, layer in layers(model).items()
        if isinstance(layer, AdapterLayer) and layer.config is not None
    }
    configs = tuple(dict.fromkeys(found.values()))
    if len(configs) < 2:
        return configs[0] if configs else None
    mixed = MixedConfig(configs)
    for path, config in found.items():
        if mixed.at(path) != config:
            raise ValueError(
                f"extract: {path} has an adapter of other settings than the first with a target "
                f"for it: {config} and {mixed.at(path)}"
            )
    return mixed


def load_state(model: T, state: AdapterState) -> T:
    """A copy of `model` with the trainable values of `state`, cast to the dtypes that it has.

    Raises ValueError naming every key that is missing, unknown or of another shape.
    """
    expected = trainable_variables(model)
    missing, unknown = expected.keys() - state.arrays.keys(), state.arrays.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(
            f"adapter state: missing keys {_some(missing)}, unknown keys {_some(unknown)}"
        )
    for path, variable in expected.items():
        found, wanted = jnp.shape(state.arrays[path]), variable.get_value().shape
        if found != wanted:
            raise ValueError(f"adapter state: {path} has shape {found}, expected {wanted}")

    def fill(path: str, variable: nnx.Variable) -> nnx.Variable:
        if path not in expected or not isinstance(variable, Trainable):
            return variable
        value = jnp.asarray(state.arrays[path], variable.get_value().dtype)
        return Trainable(value, **variable.get_metadata())

    return map_variables(fill, model)


def stack(states: Sequence[T]) -> T:
    """States (or any pytrees) of one structure, their arrays stacked on a new first axis.

    Raises ValueError naming the first leaf whose shape differs.
    """
    if not states:
        raise ValueError("stack: no states")
    first = jax.tree_util.tree_leaves_with_path(states[0])
    for number, state in enumerate(states[1:], 1):
        if jax.tree.structure(state) != jax.tree.structure(states[0]):
            raise ValueError(f"stack: state {number} has other keys or configuration than state 0")
        for (path, leaf), other in zip(first, jax.tree.leaves(state), strict=True):
            if jnp.shape(leaf) != jnp.shape(other):
                raise ValueError(
                    f"stack: {jax.tree_util.keystr(path)} has shape {jnp.shape(other)} in state "
                    f"{number}, {jnp.shape(leaf)} in state 0"
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstack(stacked: T) -> list[T]:
    """The states that `stack` put together."""
    count = jax.tree.leaves(stacked)[0].shape[0]
    return [_take(stacked, i) for i in range(count)]


@jax.jit
def _take(stacked: T, i: int) -> T:
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def route(stacked: T, index: Int[Array, " b"]) -> T:
    """One state a sample: row `index[i]` of every stacked array at position i.

    For `jax.vmap(one_sample, in_axes=(0, None, 0))(route(stacked, index), frozen, samples)`.
    """
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _some(keys: set[str]) -> str:
    """Up to five keys for a message."""
    shown = sorted(keys)[:5]
    rest = len(keys) - len(shown)
    return f"{shown}" + (f" and {rest} more" if rest else "")
