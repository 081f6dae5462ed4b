"""An adapter's values as a row of equal blocks, the data that a generator of weights learns.

The values of one layer (its low-rank factors, with a bias or a norm that belongs to it) make a
group, which is raveled and cut into blocks of 256 values (Gong et al. 2024, arXiv 2407.11966: the
datum is a block, its number and the text). A group is filled up with zeros to whole blocks, so no
block mixes layers.

Low-rank factors are not unique: (A R, R^-1 B) is the same update for any invertible R. `canonical`
picks one pair for each product, so that states that do the same are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsynth.adapters.inject import AdapterState

Per = Literal["group", "array", "value"]
PER = ("group", "array", "value")
_PAIR = ("lora_A", "lora_B")


def layer_of(name: str) -> str:
    """The module path of an array's name: the layer that it belongs to."""
    return name.rpartition(".")[0]


@dataclass(frozen=True)
class Entry:
    """One array of a state: its name, group, shape and dtype."""

    name: str
    group: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Layout:
    """Where each value of a state lies in its blocks: groups by name, arrays by name in a group.

    `config` is the adapter's own configuration, which the states made from blocks get.
    """

    block: int
    entries: tuple[Entry, ...]
    config: Any = None

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"Layout: block is {self.block}, expected at least 1")
        if not self.entries:
            raise ValueError("Layout: no arrays")

    @classmethod
    def of(
        cls, state: AdapterState, block: int = 256, *, group: Callable[[str], str] = layer_of
    ) -> "Layout":
        """The layout of states like `state`; `group` names the group of an array by its name.

        ValueError naming an array that is not of floats of 16 or 32 bits.
        """
        entries = []
        for name, value in state.arrays.items():
            dtype = value.dtype.name
            if dtype not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"Layout: {name} is {dtype}, expected floats of 16 or 32 bits")
            entries.append(Entry(name, group(name), tuple(value.shape), dtype))
        return cls(block, tuple(sorted(entries, key=lambda e: (e.group, e.name))), state.config)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups' names, in order."""
        return tuple(dict.fromkeys(entry.group for entry in self.entries))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of blocks of each group."""
        sizes = dict.fromkeys(self.groups, 0)
        for entry in self.entries:
            sizes[entry.group] += entry.size
        return tuple(-(-size // self.block) for size in sizes.values())

    @property
    def num_blocks(self) -> int:
        return sum(self.counts)

    @property
    def num_values(self) -> int:
        """The number of values, without what groups are filled up with."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def group_index(self) -> Int[np.ndarray, " n"]:
        """The number of each block's group."""
        return np.repeat(np.arange(len(self.groups)), self.counts)

    def parts(self, per: Per) -> Int[np.ndarray, "n block"]:
        """For each value the number of the part that it belongs to, -1 where nothing lies.

        A part is a group, an array or a single value; parts are numbered in order.
        """
        if per not in PER:
            raise ValueError(f"per is {per!r}, expected one of {', '.join(PER)}")
        found = np.full(self.num_blocks * self.block, -1)
        for number, (entry, start) in enumerate(zip(self.entries, self._starts, strict=True)):
            found[start : start + entry.size] = {
                "group": self.groups.index(entry.group),
                "array": number,
                "value": 0,
            }[per]
        if per == "value":
            found[found == 0] = np.arange(self.num_values)
        return found.reshape(self.num_blocks, self.block)

    @cached_property
    def mask(self) -> Bool[np.ndarray, "n block"]:
        """Where values lie."""
        return self.parts("group") >= 0

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """The place of each array's first value."""
        first = dict(zip(self.groups, np.cumsum((0, *self.counts))[:-1] * self.block, strict=True))
        starts = []
        for entry in self.entries:
            starts.append(int(first[entry.group]))
            first[entry.group] += entry.size
        return tuple(starts)

    def to_blocks(self, state: AdapterState) -> Float[Array, "n block"]:
        """The blocks of a state, float32.

        Raises ValueError naming keys or shapes that are not those of the layout.
        """
        names = {entry.name for entry in self.entries}
        if names != state.arrays.keys():
            missing, unknown = names - state.arrays.keys(), state.arrays.keys() - names
            raise ValueError(
                f"to_blocks: missing keys {sorted(missing)[:5]}, unknown keys {sorted(unknown)[:5]}"
            )
        pieces, place = [], 0
        for entry, start in zip(self.entries, self._starts, strict=True):
            value = jnp.asarray(state.arrays[entry.name])
            if value.shape != entry.shape:
                raise ValueError(
                    f"to_blocks: {entry.name} has shape {value.shape}, expected {entry.shape}"
                )
            pieces += [jnp.zeros(start - place), value.reshape(-1).astype(jnp.float32)]
            place = start + entry.size
        pieces.append(jnp.zeros(self.num_blocks * self.block - place))
        return jnp.concatenate(pieces).reshape(self.num_blocks, self.block)

    def from_blocks(self, blocks: Float[Array, "n block"]) -> AdapterState:
        """The state that lies in blocks: exactly that which `to_blocks` was given."""
        if blocks.shape != (self.num_blocks, self.block):
            raise ValueError(
                f"from_blocks: shape {blocks.shape}, expected {(self.num_blocks, self.block)}"
            )
        flat = jnp.asarray(blocks).reshape(-1)
        arrays = {
            entry.name: flat[start : start + entry.size].reshape(entry.shape).astype(entry.dtype)
            for entry, start in zip(self.entries, self._starts, strict=True)
        }
        return AdapterState(dict(sorted(arrays.items())), self.config)

    def to_json(self) -> dict[str, Any]:
        """All but the adapter's configuration."""
        entries = [[e.name, e.group, list(e.shape), e.dtype] for e in self.entries]
        return {"block": self.block, "entries": entries}

    @classmethod
    def from_json(cls, value: dict[str, Any], config: Any = None) -> "Layout":
        """Read what `to_json` gave; KeyError, TypeError or ValueError for anything else."""
        entries = tuple(
            Entry(str(name), str(group), tuple(int(n) for n in shape), str(dtype))
            for name, group, shape, dtype in value["entries"]
        )
        return cls(int(value["block"]), entries, config)


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The names of the low-rank pairs (A, B) among the names of a state's arrays."""
    known = set(names)
    found = []
    for name in names:
        layer, _, last = name.rpartition(".")
        other = f"{layer}.{_PAIR[1]}"
        if last == _PAIR[0] and other in known:
            found.append((name, other))
    return found


