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
from jaxsynth.adapters.kinds.convolution import check_conv, narrow_convolve

Axis = Literal["none", "output", "input"]


@dataclass(frozen=True)
class UpdateConfig:
    """What an added kernel wraps, and how.

    `alpha` None means `rank`, i.e. scale 1. `rank_pattern` and `alpha_pattern` map a regular
    expression for the end of a module path to a value that replaces the default there; the first
    match wins. `dropout` is that of the inputs; `module_dropout` leaves out a layer's whole update,
    one draw a step. `decompose` is the axis of DoRA's magnitudes, "output" as in the paper and
    peft, "input" as in LyCORIS 2.2 to 3.1; `detach_norm` False lets gradients through the norm, as
    LyCORIS does.
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

    def __post_init__(self):
        name = type(self).__name__
        object.__setattr__(self, "targets", tuple(self.targets))
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
        default = self.rank if self.alpha is None else self.alpha
        return inject.first_match(self.alpha_pattern, path, default)

    def scaling_at(self, path: str) -> float:
        """The factor on the update of the layer at a dotted path."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.use_rslora else rank)


def check_rate(config: Any, name: str) -> None:
    """Raises ValueError where a field is no rate of dropout."""
    found = getattr(config, name)
    if not 0 <= found < 1:
        kind = type(config).__name__
        raise ValueError(f"{kind}.{name} is {found}, expected 0 <= {name} < 1")


