"""Affiner (DiffScaler, Nair et al. 2024, arXiv:2404.09976): rescale, shift and add a low rank.

    y = W (a * x) + b0 + b + s * W_up act(W_down x)

around a frozen layer `y = W x + b0`, with a scale `a` (1 at the start), a shift `b` (0), two
Kaiming-normal factors and a scalar `s` (0). So the untrained layer is its base because of `s`,
where LoRA's is because of a zero factor.

The paper's own equation was not found, and what is quoted of it conflicts: a factor `1 + a` with
`a` starting at 1 would double W, so `a` here is the factor itself; and only one account has a ReLU
between the factors. The form without it is the default, because it merges into W exactly:
`W' = W diag(a) + s W_up W_down`, `b0' = b0 + b`. `a` scales inputs, the side that the paper's
shape for it belongs to.

Rank 0 leaves scale and shift alone, and with `scale_side="output"` and no shift it is the scale of
DiffFit (Xie et al. 2023, arXiv:2304.06648): baselines that come as settings.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.convolution import centre, check_conv, narrow_convolve
from jaxsynth.adapters.kinds.update import check_scale
from jaxsynth.core.errors import shown

# He et al. 2015, arXiv:1502.01852: variance 2 / fan_in.
_KAIMING = math.sqrt(2)
Form = Literal["merging", "relu"]
Side = Literal["input", "output", "none"]


@dataclass(frozen=True)
class AffinerConfig:
    """What the Affiner wraps, and which of its parts it has.

    `rank` 0 leaves out the low-rank path; `rank_pattern` maps a regular expression for the end of a
    module path to the rank there, as in `UpdateConfig`. `scale_side` is the side of W that `a`
    scales, with the bias on "output". `shift` is for all layers, or names targets as `targets`
    does. `gate` False fixes s at 1 and starts W_up at 0, as LoRA does. `initial_scale` is W_down's
    standard deviation times sqrt(fan_in), None for Kaiming's sqrt(2); LoRA has the same setting.
    """

    rank: int = 8
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    form: Form = "merging"
    scale_side: Side = "input"
    shift: bool | tuple[str, ...] = True
    gate: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    initial_scale: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        check_scale(self, "initial_scale")
        if not isinstance(self.shift, bool):
            object.__setattr__(self, "shift", tuple(self.shift))
        for pattern, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 0:
                raise ValueError(f"AffinerConfig: {pattern} is {rank}, expected at least 0")
        for name, found, allowed in (
            ("form", self.form, ("merging", "relu")),
            ("scale_side", self.scale_side, ("input", "output", "none")),
        ):
            if found not in allowed:
                raise ValueError(
                    f"AffinerConfig.{name} is {shown(found)}, expected one of {allowed}"
                )
        if not self.rank and not self.rank_pattern and self.scale_side == "none" and not self.shift:
            raise ValueError("AffinerConfig: rank 0, no scale and no shift leave nothing to train")

    def shift_at(self, path: str) -> bool:
        """Whether the layer at a dotted path gets a shift."""
        if isinstance(self.shift, bool):
            return self.shift
        return any(inject.matches(target, path) for target in self.shift)


def affiner(config: AffinerConfig) -> inject.Maker:
    """Makes the Affiner layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, key: jax.Array) -> inject.AdapterLayer:
        # Exact types: a subclass may compute something that the update would not follow.
        if type(layer) not in (nnx.Linear, nnx.Conv):
            raise TypeError(
                f"{path}: an Affiner wraps nnx.Linear and nnx.Conv, found {type(layer).__name__}"
            )
        return Affiner(layer, config, path, key)

    return make


def add_affiner(
    model: inject.T, config: AffinerConfig, *, rngs: nnx.Rngs | Key[Array, ""]
) -> inject.T:
    """A copy of `model` with Affiners on `config.targets`; see `inject.inject`."""
    return inject.inject(model, affiner(config), targets=config.targets, rngs=rngs)


