"""Identities as prompts: tokens of a face beside the text, and a ControlNet that reads them alone.

InstantID (Wang et al. 2024, arXiv 2401.07519): a resampler makes tokens of the embedding that a
face recognition network gives of a face. The denoiser's cross-attentions read them beside the text
(`image_prompt`), and IdentityNet, a ControlNet that follows a picture of five points of the face,
attends to them in the place of the text. SDXL's also reads the pooled text and the sizes, as the
denoiser does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxsynth.models.diffusion.controlnet import ControlNet, embedding_channels
from jaxsynth.models.diffusion.image_prompt import (
    ImageAdapter,
    ImagePrompted,
    Resampler,
    ResamplerConfig,
    adapter_of,
    initial_adapter,
    with_image_prompts,
)
from jaxsynth.models.diffusion.text_to_image import TextCondition, TextToImage
from jaxsynth.models.diffusion.unet import UNet2DCondition


@dataclasses.dataclass(frozen=True)
class Identity:
    """An InstantID: the adapter, whose projection is a resampler of embeddings, and IdentityNet."""

    adapter: ImageAdapter
    net: ControlNet

    @property
    def width(self) -> int:
        """Numbers of the embedding of a face."""
        return self.adapter.projection.config.features


class IdentityPrompted(ImagePrompted):
    """The networks of a text-to-image pipeline and those of one InstantID.

    The states that `denoise` is given end in the identity's tokens.
    """

    def __init__(
        self,
        unet: UNet2DCondition,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection | None,
        projections: Sequence[Resampler],
        identity_net: ControlNet,
    ):
        super().__init__(unet, text_encoder, text_encoder_2, projections)
        self.identity_net = identity_net

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"] | Float[Array, " b"],
        encoder_hidden_states: Float[Array, "b s d"],
        condition: Float[Array, "b h2 w2 3"],
        *,
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Float[Array, "b k"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """`denoise`, told by the denoiser's own arguments."""
        text = TextCondition(encoder_hidden_states, text_embeds, time_ids)
        return self.denoise(x, t, text, condition=condition)

    def denoise(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"] | Float[Array, " b"],
        text: TextCondition,
        *,
        condition: Float[Array, "b h2 w2 3"],
        remat: str | None = None,
        **residuals: Any,
    ) -> Float[Array, "b h w o"]:
        """The denoiser's output; `condition` is the picture of the five points, in [0, 1]."""
        if residuals:
            raise TypeError(f"denoise: {sorted(residuals)} are IdentityNet's own here")
        tokens = self.image_projections[0].config.tokens
        told = text.part(-tokens, None).inputs()
        found = self.identity_net(x, t, controlnet_cond=condition, remat=remat, **told)
        return super().denoise(
            x,
            t,
            text,
            remat=remat,
            down_block_additional_residuals=found.down_block_res_samples,
            mid_block_additional_residual=found.mid_block_res_sample,
        )


def initial_identity(
    unet: UNet2DCondition, config: ResamplerConfig, downscale: int, *, rngs: nnx.Rngs
) -> Identity:
    """An untrained InstantID, which changes nothing by its IdentityNet.

    The kernels start as those of the text, IdentityNet as the denoiser's encoder with convolutions
    of zeros. `downscale` is how many pixels a latent has along one side.
    """
    projection = Resampler(config, dtype=unet.dtype, rngs=rngs)
    net = ControlNet.from_unet(
        unet, conditioning_embedding_out_channels=embedding_channels(downscale), rngs=rngs
    )
    return Identity(initial_adapter(unet, projection), net)


def with_identity(model: TextToImage, identity: Identity) -> IdentityPrompted:
    """The networks with an InstantID at scale 1, as it is trained."""
    prompted = with_image_prompts(model, [identity.adapter])
    return IdentityPrompted(
        prompted.unet,
        prompted.text_encoder,
        prompted.text_encoder_2,
        prompted.image_projections,
        identity.net,
    )


def identity_of(model: IdentityPrompted) -> Identity:
    """The InstantID of a model."""
    return Identity(adapter_of(model), model.identity_net)