def check_choice(config: Any, name: str, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError where a field is none of its values."""
    found = getattr(config, name)
    if found not in allowed:
        raise ValueError(f"{type(config).__name__}.{name} is {found!r}, expected one of {allowed}")


@dataclass(frozen=True)
class Place:
    """The kernel of a wrapped layer: (*lead, *size, in, out) in the parameter `name`.

    `lead` are the axes of layers stacked for a scan, which are gone within it; `size` is a
    convolution's window, () elsewhere. A table of embeddings is a kernel for one-hot inputs.
    """

    name: str
    lead: tuple[int, ...]
    size: tuple[int, ...]
    c_in: int
    c_out: int

    @classmethod
    def of(cls, layer: nnx.Module, kind: str, path: str) -> "Place":
        """Raises TypeError for a layer without a kernel, ValueError for a convolution too unusual.

        Exact types: a subclass may compute something that an update would not follow.
        """
        axes, name = 0, "kernel"
        if type(layer) is nnx.Conv:
            check_conv(kind, path, layer)
            axes = len(layer.kernel_size)
        elif type(layer) is nnx.Embed:
            name = "embedding"
        elif type(layer) is not nnx.Linear:
            raise TypeError(
                f"{path}: {kind} adapts nnx.Linear, nnx.Conv and nnx.Embed, found "
                f"{type(layer).__name__}"
            )
        *outer, c_in, c_out = getattr(layer, name).get_value().shape
        cut = len(outer) - axes
        return cls(name, tuple(outer[:cut]), tuple(outer[cut:]), c_in, c_out)

    @property
    def is_table(self) -> bool:
        return self.name == "embedding"

    @property
    def ones(self) -> tuple[int, ...]:
        """A window of one tap."""
        return (1,) * len(self.size)

    @property
    def rows(self) -> int:
        """How many inputs one output sums."""
        return math.prod(self.size) * self.c_in

    def flat(self, kernel: Array) -> Array:
        """(*lead, *size, in, n) as a matrix (*lead, rows, n)."""
        return kernel.reshape(*self._lead(kernel), -1, kernel.shape[-1])

    def tall(self, kernel: Array) -> Array:
        """A kernel of one tap, (*lead, *1, n, out) as a matrix (*lead, n, out)."""
        return kernel.reshape(*self._lead(kernel), *kernel.shape[-2:])

    def wide(self, matrix: Array) -> Array:
        """The inverse of `tall`."""
        return matrix.reshape(*matrix.shape[:-2], *self.ones, *matrix.shape[-2:])

    def inputs(self, rows: Array) -> Array:
        """Values of the rows of a matrix, (*lead, rows), summed for each input: (*lead, in)."""
        return rows.reshape(*rows.shape[:-1], -1, self.c_in).sum(-2)

    def spread(self, values: Array, side: str) -> Array:
        """Values of inputs or outputs, (*lead, n), shaped to multiply a kernel."""
        ends = (values.shape[-1], 1) if side == "input" else (1, values.shape[-1])
        return values.reshape(*values.shape[:-1], *self.ones, *ends)

    def _lead(self, kernel: Array) -> tuple[int, ...]:
        return kernel.shape[: kernel.ndim - 2 - len(self.size)]


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
    DoRA's, (out,) or (in,) after any stacking axes.
    """

    is_dense: ClassVar[bool] = False

    def __init__(self, layer: nnx.Module, config: Any, path: str):
        super().__init__(layer, config, dropout=config.dropout)
        self.place = Place.of(layer, self.kind, path)
        self.scaling = config.scaling_at(path)
        self.magnitude = nnx.data(None)
        if config.decompose != "none":
            self.magnitude = inject.Trainable(dora.initial(self.weight(), self.place, config))

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
        if self.is_cheaper_whole(inputs):
            return inject.with_params(self.base, self.merged())(inputs)
        if self.magnitude is not None:
            return dora.decomposed(self, inputs)
        out = self.base(inputs)
        # The base layer's result tells its compute dtype.
        return out + self.added(inputs, out.dtype, self.strength)

    def is_cheaper_whole(self, inputs: Array) -> bool:
        """Whether a training step on these inputs had better make the changed kernel."""
        return False

    def added(self, inputs: Array, dtype: Any, strength: Any) -> Float[Array, "*b o"]:
        """What the added kernel makes of the inputs, times `strength`."""
        down, up = self.low_rank()
        low = project(self.base, self.dropped(inputs), down.astype(dtype))
        return (low * self.factor(strength)).astype(dtype) @ up.astype(dtype)

    def factor(self, strength: Any) -> Any:
        """The scale at this strength, 0 where this step leaves the layer out."""
        rate = self.config.module_dropout
        scale = self.scaling * strength
        if rate == 0 or self.dropout_key is None:
            return scale
        return scale * jax.random.bernoulli(jax.random.fold_in(self.dropout_key, 1), 1 - rate)

    def dropped(self, inputs: Array) -> Array:
        """The inputs after dropout; ids are not dropped."""
        return inputs if self.place.is_table else self.drop(inputs)

    @property
    def drops(self) -> bool:
        return self.dropout > 0 or self.config.module_dropout > 0

    def weight(self) -> Float[Array, "*lead_and_size i o"]:
        """The base layer's own kernel, in float32."""
        return getattr(self.base, self.place.name)[...].astype(jnp.float32)

    def merged(self) -> dict[str, Array]:
        weight = getattr(self.base, self.place.name)[...]
        if self.is_off:
            return {self.place.name: weight}
        factor, delta = self._change()
        wide = weight.astype(jnp.float32) * factor + delta
        return {self.place.name: wide.astype(weight.dtype)}

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        if self.is_off:
            return merged
        weight = merged[self.place.name]
        factor, delta = self._change()
        wide = (weight.astype(jnp.float32) - delta) / factor
        return {self.place.name: wide.astype(weight.dtype)}

    def _change(self) -> tuple[Array | float, Array]:
        """By what merging multiplies a kernel, and what it then adds."""
        if self.magnitude is None:
            return 1.0, self.strength * self.delta()
        ratio = self.place.spread(dora.ratios(self), self.config.decompose)
        return 1 + self.strength * (ratio - 1), self.strength * ratio * self.delta()


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """peft's and LyCORIS' Kaiming-uniform with a = sqrt(5): within +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
