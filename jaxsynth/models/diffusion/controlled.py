"""Denoisers that follow a condition image: beside a ControlNet, or by further input channels."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models.diffusion.controlnet import ControlNet
from jaxsynth.models.diffusion.unet import UNet2DCondition
from jaxsynth.ops.space_to_depth import space_to_depth


class ByControlNet(nnx.Module):
    """A denoiser steered by the residuals of a ControlNet."""

    def __init__(self, unet: UNet2DCondition, controlnet: ControlNet):
        self.unet = unet
        self.controlnet = controlnet

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        text: Float[Array, "b n d"],
        condition: Float[Array, "b h2 w2 k"],
        *,
        remat: str | None = None,
    ) -> Float[Array, "b h w c"]:
        """The denoiser's prediction; `condition` is in [0, 1] and of the size of the pixels."""
        control = self.controlnet(x, t, text, condition, remat=remat)
        return self.unet(
            x,
            t,
            text,
            down_block_additional_residuals=control.down_block_res_samples,
            mid_block_additional_residual=control.mid_block_res_sample,
            remat=remat,
        )


class ByAdapters(nnx.Module):
    """A denoiser that reads the condition beside the noisy latents."""

    def __init__(self, unet: UNet2DCondition, downscale: int):
        self.unet = unet
        self.downscale = downscale

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        text: Float[Array, "b n d"],
        condition: Float[Array, "b h2 w2 k"],
        *,
        remat: str | None = None,
    ) -> Float[Array, "b h w c"]:
        """The denoiser's prediction; `condition` is in [0, 1] and of the size of the pixels."""
        small = space_to_depth(condition, self.downscale).astype(x.dtype)
        return self.unet(jnp.concatenate([x, small], axis=-1), t, text, remat=remat)


Controlled = ByControlNet | ByAdapters
