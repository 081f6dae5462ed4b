"""LoRA (Hu et al. 2021, arXiv:2106.09685): a low-rank update beside a linear or convolution layer.

`y = base(x) + s * B(A(drop(x)))` with `s = alpha / rank`, or `alpha / sqrt(rank)` (rsLoRA,
arXiv:2312.03732). B starts at zero, so an untrained adapter changes nothing. Conventions, names and
defaults of initialisation are those of peft 0.21, which the tests compare with; kernels are in
NNX's layout. Factors are stored in float32 and computed in the base layer's dtype.
"""

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxsynth.adapters import base
from jaxsynth.adapters.convolution import check_conv, narrow_convolve


@dataclass(frozen=True)
class LoRAConfig:
    """What LoRA wraps, and how.

    `alpha` None means `rank`, i.e. scale 1. `rank_pattern` and `alpha_pattern` map a regular
    expression for the end of a module path to a value that replaces the default there; the first
    match wins. `init` is A's: "kaiming" (peft's default) is uniform in +-1/sqrt(fan_in), "gaussian"
    (diffusers' training scripts) normal with standard deviation 1/rank.
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    use_rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"LoRAConfig: {name} is {rank}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRAConfig.dropout is {self.dropout}, expected 0 <= dropout < 1")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"LoRAConfig.init is {self.init!r}, expected kaiming or gaussian")

    def rank_at(self, path: str) -> int:
        """The rank of the layer at a dotted path."""
        return _first_match(self.rank_pattern, path, self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha of the layer at a dotted path."""
        default = self.rank if self.alpha is None else self.alpha
        return _first_match(self.alpha_pattern, path, default)

    def scaling_at(self, path: str) -> float:
        """The factor on the update of the layer at a dotted path."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.use_rslora else rank)


def lora(config: LoRAConfig) -> base.Maker:
    """Makes the LoRA layers of `config`, for `base.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> base.AdapterLayer:
        # Exact types: a subclass may compute something that the update would not follow.
        if type(layer) is nnx.Linear:
            return LoRALinear(layer, config, path, key)
        if type(layer) is nnx.Conv:
            return LoRAConv(layer, config, path, key)
        raise TypeError(
            f"{path}: LoRA adapts nnx.Linear and nnx.Conv, found {type(layer).__name__}"
        )

    return make


def add_lora(model: base.T, config: LoRAConfig, *, rngs: nnx.Rngs | Key[Array, ""]) -> base.T:
    """A copy of `model` with LoRA on `config.targets`; see `base.inject`."""
    return base.inject(model, lora(config), targets=config.targets, rngs=rngs)


class LoRALinear(base.AdapterLayer):
    """LoRA on `nnx.Linear`: lora_A (in, rank), lora_B (rank, out), after any stacking axes."""

    kind = "LoRA"

    def __init__(self, layer: nnx.Linear, config: LoRAConfig, path: str, key: jax.Array):
        super().__init__(layer, config, dropout=config.dropout)
        *lead, c_in, c_out = layer.kernel.get_value().shape
        rank = config.rank_at(path)
        self.scaling = config.scaling_at(path)
        init = partial(_init_a, config.init, fan_in=c_in, rank=rank)
        self.lora_A = base.Trainable(init(key, (*lead, c_in, rank)))
        self.lora_B = base.Trainable(jnp.zeros((*lead, rank, c_out), jnp.float32))

    def __call__(self, inputs: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        out = self.base(inputs)
        if self.is_off:
            return out
        # The base layer's result tells its compute dtype.
        dtype = out.dtype
        low = self.drop(inputs).astype(dtype) @ self.lora_A[...].astype(dtype)
        low = (low * (self.scaling * self.strength)).astype(dtype)
        return out + low @ self.lora_B[...].astype(dtype)

    def delta(self) -> Float[Array, "*lead i o"]:
        return self.scaling * jnp.matmul(
            self.lora_A[...], self.lora_B[...], precision=jax.lax.Precision.HIGHEST
        )


class LoRAConv(base.AdapterLayer):
    """LoRA on `nnx.Conv`: lora_A (*kernel, in, rank), then a pointwise lora_B (1.., rank, out)."""

    kind = "LoRA"

    def __init__(self, layer: nnx.Conv, config: LoRAConfig, path: str, key: jax.Array):
        super().__init__(layer, config, dropout=config.dropout)
        check_conv(self.kind, path, layer)
        kernel, axes = layer.kernel.get_value().shape, len(layer.kernel_size)
        lead, size, (c_in, c_out) = kernel[: -axes - 2], kernel[-axes - 2 : -2], kernel[-2:]
        rank = config.rank_at(path)
        self.scaling = config.scaling_at(path)
        init = partial(_init_a, config.init, fan_in=math.prod(size) * c_in, rank=rank)
        self.lora_A = base.Trainable(init(key, (*lead, *size, c_in, rank)))
        self.lora_B = base.Trainable(jnp.zeros((*lead, *[1] * axes, rank, c_out), jnp.float32))

    def __call__(self, inputs: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        out = self.base(inputs)
        if self.is_off:
            return out
        dtype = out.dtype
        low = narrow_convolve(
            self.drop(inputs).astype(dtype), self.lora_A[...].astype(dtype), self.base
        )
        low = (low * (self.scaling * self.strength)).astype(dtype)
        up = self.lora_B[...].astype(dtype)
        return out + low @ up.reshape(up.shape[-2:])

    def delta(self) -> Float[Array, "*lead_and_kernel i o"]:
        return self.scaling * jnp.matmul(
            self.lora_A[...], self.lora_B[...], precision=jax.lax.Precision.HIGHEST
        )


def _init_a(
    kind: str, key: jax.Array, shape: tuple[int, ...], *, fan_in: int, rank: int
) -> Float[Array, "..."]:
    if kind == "gaussian":
        return jax.random.normal(key, shape, jnp.float32) / rank
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _first_match(patterns: dict, path: str, default):
    """The value of the first pattern that matches the path or its end after a dot (as in peft)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
