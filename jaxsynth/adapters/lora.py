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
    """LoRA on a 2-D `nnx.Conv`: lora_A (kh, kw, in, rank), then a 1x1 lora_B (1, 1, rank, out)."""

    kind = "LoRA"

    def __init__(self, layer: nnx.Conv, config: LoRAConfig, path: str, key: jax.Array):
        super().__init__(layer, config, dropout=config.dropout)
        _check_conv(path, layer)
        *lead, kh, kw, c_in, c_out = layer.kernel.get_value().shape
        rank = config.rank_at(path)
        self.scaling = config.scaling_at(path)
        init = partial(_init_a, config.init, fan_in=kh * kw * c_in, rank=rank)
        self.lora_A = base.Trainable(init(key, (*lead, kh, kw, c_in, rank)))
        self.lora_B = base.Trainable(jnp.zeros((*lead, 1, 1, rank, c_out), jnp.float32))

    def __call__(self, inputs: Float[Array, "*b h w i"]) -> Float[Array, "*b h2 w2 o"]:
        out = self.base(inputs)
        if self.is_off:
            return out
        dtype = out.dtype
        low = _narrow_convolve(
            self.drop(inputs).astype(dtype), self.lora_A[...].astype(dtype), self.base
        )
        low = (low * (self.scaling * self.strength)).astype(dtype)
        return out + low @ self.lora_B[...][0, 0].astype(dtype)

    def delta(self) -> Float[Array, "*lead kh kw i o"]:
        return self.scaling * jnp.matmul(
            self.lora_A[...], self.lora_B[...], precision=jax.lax.Precision.HIGHEST
        )


def _narrow_convolve(
    inputs: Float[Array, "*b h w i"], kernel: Float[Array, "kh kw i r"], layer: nnx.Conv
) -> Float[Array, "*b h2 w2 r"]:
    """The convolution of `layer` with another kernel, as one matrix product and shifted sums.

    Mapped over kernels, a convolution becomes a grouped one, which is very slow on CPU; this stays
    a batched product. The inputs are first projected by all kh * kw slices of the kernel and the
    results then shifted, rather than gathering kh * kw copies of the inputs, because the rank is
    smaller than the number of channels.
    """
    kh, kw, c_in, rank = kernel.shape
    strides, dilation = _pair(layer.strides), _pair(layer.kernel_dilation)
    slices = inputs @ jnp.moveaxis(kernel, 2, 0).reshape(c_in, kh * kw * rank)
    if (kh, kw) == (1, 1) and strides == (1, 1) and not any(map(any, _pads(layer, inputs))):
        return slices
    no_pad = [(0, 0)] * (inputs.ndim - 3)
    slices = jnp.pad(slices, [*no_pad, *_pads(layer, inputs), (0, 0)])
    height = (slices.shape[-3] - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    width = (slices.shape[-2] - dilation[1] * (kw - 1) - 1) // strides[1] + 1

    def at(i: int, j: int) -> Array:
        rows = slice(i * dilation[0], i * dilation[0] + (height - 1) * strides[0] + 1, strides[0])
        columns = slice(j * dilation[1], j * dilation[1] + (width - 1) * strides[1] + 1, strides[1])
        first = (i * kw + j) * rank
        return slices[..., rows, columns, first : first + rank]

    return sum(at(i, j) for i in range(kh) for j in range(kw))


def _check_conv(path: str, layer: nnx.Conv) -> None:
    for name, found, expected in (
        ("number of spatial axes", len(layer.kernel_size), 2),
        ("feature_group_count", layer.feature_group_count, 1),
        ("input_dilation", _pair(layer.input_dilation), (1, 1)),
        ("mask", layer.mask, None),
    ):
        if found != expected:
            raise ValueError(
                f"{path}: LoRA on a convolution needs {name} {expected}, found {found}"
            )
    if isinstance(layer.padding, str) and layer.padding not in ("SAME", "VALID"):
        raise ValueError(f"{path}: LoRA on a convolution with padding {layer.padding!r}")


def _pads(layer: nnx.Conv, inputs: Array) -> list[tuple[int, int]]:
    """Rows and columns of zeros before and after."""
    if isinstance(layer.padding, str):
        dilated = [
            (k - 1) * d + 1
            for k, d in zip(layer.kernel_size, _pair(layer.kernel_dilation), strict=True)
        ]
        return list(
            jax.lax.padtype_to_pads(
                inputs.shape[-3:-1], dilated, _pair(layer.strides), layer.padding
            )
        )
    if isinstance(layer.padding, int):
        return [(layer.padding, layer.padding)] * 2
    return [(pad, pad) if isinstance(pad, int) else tuple(pad) for pad in layer.padding]


def _pair(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if value is None or isinstance(value, int):
        return (value or 1,) * 2
    return tuple(value)


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
