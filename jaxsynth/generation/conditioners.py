"""What steers a sampled image: a text, a class, a condition image, an image to be edited.

A conditioner is a frozen dataclass, part of the compiled program, that says three things to
`sampler.ImageSampler`:

- `branches(tables, rows, vae)`: the conditions of one batch from the least to the most informed,
  pytrees with the batch first; a leaf may have batch 1. `tables` are arrays that all batches share
  (the conditions of the prompts), `rows` those of the batch;
- `scales`: the guidance from each branch to the next, one fewer than branches, and `channels`, how
  many of the first channels it holds for (None: all); `rescale`, the share of its result that is
  brought to the standard deviation of the last branch;
- `denoise(model, x, t, condition)`: the denoiser's output.

`table` is the sharding table of the denoiser. A new way to steer is one more such class.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxsynth.data.conditions import as_fractions
from jaxsynth.diffusion.learned_range import without_variance
from jaxsynth.models.diffusion.vae import AutoencoderKL, from_uint8
from jaxsynth.training import sharding

Rows = dict[str, Array]


class Conditioner(Protocol):
    """What `ImageSampler` needs; see the module docstring."""

    table: ClassVar[sharding.Table]

    @property
    def scales(self) -> tuple[float, ...]: ...
    @property
    def channels(self) -> int | None: ...
    @property
    def rescale(self) -> float: ...
    def branches(self, tables: PyTree, rows: Rows, vae: AutoencoderKL) -> tuple[PyTree, ...]: ...
    def denoise(self, model: Any, x: Array, t: Array, condition: PyTree) -> Array: ...


@dataclass(frozen=True)
class Text:
    """A prompt against a negative prompt (arXiv 2207.12598).

    `tables` are the `TextCondition`s of the prompts and of their negative prompts, and
    `rows["prompt"]` says which prompt an image has. The model is a `TextToImage`.
    """

    guidance_scale: float
    rescale: float = 0.0
    channels: None = None
    table: ClassVar = (*sharding.UNET, *sharding.CLIP)

    @property
    def scales(self) -> tuple[float, ...]:
        return (self.guidance_scale,)

    def branches(self, tables: PyTree, rows: Rows, vae: AutoencoderKL) -> tuple[PyTree, ...]:
        positive, negative = tables
        return negative.take(rows["prompt"]), positive.take(rows["prompt"])

    def denoise(self, model: Any, x: Array, t: Array, condition: PyTree) -> Array:
        return model.denoise(x, t, condition)


@dataclass(frozen=True)
class ClassLabel:
    """A class against no class, for a `DiT`; `rows` are "label" and, where given, "condition".

    A condition is uint8 in 255ths or fractions. Guidance strengthens the class, not the condition:
    the branch without a class sees it too, as in ControlNet. `drops_variance` is for a network that
    predicts its variance under a sampler that sets it.
    """

    guidance_scale: float
    null_label: int
    channels: int
    drops_variance: bool
    rescale: float = 0.0
    table: ClassVar = sharding.DIT

    @property
    def scales(self) -> tuple[float, ...]:
        return (self.guidance_scale,)

    def branches(self, tables: PyTree, rows: Rows, vae: AutoencoderKL) -> tuple[PyTree, ...]:
        labels = rows["label"]
        more = (as_fractions(rows["condition"]),) if "condition" in rows else ()
        return (jnp.full_like(labels, self.null_label), *more), (labels, *more)

    def denoise(self, model: Any, x: Array, t: Array, condition: PyTree) -> Array:
        labels, *more = condition
        run = without_variance(model) if self.drops_variance else model
        return run(x, t, labels, condition=more[0] if more else None)


@dataclass(frozen=True)
class ConditionImage:
    """A prompt and a condition image, for a `Controlled` denoiser (a ControlNet or more inputs).

    `tables` is the state of the negative prompt (1, t, d); `rows` are "text", the prompts' states,
    and "condition", in [0, 1] and of the pixels' size. Guidance strengthens the prompt alone.
    """

    guidance_scale: float
    rescale: float = 0.0
    channels: None = None
    table: ClassVar = sharding.CONTROLNET

    @property
    def scales(self) -> tuple[float, ...]:
        return (self.guidance_scale,)

    def branches(self, tables: PyTree, rows: Rows, vae: AutoencoderKL) -> tuple[PyTree, ...]:
        condition = rows["condition"]
        return (tables, condition), (rows["text"], condition)

    def denoise(self, model: Any, x: Array, t: Array, condition: PyTree) -> Array:
        return model(x, t, *condition)


@dataclass(frozen=True)
class ImageEdit(Text):
    """An image and an instruction, for a UNet that reads the image's latents beside the noisy ones.

    InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800, equation 3): one scale of guidance from
    nothing to the image, one from there to the image with the instruction. The image's latents are
    the mean of the autoencoder's posterior, not scaled as the noisy ones are. `tables` and the row
    "prompt" are `Text`'s; a further row is "pixels" (b, h, w, 3) uint8.
    """

    image_guidance_scale: float = 1.5

    @property
    def scales(self) -> tuple[float, ...]:
        return self.image_guidance_scale, self.guidance_scale

    def branches(self, tables: PyTree, rows: Rows, vae: AutoencoderKL) -> tuple[PyTree, ...]:
        negative, positive = super().branches(tables, rows, vae)
        seen = vae.encode(from_uint8(rows["pixels"])).mean
        return (negative, jnp.zeros_like(seen)), (negative, seen), (positive, seen)

    def denoise(self, model: Any, x: Array, t: Array, condition: PyTree) -> Array:
        text, image = condition
        return model.denoise(jnp.concatenate([x, image.astype(x.dtype)], axis=-1), t, text)


@dataclass(frozen=True)
class Inpaint(Text):
    """A prompt for the masked part of an image, for a UNet that reads what is around it.

    Rombach et al. 2022 (arXiv 2112.10752, section 4.5), in the form of Stable Diffusion's
    inpainting models: beside the noisy latents stand the mask, of which every so many pixels
    count, and the latents of the image, grey where it is masked, as the mean of the autoencoder's
    posterior and scaled as the noisy ones are. `tables` and the row "prompt" are `Text`'s; further
    rows are "pixels" (b, h, w, 3) uint8 and "mask" (b, h, w), 1 where the image is to be painted.
    """

    def branches(self, tables: PyTree, rows: Rows, vae: AutoencoderKL) -> tuple[PyTree, ...]:
        mask, step = rows["mask"].astype(jnp.float32)[..., None], vae.config.downscale
        around = vae.encode(from_uint8(rows["pixels"]) * (1 - mask)).mean
        seen = [mask[:, ::step, ::step], around * vae.config.scaling_factor]
        beside = jnp.concatenate(seen, axis=-1)
        return tuple((text, beside) for text in super().branches(tables, rows, vae))

    def denoise(self, model: Any, x: Array, t: Array, condition: PyTree) -> Array:
        text, beside = condition
        return model.denoise(jnp.concatenate([x, beside.astype(x.dtype)], axis=-1), t, text)
