"""Scripts that the tests run in processes of their own: one that is killed, and two that cooperate.

python worker.py resume FOLDER STEPS DIE_AT
python worker.py distributed FOLDER PORT PROCESS COUNT
python worker.py elastic FOLDER PORT PROCESS COUNT DEVICES UNTIL
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import small_net

from jaxsynth.runs.stage import run_stage
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.loop import fit
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.sharding import UNET, make_mesh, shard, shard_batch
from jaxsynth.training.step import init_state, make_train_step


class Deadly(small_net.Batches):
    def __init__(self, die_at: int):
        super().__init__()
        self.die_at = die_at

    def __next__(self):
        if self.index == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__next__()


def parts(steps: int):
    graphdef, params = small_net.make()
    config = TrainingConfig(
        learning_rate=1e-2,
        steps=steps,
        eps=1e-3,
        schedule="cosine",
        weight_decay=0.01,
        clip_norm=1.0,
    )
    tx, rate = make_optimizer(config), Rate.of(config)
    state = init_state(params, tx, jax.random.key(1), rate, ema=True)
    loss = small_net.make_loss(graphdef, noise=0.1)
    step = make_train_step(loss, tx, schedule=config.schedule, ema_decay=0.9)
    return state, step


def save(path: Path, state) -> None:
    arrays = {}
    for name in ("trainable", "ema", "opt_state"):
        for i, leaf in enumerate(jax.tree.leaves(getattr(state, name))):
            arrays[f"{name}{i:03d}"] = np.asarray(leaf)
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def resume(folder: Path, steps: int, die_at: int) -> None:
    def build(path: Path):
        state, step = parts(steps)
        with Checkpoints(path / "checkpoints", every=5) as checkpoint, MetricsWriter(path) as lines:
            state = fit(
                state,
                None,
                Deadly(die_at),
                step,
                steps=steps,
                checkpoint=checkpoint,
                metrics=lines,
                log_every=5,
            )
        save(path / "state.npz", state)
        return {"steps": int(state.step)}

    run_stage("train", folder, {"steps": steps}, {}, build)


class Share(small_net.Batches):
    """The rows of each batch of eight that one process has."""

    def __init__(self, process: int, count: int):
        super().__init__()
        self.own = slice(process * 8 // count, (process + 1) * 8 // count)

    def __next__(self):
        return {k: v[self.own] for k, v in super().__next__().items()}


def train(path: Path, process: int, count: int, ends: tuple[int, ...]):
    """Up to each of `ends`, every time from the newest checkpoint."""
    mesh = make_mesh(fsdp=2)
    _, step = parts(6)
    with Checkpoints(path / "checkpoints", every=2) as checkpoint, MetricsWriter(path) as lines:
        for steps in ends:
            state = fit(
                shard(parts(6)[0], mesh, UNET, min_size=64),
                None,
                Share(process, count),
                step,
                steps=steps,
                place=partial(shard_batch, mesh=mesh),
                checkpoint=checkpoint,
                metrics=lines,
                log_every=1,
            )
    return state


def join(port: str, process: int, count: int, devices: int) -> None:
    """Be one of `count` processes, which have so many devices together."""
    jax.config.update("jax_num_cpu_devices", devices // count)
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, process)


def distributed(folder: Path, port: str, process: int, count: int) -> None:
    join(port, process, count, 4)

    def build(path: Path):
        # The second end starts from the first one's checkpoint.
        return {"steps": int(train(path, process, count, (3, 6)).step)}

    run_stage("train", folder, {"steps": 6}, {}, build)


def elastic(folder: Path, port: str, process: int, count: int, devices: int, until: int) -> None:
    join(port, process, count, devices)
    train(folder, process, count, (until,))


if __name__ == "__main__":
    verb, folder, *rest = sys.argv[1:]
    if verb == "resume":
        resume(Path(folder), int(rest[0]), int(rest[1]))
    else:
        {"distributed": distributed, "elastic": elastic}[verb](
            Path(folder), rest[0], *map(int, rest[1:])
        )
