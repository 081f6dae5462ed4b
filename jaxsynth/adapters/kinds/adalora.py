"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): LoRA that gives its ranks to where they count.

    dW = s B E A,    s = alpha / rank

with a scalar E for each rank, zero at the start. Training starts with more ranks than it may keep.
`budgeted` is an optimiser that zeroes the E of those whose products of weight and gradient matter
least, until `target_rank` a layer are left on average. `orthogonality` is the term that the loss
adds, so that A and B stay like singular vectors. Conventions are those of peft 0.21.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.update import UpdateConfig, UpdateLayer

_FACTORS = ("lora_A", "lora_B", "lora_E")


@dataclass(frozen=True)
class AdaLoRAConfig(UpdateConfig):
    """What AdaLoRA wraps, and how.

    `rank` ranks a layer at the start, `target_rank` at the end; the budget falls with the cube of
    the steps left between `warmup` (peft: tinit) and the `final` (tfinal) steps, every `interval`
    (deltaT) of them. `beta1` and `beta2` smooth importance and its uncertainty.
    """

    rank: int = 12
    target_rank: int = 8
    warmup: int = 0
    final: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.target_rank <= self.rank:
            raise ValueError(
                f"AdaLoRAConfig.target_rank is {self.target_rank}, expected 0 to {self.rank}"
            )
        if self.warmup < 0 or self.final < 0 or self.interval < 1:
            raise ValueError("AdaLoRAConfig: warmup and final are at least 0, interval at least 1")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"AdaLoRAConfig.{name} is {getattr(self, name)}, expected in (0, 1)"
                )


def adalora(config: AdaLoRAConfig) -> inject.Maker:
    """Makes the AdaLoRA layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        return AdaLoRA(layer, config, path, key)

    return make


class AdaLoRA(UpdateLayer):
    """AdaLoRA on a layer: lora_A (*window, in, rank), lora_B (rank, out), lora_E (rank,), after any
    stacking axes.
    """

    kind = "AdaLoRA"

    def __init__(self, layer: nnx.Module, config: AdaLoRAConfig, path: str, key: jax.Array):
        super().__init__(layer, config, path)
        place, rank = self.place, config.rank_at(path)
        # peft's guard against a rank of 0.
        self.scaling = config.scaling_at(path) * rank / (rank + 1e-5)
        keys = jax.random.split(key)
        shape_a = (*place.lead, *place.size, place.c_in, rank)
        self.lora_A = inject.Trainable(0.02 * jax.random.normal(keys[0], shape_a))
        shape_b = (*place.lead, rank, place.c_out)
        self.lora_B = inject.Trainable(0.02 * jax.random.normal(keys[1], shape_b))
        self.lora_E = inject.Trainable(jnp.zeros((*place.lead, rank)))

    def low_rank(self) -> tuple[Array, Array]:
        return self.lora_A[...] * self.place.spread(self.lora_E[...], "output"), self.lora_B[...]


def orthogonality(trainable: Any) -> Float[Array, ""]:
    """The mean of ||A A^T - I|| and ||B^T B - I|| over all A and B; peft adds half of it."""
    total, count = jnp.zeros(()), 0
    for factors in _layers(trainable).values():
        lead = factors["lora_E"].ndim - 1
        a = factors["lora_A"].reshape(
            *factors["lora_A"].shape[:lead], -1, factors["lora_E"].shape[-1]
        )
        for matrix in (jnp.swapaxes(a, -1, -2), factors["lora_B"]):
            gram = matrix @ jnp.swapaxes(matrix, -1, -2)
            difference = gram - jnp.eye(gram.shape[-1])
            norms = jnp.sqrt((difference**2).sum((-2, -1)) + 1e-20)
            total, count = total + norms.sum(), count + norms.size
    return total / count


class BudgetState(NamedTuple):
    """The optimiser's state, the steps done, and by layer: importance, uncertainty, kept ranks."""

    inner: Any
    step: Array
    importance: dict[str, dict[str, Array]]
    uncertainty: dict[str, dict[str, Array]]
    kept: dict[str, Array]


