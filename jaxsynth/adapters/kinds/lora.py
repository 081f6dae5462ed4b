"""LoRA (Hu et al. 2021, arXiv:2106.09685): a low-rank update beside a layer.

`y = base(x) + s * B(A(drop(x)))`. B starts at zero, so an untrained adapter changes nothing (for a
table of embeddings it is A, as in peft). Conventions, names and defaults of initialisation are
those of peft 0.21, which the tests compare with.

- PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775) start
  from W's own leading parts, A0 and B0, and train what they took out of it. Here W stays whole and
  the constant s B0 A0 is subtracted beside it, which is the same function, starts as the base and
  has the base at strength 0.
- LoCon with Tucker factors (LyCORIS, arXiv:2309.14859) splits a convolution's A into a pointwise
  one and a small kernel between A and B.
- LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is a learning rate of its own for B, which training's
  rates by pattern give.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.convolution import narrow_convolve
from jaxsynth.adapters.kinds.place import Place
from jaxsynth.adapters.kinds.update import (
    UpdateConfig,
    UpdateLayer,
    check_choice,
    check_rate,
    check_scale,
    project,
    uniform,
)

Init = Literal["kaiming", "gaussian", "pissa", "olora"]


@dataclass(frozen=True)
class LoRAConfig(UpdateConfig):
    """What LoRA wraps, and how.

    `init` is A's: "kaiming" (peft's default) is uniform in +-1/sqrt(fan_in), "gaussian" (diffusers'
    training scripts) normal with standard deviation 1/rank; "pissa" and "olora" start both factors
    from W. `initial_scale`, where it is given, is A's standard deviation times sqrt(fan_in), in
    place of Kaiming's 1/sqrt(3) or 1/rank. `use_tucker` puts a third factor into convolutions of
    more than one tap. `rank_dropout` (kohya's) drops single ranks, with a mask for each sample.
    """

    init: Init = "kaiming"
    initial_scale: float | None = None
    use_tucker: bool = False
    rank_dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_rate(self, "rank_dropout")
        check_choice(self, "init", ("kaiming", "gaussian", "pissa", "olora"))
        check_scale(self, "initial_scale")
        if self.initial_scale is not None and self.init in ("pissa", "olora"):
            raise ValueError(f"LoRAConfig: init {self.init!r} has no initial_scale")
        if self.use_tucker and self.init in ("pissa", "olora"):
            raise ValueError(f"LoRAConfig: init {self.init!r} has no Tucker factors")


def lora(config: LoRAConfig) -> inject.Maker:
    """Makes the LoRA layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        return LoRA(layer, config, path, key)

    return make


def add_lora(model: inject.T, config: LoRAConfig, *, rngs: nnx.Rngs | Key[Array, ""]) -> inject.T:
    """A copy of `model` with LoRA on `config.targets`; see `inject.inject`."""
    return inject.inject(model, lora(config), targets=config.targets, rngs=rngs)


class LoRA(UpdateLayer):
    """LoRA on a layer. Factors, after any stacking axes:

    - linear: lora_A (in, rank), lora_B (rank, out)
    - convolution: lora_A (*window, in, rank), a pointwise lora_B (1.., rank, out); with Tucker
      factors a pointwise lora_A and lora_mid (*window, rank, rank)
    - table: lora_embedding_A (rows, rank), lora_embedding_B (rank, dim)
    """

    kind = "LoRA"

    def __init__(self, layer: nnx.Module, config: LoRAConfig, path: str, key: jax.Array):
        super().__init__(layer, config, path)
        place, rank = self.place, config.rank_at(path)
        self.prefix = "lora_embedding_" if place.is_table else "lora_"
        tucker = config.use_tucker and math.prod(place.size) > 1
        window = place.ones if tucker else place.size
        shape_a = (*place.lead, *window, place.c_in, rank)
        shape_b = (*place.lead, *place.ones, rank, place.c_out)
        self.lora_mid = self.start_A = self.start_B = nnx.data(None)
        if config.init in ("pissa", "olora"):
            find = _principal if config.init == "pissa" else _orthogonal
            down, up = find(place.flat(self.weight()), rank, self.scaling, path)
            a, b = down.reshape(shape_a), up.reshape(shape_b)
            self.start_A, self.start_B = inject.Constant(a), inject.Constant(b)
        elif place.is_table:
            a, b = jnp.zeros(shape_a), jax.random.normal(key, shape_b)
        else:
            a, b = _init_a(config, key, shape_a, place, rank), jnp.zeros(shape_b)
        if tucker:
            shape = (*place.lead, *place.size, rank, rank)
            fan_in = math.prod(place.size) * rank
            self.lora_mid = inject.Trainable(uniform(jax.random.fold_in(key, 1), shape, fan_in))
        setattr(self, f"{self.prefix}A", inject.Trainable(a))
        setattr(self, f"{self.prefix}B", inject.Trainable(b))

    def low_rank(self) -> tuple[Array, Array]:
        down, up = self._pair()
        if self.lora_mid is not None:
            down = jnp.matmul(down, self.lora_mid[...], precision=jax.lax.Precision.HIGHEST)
        if self.start_A is not None:
            down = jnp.concatenate([down, self.start_A[...]], axis=-1)
            up = jnp.concatenate([up, -self.start_B[...]], axis=-2)
        return down, self.place.tall(up)

    def added(self, inputs: Array, dtype: Any, strength: Any) -> Float[Array, "*b o"]:
        inputs = self.dropped(inputs)
        if self.lora_mid is None:
            down, up = self.low_rank()
            low = project(self.base, inputs, down.astype(dtype))
        else:
            down, up = map(self.place.tall, self._pair())
            low = inputs.astype(dtype) @ down.astype(dtype)
            low = narrow_convolve(low, self.lora_mid[...].astype(dtype), self.base)
        low = (self._drop_ranks(low) * (self.scaling * strength)).astype(dtype)
        return low @ up.astype(dtype)

    @property
    def drops(self) -> bool:
        return super().drops or self.config.rank_dropout > 0

    def _pair(self) -> tuple[Array, Array]:
        return getattr(self, f"{self.prefix}A")[...], getattr(self, f"{self.prefix}B")[...]

    def _drop_ranks(self, low: Array) -> Array:
        rate = self.config.rank_dropout
        if rate == 0 or self.dropout_key is None:
            return low
        single = low.ndim == 1 + len(self.place.size)
        shape = [1 if single else low.shape[0]] * (low.ndim > 1) + [1] * (low.ndim - 2)
        key = jax.random.fold_in(self.dropout_key, 2)
        keep = jax.random.bernoulli(key, 1 - rate, (*shape, low.shape[-1]))
        return jnp.where(keep, low / (1 - rate), 0).astype(low.dtype)


def _init_a(
    config: LoRAConfig, key: jax.Array, shape: tuple[int, ...], place: Place, rank: int
) -> Float[Array, "..."]:
    fan_in, scale = math.prod(shape[len(place.lead) : -1]), config.initial_scale
    if config.init == "gaussian":
        deviation = 1 / rank if scale is None else scale / math.sqrt(fan_in)
        return jax.random.normal(key, shape, jnp.float32) * deviation
    drawn = uniform(key, shape, fan_in)
    return drawn if scale is None else drawn * (scale * math.sqrt(3))


def _principal(weight: Array, rank: int, scaling: float, path: str) -> tuple[Array, Array]:
    """PiSSA: the first singular vectors of (*lead, rows, out), each with a root of its value."""
    _check_rank(weight, rank, path)
    left, values, right = jnp.linalg.svd(weight, full_matrices=False)
    roots = jnp.sqrt(values[..., :rank] / scaling)
    return left[..., :rank] * roots[..., None, :], roots[..., None] * right[..., :rank, :]


def _orthogonal(weight: Array, rank: int, scaling: float, path: str) -> tuple[Array, Array]:
    """OLoRA: the first columns of Q and rows of R of the (out, rows) matrix's QR decomposition."""
    _check_rank(weight, rank, path)
    q, r = jnp.linalg.qr(jnp.swapaxes(weight, -1, -2))
    return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)


def _check_rank(weight: Array, rank: int, path: str) -> None:
    if rank > min(weight.shape[-2:]):
        raise ValueError(
            f"{path}: rank {rank}, but a kernel of {weight.shape[-2]} rows and {weight.shape[-1]} "
            f"columns has {min(weight.shape[-2:])} principal parts"
        )
