"""ChimeraLoRA (CVPR 2026): LoRA whose down projections all images share, with an up projection, a
head, of each image's own.

The heads B_i of a class's images are trained together with the one A, each by its own image:
`loss = E_i |e - e(x_i; W + B_i A)|^2`. A sum of the heads, with weights drawn anew for each image,
is an adapter of the class again (`adapters.mixing`). The paper has no released code; what it says
of its crops by a segmentation model is not done here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from jaxsynth.adapters.inject import AdapterState, Trainable, extract
from jaxsynth.adapters.mixing import UP
from jaxsynth.adapters.tree import map_variables
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.tasks.text_to_image import (
    Denoising,
    EpochBatches,
    Examples,
    FinetuneConfig,
    finetune_tasks,
)
from jaxsynth.training.trainer import Resident, Task, train_stacked
from jaxsynth.weights.hf import StableDiffusion


def with_heads(model: TextToImage, count: int) -> TextToImage:
    """A copy of an adapted network whose up projections are `count` heads on a first axis."""

    def repeat(path: str, variable: nnx.Variable) -> nnx.Variable:
        if not (isinstance(variable, Trainable) and path.endswith(UP)):
            return variable
        value = variable.get_value()
        return Trainable(jnp.repeat(value[None], count, axis=0), **variable.get_metadata())

    return map_variables(repeat, model)


def heads_of(state: AdapterState) -> list[AdapterState]:
    """The adapter of each image: the shared down projections with its head."""
    count = next(len(x) for name, x in state.arrays.items() if name.endswith(UP))
    return [
        AdapterState(
            {name: x[i] if name.endswith(UP) else x for name, x in state.arrays.items()},
            state.config,
        )
        for i in range(count)
    ]


@dataclass(frozen=True)
class HeadBatches:
    """Batches of `EpochBatches` with each example's place in the data, its "head"."""

    inner: EpochBatches

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        return self.inner(step, data) | {"head": self.inner.rows(step, data)}


@dataclass(frozen=True)
class HeadDenoising:
    """The loss `inner` of each example by the network with its own head."""

    inner: Denoising

    def __call__(self, model: TextToImage, schedule: NoiseSchedule, batch: dict, key: Array):
        own = {name: value for name, value in batch.items() if name != "head"}
        graphdef, heads, rest = nnx.split(model, _is_head, ...)
        heads = jax.tree.map(lambda x: x[batch["head"]], heads)

        def one(heads: Any, example: dict, key: Array) -> Array:
            alone = jax.tree.map(lambda x: x[None], example)
            return self.inner(nnx.merge(graphdef, heads, rest), schedule, alone, key)[0]

        keys = jax.random.split(key, len(batch["head"]))
        return jax.vmap(one)(heads, own, keys).mean(), {}


def _is_head(path: tuple, value: Any) -> bool:
    return isinstance(value, Trainable) and path[-1] == UP


def finetune_heads(
    pipeline: StableDiffusion,
    sets: Sequence[Examples],
    config: FinetuneConfig,
    folder: Path,
    *,
    seed: int,
    first: int = 0,
    mesh: Mesh | None = None,
    description: str = "fine-tune",
) -> list[list[AdapterState]]:
    """For each set of examples an adapter of each example, which share their down projections.

    The arguments are those of `finetune_each`.
    """
    tasks = [
        headed(task, len(examples), config)
        for task, examples in zip(
            finetune_tasks(pipeline, sets, config, seed=seed, first=first), sets, strict=True
        )
    ]
    sized = config.sized(len(sets[0]))
    trained = train_stacked(tasks, sized, folder, mesh=mesh, description=description)
    return [heads_of(extract(model)) for model in trained]


def headed(task: Task, count: int, config: FinetuneConfig) -> Task:
    """A task of `text_to_image` over `count` examples with a head for each of them."""
    assert isinstance(task.batches, Resident) and isinstance(task.loss, Denoising)
    batches = HeadBatches(EpochBatches(count, config.batch_size))
    return replace(
        task,
        model=with_heads(task.model, count),
        loss=HeadDenoising(task.loss),
        batches=replace(task.batches, next_batch=batches),
    )