def budgeted(
    inner: optax.GradientTransformation, config: AdaLoRAConfig, total_steps: int
) -> optax.GradientTransformation:
    """`inner` within AdaLoRA's budget over `total_steps` updates; for trees of AdaLoRA's factors.

    Needs `params` in `update`. Variables of other adapters or layers in the tree are left to
    `inner`. ValueError where warm-up and final steps leave none between them.
    """
    last = total_steps - config.final
    if last <= config.warmup:
        raise ValueError(
            f"AdaLoRA: {total_steps} steps, of which {config.warmup} warm up and {config.final} "
            "are final"
        )

    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> BudgetState:
        zeros = {
            path: {name: jnp.zeros_like(value) for name, value in factors.items()}
            for path, factors in _layers(params).items()
        }
        if not zeros:
            raise ValueError("AdaLoRA: no lora_A, lora_B and lora_E among the parameters")
        kept = {path: jnp.ones(own["lora_E"].shape, bool) for path, own in zeros.items()}
        # Arrays of their own: a step donates each of them.
        apart = jax.tree.map(jnp.copy, zeros)
        return BudgetState(inner.init(params), jnp.zeros((), jnp.int32), zeros, apart, kept)

    def update(grads: Any, state: BudgetState, params: Any = None, **extra):
        if params is None:
            raise ValueError("AdaLoRA: update needs params")
        step = state.step + 1
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        old, gradient = _layers(params), _layers(grads)
        new = _layers(optax.apply_updates(params, updates))
        learning = step < last

        def smooth(beta: float, before: Array, found: Array) -> Array:
            return jnp.where(learning, beta * before + (1 - beta) * found, before)

        found = jax.tree.map(lambda value, grad: jnp.abs(value * grad), new, gradient)
        importance = jax.tree.map(
            lambda before, now: smooth(config.beta1, before, now), state.importance, found
        )
        uncertainty = jax.tree.map(
            lambda before, now, mean: smooth(config.beta2, before, jnp.abs(now - mean)),
            state.uncertainty, found, importance,
        )  # fmt: skip
        scores = {
            path: _score(jax.tree.map(jnp.multiply, importance[path], uncertainty[path]))
            for path in new
        }
        ranked = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
        full = ranked.size
        aim = config.target_rank * sum(score.size // score.shape[-1] for score in scores.values())
        left = 1 - (step - config.warmup) / (last - config.warmup)
        budget = jnp.floor((full - aim) * left**3 + aim).astype(jnp.int32)
        excess = jnp.where(step > config.warmup, full - budget, 0)
        worst = jnp.where(excess > 0, ranked[jnp.maximum(excess - 1, 0)], -jnp.inf)
        due = (learning & (step % config.interval == 0)) | (step == last)
        # After the last allocation the same ranks stay off; before, a rank may come back.
        kept = {
            path: jnp.where(due, score > worst, jnp.where(step > last, state.kept[path], True))
            for path, score in scores.items()
        }

        def prune(path: inject.Path, change: Array) -> Array:
            layer, factor = _split(path)
            if factor != "lora_E" or layer not in kept:
                return change
            return jnp.where(kept[layer], change, -old[layer]["lora_E"])

        updates = jax.tree_util.tree_map_with_path(prune, updates)
        return updates, BudgetState(inner_state, step, importance, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _score(factors: dict[str, Array]) -> Float[Array, "*lead r"]:
    """A rank's own score and the means of those of its column of A and row of B."""
    own = factors["lora_E"]
    axes = tuple(range(own.ndim - 1, factors["lora_A"].ndim - 1))
    return own + factors["lora_A"].mean(axes) + factors["lora_B"].mean(-1)


def _layers(tree: Any) -> dict[str, dict[str, Array]]:
    """The factors of AdaLoRA's layers in a tree of variables, by layer."""
    found: dict[str, dict[str, Array]] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        layer, factor = _split(path)
        if factor in _FACTORS:
            found.setdefault(layer, {})[factor] = value
    return {layer: own for layer, own in found.items() if len(own) == len(_FACTORS)}


def _split(path: inject.Path) -> tuple[str, str]:
    """The layer and the name of a leaf."""
    names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
    at = next((i for i, name in enumerate(names) if name in _FACTORS), len(names) - 1)
    return ".".join(names[:at]), names[at]
