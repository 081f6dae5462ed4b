"""Editing images as a text says, by a diffusion model that sees the image.

InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800): the denoiser reads the latents of the image
beside the noisy ones, eight channels in all, and two scales of guidance weigh how close the result
is to the image and to the instruction (`conditioners.ImageEdit`). Here it makes the pairs that
image-to-image networks learn from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import Count, Finite, check_limits
from jaxsynth.core.words import counted
from jaxsynth.diffusion.samplers import check_sampler
from jaxsynth.generation.conditioners import ImageEdit
from jaxsynth.generation.sampler import ImageSampler, Networks, sample_numbered, sampler_of
from jaxsynth.models.diffusion.text_to_image import encode_texts, whole_image
from jaxsynth.weights.hf import StableDiffusion


@dataclass(frozen=True)
class EditConfig:
    """How images are edited; the defaults are those of diffusers' pipeline.

    `guidance_scale` is the instruction's, `image_guidance_scale` the image's. `sampler` "" takes
    the one that the model's folder names.
    """

    guidance_scale: Finite = 7.5
    image_guidance_scale: Finite = 1.5
    num_inference_steps: Count = 100
    sampler: str = ""
    negative_prompt: str = ""
    batch_size: Count = 8

    def __post_init__(self):
        check_limits(self)
        check_sampler(self.sampler)


def edit_images(
    pipeline: StableDiffusion,
    images: UInt8[np.ndarray, "n h w 3"],
    prompts: Sequence[str],
    config: EditConfig,
    *,
    seed: int,
    mesh: Mesh | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Each image edited by its prompt; image i depends on `seed`, i and its inputs only.

    `pipeline` is loaded with `kinds=EDITING`. UserError for one whose denoiser does not read the
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
        raise UserError(
            f"edit_images: {counted(len(prompts), 'prompt')} for {counted(len(images), 'image')}"
        )
    downscale = pipeline.vae.config.downscale
    height, width = images.shape[1:3]
    if height % downscale or width % downscale:
        raise UserError(
            f"edit_images: images of {width}x{height} pixels, expected multiples of {downscale}"
        )
    texts = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
    positive, negative = (
        encode_texts(pipeline.networks, pipeline.tokenizer(own)).sized(whole_image((height, width)))
        for own in (list(texts), [config.negative_prompt])
    )
    if pipeline.zeroes_empty:
        negative = negative.where(pipeline.given([config.negative_prompt]))
    sampler = ImageSampler(
        Networks.of([pipeline.networks], mesh=mesh, table=ImageEdit.table),
        pipeline.vae,
        ImageEdit(config.guidance_scale, image_guidance_scale=config.image_guidance_scale),
        sampler_of(pipeline, config.sampler, config.num_inference_steps),
        (height // downscale, width // downscale, channels),
        batch_size=config.batch_size,
        tables=(positive, negative.take(np.zeros(len(texts), np.int32))),
        mesh=mesh,
    )
    prompt = np.array([texts[text] for text in prompts], np.int32)

    def rows(numbers: np.ndarray) -> dict:
        return {"prompt": prompt[numbers], "pixels": images[numbers]}

    return sample_numbered(
        sampler,
        len(images),
        rows,
        seed=seed,
        describe=lambda i: f"image {i} edited by {prompts[i]!r}",
    )