def canonical(state: AdapterState, reference: AdapterState | None = None) -> AdapterState:
    """The state with each LoRA pair replaced by a balanced one of the same product.

    With A B = U S V^T it is U sqrt(S), sqrt(S) V^T, the largest singular value first and the
    largest entry of each column of U positive. These choices jump where singular values cross; with
    a `reference`, itself balanced, the pair is instead rotated to lie as close to the reference's
    as it can (orthogonal Procrustes), which has no such jumps.

    A pair of product 0 becomes zeros, from where no gradient leads away: not for untrained states.
    ValueError for a state without pairs, or with stacked ones.
    """
    found = pairs(list(state.arrays))
    if not found:
        raise ValueError("canonical: the state holds no low-rank pair (lora_A, lora_B)")
    arrays = dict(state.arrays)
    for names in found:
        shapes = [jnp.shape(arrays[name]) for name in names]
        dtypes = [jnp.result_type(arrays[name]) for name in names]
        a, b = _balanced(*_matrices(state, names))
        if reference is not None:
            a0, b0 = _matrices(reference, names)
            u, _, vt = jnp.linalg.svd(_product(a.T, a0) + _product(b, b0.T))
            turn = _product(u, vt)
            a, b = _product(a, turn), _product(turn.T, b)
        for name, value, shape, dtype in zip(names, (a, b), shapes, dtypes, strict=True):
            arrays[name] = value.reshape(shape).astype(dtype)
    return AdapterState(arrays, state.config)


def _matrices(state: AdapterState, names: tuple[str, str]) -> tuple[Array, Array]:
    """A pair as matrices (inputs x taps, rank) and (rank, outputs), float32."""
    a, b = (jnp.asarray(state.arrays[name], jnp.float32) for name in names)
    if b.size != b.shape[-2] * b.shape[-1]:
        raise ValueError(f"canonical: {names[1]} has shape {b.shape}, a stack of pairs")
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[-2:])


def _balanced(a: Float[Array, "i r"], b: Float[Array, "r o"]) -> tuple[Array, Array]:
    """Factors of a @ b as `canonical` has them; only matrices of r x r are decomposed."""
    (q_a, r_a), (q_b, r_b) = jnp.linalg.qr(a), jnp.linalg.qr(b.T)
    u, s, vt = jnp.linalg.svd(_product(r_a, r_b.T), full_matrices=False)
    left, right = _product(q_a, u), _product(vt, q_b.T)
    largest = jnp.take_along_axis(left, jnp.abs(left).argmax(0)[None], axis=0)
    scale = jnp.sqrt(s) * jnp.where(largest[0] < 0, -1.0, 1.0)
    # A layer with fewer inputs or outputs than the rank has fewer singular values.
    short = a.shape[1] - s.shape[0]
    left, right = left * scale, scale[:, None] * right
    return jnp.pad(left, ((0, 0), (0, short))), jnp.pad(right, ((0, short), (0, 0)))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
