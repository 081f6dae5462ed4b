"""ControlNets beside a generator's denoiser, each with a condition image for every prompt.

They read the text and not the tokens of images that prompt beside it, as in diffusers' pipelines,
or the tokens of one such prompt alone, as InstantID's IdentityNet (arXiv 2401.07519) those of a
face. Their residuals are added up, each at its scale. In guess mode (Zhang et al. 2023, arXiv
2302.05543) only the branch with the prompt gets residuals, which grow towards the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree, UInt8

from jaxsynth.core.errors import UserError
from jaxsynth.data.conditions import as_fractions
from jaxsynth.generation.conditioners import Rows, Text
from jaxsynth.models.diffusion.controlnet import ControlNet
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.diffusion.unet import UNet2DCondition
from jaxsynth.models.diffusion.vae import AutoencoderKL
from jaxsynth.training import sharding

# What a ControlNet must have as its base has it.
_SHARED = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type")


@dataclass(frozen=True)
class Control:
    """A ControlNet, the condition of each prompt (uint8, or fractions) and its settings.

    `reads` is the number of the image prompt whose tokens it attends to instead of the text.
    """

    controlnet: ControlNet
    conditions: UInt8[np.ndarray, "p h w k"] | Float[np.ndarray, "p h w k"]
    scale: float = 1.0
    guess_mode: bool = False
    reads: int | None = None

    def check(
        self, unet: UNet2DCondition, size: tuple[int, int], *, name: str = "the ControlNet"
    ) -> None:
        """UserError for a ControlNet of another base, or conditions that it does not read."""
        for field in _SHARED:
            found, expected = (getattr(x.config, field) for x in (self.controlnet, unet))
            if found != expected:
                raise UserError(
                    f"{name}: {field} is {found}, and the base's {expected}: it is for another base"
                )
        expected = (*size, self.controlnet.config.conditioning_channels)
        if self.conditions.shape[1:] != expected:
            raise UserError(
                f"{name}: conditions of shape {self.conditions.shape[1:]}, expected {expected}"
            )


class WithControlNets(TextToImage):
    """The networks of a text-to-image pipeline and ControlNets."""

    def __init__(self, base: TextToImage, controlnets: Sequence[ControlNet]):
        super().__init__(base.unet, base.text_encoder, base.text_encoder_2)
        self.controlnets = nnx.List(controlnets)


class Setting(NamedTuple):
    """A ControlNet's scale, whether it guesses, and which of the last states it reads, if any.

    Those are a start and a stop that count from the end of the states; None reads the text.
    """

    scale: float
    guesses: bool
    tokens: tuple[int, int | None] | None


@dataclass(frozen=True)
class ControlledText(Text):
    """`Text` with ControlNets: `controls` are their settings.

    Further rows are "control0" and on, the conditions. The last `tokens` of the states are those of
    images that prompt. The model is a `WithControlNets`.
    """

    controls: tuple[Setting, ...] = ()
    tokens: int = 0
    table: ClassVar = (*sharding.CONTROLNET, *sharding.CLIP)

    def branches(self, tables: PyTree, rows: Rows, vae: AutoencoderKL) -> tuple[PyTree, ...]:
        negative, positive = super().branches(tables, rows, vae)
        seen = tuple(as_fractions(rows[row_of(i)]) for i in range(len(self.controls)))
        count = len(positive.states)
        return (negative, seen, jnp.zeros(count)), (positive, seen, jnp.ones(count))

    def denoise(self, model: Any, x: Array, t: Array, condition: PyTree) -> Array:
        text, seen, prompted = condition
        total: list[Array] = []
        for net, own, condition in zip(model.controlnets, self.controls, seen, strict=True):
            told = text.without_last(self.tokens)
            if own.tokens is not None:
                told = text.part(*own.tokens)
            found = net(
                x, t, controlnet_cond=condition, conditioning_scale=own.scale,
                guess_mode=own.guesses, **told.inputs(),
            )  # fmt: skip
            parts = [*found.down_block_res_samples, found.mid_block_res_sample]
            if own.guesses:
                parts = [part * prompted[:, None, None, None].astype(part.dtype) for part in parts]
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return model.denoise(
            x,
            t,
            text,
            down_block_additional_residuals=total[:-1],
            mid_block_additional_residual=total[-1],
        )


def row_of(number: int) -> str:
    """The name of the rows of ControlNet `number`."""
    return f"control{number}"


def controlled(
    base: Text,
    controls: Sequence[Control],
    *,
    tokens: Sequence[int],
    pixels: tuple[int, int],
    unet: UNet2DCondition,
) -> ControlledText:
    """The conditioner of a base with ControlNets; UserError for one that does not go with them.

    `tokens` are the numbers of tokens of the image prompts.
    """
    if type(base) is not Text:
        what = "an InstantID" if controls[-1].reads is not None else "a ControlNet"
        raise UserError(f"{what} goes with a base of texts; this one reads images itself")
    for control in controls:
        control.check(unet, pixels)
    settings = tuple(
        Setting(control.scale, control.guess_mode, _span(control.reads, tokens))
        for control in controls
    )
    return ControlledText(base.guidance_scale, base.rescale, controls=settings, tokens=sum(tokens))


def _span(number: int | None, tokens: Sequence[int]) -> tuple[int, int | None] | None:
    """Where the tokens of an image prompt lie, counted from the end."""
    if number is None:
        return None
    after = sum(tokens[number + 1 :])
    return -(tokens[number] + after), -after or None


def control_rows(
    controls: Sequence[Control], labels: Int[np.ndarray, " b"]
) -> dict[str, np.ndarray]:
    """The conditions of a batch of images."""
    return {row_of(i): control.conditions[labels] for i, control in enumerate(controls)}
