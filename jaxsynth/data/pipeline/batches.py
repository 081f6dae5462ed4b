"""From sources to batches, with Grain.

A pipeline is a function of a position: which image comes when and how it is augmented follow from
the seed and the position alone. So an iterator stopped anywhere goes on exactly (`get_state`,
`set_state`), also in another number of processes: together they read the same batches, each of them
other rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxsynth.core.words import counted
from jaxsynth.data.dataset import ImageSource, Record, SourceError
from jaxsynth.data.sources.arrays import cached

# uint8 (h, w, 3) and a generator (None when evaluating) -> array; see data/augment.py.
Transform = Callable[[np.ndarray, np.random.Generator | None], np.ndarray]
Batch = dict[str, np.ndarray]


class _Examples:
    """A source as what Grain asks of one: each example with its place."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Record]:
        return int(index), self.source[int(index)]

    def __repr__(self) -> str:  # Grain logs it; a repr of all pixels would be slow
        return f"{type(self.source).__name__}({len(self.source)})"


class _Apply:
    """The transform as Grain's random_map wants it."""

    def __init__(self, transform: Transform | None, numbered: bool):
        self.transform, self.numbered = transform, numbered

    def __call__(self, example: tuple[int, Record], rng: np.random.Generator) -> dict[str, Any]:
        index, record = example
        image = record.image if self.transform is None else self.transform(record.image, rng)
        found = {"image": image, "label": np.int32(record.label)}
        return found | ({"index": np.int32(index)} if self.numbered else {})


def _with_step(step: int, batch: Batch) -> Batch:
    return batch | {"step": np.full(len(batch["label"]), step, np.int32)}


def collate(examples: Sequence[dict[str, Any]]) -> Batch:
    """Stack examples; images of unequal shapes are an error that says what to do."""
    shapes = {np.shape(example["image"]) for example in examples}
    if len(shapes) > 1:
        raise SourceError(
            f"images of different shapes in a batch: {sorted(shapes)[:4]}; set image_size or give "
            "a transform that makes them equal"
        )
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _local(batch_size: int, process_index: int, process_count: int, what: str) -> int:
    if not 0 <= process_index < process_count:
        raise SourceError(f"process_index {process_index}: expected below {process_count}")
    if batch_size < 1 or batch_size % process_count:
        raise SourceError(f"{what} {batch_size} does not divide among {process_count} processes")
    return batch_size // process_count


class _Share:
    """Of each batch of `size` examples the rows `first`, `first + step`, ...: those of one process.

    Which examples a batch holds, and how each is augmented, do not depend on the processes, so that
    a number of batches is the place in the data of any number of them.
    """

    def __init__(self, examples: grain.MapDataset, size: int, first: int, step: int):
        self.examples, self.size, self.rows = examples, size, range(first, size, step)

    def __len__(self) -> int:
        return len(self.examples) // self.size

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.size
        return collate([self.examples[start + row] for row in self.rows])

    def __repr__(self) -> str:
        return f"_Share({len(self)})"


def _batched(source, batch_size, seed, transform, epochs, first, process_count, what, numbered):
    """A MapDataset of batches of `batch_size`, of which this process has every so manyth row."""
    if not len(source):
        raise SourceError(f"{what}: the source has no images")
    # A slice that takes all: Grain's seed of what follows hangs on the number of steps before it,
    # and figures that were published hang on that.
    examples = (
        grain.MapDataset.source(_Examples(source))
        .seed(seed)
        .shuffle()
        .repeat(epochs)[0::1]
        .random_map(_Apply(transform, numbered))
    )
    batches = grain.MapDataset.source(_Share(examples, batch_size, first, process_count))
    return batches.map_with_index(_with_step) if numbered else batches


