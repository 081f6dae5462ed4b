"""Images that follow condition images, from a base with a ControlNet or with adapters."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from jaxsynth.diffusion.guidance import classifier_free
from jaxsynth.diffusion.samplers import initial_noise, make_sampler, sample
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import GenerateConfig, image_keys
from jaxsynth.models.diffusion.controlled import Controlled
from jaxsynth.models.diffusion.text_to_image import encode_text
from jaxsynth.models.diffusion.vae import decode_scaled
from jaxsynth.weights.hf import StableDiffusion


def draw_controlled(
    pipeline: StableDiffusion,
    model: Controlled,
    prompts: Sequence[str],
    condition: Float[np.ndarray, "n size size k"],
    config: GenerateConfig,
    *,
    seed: int,
) -> UInt8[np.ndarray, "n size size 3"]:
    """One image for each prompt and condition; image i depends on `seed`, i and its inputs only.

    Guidance strengthens the prompt, not the condition: the branch without a prompt sees it too, as
    in ControlNet. `images_per_class` and `batches_per_shard` have no meaning here. Raises
    ValueError where the counts differ.
    """
    if len(prompts) != len(condition):
        raise ValueError(f"draw_controlled: {len(prompts)} prompts, {len(condition)} conditions")
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    sampler = make_sampler(
        config.sampler or pipeline.scheduler_config, schedule, config.num_inference_steps
    )
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    (model_graph, model_state), (vae_graph, vae_state) = nnx.split(model), nnx.split(pipeline.vae)

    @jax.jit
    def draw(model_state, vae_state, keys, text, empty, condition):
        def denoise(x: Array, t: Array, given: tuple[Array, Array]) -> Array:
            return nnx.merge(model_graph, model_state)(x, t, *given)

        guided = classifier_free(
            denoise, config.guidance_scale, (text, condition), (empty, condition)
        )
        x_T = initial_noise(keys, (side, side, channels), sampler)
        latents = sample(guided, x_T, sampler, keys=keys)
        return decode_scaled(nnx.merge(vae_graph, vae_state), latents)

    states = partial(encode_text, pipeline.text_encoder)
    empty = states(pipeline.tokenizer([config.negative_prompt]))
    ids = pipeline.tokenizer(list(prompts))
    made = []
    for start in range(0, len(prompts), config.batch_size):
        # One compiled shape: the last batch is filled up.
        end = min(start + config.batch_size, len(prompts))
        rows = np.resize(np.arange(start, end), config.batch_size)
        keys = image_keys(seed, np.zeros_like(rows), rows)
        images = draw(model_state, vae_state, keys, states(ids[rows]), empty, condition[rows])
        made.append(np.asarray(images)[: end - start])
    return np.concatenate(made)
