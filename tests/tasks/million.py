"""Memory and speed of training on a great many latents that stay on the disk.

    python -m tests.tasks.million [--images=1000000] [--devices=8]

trains a transformer of one token on latents of 2 x 2 pixels, in batches of 1,000 over fake devices,
for as many steps as the images fill. It prints the memory of the process that no file holds, the
images a second, at each tenth.
"""

import argparse
import itertools
import os
import tempfile
import threading
import time
from pathlib import Path

BATCH, SIDE = 1000, 2


def anonymous() -> int:
    """Bytes of this process that lie in memory and in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def write(path: Path, images: int) -> None:
    """Latents of noise in ten classes, in one file."""
    import numpy as np

    mean = np.random.default_rng(0).normal(size=(images, 1, SIDE, SIDE, 4)).astype(np.float32)
    labels = (np.arange(images) % 10).astype(np.int32)
    np.savez(path, mean=mean, std=np.abs(mean), labels=labels)


def train(folder: Path, images: int) -> list[tuple[int, float, int]]:
    """Images so far, images a second since the mark before and bytes, at each tenth."""
    from flax import nnx

    from jaxsynth.adapters.inject import mark_trainable
    from jaxsynth.diffusion.schedules import NoiseSchedule
    from jaxsynth.models.diffusion.dit import DiT, DiTConfig
    from jaxsynth.tasks.class_conditional import AdaptConfig, adapt
    from jaxsynth.tasks.latents import Latents
    from jaxsynth.training.metrics import read_metrics
    from jaxsynth.training.sharding import make_mesh
    from jaxsynth.weights.networks.dit import SCHEDULER

    network = DiTConfig(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, out_channels=8, sample_size=SIDE,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    model = mark_trainable(DiT(network, rngs=nnx.Rngs(0)))
    steps = images // BATCH
    config = AdaptConfig(steps=steps, batch_size=BATCH, log_every=steps // 10, streamed=True)
    latents = Latents.load(folder / "latents.npz", mapped=True)
    marks, ended = [(0, time.perf_counter(), anonymous())], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            lines = read_metrics(folder / "run" / "metrics.jsonl")
            if lines and lines[-1]["step"] * BATCH > marks[-1][0]:
                marks.append((lines[-1]["step"] * BATCH, time.perf_counter(), anonymous()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        adapt(
            model, latents, NoiseSchedule.from_config(SCHEDULER), config, folder / "run", seed=0,
            mesh=make_mesh(),
        )  # fmt: skip
    finally:
        ended.set()
        watcher.join()
    pairs = itertools.pairwise(marks)
    return [(n, (n - before) / (t - began), size) for (before, began, _), (n, t, size) in pairs]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--devices", type=int, default=8)
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
    with tempfile.TemporaryDirectory() as made:
        write(Path(made) / "latents.npz", args.images)
        print(f"{(Path(made) / 'latents.npz').stat().st_size / 2**20:.0f} MiB of latents")
        for count, rate, size in train(Path(made), args.images):
            print(f"{count:>9,} images  {rate:8,.0f} images/s  {size / 2**20:7.1f} MiB", flush=True)
