"""The two networks of a text-to-image pipeline that fine-tuning adapts, as one module."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models.clip import CLIPTextModel
from jaxsynth.models.diffusion.unet import UNet2DCondition


class TextToImage(nnx.Module):
    """The two networks that fine-tuning adapts: paths start with "unet." or "text_encoder."."""

    def __init__(self, unet: UNet2DCondition, text_encoder: CLIPTextModel):
        self.unet = unet
        self.text_encoder = text_encoder


@jax.jit
def encode_text(text_encoder: CLIPTextModel, ids: Int[Array, "n t"]) -> Float[Array, "n t d"]:
    """The states that the denoiser attends to; compiled once for each shape of `ids`."""
    return text_encoder(ids).last_hidden_state
