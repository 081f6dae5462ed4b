"""OFT and BOFT: rotate what a frozen layer takes, or gives (Qiu et al. 2023, arXiv:2306.07280; Liu
et al. 2023, arXiv:2311.06243).

The rotation is block-diagonal with the Cayley transform (I + Q) (I - Q)^-1 of a skew-symmetric Q
in each block. BOFT multiplies several of them, each on channels in another order (a butterfly), so
that few numbers mix them all. peft rotates inputs, LyCORIS outputs; the order of BOFT's channels is
LyCORIS', whose first stage is peft's only one without its CUDA extension.

peft's default replaces the inverse by the first terms of its series (`cayley` "neumann"). Its exact
form, and LyCORIS' BOFT, turn the other way: their Q is -Q here.

A strength t rotates by I + t (R - I).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.place import Place
from jaxsynth.adapters.kinds.update import check_choice

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class OFTConfig:
    """What is rotated, and how.

    `block_size` must divide the channels of `side`. `butterfly` is the number of BOFT's stages, 0
    for OFT's one without an order of its own. `constraint` (LyCORIS) bounds the norm of all blocks'
    Q by that times the number of channels; `rescale` adds a factor for each output.
    """

    block_size: int = 32
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    side: Literal["input", "output"] = "input"
    cayley: Literal["exact", "neumann"] = "exact"
    butterfly: int = 0
    constraint: float = 0.0
    rescale: bool = False

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        check_choice(self, "side", ("input", "output"))
        check_choice(self, "cayley", ("exact", "neumann"))
        if self.block_size < 2:
            raise ValueError(f"OFTConfig.block_size is {self.block_size}, expected at least 2")
        if self.butterfly < 0 or self.constraint < 0:
            raise ValueError("OFTConfig: butterfly and constraint are at least 0")


def oft(config: OFTConfig) -> inject.Maker:
    """Makes the OFT or BOFT layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, _: jax.Array) -> inject.AdapterLayer:
        return OFT(layer, config, path)

    return make


