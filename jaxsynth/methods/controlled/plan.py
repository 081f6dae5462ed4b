"""What a comparison of ways to follow conditions needs on a mesh, from a configuration alone.

The tasks are those of the run (`tasks.controlled.control_task`), of shapes. Of the base's folder
only the config.json files are read.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsynth.core.errors import UserError
from jaxsynth.data.conditions import CHANNELS
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.methods.controlled.config import Config
from jaxsynth.models.diffusion.unet import UNet2DCondition
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.controlled import Triples, control_task
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan
from jaxsynth.weights.hf import is_here, pipeline_configs


def plan(config: Config, mesh: Mesh) -> list[Plan]:
    """One for every way; its rates and seeds share one program.

    Raises UserError where the base's shape cannot be known, and as `trainer.train`.
    """
    if not is_here(config.base):  # a hub id would be downloaded with its weights
        raise UserError(
            f"base: {config.base!r} is no folder here, so its shape is unknown; a folder with the "
            "config.json files of unet, vae, text_encoder and scheduler is enough"
        )
    configs, scheduler = pipeline_configs(config.base)
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    schedule = NoiseSchedule.from_config(scheduler)
    classes, images, note = count_data(config.data)

    def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    side, pixels = unet.sample_size, unet.sample_size * vae.downscale
    latent = shape(images, side, side, vae.latent_channels)
    triples = Triples(
        mean=latent,
        std=latent,
        condition=shape(images, pixels, pixels, CHANNELS[config.kind]),
        # A prompt for each class, and the empty one.
        text=shape(classes + 1, text.max_position_embeddings, text.hidden_size),
        prompt=shape(images, dtype=np.int32),
    )
    sized, seed, made = config.train.sized(images), config.seeds[0], []
    for name in config.ways:
        way = config.way(name, seed)
        model = nnx.eval_shape(
            lambda way=way: way.apply(UNet2DCondition(unet, rngs=nnx.Rngs(0)), vae.downscale)
        )
        task = control_task(model, triples, schedule, config.train, seed=seed)
        made.append(trainer.plan(name, task, sized, mesh, note=note))
    return made
