"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): two learnt vectors around frozen random factors.

    y = W x + b' * (B (d * (A x)))

A and B are Kaiming-uniform, drawn from `seed` and the same for every layer as far as its size goes,
so that no file holds them: row i of either is drawn from i alone. b' is zero at the start, d is
`d_initial`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.update import UpdateConfig, UpdateLayer
from jaxsynth.core.limits import Seed


@dataclass(frozen=True)
class VeRAConfig(UpdateConfig):
    """What VeRA wraps, and how. `alpha` None, the default, is the paper's scale of 1."""

    rank: int = 256
    d_initial: float = 0.1
    seed: Seed = 0


def vera(config: VeRAConfig) -> inject.Maker:
    """Makes the VeRA layers of `config`, for `inject.inject`."""

    def make(path: str, layer: nnx.Module, _: jax.Array) -> inject.AdapterLayer:
        return VeRA(layer, config, path)

    return make


class VeRA(UpdateLayer):
    """VeRA on a layer: vera_lambda_d (rank,) and vera_lambda_b (out,) after any stacking axes, and
    the constants vera_A (*window, in, rank) and vera_B (rank, out).
    """

    kind = "VeRA"

    def __init__(self, layer: nnx.Module, config: VeRAConfig, path: str):
        super().__init__(layer, config, path)
        place, rank = self.place, config.rank_at(path)
        a, b = projections(config, rank, place.rows, place.c_out)
        shape_a = (*place.lead, *place.size, place.c_in, rank)
        a = a.reshape(*place.size, place.c_in, rank)
        self.vera_A = inject.Constant(jnp.broadcast_to(a, shape_a))
        self.vera_B = inject.Constant(jnp.broadcast_to(b, (*place.lead, rank, place.c_out)))
        self.vera_lambda_d = inject.Trainable(
            jnp.full((*place.lead, rank), config.d_initial, jnp.float32)
        )
        self.vera_lambda_b = inject.Trainable(jnp.zeros((*place.lead, place.c_out)))

    def low_rank(self) -> tuple[Array, Array]:
        inner = self.place.spread(self.vera_lambda_d[...], "output")
        return self.vera_A[...] * inner, self.vera_B[...] * self.vera_lambda_b[...][..., None, :]


def projections(config: VeRAConfig, rank: int, rows: int, outputs: int) -> tuple[Array, Array]:
    """The random factors of a kernel: A (rows, rank) and B (rank, outputs)."""
    keys = jax.random.split(jax.random.key(config.seed))
    return _rows(keys[0], rows, rank, fan_in=rows), _rows(keys[1], outputs, rank, fan_in=rank).T


def _rows(key: jax.Array, count: int, size: int, *, fan_in: int) -> Array:
    """Kaiming-uniform rows, each from its own number."""
    bound = math.sqrt(6 / fan_in)

    def row(i: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, i), (size,), jnp.float32, -bound, bound)

    return jax.vmap(row)(jnp.arange(count))
