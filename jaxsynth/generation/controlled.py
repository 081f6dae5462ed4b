"""Images that follow condition images, from a base with a ControlNet or with adapters."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from jaxsynth.core.words import counted
from jaxsynth.generation.conditioners import ConditionImage
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.generation.sampler import (
    ImageSampler,
    Networks,
    latent_shape,
    sample_numbered,
    sampler_of,
)
from jaxsynth.models.diffusion.controlled import Controlled
from jaxsynth.models.diffusion.text_to_image import encode_text
from jaxsynth.weights.hf import StableDiffusion


def draw_controlled(
    pipeline: StableDiffusion,
    model: Controlled,
    prompts: Sequence[str],
    condition: Float[np.ndarray, "n size size k"],
    config: GenerateConfig,
    *,
    seed: int,
    mesh: Mesh | None = None,
) -> UInt8[np.ndarray, "n size size 3"]:
    """One image for each prompt and condition; image i depends on `seed`, i and its inputs only.

    `images_per_class` and `batches_per_shard` have no meaning here. Raises ValueError where the
    counts differ.
    """
    if len(prompts) != len(condition):
        raise ValueError(
            f"draw_controlled: {counted(len(prompts), 'prompt')}, "
            f"{counted(len(condition), 'condition')}"
        )
    sampler = ImageSampler(
        Networks.of([model], mesh=mesh, table=ConditionImage.table),
        pipeline.vae,
        ConditionImage(config.guidance_scale, config.guidance_rescale),
        sampler_of(pipeline, config.sampler, config.num_inference_steps),
        latent_shape(pipeline),
        batch_size=config.batch_size,
        tables=encode_text(pipeline.text_encoder, pipeline.tokenizer([config.negative_prompt])),
        mesh=mesh,
    )
    ids = pipeline.tokenizer(list(prompts))

    def rows(numbers: np.ndarray) -> dict:
        text = encode_text(pipeline.text_encoder, ids[numbers])
        return {"text": text, "condition": condition[numbers]}

    return sample_numbered(
        sampler,
        len(prompts),
        rows,
        seed=seed,
        describe=lambda i: f"image {i} of {prompts[i]!r}",
    )
