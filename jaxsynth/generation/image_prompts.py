"""Images as prompts beside the text: IP-Adapters put into the networks of a generator.

Their tokens end the states of each prompt; those of no image end the states that guidance leads
away from, as in diffusers' pipelines (`models.diffusion.image_prompt`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsynth.adapters.layer import first_match
from jaxsynth.core.errors import UserError, shown
from jaxsynth.models.diffusion.image_prompt import (
    ImageAdapter,
    ImagePrompted,
    Resampler,
    attention_places,
    with_image_prompts,
)
from jaxsynth.models.diffusion.text_to_image import TextCondition, TextToImage
from jaxsynth.weights.image_encoder import ImageEncoder


@dataclass(frozen=True)
class ImagePrompt:
    """An adapter and the images that it prompts by, the same number for each text prompt.

    `features` (prompts, images, ...) are the image encoder's, `absent` (...) those of no image.
    `scale` is one for all cross-attentions, or by pattern of their paths ("up_blocks.1"; those of
    no pattern are at 0). `mask` (h, w) in [0, 1] says where in the picture the images count.
    """

    adapter: ImageAdapter
    features: Float[np.ndarray, "p k ..."]
    absent: Float[np.ndarray, "..."]
    scale: float | Mapping[str, float] = 1.0
    mask: Float[np.ndarray, "h w"] | None = None

    @property
    def tokens(self) -> int:
        """How many end the states of a text."""
        return self.features.shape[1] * self.adapter.projection.config.tokens

    def scale_at(self, path: str) -> float:
        """The scale of a cross-attention."""
        if isinstance(self.scale, Mapping):
            return first_match({f"{part}.*": x for part, x in self.scale.items()}, path, 0.0)
        return self.scale


def prompt_of(
    adapter: ImageAdapter,
    encoder: ImageEncoder,
    images: Sequence[Sequence[np.ndarray]],
    *,
    scale: float | Mapping[str, float] = 1.0,
    mask: Float[np.ndarray, "h w"] | None = None,
    name: str = "the adapter",
) -> ImagePrompt:
    """The prompt of `images[p]`, uint8 (h, w, 3) each, at text prompt p.

    UserError naming the adapter for an encoder of another width.
    """
    of_patches = isinstance(adapter.projection, Resampler)
    found, expected = encoder.features(of_patches), adapter.projection.config.features
    if found != expected:
        what = "states of patches" if of_patches else "projected features"
        raise UserError(
            f"{name}: reads {what} of {expected} numbers, and the image encoder makes {found}; "
            "give the one that it was trained with"
        )
    rows = encoder([image for own in images for image in own], of_patches=of_patches)
    features = rows[1:].reshape(len(images), -1, *rows.shape[1:])
    return ImagePrompt(adapter, features, rows[0], scale, mask)


def prompted(model: TextToImage, prompts: Sequence[ImagePrompt]) -> ImagePrompted:
    """The networks with the adapters of the prompts.

    UserError for a scale of a place that this base has not.
    """
    paths = list(attention_places(model.unet))
    for prompt in prompts:
        parts = prompt.scale if isinstance(prompt.scale, Mapping) else ()
        for part in parts:
            if not any(first_match({f"{part}.*": True}, path, False) for path in paths):
                raise UserError(
                    f"scale: {shown(part)} is no part with cross-attentions here, expected one of "
                    f"{', '.join(sorted({path.rpartition('.transformer')[0] for path in paths}))}"
                )
    return with_image_prompts(
        model,
        [prompt.adapter for prompt in prompts],
        images=[prompt.features.shape[1] for prompt in prompts],
        scales=[prompt.scale_at for prompt in prompts],
        masks=[None if p.mask is None else jnp.asarray(p.mask, jnp.float32) for p in prompts],
    )


def with_tokens(
    texts: tuple[TextCondition, TextCondition], prompts: Sequence[ImagePrompt]
) -> tuple[TextCondition, TextCondition]:
    """What texts and negative texts say, their states followed by the tokens of all prompts."""
    positive, negative = texts
    texts_count = len(positive.states)
    for prompt in prompts:
        count, images = prompt.features.shape[:2]
        if count != texts_count:
            raise ValueError(f"images for {count} prompts, expected {texts_count}")
        flat = prompt.features.reshape(count * images, *prompt.features.shape[2:])
        tokens = _project(prompt.adapter.projection, np.concatenate([prompt.absent[None], flat]))
        own = tokens[1:].reshape(count, -1, tokens.shape[-1])
        none = jnp.tile(tokens[:1], (count, images, 1))
        positive, negative = positive.followed_by(own), negative.followed_by(none)
    return positive, negative


@jax.jit
def _project(projection, features: Array) -> Array:
    return projection(features)