def _iterator(batches: grain.MapDataset, num_workers: int, num_threads: int):
    """Threads prefetch batches in this process; workers, if any, are processes of their own."""
    threads = num_threads if num_threads >= 0 else min(8, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = batches.to_iter_dataset(options)
    if num_workers:
        # Grain reads absl flags to start workers, which fails in a program that never parsed any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(dataset)


def ahead(batches: Any, *, num_threads: int = -1):
    """`batches[0]`, `batches[1]`, ..., read ahead by threads; has get_state and set_state."""
    return _iterator(grain.MapDataset.source(batches), 0, num_threads)


def train_batches(
    source: ImageSource,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    *,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    cache: bool = True,
    num_workers: int = 0,
    num_threads: int = -1,
    numbered: bool = False,
):
    """Shuffled batches {"image", "label"}, endless or for a number of epochs.

    batch_size is the global one; each process yields its share. Each epoch has its own order, a
    batch may straddle two, and the last incomplete one is dropped. With `cache`, images are decoded
    once if they fit in 1 GiB. `numbered` adds "index", each image's place in the source, and
    "step", the batch's own number from 0. The iterator has get_state and set_state.
    """
    source = cached(source) if cache else source
    _local(batch_size, process_index, process_count, "batch_size")
    args = (batch_size, seed, transform, epochs, process_index, process_count, "batch_size")
    batches = _batched(source, *args, numbered)
    if not len(batches):
        raise SourceError(
            f"batch_size {batch_size}: {counted(len(source), 'image')} in {epochs} epochs do not "
            "fill a batch"
        )
    return _iterator(batches, num_workers, num_threads)


def _join(parts: tuple[Batch, Batch]) -> Batch:
    """One batch of a real and a synthetic one, real images first."""
    real, synthetic = parts
    counts = [len(part["label"]) for part in parts]
    shapes = [part["image"].shape[1:] for part in parts]
    if shapes[0] != shapes[1]:
        raise SourceError(
            f"real images are {shapes[0]}, synthetic ones {shapes[1]}: give a transform that "
            "makes them equal"
        )
    batch = {key: np.concatenate([real[key], synthetic[key]]) for key in real}
    return batch | {"is_real": np.repeat([True, False], counts)}


def real_count(batch_size: int, real_fraction: float) -> int:
    """Real images per batch: the nearest count that leaves at least one of each kind."""
    if not 0 < real_fraction < 1:
        raise SourceError(f"real_fraction: expected between 0 and 1, found {real_fraction}")
    if batch_size < 2:
        raise SourceError(f"batch_size: expected 2 or more to hold both kinds, found {batch_size}")
    return min(max(round(batch_size * real_fraction), 1), batch_size - 1)


def mixed_batches(
    real: ImageSource,
    synthetic: ImageSource,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    *,
    real_fraction: float = 0.5,
    steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    cache: bool = True,
    num_workers: int = 0,
    num_threads: int = -1,
    numbered: bool = False,
):
    """Batches {"image", "label", "is_real"} with the same number of real images in each, first.

    The counts are fixed (`real_count`), so neither part of a loss over both is ever empty. Each
    kind is shuffled and repeated on its own, without end or for `steps` batches. In a batch put
    together from several processes, real images come first within each process's part; the numbers
    of real images in the parts differ by one at most. `numbered` is as in `train_batches`; places
    are those in an image's own source.
    """
    _local(batch_size, process_index, process_count, "batch_size")
    count = real_count(batch_size, real_fraction)
    if min(count, batch_size - count) < process_count:
        raise SourceError(
            f"batch_size {batch_size}: {count} real and {batch_size - count} synthetic images, "
            f"expected at least one of each for every one of {process_count} processes"
        )
    parts = []
    for offset, (source, size, what) in enumerate(
        [(real, count, "real images"), (synthetic, batch_size - count, "synthetic images")]
    ):
        source = cached(source) if cache else source
        # The synthetic rows come after the real ones of the whole batch.
        first = (process_index - offset * count) % process_count
        # Odd and even seeds, so that the two kinds do not share their order.
        args = (2 * seed + offset, transform, None, first, process_count, what, numbered)
        parts.append(_batched(source, size, *args))
    # Both are endless; what is zipped must be of one length.
    steps = min(map(len, parts)) if steps is None else steps
    batches = grain.experimental.ZipMapDataset([part[:steps] for part in parts]).map(_join)
    return _iterator(batches, num_workers, num_threads)


class _Padded:
    """Batches of an evaluation; positions past the end repeat the first image, marked not valid."""

    def __init__(self, source, batch_size, transform, process_index, process_count):
        self.source, self.transform = source, transform
        self.local = _local(batch_size, process_index, process_count, "batch_size")
        self.offset = process_index * self.local
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.batch_size + self.offset
        examples = []
        for position in range(start, start + self.local):
            valid = position < len(self.source)
            record = self.source[position if valid else 0]
            image = record.image if self.transform is None else self.transform(record.image, None)
            examples.append(
                {
                    "image": image,
                    "label": np.int32(record.label),
                    "index": np.int32(position if valid else -1),
                    "valid": np.bool_(valid),
                }
            )
        return collate(examples)

    def __repr__(self) -> str:
        return f"_Padded({len(self.source)})"


def eval_batches(
    source: ImageSource,
    batch_size: int,
    transform: Transform | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_threads: int = -1,
):
    """Every image once and in order: {"image", "label", "index", "valid"}, all batches full.

    The last batch is filled up with images marked `valid` False (and `index` -1), so that one
    compiled program serves all batches and every process yields as many.
    """
    if not len(source):
        raise SourceError("the source has no images")
    padded = _Padded(source, batch_size, transform, process_index, process_count)
    return _iterator(grain.MapDataset.source(padded), num_workers, num_threads)
