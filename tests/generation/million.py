"""Memory and speed of filling a store with a great many images, of a generator that costs nothing.

    python -m tests.generation.million [--images=1000000] [--side=8]

draws noise in place of a denoiser's images, so that what is left is the store's own work: numbers,
PNG files, manifest lines, digests. It prints the resident memory and the images a second of each
tenth.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxsynth.generation.generate import GenerateConfig, fill_store

CLASSES, BATCH, BATCHES = 10, 500, 4


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Noise:
    """Images number `indices` of classes `labels`; notes memory and time at each tenth."""

    def __init__(self, images: int, side: int):
        self.images, self.side = images, side
        self.drawn, self.marks = 0, [(0, time.perf_counter(), resident())]

    def __call__(self, labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        tenth = self.drawn * 10 // self.images
        if tenth >= len(self.marks):
            self.marks.append((self.drawn, time.perf_counter(), resident()))
        random = np.random.default_rng([int(labels[0]), int(indices[0])])
        self.drawn += len(labels)
        return random.integers(0, 256, (len(labels), self.side, self.side, 3), np.uint8)


def fill(folder: Path, images: int, side: int) -> list[tuple[int, float, int]]:
    """Images so far, images a second since the mark before, and resident bytes, at each mark."""
    draw = Noise(images, side)
    config = GenerateConfig(
        images_per_class=images // CLASSES, batch_size=BATCH, batches_per_shard=BATCHES
    )
    names = [f"class {i}" for i in range(CLASSES)]
    assert fill_store(draw, folder, names, names, config, seed=0) == images
    draw.marks.append((draw.drawn, time.perf_counter(), resident()))
    pairs = zip(draw.marks, draw.marks[1:], strict=False)
    return [(n, (n - before) / (t - began), size) for (before, began, _), (n, t, size) in pairs]


@contextmanager
def folder_for(given: str) -> Iterator[Path]:
    if given:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made) / "store"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--folder", default="", help="where the store goes (default: removed)")
    args = parser.parse_args()
    with folder_for(args.folder) as folder:
        for count, rate, size in fill(folder, args.images, args.side):
            print(f"{count:>9,} images  {rate:8,.0f} images/s  {size / 2**20:7.1f} MiB", flush=True)
