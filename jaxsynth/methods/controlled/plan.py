"""What a comparison of ways to follow conditions needs on a mesh, from a configuration alone.

The tasks are those of the run (`tasks.controlled.control_task`), of shapes. Of the base's folder
only the config.json files are read.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsynth.core.errors import UserError
from jaxsynth.data.conditions import CHANNELS
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.conditioners import ConditionImage
from jaxsynth.generation.planning import plan_sampler, text_states
from jaxsynth.generation.sampler import latent_shape, sampler_of
from jaxsynth.methods.controlled.config import Config
from jaxsynth.models.diffusion.controlled import Controlled
from jaxsynth.models.shapes import transform
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.controlled import Triples, control_task
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import PIPELINES, StableDiffusion, describe_pipeline, has_shapes


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """The training of every way, whose rates and seeds share one program, and its drawing.

    A run draws on one device. UserError where the base's shape cannot be known, and as
    `trainer.train`.
    """
    shapes, one_device = _Shapes.of(config), make_mesh(devices=mesh.devices.flat[:1])
    train, generate = config.train, config.generate
    unit = rows_of(mesh) * train.accumulate
    programs = []
    for name in config.ways:
        trained = len(config.rates_of(name)) + len(config.seeds) - 1

        def updates(batch: int, trained: int = trained) -> int:
            sized = dataclasses.replace(train, batch_size=batch)
            return trained * sized.sized(shapes.triples.mean.shape[0]).steps

        def batches(batch: int, trained: int = trained) -> int:
            return trained * math.ceil(config.images / batch)

        training = partial(shapes.training, name, mesh)
        drawing = partial(shapes.drawing, name, one_device)
        programs += [
            Program(name, training, "train.batch_size", train.batch_size, unit, updates),
            Program(
                f"draw, {name}", drawing, "generate.batch_size", generate.batch_size, 1, batches
            ),
        ]
    return programs


@dataclass(frozen=True)
class _Shapes:
    """A run's base and data as shapes."""

    config: Config
    base: StableDiffusion
    triples: Triples
    note: str

    @classmethod
    def of(cls, config: Config) -> "_Shapes":
        if not has_shapes(config.base):  # told here with what is enough, and no hub is asked
            raise UserError(
                f"base: {config.base!r} is no folder or file here, so its shape is unknown; a "
                "folder with the tokenizer and the config.json files of unet, vae, text_encoder "
                "and scheduler is enough"
            )
        base = describe_pipeline(config.base, kinds=PIPELINES)
        classes, images, note = count_data(config.data)
        side, text = base.unet.config.sample_size, base.text_encoder.config
        pixels = side * base.vae.config.downscale
        latent = _shape(images, side, side, base.vae.config.latent_channels)
        triples = Triples(
            mean=latent,
            std=latent,
            condition=_shape(images, pixels, pixels, CHANNELS[config.kind]),
            # A prompt for each class, and the empty one.
            text=_shape(classes + 1, text.max_position_embeddings, text.hidden_size),
            prompt=_shape(images, dtype=np.int32),
        )
        return cls(config, base, triples, note)

    def _model(self, name: str) -> Controlled:
        way, down = self.config.way(name, self.config.seeds[0]), self.base.vae.config.downscale
        return transform(lambda unet: way.apply(unet, down), self.base.unet)

    def training(self, name: str, mesh: Mesh, batch: int) -> Plan:
        """A step of a way."""
        train = dataclasses.replace(self.config.train, batch_size=batch)
        schedule = NoiseSchedule.from_config(self.base.scheduler_config)
        seed = self.config.seeds[0]
        task = control_task(self._model(name), self.triples, schedule, train, seed=seed)
        sized = train.sized(self.triples.mean.shape[0])
        return trainer.plan(name, task, sized, mesh, note=self.note)

    def drawing(self, name: str, mesh: Mesh, batch: int) -> Plan:
        """One batch of a way's images."""
        config, base = self.config.generate, self.base
        states = text_states(base, 1).states
        condition = self.triples.condition
        return plan_sampler(
            f"draw, {name}",
            self._model(name),
            base.vae,
            ConditionImage(config.guidance_scale, config.guidance_rescale),
            sampler_of(base, config.sampler, config.num_inference_steps),
            latent_shape(base),
            {
                "text": (states.shape[1:], states.dtype),
                "condition": (condition.shape[1:], condition.dtype),
            },
            mesh,
            batch_size=batch,
            tables=states,
            note=self.note,
        )


def _shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)
