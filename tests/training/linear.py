"""The smallest task: a linear layer, its examples on the devices."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.training import trainer
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.training.trainer import Resident, Task

WIDTH, EXAMPLES = 256, 4096


@dataclass(frozen=True)
class SquaredError:
    def __call__(self, model, constants, batch, key):
        return jnp.square(model(batch["x"]) - batch["x"]).mean(), {}


@dataclass(frozen=True)
class Rows:
    batch_size: int

    def __call__(self, step, data):
        rows = (step * self.batch_size + jnp.arange(self.batch_size)) % EXAMPLES
        return {"x": data["x"][rows]}


def linear_program(mesh: Mesh, batch_size: int = 64) -> Program:
    """The program of its training, of shapes."""
    model = nnx.eval_shape(
        lambda: mark_trainable(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(jax.random.key(0))))
    )

    def build(batch: int) -> Plan:
        data = {"x": jax.ShapeDtypeStruct((EXAMPLES, WIDTH), jnp.float32)}
        task = Task(
            model=model,
            loss=SquaredError(),
            batches=Resident(data, Rows(batch), sharded=("x",)),
            table=((r"(kernel|bias)$", PartitionSpec()),),
            key=jax.random.key(0),
        )
        config = TrainingConfig(steps=4, batch_size=batch)
        return trainer.plan("linear", task, config, mesh, note="a note")

    return Program("linear", build, "batch_size", batch_size, rows_of(mesh), lambda _: 1234)
