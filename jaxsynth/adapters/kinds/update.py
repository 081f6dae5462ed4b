"""Adapters whose effect is an added kernel, W' = W + s dW, with s = alpha / rank.

LoRA, LoHa, LoKr, VeRA, AdaLoRA, ... differ in how few numbers make dW, and in nothing else: the
layers that they wrap, scale, dropout, merging and DoRA on top of any of them (`dora`) are here. The
rank-stabilised s = alpha / sqrt(rank) is rsLoRA's (Kalajdzievski 2023, arXiv:2312.03732).

A kind gives dW as two factors (`low_rank`) or as a whole (`delta`). Factors are stored in float32
in the layout of NNX's kernels, (in, out), and computed in the base layer's dtype.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds import dora
from jaxsynth.adapters.kinds.convolution import narrow_convolve
from jaxsynth.adapters.kinds.place import Place
from jaxsynth.core.errors import shown

Axis = Literal["none", "output", "input"]


@dataclass(frozen=True)
class UpdateConfig:
    """What an added kernel wraps, and how.

    `alpha` None means each layer's own rank, i.e. scale 1. `rank_pattern` and `alpha_pattern` map a
    regular expression for the end of a module path to a value that replaces the default there; the
    first match wins. `dropout` is that of the inputs; `module_dropout` leaves out a layer's whole
    update, one draw a step. `decompose` is the axis of DoRA's magnitudes, "output" as in the paper
    and peft, "input" as in LyCORIS 2.2 to 3.1; `detach_norm` False lets gradients through the norm,
    as LyCORIS does. `bias` trains a change of the bias as well: on all layers, or on those that it
    names as `targets` does.
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    module_dropout: float = 0.0
    decompose: Axis = "none"
    detach_norm: bool = True
    bias: bool | tuple[str, ...] = False

    def __post_init__(self):
        name = type(self).__name__
        object.__setattr__(self, "targets", tuple(self.targets))
        if not isinstance(self.bias, bool):
            object.__setattr__(self, "bias", tuple(self.bias))
        for pattern, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"{name}: {pattern} is {rank}, expected at least 1")
        for rate in ("dropout", "module_dropout"):
            check_rate(self, rate)
        check_choice(self, "decompose", ("none", "output", "input"))

    def rank_at(self, path: str) -> int:
        """The rank of the layer at a dotted path."""
        return inject.first_match(self.rank_pattern, path, self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha of the layer at a dotted path."""
        default = self.rank_at(path) if self.alpha is None else self.alpha
        return inject.first_match(self.alpha_pattern, path, default)

    def alphas(self) -> tuple[float, dict[str, float]]:
        """The alpha of most layers and the others' by pattern, for files that know no None."""
        if self.alpha is not None:
            return self.alpha, dict(self.alpha_pattern)
        return self.rank, {**self.alpha_pattern, **_missing(self.rank_pattern, self.alpha_pattern)}

    def bias_at(self, path: str) -> bool:
        """Whether the layer at a dotted path trains a change of its bias."""
        if isinstance(self.bias, bool):
            return self.bias
        return any(inject.matches(target, path) for target in self.bias)

    def scaling_at(self, path: str) -> float:
        """The factor on the update of the layer at a dotted path."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.use_rslora else rank)


def _missing(patterns: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The patterns that `known` lacks."""
    return {pattern: value for pattern, value in patterns.items() if pattern not in known}


def check_rate(config: Any, name: str) -> None:
    """Raises ValueError where a field is no rate of dropout."""
    found = getattr(config, name)
    if not 0 <= found < 1:
        kind = type(config).__name__
        raise ValueError(f"{kind}.{name} is {found}, expected 0 <= {name} < 1")


def check_scale(config: Any, name: str) -> None:
    """Raises ValueError where a field is neither None nor a positive scale."""
    found = getattr(config, name)
    if found is not None and not found > 0:
        raise ValueError(f"{type(config).__name__}.{name} is {found}, expected more than 0")


def check_choice(config: Any, name: str, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError where a field is none of its values."""
    found = getattr(config, name)
    if found not in allowed:
        raise ValueError(
            f"{type(config).__name__}.{name} is {shown(found)}, expected one of {allowed}"
        )


def project(layer: nnx.Module, inputs: Array, kernel: Array) -> Array:
    """What `layer` would give without its bias and with another, narrower kernel (*size, in, n)."""
    if isinstance(layer, nnx.Embed):
        return jnp.take(kernel, inputs, axis=0)
    if isinstance(layer, nnx.Conv):
        return narrow_convolve(inputs.astype(kernel.dtype), kernel, layer)
    return inputs.astype(kernel.dtype) @ kernel


class UpdateLayer(inject.AdapterLayer):
    """A frozen `nnx.Linear`, `nnx.Conv` (1-D, 2-D, 3-D) or `nnx.Embed` with an added kernel.

    A kind implements `low_rank`; one whose kernel is cheaper to make as a whole sets `is_dense` and
    implements `delta`, and one with a way of its own to apply it overrides `added`. `magnitude` is
    DoRA's, (out,) or (in,) after any stacking axes; `diff_b` (out,) the change of the bias.
    """

    is_dense: ClassVar[bool] = False

    def __init__(self, layer: nnx.Module, config: Any, path: str):
        super().__init__(layer, config, dropout=config.dropout)
        self.place = Place.of(layer, self.kind, path)
        self.scaling = config.scaling_at(path)
        self.magnitude = self.diff_b = nnx.data(None)
        if config.decompose != "none":
            lengths = dora.lengths(self.weight(), self.place, config.decompose)
            self.magnitude = inject.Trainable(lengths)
        if config.bias_at(path):
            if self.place.is_table:
                raise ValueError(f"{path}: a table has no bias to change")
            self.diff_b = inject.Trainable(jnp.zeros((*self.place.lead, self.place.c_out)))

    def low_rank(self) -> tuple[Float[Array, "*lead_and_size i r"], Float[Array, "*lead r o"]]:
        """Two factors whose product is the added kernel at scale 1, exactly."""
        raise NotImplementedError(f"the kernel of a {self.kind} layer has no low rank")

    def delta(self) -> Float[Array, "*lead_and_size i o"]:
        """The kernel that the adapter adds at strength 1, in float32."""
        down, up = self.low_rank()
        product = jnp.matmul(down, self.place.wide(up), precision=jax.lax.Precision.HIGHEST)
        return self.scaling * product

    def __call__(self, inputs: Array) -> Float[Array, "*b o"]:
        if self.is_off:
            return self.base(inputs)
        strength = self._drawn_strength()
        out = self.changed(inputs, strength)
        return out if self.diff_b is None else out + (strength * self.diff_b[...]).astype(out.dtype)

    def changed(self, inputs: Array, strength: Any) -> Float[Array, "*b o"]:
        """The layer's outputs with its changed kernel at this strength, without `diff_b`."""
        if self.is_cheaper_whole(inputs):
            return inject.with_params(self.base, self._with_change(strength))(inputs)
        if self.magnitude is not None:
            return self._decomposed(inputs, strength)
        out = self.base(inputs)
        # The base layer's result tells its compute dtype.
        return out + self.added(inputs, out.dtype, strength)

    def is_cheaper_whole(self, inputs: Array) -> bool:
        """Whether a training step on these inputs had better make the changed kernel."""
        return False

    def added(self, inputs: Array, dtype: Any, strength: Any) -> Float[Array, "*b o"]:
        """What the added kernel makes of the inputs, times `strength`."""
        down, up = self.low_rank()
        low = project(self.base, self.dropped(inputs), down.astype(dtype))
        return (low * (self.scaling * strength)).astype(dtype) @ up.astype(dtype)

    def dropped(self, inputs: Array) -> Array:
        """The inputs after dropout; ids are not dropped."""
        return inputs if self.place.is_table else self.drop(inputs)

    @property
    def drops(self) -> bool:
        return self.dropout > 0 or self.config.module_dropout > 0

    def weight(self) -> Float[Array, "*lead_and_size i o"]:
        """The base layer's own kernel, in float32."""
        return getattr(self.base, self.place.name)[...].astype(jnp.float32)

    def ratios(self) -> Float[Array, "*lead n"]:
        """DoRA's m / ||W + s dW|| for each output or input, in float32."""
        place, side = self.place, self.config.decompose
        weight = self._constant(self.weight())
        if self.is_dense:
            norms = dora.lengths(weight + self._constant(self.delta()), place, side)
        else:
            down, up = map(self._constant, self.low_rank())
            norms = dora.sum_lengths(weight, down, self.scaling * up, place, side)
        return self.magnitude[...] / norms

    def merged(self) -> dict[str, Array]:
        if self.is_off:
            return {self.place.name: getattr(self.base, self.place.name)[...]}
        result = self._with_change(self.strength)
        if self.diff_b is None:
            return result
        bias = self.strength * self.diff_b[...]
        if self.base.bias is not None:
            bias = bias + self.base.bias[...].astype(jnp.float32)
        return result | {"bias": bias.astype(result[self.place.name].dtype)}

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        if self.is_off:
            return merged
        result: dict[str, Array | None] = {self.place.name: self._without_change(merged)}
        if self.diff_b is None:
            return result
        if self.base.bias is None:
            return result | {"bias": None}
        bias = merged["bias"].astype(jnp.float32) - self.strength * self.diff_b[...]
        return result | {"bias": bias.astype(merged["bias"].dtype)}

    def _with_change(self, strength: Any) -> dict[str, Array]:
        """The base layer's kernel with the change in it."""
        weight = getattr(self.base, self.place.name)[...]
        factor, delta = self._change(strength)
        wide = weight.astype(jnp.float32) * factor + delta
        return {self.place.name: wide.astype(weight.dtype)}

    def _without_change(self, merged: dict[str, Array]) -> Array:
        """The base layer's kernel, given one with the change in it."""
        weight = merged[self.place.name]
        factor, delta = self._change(self.strength)
        return ((weight.astype(jnp.float32) - delta) / factor).astype(weight.dtype)

    def _change(self, strength: Any) -> tuple[Array | float, Array]:
        """By what a strength multiplies the kernel, and what it then adds."""
        if self.magnitude is None:
            return 1.0, strength * self.delta()
        ratio = self.place.spread(self.ratios(), self.config.decompose)
        return 1 + strength * (ratio - 1), strength * ratio * self.delta()

    def _decomposed(self, inputs: Array, strength: Any) -> Float[Array, "*b o"]:
        """The base's outputs, and what DoRA changes of them."""
        ratio, side = self.ratios(), self.config.decompose
        if side == "input" and not self.place.is_table:
            scale = (1 + strength * (ratio - 1)).astype(inputs.dtype)
            out = self.base(inputs * scale)
            return out + self.added(inputs * ratio.astype(inputs.dtype), out.dtype, strength)
        out = self.base(inputs)
        if side == "input":
            ratio = jnp.take(ratio, inputs, axis=0)[..., None]
        # peft with dropout passes dropped inputs through the base a second time; here they reach
        # the update alone, as in LoRA.
        change = (strength * (ratio - 1)).astype(out.dtype) * inject.without_bias(out, self.base)
        added = self.added(inputs, out.dtype, 1.0)
        return out + change + (strength * ratio).astype(out.dtype) * added

    def _drawn_strength(self) -> Any:
        """The strength, or 0 where this step of training leaves the layer out."""
        rate = self.config.module_dropout
        if rate == 0 or self.dropout_key is None:
            return self.strength
        key = jax.random.fold_in(self.dropout_key, 1)
        return self.strength * jax.random.bernoulli(key, 1 - rate)

    def _constant(self, value: Array) -> Array:
        return jax.lax.stop_gradient(value) if self.config.detach_norm else value


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """peft's and LyCORIS' Kaiming-uniform with a = sqrt(5): within +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
