"""Hypernetworks (NovelAI 2022, as in the A1111 web UI): a small network before keys and values.

    y = W h(x),    h(x) = x + strength MLP(x)

on the inputs of an attention's to_k and to_v. There one pair of networks, for keys and for values,
serves all layers of the same width; here each layer has its own copy, so that it is an adapter like
any other, and `shared` is the optimiser that keeps the copies equal. (Without it every layer learns
its own, which the file format cannot say.) The last layer starts at zero, so that an untrained
network is its base (but for a sigmoid's 1/2 at the output); A1111 starts it normal.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.update import check_choice, check_rate

_ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "leakyrelu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


@dataclass(frozen=True)
class HypernetworkConfig:
    """What a network stands before, and its form.

    `structure` are the widths of its layers as multiples of the inputs', first and last 1;
    `activation` stands after all but the last layer (`activate_output`: after it too), and then, on
    request, a LayerNorm after every layer.
    """

    targets: tuple[str, ...] = ("to_k", "to_v")
    structure: tuple[float, ...] = (1, 2, 1)
    activation: Literal["linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid"] = "linear"
    layer_norm: bool = False
    activate_output: bool = False
    deviation: float = 0.01
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "structure", tuple(self.structure))
        check_choice(self, "activation", tuple(_ACTIVATIONS))
        check_rate(self, "dropout")
        ends = self.structure[:1] + self.structure[-1:]
        if len(self.structure) < 2 or ends != (1, 1) or min(self.structure) <= 0:
            raise ValueError(
                f"HypernetworkConfig.structure is {self.structure}, expected at least two positive "
                "widths, the first and the last 1"
            )


def hypernetwork(config: HypernetworkConfig) -> inject.Maker:
    """Makes the hypernetwork layers of `config`, for `inject.inject`.

    A network's start depends on the last name of the path and the width, so that the copies of one
    network start equal.
    """

    def make(path: str, layer: nnx.Module, _: jax.Array) -> inject.AdapterLayer:
        if type(layer) is not nnx.Linear:
            raise TypeError(
                f"{path}: a hypernetwork stands before nnx.Linear, found {type(layer).__name__}"
            )
        return Hypernetwork(layer, config, path)

    return make


class Hypernetwork(inject.AdapterLayer):
    """A linear layer and a network before it: `kernel_i` (in, out) and `bias_i` (out,) for each of
    its layers, `norm_i` and `shift_i` (out,) of a LayerNorm, after any stacking axes.
    """

    kind = "hypernetwork"

    def __init__(self, layer: nnx.Linear, config: HypernetworkConfig, path: str):
        super().__init__(layer, config, dropout=config.dropout)
        *lead, width, _ = layer.kernel.get_value().shape
        sizes = [round(width * multiple) for multiple in config.structure]
        key = inject.key_of(jax.random.fold_in(jax.random.key(0), width), path.rpartition(".")[2])
        self.depth = len(sizes) - 1
        for i, (c_in, c_out) in enumerate(itertools.pairwise(sizes)):
            drawn = config.deviation * jax.random.normal(jax.random.fold_in(key, i), (c_in, c_out))
            drawn = jnp.zeros_like(drawn) if i == self.depth - 1 else drawn
            values = {"kernel": drawn, "bias": jnp.zeros(c_out)}
            if config.layer_norm:
                values |= {"norm": jnp.ones(c_out), "shift": jnp.zeros(c_out)}
            for name, value in values.items():
                value = jnp.broadcast_to(value, (*lead, *value.shape))
                setattr(self, f"{name}_{i}", inject.Trainable(value))

    def __call__(self, inputs: Float[Array, "... i"]) -> Float[Array, "... o"]:
        if self.is_off:
            return self.base(inputs)
        change = self.strength * self.network(inputs)
        return self.base(inputs + change.astype(inputs.dtype))

    def network(self, hidden: Array) -> Array:
        """MLP(x), in float32."""
        hidden = hidden.astype(jnp.float32)
        for i in range(self.depth):
            kernel, bias = (getattr(self, f"{name}_{i}")[...] for name in ("kernel", "bias"))
            hidden = hidden @ kernel + bias
            last = i == self.depth - 1
            if not last or self.config.activate_output:
                hidden = _ACTIVATIONS[self.config.activation](hidden)
            if self.config.layer_norm:
                hidden = jax.nn.standardize(hidden, epsilon=1e-5)
                hidden = hidden * getattr(self, f"norm_{i}")[...] + getattr(self, f"shift_{i}")[...]
            hidden = hidden if last else self.drop(hidden)
        return hidden


def shared(
    inner: optax.GradientTransformation, targets: tuple[str, ...]
) -> optax.GradientTransformation:
    """`inner` for hypernetworks that are shared, as A1111 has them.

    The gradients of all copies of one network are summed, so that the copies stay equal: those on
    the same target (the same end of a path) and of the same shape.
    """

    def group(path: inject.Path, value: Array) -> tuple | None:
        names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        found = [(t, i) for i, name in enumerate(names) for t in targets if name == t]
        return (*found[-1][:1], *names[found[-1][1] + 1 :], value.shape) if found else None

    inner = optax.with_extra_args_support(inner)

    def update(grads: Any, state: Any, params: Any = None, **extra):
        sums: dict[tuple, Array] = {}
        for path, value in jax.tree_util.tree_leaves_with_path(grads):
            if name := group(path, value):
                sums[name] = sums[name] + value if name in sums else value

        def replace(path: inject.Path, value: Array) -> Array:
            name = group(path, value)
            return sums[name] if name else value

        return inner.update(
            jax.tree_util.tree_map_with_path(replace, grads), state, params, **extra
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)
