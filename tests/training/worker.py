"""Scripts that the tests run in processes of their own: one that is killed, and two that cooperate.

python worker.py resume FOLDER STEPS DIE_AT
python worker.py distributed FOLDER PORT PROCESS COUNT
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


def distributed(folder: Path, port: str, process: int, count: int) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // count)
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, process)
    mesh = make_mesh(data=2, fsdp=2)
    rows = 8 // count

    class Mine(small_net.Batches):
        def __next__(self):
            whole = super().__next__()
            return {k: v[process * rows : (process + 1) * rows] for k, v in whole.items()}

    def build(path: Path):
        state, step = parts(6)
        state = shard(state, mesh, UNET, min_size=64)
        with Checkpoints(path / "checkpoints", every=2) as checkpoint, MetricsWriter(path) as lines:
            for steps in (3, 6):  # the second call starts from the first one's checkpoint
                fresh = shard(parts(6)[0], mesh, UNET, min_size=64)
                state = fit(
                    fresh,
                    None,
                    Mine(),
                    step,
                    steps=steps,
                    place=partial(shard_batch, mesh=mesh),
                    checkpoint=checkpoint,
                    metrics=lines,
                    log_every=1,
                )
        return {"steps": int(state.step)}

    run_stage("train", folder, {"steps": 6}, {}, build)


if __name__ == "__main__":
    verb, folder, *rest = sys.argv[1:]
    if verb == "resume":
        resume(Path(folder), int(rest[0]), int(rest[1]))
    else:
        distributed(Path(folder), rest[0], int(rest[1]), int(rest[2]))