class Affiner(inject.AdapterLayer):
    """An Affiner on `nnx.Linear` or a 1-D, 2-D or 3-D `nnx.Conv`.

    Factors, after any stacking axes: scale (in,) or (out,), shift (out,), down (in, rank), up
    (rank, out), gate (). On a convolution `down` is pointwise (the paper's 1x1) and meets the
    kernel's middle tap; a kernel without one (a patch embedding) gets a `down` of its own size.
    """

    kind = "Affiner"

    def __init__(self, layer: nnx.Linear | nnx.Conv, config: AffinerConfig, path: str, key: Array):
        super().__init__(layer, config)
        shape = layer.kernel.get_value().shape
        size: tuple[int, ...] = ()
        self.tap = None
        if isinstance(layer, nnx.Conv):
            check_conv(self.kind, path, layer)
            self.tap = centre(layer.kernel_size)
            size = (1,) * len(layer.kernel_size) if self.tap else tuple(layer.kernel_size)
        lead, (c_in, c_out) = shape[: len(shape) - 2 - len(size)], shape[-2:]

        scaled = {"input": c_in, "output": c_out, "none": 0}[config.scale_side]
        scale = jnp.ones((*lead, scaled)) if scaled else None
        shift = jnp.zeros((*lead, c_out)) if config.shift_at(path) else None
        down = up = gate = None
        if rank := inject.first_match(config.rank_pattern, path, config.rank):
            keys = jax.random.split(key)
            fan_in = math.prod(size) * c_in
            scale_of_down = _KAIMING if config.initial_scale is None else config.initial_scale
            down = _normal(keys[0], (*lead, *size, c_in, rank), fan_in, scale_of_down)
            shape = (*lead, rank, c_out)
            up = _normal(keys[1], shape, rank, _KAIMING) if config.gate else jnp.zeros(shape)
            gate = jnp.zeros(lead) if config.gate else None
        self.scale, self.shift, self.gate = map(_trainable, (scale, shift, gate))
        self.down, self.up = map(_trainable, (down, up))

    def __call__(self, inputs: Float[Array, "... i"]) -> Float[Array, "... o"]:
        if self.is_off:
            return self.base(inputs)
        side = self.config.scale_side
        scale = None if self.scale is None else self._strengthened_scale()
        scaled = inputs * scale.astype(inputs.dtype) if side == "input" else inputs
        out = self.base(scaled)
        # The base layer's result tells its compute dtype.
        dtype = out.dtype
        if side == "output":
            out = out * scale.astype(dtype)
        if self.shift is not None:
            out = out + (self.shift[...] * self.strength).astype(dtype)
        if self.down is None:
            return out
        down, up = self.down[...].astype(dtype), self.up[...].astype(dtype)
        low = inputs.astype(dtype)
        if isinstance(self.base, nnx.Conv):
            low = narrow_convolve(low, down, self.base, tap=self.tap)
        else:
            low = low @ down
        if self.config.form == "relu":
            low = jax.nn.relu(low)
        return out + (low * jnp.asarray(self._factor(), dtype)) @ up

    def delta(self) -> Float[Array, "*lead_and_kernel i o"]:
        """The low-rank path's kernel; what a convolution has besides the middle tap is 0."""
        self._refuse_relu()
        lead = self.down.get_value().ndim - 2 - (len(self.tap) if self.tap else 0)
        up = self.up[...]
        if isinstance(self.base, nnx.Conv):
            up = up.reshape(*up.shape[:-2], *[1] * len(self.base.kernel_size), *up.shape[-2:])
        product = jnp.matmul(self.down[...], up, precision=jax.lax.Precision.HIGHEST)
        gate = 1.0 if self.gate is None else self.gate[...]
        product = product * jnp.reshape(gate, jnp.shape(gate) + (1,) * (product.ndim - lead))
        if self.tap is None:
            return product
        sizes = zip(self.tap, self.base.kernel_size, strict=True)
        pads = [(0, 0)] * lead + [(at, size - 1 - at) for at, size in sizes] + [(0, 0)] * 2
        return jnp.pad(product, pads)

    def merged(self) -> dict[str, Array]:
        """The base layer's kernel and bias; a layer without a bias gets one where there is b."""
        self._refuse_relu()
        kernel, bias = self.base.kernel[...], _bias(self.base)
        if self.is_off:
            return {"kernel": kernel} | ({} if bias is None else {"bias": bias})
        wide = kernel.astype(jnp.float32) * self._kernel_scale()
        if self.down is not None:
            wide = wide + self.strength * self.delta()
        result = {"kernel": wide.astype(kernel.dtype)}
        if bias is None and self.shift is None:
            return result
        return result | {"bias": self._moved_bias(bias).astype(kernel.dtype)}

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        """The base layer's own, given the merged ones. A scale of 0 cannot be undone."""
        self._refuse_relu()
        if self.is_off:
            return merged
        kernel = merged["kernel"].astype(jnp.float32)
        if self.down is not None:
            kernel = kernel - self.strength * self.delta()
        result = {"kernel": (kernel / self._kernel_scale()).astype(merged["kernel"].dtype)}
        if "bias" not in merged:
            return result
        if _bias(self.base) is None:
            return result | {"bias": None}
        bias = merged["bias"].astype(jnp.float32)
        if self.shift is not None:
            bias = bias - self.strength * self.shift[...]
        if self.config.scale_side == "output":
            bias = bias / self._strengthened_scale()
        return result | {"bias": bias.astype(merged["bias"].dtype)}

    def _strengthened_scale(self) -> Array:
        return 1.0 + self.strength * (self.scale[...] - 1.0)

    def _kernel_scale(self) -> Array:
        """The scale, shaped to multiply a kernel (*lead, *kernel, in, out)."""
        if self.scale is None:
            return jnp.ones(())
        scale = self._strengthened_scale()
        axes = len(self.base.kernel_size) if isinstance(self.base, nnx.Conv) else 0
        ends = (scale.shape[-1], 1) if self.config.scale_side == "input" else (1, scale.shape[-1])
        return scale.reshape(*scale.shape[:-1], *[1] * axes, *ends)

    def _moved_bias(self, bias: Array | None) -> Array:
        wide = jnp.zeros(()) if bias is None else bias.astype(jnp.float32)
        if self.config.scale_side == "output":
            wide = wide * self._strengthened_scale()
        return wide if self.shift is None else wide + self.strength * self.shift[...]

    def _factor(self) -> Array | float:
        return self.strength if self.gate is None else self.strength * self.gate[...]

    def _refuse_relu(self) -> None:
        if self.config.form == "relu" and self.down is not None:
            raise NotImplementedError(
                "an Affiner with a ReLU between its factors is no change of the kernel, and cannot "
                'be merged; form="merging" can'
            )


def _trainable(value: Array | None) -> inject.Trainable | None:
    # NNX takes an attribute that was None for static ever after unless it is told.
    return nnx.data(None) if value is None else inject.Trainable(value)


def _bias(layer: nnx.Module) -> Array | None:
    return None if layer.bias is None else layer.bias[...]


def _normal(key: Array, shape: tuple[int, ...], fan_in: int, scale: float) -> Array:
    return jax.random.normal(key, shape, jnp.float32) * (scale / math.sqrt(fan_in))