class OFT(inject.AdapterLayer):
    """A rotation beside an `nnx.Linear`, `nnx.Conv` or, of its outputs, `nnx.Embed`.

    `oft_R` (blocks, size (size - 1) / 2), BOFT: `boft_R` (stages, blocks, ...), after any stacking
    axes: the upper triangles of Q. `rescale` (out,).
    """

    kind = "OFT"

    def __init__(self, layer: nnx.Module, config: OFTConfig, path: str):
        super().__init__(layer, config)
        self.place = place = Place.of(layer, self.kind, path)
        if place.is_table and config.side == "input":
            raise ValueError(f"{path}: a table has no inputs to rotate; its outputs can be")
        self.channels = place.c_in if config.side == "input" else place.c_out
        size, stages = config.block_size, config.butterfly
        unit = size * 2 ** max(stages - 1, 0)
        if self.channels % unit or (stages and size % 2):
            even = "even and " if stages else ""
            raise ValueError(
                f"{path}: block_size {size} with butterfly {stages} does not fit {self.channels} "
                f"{config.side} channels: it must be {even}such that {unit} divides them"
            )
        shape = (self.channels // size, size * (size - 1) // 2)
        self.name = "boft_R" if stages else "oft_R"
        shape = (stages, *shape) if stages else shape
        setattr(self, self.name, inject.Trainable(jnp.zeros((*place.lead, *shape))))
        self.rescale = nnx.data(None)
        if config.rescale:
            self.rescale = inject.Trainable(jnp.ones((*place.lead, place.c_out)))

    def __call__(self, inputs: Array) -> Float[Array, "*b o"]:
        if self.is_off:
            return self.base(inputs)
        strength = self.strength
        if self.config.side == "input":
            out = self.base(
                inputs + (strength * (self._rotate(inputs) - inputs)).astype(inputs.dtype)
            )
            if self.rescale is None:
                return out
            change = strength * (self.rescale[...] - 1)
            return out + change.astype(out.dtype) * inject.without_bias(out, self.base)
        out = self.base(inputs)
        plain = inject.without_bias(out, self.base)
        turned = self._rotate(plain)
        if self.rescale is not None:
            turned = turned * self.rescale[...].astype(out.dtype)
        return out + (strength * (turned - plain)).astype(out.dtype)

    def merged(self) -> dict[str, Array]:
        return self._applied(getattr(self.base, self.place.name)[...], jnp.matmul)

    def unmerged(self, merged: dict[str, Array]) -> dict[str, Array | None]:
        return self._applied(merged[self.place.name], _solve)

    def _applied(self, weight: Array, apply) -> dict[str, Array]:
        if self.is_off:
            return {self.place.name: weight}
        wide = weight.astype(jnp.float32)
        eye, strength = jnp.eye(self.channels), self.strength
        matrix = self._matrix()
        scale = None if self.rescale is None else self.rescale[...]
        if self.config.side == "input":
            wide = apply(self.place.wide(eye + strength * (matrix - eye)), wide)
            if scale is not None:
                factor = self.place.spread(1 + strength * (scale - 1), "output")
                wide = wide * factor if apply is jnp.matmul else wide / factor
        else:
            matrix = matrix if scale is None else matrix * scale[..., None, :]
            turned = jnp.swapaxes(eye + strength * (matrix - eye), -1, -2)
            wide = jnp.swapaxes(apply(self.place.wide(turned), jnp.swapaxes(wide, -1, -2)), -1, -2)
        return {self.place.name: wide.astype(weight.dtype)}

    def _rotations(self) -> Float[Array, "*lead s k b b"]:
        """The orthogonal blocks of every stage; OFT has one."""
        size, upper = self.config.block_size, getattr(self, self.name)[...]
        rows, columns = np.triu_indices(size, 1)
        if not self.config.butterfly:
            upper = upper[..., None, :, :]
        skew = jnp.zeros((*upper.shape[:-1], size, size)).at[..., rows, columns].set(upper)
        skew = skew - jnp.swapaxes(skew, -1, -2)
        if self.config.constraint:
            most = self.config.constraint * self.channels
            norm = jnp.sqrt((skew**2).sum((-4, -3, -2, -1), keepdims=True) + 1e-16)
            skew = skew * jnp.minimum(1.0, most / norm)
        eye = jnp.eye(size)
        if self.config.cayley == "exact":
            return jnp.linalg.solve(eye - skew, eye + skew)
        # peft's five terms, the last one once.
        second = jnp.matmul(skew, skew, precision=_HIGHEST)
        third = jnp.matmul(second, skew, precision=_HIGHEST)
        fourth = jnp.matmul(third, skew, precision=_HIGHEST)
        return eye + 2 * (skew + second + third) + fourth

    def _orders(self) -> list[np.ndarray | None]:
        """The order of channels in which each stage has its blocks; None as they are."""
        if not self.config.butterfly:
            return [None]
        half, numbers = self.config.block_size // 2, np.arange(self.channels)
        return [
            numbers.reshape(-1, 2, 2**stage * half).swapaxes(1, 2).ravel()
            for stage in range(self.config.butterfly)
        ]

    def _rotate(self, values: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        rotations, size = self._rotations().astype(values.dtype), self.config.block_size
        for number, order in enumerate(self._orders()):
            values = values if order is None else values[..., order]
            blocks = values.reshape(*values.shape[:-1], -1, size)
            values = jnp.einsum("...kn,knm->...km", blocks, rotations[number])
            values = values.reshape(*values.shape[:-2], self.channels)
            values = values if order is None else values[..., np.argsort(order)]
        return values

    def _matrix(self) -> Float[Array, "*lead n n"]:
        """The rotation as a matrix on the right."""
        rotations = self._rotations()
        count = self.channels // self.config.block_size
        result = None
        for number, order in enumerate(self._orders()):
            own = jnp.einsum("...kij,kl->...kilj", rotations[..., number, :, :, :], jnp.eye(count))
            own = own.reshape(*own.shape[:-4], self.channels, self.channels)
            if order is not None:
                back = np.argsort(order)
                own = own[..., back, :][..., :, back]
            result = own if result is None else jnp.matmul(result, own, precision=_HIGHEST)
        return result


def _solve(matrix: Array, right: Array) -> Array:
    return jnp.linalg.solve(
        jnp.broadcast_to(matrix, (*right.shape[:-2], *matrix.shape[-2:])), right
    )
