"""Delta-LoRA (Zi et al. 2023, arXiv:2309.02411): the frozen weight moves with its update.

After each step beyond the first `start` the paper adds what the step changed of B A to W:

    W <- W + lambda s (B' A' - B A)

W has neither gradient nor optimiser state of its own. The sum of these changes telescopes, so that
after any number of steps W is W0 + lambda s (B A - B_K A_K) with the factors of step K = `start`.
Here W0 stays as it is and that term stands beside it, without a gradient: the factors of step K are
the only state, runs stack, and the result is also LoRA of rank 2 r.

`following` is the optimiser that keeps the factors of step K. The paper uses no dropout; its values
of lambda and K were not found in a source to trust: lambda is to be given, and K is 0 unless it is.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.update import UpdateConfig, UpdateLayer, project, uniform

# The factors of step K, and those that they follow until then.
_KEPT = {"start_A": "lora_A", "start_B": "lora_B"}


@dataclass(frozen=True)
class DeltaLoRAConfig(UpdateConfig):
    """What Delta-LoRA wraps, and how: `ratio` is the paper's lambda, `start` its K in steps."""

    ratio: float | None = None
    start: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.ratio is None:
            raise ValueError("DeltaLoRAConfig.ratio is to be given: no value of it is established")
        if self.dropout or self.decompose != "none":
            raise ValueError("DeltaLoRAConfig: there is no Delta-LoRA with dropout or DoRA")


def delta_lora(config: DeltaLoRAConfig) -> inject.Maker:
    """Makes the Delta-LoRA layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        return DeltaLoRA(layer, config, path, key)

    return make


class DeltaLoRA(UpdateLayer):
    """Delta-LoRA on a layer: lora_A (*window, in, rank) and lora_B (rank, out), and start_A and
    start_B, those of step K, after any stacking axes.
    """

    kind = "Delta-LoRA"

    def __init__(self, layer: nnx.Module, config: DeltaLoRAConfig, path: str, key: jax.Array):
        super().__init__(layer, config, path)
        place, rank = self.place, config.rank_at(path)
        a = uniform(key, (*place.lead, *place.size, place.c_in, rank), place.rows)
        b = jnp.zeros((*place.lead, rank, place.c_out))
        self.lora_A, self.start_A = inject.Trainable(a), inject.Trainable(a)
        self.lora_B, self.start_B = inject.Trainable(b), inject.Trainable(b)

    def low_rank(self) -> tuple[Array, Array]:
        ratio = self.config.ratio
        down = jnp.concatenate([self.lora_A[...], self.start_A[...]], axis=-1)
        up = [(1 + ratio) * self.lora_B[...], -ratio * self.start_B[...]]
        return down, jnp.concatenate(up, axis=-2)

    def added(self, inputs: Array, dtype: Any, strength: Any) -> Float[Array, "*b o"]:
        down, up, ratio = self.lora_A[...], self.lora_B[...], self.config.ratio
        stop = jax.lax.stop_gradient
        # What moved W passes gradients to the inputs, and none to the factors.
        downs = jnp.concatenate([down, stop(down), stop(self.start_A[...])], axis=-1)
        ups = jnp.concatenate([up, ratio * stop(up), -ratio * stop(self.start_B[...])], axis=-2)
        low = project(self.base, inputs, downs.astype(dtype))
        return (low * (self.scaling * strength)).astype(dtype) @ ups.astype(dtype)


class FollowingState(NamedTuple):
    """The optimiser's own state, and the steps done."""

    inner: Any
    step: Array


def following(inner: optax.GradientTransformation, start: int) -> optax.GradientTransformation:
    """`inner` for a tree with Delta-LoRA's factors: W moves from the end of step `start` on.

    Until then start_A and start_B equal lora_A and lora_B; from then on they stay. Needs `params`
    in `update`.
    """
    if start < 0:
        raise ValueError(f"Delta-LoRA: start is {start}, expected at least 0")

    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> FollowingState:
        return FollowingState(inner.init(params), jnp.zeros((), jnp.int32))

    def update(grads: Any, state: FollowingState, params: Any = None, **extra):
        if params is None:
            raise ValueError("Delta-LoRA: update needs params")
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        step = state.step + 1
        new = _by_path(optax.apply_updates(params, updates))
        old = _by_path(params)

        def keep(path: inject.Path, change: Array) -> Array:
            names = _names(path)
            for kept, followed in _KEPT.items():
                if kept in names:
                    source = tuple(followed if name == kept else name for name in names)
                    return jnp.where(step <= start, new[source] - old[names], 0)
            return change

        kept = jax.tree_util.tree_map_with_path(keep, updates)
        return kept, FollowingState(inner_state, step)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_path(tree: Any) -> dict[tuple[str, ...], Array]:
    return {_names(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


def _names(path: inject.Path) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path)
