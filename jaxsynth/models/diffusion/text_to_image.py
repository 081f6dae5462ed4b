"""The networks of a text-to-image pipeline that fine-tuning adapts, as one module.

Stable Diffusion 1 and 2 have one text encoder, whose last states the denoiser attends to. SDXL
(Podell et al. 2023, arXiv 2307.01952, section 2.1) has two, whose states before their last layers
are joined, and the denoiser also reads the pooled text of the second, and sizes (section 2.2).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxsynth.models.diffusion.unet import UNet2DCondition


class TextCondition(NamedTuple):
    """What a denoiser is told, a row for each text or image.

    `states` (n, t, d) are what it attends to. SDXL's also reads `pooled` (n, p), and `sizes` (n, 6)
    in pixels: height and width of the original image, the top and left of the crop, height and
    width of the crop. They are None for others.
    """

    states: Any
    pooled: Any = None
    sizes: Any = None

    def take(self, rows: Any) -> "TextCondition":
        """The condition at these rows."""
        return jax.tree.map(lambda x: x[rows], self)

    def where(self, given: Any) -> "TextCondition":
        """With zeros for the texts of the rows that are not `given` (n,), booleans."""

        def kept(x: Any) -> Any:
            return x * jnp.asarray(given, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))

        return self._replace(states=kept(self.states), pooled=jax.tree.map(kept, self.pooled))

    def sized(self, sizes: Any) -> "TextCondition":
        """With sizes (n, 6), or the same (6,) for all; a denoiser that reads none gets none."""
        if self.pooled is None:
            return self
        return self._replace(sizes=jnp.broadcast_to(sizes, (self.pooled.shape[0], 6)))

    def followed_by(self, tokens: Any) -> "TextCondition":
        """With further states (n, k, d) at the end, as those of images that prompt."""
        tokens = jnp.asarray(tokens, self.states.dtype)
        return self._replace(states=jnp.concatenate([self.states, tokens], axis=1))

    def without_last(self, tokens: int) -> "TextCondition":
        """Without so many states at the end."""
        return self._replace(states=self.states[:, : self.states.shape[1] - tokens])

    def part(self, start: int, stop: int | None) -> "TextCondition":
        """With the states from `start` to `stop` alone; negative numbers count from the end."""
        return self._replace(states=self.states[:, start:stop])

    def inputs(self) -> dict[str, Any]:
        """The arguments of the denoiser, by their names."""
        more = {} if self.pooled is None else {"text_embeds": self.pooled, "time_ids": self.sizes}
        return {"encoder_hidden_states": self.states, **more}


class TextToImage(nnx.Module):
    """The networks that fine-tuning adapts.

    Paths start with "unet.", "text_encoder." and, in SDXL, "text_encoder_2.".
    """

    def __init__(
        self,
        unet: UNet2DCondition,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
    ):
        self.unet = unet
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def encode(self, ids: Int[Array, "n *e t"]) -> TextCondition:
        """The texts' condition, without sizes; `ids` are (n, 2, t) for two text encoders."""
        return _encode(self.text_encoder, self.text_encoder_2, ids)

    def denoise(
        self,
        x: Float[Array, "b *f h w c"],
        t: Int[Array, " b"] | Float[Array, " b"],
        text: TextCondition,
        *,
        remat: str | None = None,
        **residuals: Any,
    ) -> Float[Array, "b *f h w o"]:
        """The denoiser's output for noisy latents; `residuals` are those of ControlNets.

        A denoiser of clips (`motion.OfClips`) takes the latents of f frames each.
        """
        return self.unet(x, t, **text.inputs(), remat=remat, **residuals)


def whole_image(size: tuple[int, int]) -> Float[np.ndarray, "6"]:
    """The sizes of an image of `size` (height, width) that nothing was cut from."""
    return np.asarray([*size, 0, 0, *size], np.float32)


def encode_texts(model: TextToImage, ids: Int[Array, "n *e t"]) -> TextCondition:
    """What the model's denoiser is told by texts; compiled once for each shape of `ids`."""
    # The denoiser stays out, so that one program serves whatever adapters are in it.
    return _encode_jit(model.text_encoder, model.text_encoder_2, ids)


def _encode(
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection | None,
    ids: Int[Array, "n *e t"],
) -> TextCondition:
    if text_encoder_2 is None:
        return TextCondition(text_encoder(ids).last_hidden_state)
    first, second = text_encoder(ids[:, 0]), text_encoder_2(ids[:, 1])
    states = [first.hidden_states[-2], second.hidden_states[-2]]
    return TextCondition(jnp.concatenate(states, axis=-1), second.text_embeds)


_encode_jit = jax.jit(_encode)


@jax.jit
def encode_text(text_encoder: CLIPTextModel, ids: Int[Array, "n t"]) -> Float[Array, "n t d"]:
    """The states that the denoiser attends to; compiled once for each shape of `ids`."""
    return text_encoder(ids).last_hidden_state
