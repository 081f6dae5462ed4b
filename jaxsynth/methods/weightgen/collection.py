"""A collection of weights: the adapters of many concepts as blocks, with what describes them.

It is the training set of a generator of weights (Gong et al. 2024, arXiv 2407.11966): for each
concept its texts and the blocks of K late checkpoints, all of adapters around one base. One
safetensors file holds it, with the mean and the standard deviation of each layer group beside the
blocks. Weights say nothing by themselves: the layout and the base's digest tell what they mean, so
reading compares both.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxsynth.adapters.flatten import Layout, Per
from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.documents import parse_json, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.core.io import replacing
from jaxsynth.core.words import counted
from jaxsynth.weights import hub
from jaxsynth.weights.safetensors import opened

_FORMAT = "jaxsynth.weights"
# Of parts that are the same in all states, which have no scale.
_FLAT = 1e-8


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each part of a layout (`Layout.parts`), float32."""

    per: Per
    mean: Float[np.ndarray, " parts"]
    std: Float[np.ndarray, " parts"]

    @classmethod
    def of(
        cls, blocks: Float[np.ndarray, "*rows n block"], layout: Layout, per: Per = "group"
    ) -> "Statistics":
        """Over all rows. A part that never varies gets a standard deviation of 1."""
        parts = layout.parts(per)[layout.mask]
        values = np.asarray(blocks, np.float64)[..., layout.mask].reshape(-1, parts.size)
        counts = np.bincount(parts) * len(values)
        mean = np.bincount(parts, values.sum(0)) / counts
        centred = values - mean[parts]
        std = np.sqrt(np.bincount(parts, np.square(centred).sum(0)) / counts)
        std[std < _FLAT] = 1.0
        return cls(per, mean.astype(np.float32), std.astype(np.float32))

    def normalised(
        self, blocks: Float[Array, "*rows n block"], layout: Layout
    ) -> Float[Array, "*rows n block"]:
        """Values less their part's mean, over its standard deviation; zeros where nothing lies."""
        mean, std = self._tables(layout)
        return (blocks - mean) / std

    def restored(
        self, blocks: Float[Array, "*rows n block"], layout: Layout
    ) -> Float[Array, "*rows n block"]:
        """What `normalised` was given; zeros where nothing lies."""
        mean, std = self._tables(layout)
        return (blocks * std + mean) * layout.mask.astype(np.float32)

    def _tables(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        parts, mask = layout.parts(self.per), layout.mask
        return np.where(mask, self.mean[parts], 0), np.where(mask, self.std[parts], 1)


@dataclass(frozen=True)
class WeightCollection:
    """Blocks of each concept's checkpoints; `texts[c]` are its prompt and then its paraphrases.

    `base` is the digest of the network that the adapters were trained around.
    """

    blocks: Float[np.ndarray, "c k n block"]
    texts: tuple[tuple[str, ...], ...]
    families: tuple[str, ...]
    layout: Layout
    base: str

    def __post_init__(self):
        expected = (len(self.texts), self.layout.num_blocks, self.layout.block)
        found = np.shape(self.blocks)
        if len(found) != 4 or (found[0], *found[2:]) != expected or not all(found):
            raise ValueError(
                f"blocks have shape {found}, expected ({expected[0]} concepts, checkpoints, "
                f"{expected[1]} blocks, {expected[2]} values)"
            )
        if len(self.families) != len(self.texts):
            raise ValueError(
                f"{counted(len(self.families), 'family')} for {counted(len(self.texts), 'concept')}"
            )
        for number, texts in enumerate(self.texts):
            if not texts:
                raise ValueError(f"concept {number} has no text")
        bad = np.argwhere(~np.isfinite(self.blocks).all(-1))
        if len(bad):
            concept, checkpoint, block = bad[0]
            group = self.layout.groups[self.layout.group_index[block]]
            raise ValueError(
                f"{self.texts[concept][0]!r}, checkpoint {checkpoint}: the weights of {group} are "
                "not finite"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(
        cls,
        states: Sequence[Sequence[AdapterState]],
        texts: Sequence[Sequence[str]],
        families: Sequence[str],
        layout: Layout,
        base: str,
    ) -> "WeightCollection":
        """From the K states of each concept."""
        blocks = np.stack(
            [np.stack([np.asarray(layout.to_blocks(state)) for state in own]) for own in states]
        )
        return cls(blocks, tuple(map(tuple, texts)), tuple(families), layout, base)

    def statistics(self, per: Per = "group") -> Statistics:
        """Of every part over all concepts and checkpoints."""
        return Statistics.of(self.blocks, self.layout, per)


def write_collection(path: Path, collection: WeightCollection) -> None:
    """Write one safetensors file, the same bytes for the same collection."""
    statistics = collection.statistics()
    note = {
        "texts": collection.texts,
        "families": collection.families,
        "layout": collection.layout.to_json(),
        "base": collection.base,
    }
    metadata = {"format": _FORMAT, "collection": json.dumps(note, ensure_ascii=False)}
    tensors = {"blocks": collection.blocks, "mean": statistics.mean, "std": statistics.std}
    data = hub.to_bytes({k: np.asarray(v, np.float32) for k, v in tensors.items()}, metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_collection(path: Path, layout: Layout, base: str) -> WeightCollection:
    """Read what `write_collection` wrote, of adapters of this layout around this base.

    Raises UserError naming the file and what differs: no collection, another base or layout,
    weights that are not finite, statistics that are not those of the weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a collection of weights")
    with opened(path) as file:
        metadata = file.metadata
        if metadata.get("format") != _FORMAT:
            found = quoted(metadata.get("format"))
            raise UserError(f"{path}: format {found}, expected {_FORMAT!r}")
        note = _note(path, metadata)
        if note["base"] != base:
            raise UserError(
                f"{path}: its adapters belong to base {note['base']}, the generator's is {base}"
            )
        _check_layout(path, note["layout"], layout)
        if missing := {"blocks", "mean", "std"} - set(file.keys):
            raise UserError(f"{path}: {sorted(missing)[0]} is missing")
        blocks, mean, std = (file.read(name) for name in ("blocks", "mean", "std"))
    try:
        texts = tuple(tuple(own) for own in note["texts"])
        found = WeightCollection(blocks, texts, tuple(note["families"]), layout, base)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    own = found.statistics()
    for name, written, expected in (("mean", mean, own.mean), ("std", std, own.std)):
        if written.shape != expected.shape or not np.allclose(written, expected, rtol=1e-4):
            raise UserError(f"{path}: {name} is not that of the blocks")
    return found


def _note(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    where = f"{path}: collection"
    note = parse_json(metadata.get("collection", ""), where)
    take(note, "texts", list[list[str]], where)
    take(note, "families", list[str], where)
    take(note, "base", str, where)
    take(note, "layout", dict, where)
    return note


def _check_layout(path: Path, found: Any, expected: Layout) -> None:
    try:
        layout = Layout.from_json(found, expected.config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: layout: {type(error).__name__}: {error}") from error
    if layout.block != expected.block:
        raise UserError(f"{path}: blocks of {layout.block} values, expected {expected.block}")
    if other := sorted(set(layout.entries) ^ set(expected.entries), key=lambda e: e.name):
        first = other[0]
        what = "unexpected" if first in layout.entries else "missing"
        raise UserError(f"{path}: layout: {first.name} of shape {first.shape} is {what}")
