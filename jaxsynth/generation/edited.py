"""Editing images as a text says, by a diffusion model that sees the image.

InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800): the denoiser reads the latents of the image
beside the noisy ones, eight channels in all, and two scales of guidance weigh how close the result
is to the image and to the instruction. The image's latents are the mean of the autoencoder's
posterior, not scaled as the noisy ones are. Here it makes the pairs that image-to-image networks
learn from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt8

from jaxsynth.core.errors import UserError
from jaxsynth.diffusion.guidance import nested
from jaxsynth.diffusion.samplers import initial_noise, make_sampler, sample
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import image_keys
from jaxsynth.models.diffusion.text_to_image import encode_text
from jaxsynth.models.diffusion.vae import decode_scaled
from jaxsynth.weights.hf import StableDiffusion


@dataclass(frozen=True)
class EditConfig:
    """How images are edited; the defaults are those of diffusers' pipeline.

    `guidance_scale` is the instruction's, `image_guidance_scale` the image's. `sampler` "" takes
    the one that the model's folder names.
    """

    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    num_inference_steps: int = 100
    sampler: str = ""
    negative_prompt: str = ""
    batch_size: int = 8


def edit_images(
    pipeline: StableDiffusion,
    images: UInt8[np.ndarray, "n h w 3"],
    prompts: Sequence[str],
    config: EditConfig,
    *,
    seed: int,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Each image edited by its prompt; image i depends on `seed`, i and its inputs only.

    `pipeline` is loaded with `editing=True`. UserError for one whose denoiser does not read the
    image, images whose sides the autoencoder does not divide, or another number of prompts.
    """
    channels = pipeline.vae.config.latent_channels
    if pipeline.unet.config.in_channels != 2 * channels:
        raise UserError(
            f"edit_images: the denoiser has {pipeline.unet.config.in_channels} input channels, "
            f"expected {2 * channels}: the noisy latents and the image's"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"edit_images: expected uint8 images (n, h, w, 3), found {images.dtype} {images.shape}"
        )
    if len(prompts) != len(images):
        raise UserError(f"edit_images: {len(prompts)} prompts for {len(images)} images")
    downscale = pipeline.vae.config.downscale
    height, width = images.shape[1:3]
    if height % downscale or width % downscale:
        raise UserError(
            f"edit_images: images of {width}x{height} pixels, expected multiples of {downscale}"
        )
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    sampler = make_sampler(
        config.sampler or pipeline.scheduler_config, schedule, config.num_inference_steps
    )
    shape = (height // downscale, width // downscale, channels)
    networks = (*nnx.split(pipeline.unet), *nnx.split(pipeline.vae))
    scales = (config.image_guidance_scale, config.guidance_scale)
    empty = encode_text(pipeline.text_encoder, pipeline.tokenizer([config.negative_prompt]))
    ids = pipeline.tokenizer(list(prompts))
    made = []
    for start in range(0, len(images), config.batch_size):
        # One compiled shape: the last batch is filled up.
        end = min(start + config.batch_size, len(images))
        rows = np.resize(np.arange(start, end), config.batch_size)
        keys = image_keys(seed, np.zeros_like(rows), rows)
        text = encode_text(pipeline.text_encoder, ids[rows])
        found = _draw(*networks, sampler, keys, images[rows], text, empty, scales, shape)
        made.append(np.asarray(found)[: end - start])
    return np.concatenate(made)


@partial(jax.jit, static_argnames=("unet_graph", "vae_graph", "scales", "shape"))
def _draw(
    unet_graph, unet_state, vae_graph, vae_state, sampler, keys, pixels, text, empty, scales, shape
) -> UInt8[Array, "b h w 3"]:
    """One batch; the program is kept for the next call's images of this size."""
    vae = nnx.merge(vae_graph, vae_state)
    seen = vae.encode(pixels.astype(jnp.float32) / 127.5 - 1).mean

    def denoise(x: Array, t: Array, given: tuple[Array, Array]) -> Array:
        states, image = given
        noisy = jnp.concatenate([x, image.astype(x.dtype)], axis=-1)
        return nnx.merge(unet_graph, unet_state)(noisy, t, states)

    conditions = ((empty, jnp.zeros_like(seen)), (empty, seen), (text, seen))
    guided = nested(denoise, scales, conditions)
    latents = sample(guided, initial_noise(keys, shape, sampler), sampler, keys=keys)
    return decode_scaled(vae, latents)
