"""A text-to-image pipeline and its parts: which there are, and whether they fit together.

Stable Diffusion 1 and 2 have one text encoder, SDXL has two (arXiv 2307.01952, section 2.1).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxsynth.core.documents import take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.models.clip import (
    LEGACY_EOS,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.models.siglip import SiglipTextConfig
from jaxsynth.weights.text_tokenizer import TextTokenizer
from jaxsynth.weights.tokenizer import Tokenizer

# Each network's class and its config's.
SINGLE: dict[str, tuple[type, type]] = {
    "unet": (UNet2DCondition, UNet2DConditionConfig),
    "vae": (AutoencoderKL, AutoencoderKLConfig),
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
}
DOUBLE = {**SINGLE, "text_encoder_2": (CLIPTextModelWithProjection, CLIPTextConfig)}

# model_index.json of the pipelines that differ only in what surrounds the networks: those of one
# text encoder, and SDXL's.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
TEXT_TO_IMAGE = (*PIPELINES, *XL_PIPELINES)
# Those whose denoisers read beside the noisy latents an image's, or a mask and an image's; SDXL's
# are the last of each.
EDITING = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")
INPAINTING = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
KINDS = (*TEXT_TO_IMAGE, *EDITING, *INPAINTING)
REFINER = (
    "is SDXL's refiner, which goes on with the images of a base; expected a base, such as "
    "stabilityai/stable-diffusion-xl-base-1.0"
)
DIFFUSERS_VERSION = "0.40.0"
# SDXL's sizes: of the original image, of its crop's corner, of the crop.
_SIZES = 6


class TokenizerPair:
    """SDXL's two tokenizers, which differ in what they fill texts up with."""

    def __init__(self, first: Tokenizer, second: Tokenizer):
        self.first, self.second = first, second

    @property
    def each(self) -> tuple[Tokenizer, Tokenizer]:
        return self.first, self.second

    @property
    def shape(self) -> tuple[int, int]:
        """Of a text's ids."""
        return 2, self.first.max_length

    @property
    def vocab_size(self) -> int:
        return self.first.vocab_size

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "b 2 t"]:
        """Ids (b, 2, max_length) int32, for the first text encoder and for the second."""
        return np.stack([self.first(texts), self.second(texts)], axis=1)

    def with_word(self, word: str, vectors: int = 1) -> "TokenizerPair":
        """A copy with a new word in both; UserError as `Tokenizer.with_word`."""
        return TokenizerPair(*(one.with_word(word, vectors) for one in self.each))


Tokenizing = Tokenizer | TokenizerPair


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """A latent diffusion pipeline; `digest` is the sha256 of its files, "" if not loaded.

    SDXL has a second text encoder, and a tokenizer for both; with `zeroes_empty` zeros stand for a
    negative prompt that is empty. `size` is the side in pixels of the images that are learned and
    drawn, 0 for that which the denoiser was trained on.
    """

    unet: UNet2DCondition
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Tokenizing
    scheduler_config: dict[str, Any]
    folder: Path | None = None
    digest: str = ""
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zeroes_empty: bool = False
    size: int = 0

    @property
    def image_size(self) -> int:
        """The side in pixels of the images that are learned and drawn."""
        return self.size or self.unet.config.sample_size * self.vae.config.downscale

    def sized(self, side: int) -> "StableDiffusion":
        """The pipeline for images of this side in pixels, 0 for that of the denoiser."""
        return dataclasses.replace(self, size=side)

    @property
    def networks(self) -> TextToImage:
        """The networks that fine-tuning adapts, as one module."""
        return TextToImage(self.unet, self.text_encoder, self.text_encoder_2)

    def with_networks(self, model: TextToImage) -> "StableDiffusion":
        """The pipeline with these in their place."""
        own = {name: getattr(model, name) for name in self.adaptable}
        return dataclasses.replace(self, **own)

    @property
    def adaptable(self) -> dict[str, nnx.Module]:
        """The same by name: "unet", "text_encoder" and, in SDXL, "text_encoder_2"."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"unet": self.unet, "text_encoder": self.text_encoder, **second}

    def given(self, texts: Sequence[str]) -> np.ndarray:
        """Which texts count where nothing is to be said; the others are zeros (`zeroes_empty`)."""
        return np.asarray([bool(text) or not self.zeroes_empty for text in texts])


def kind_of(unet: UNet2DCondition, vae: AutoencoderKL) -> str:
    """The pipeline that a denoiser is for, by what it reads; one of `KINDS`."""
    double, latent = unet.config.addition_embed_type is not None, vae.config.latent_channels
    further = {2 * latent: EDITING[double], 2 * latent + 1: INPAINTING[double]}
    plain = XL_PIPELINES if double else PIPELINES
    return further.get(unet.config.in_channels, plain[0])


def is_xl(kind: Any) -> bool:
    """Whether a pipeline's class is one of SDXL's."""
    return str(kind).startswith("StableDiffusionXL")


def check_texts(where: Path, double: bool, kinds: Sequence[str]) -> None:
    """UserError naming a base to take where this is SDXL, and none of `kinds` is."""
    if double and not any(map(is_xl, kinds)):
        raise UserError(
            f"{where}: is SDXL, with two text encoders; expected a base with one here, such as "
            "Stable Diffusion 1.5 or 2.1"
        )


def parts_in(
    folder: Path, index: Mapping[str, Any], kinds: Sequence[str]
) -> dict[str, tuple[type, type]]:
    """The networks of a folder whose model_index.json is `index`: class and config's by part.

    UserError naming what it is a pipeline of where that is none of `kinds`, and a base to take
    where it is one of SDXL.
    """
    kind, where = index.get("_class_name"), folder / "model_index.json"
    check_texts(where, is_xl(kind), kinds)
    if kind not in kinds:
        raise UserError(f"{where}: _class_name {quoted(kind)}, expected one of {tuple(kinds)}")
    if not is_xl(kind):
        return SINGLE
    if index.get("text_encoder", (None,))[-1] is None or index.get("requires_aesthetics_score"):
        raise UserError(f"{where}: {REFINER}")
    if index.get("is_cosxl_edit"):
        raise UserError(
            f"{where}: is_cosxl_edit is true, of a network that was trained with the noise of EDM, "
            "from which nothing is drawn here; expected InstructPix2Pix of SDXL itself"
        )
    return DOUBLE


def is_double(parts: Mapping[str, Any]) -> bool:
    return "text_encoder_2" in parts


def read_tokenizer(folder: Path, parts: Mapping[str, Any]) -> Tokenizing:
    """The tokenizer of a folder, or both; UserError naming a file or how they differ."""
    first = Tokenizer(folder / "tokenizer")
    if not is_double(parts):
        return first
    return paired(first, Tokenizer(folder / "tokenizer_2"), folder / "tokenizer_2")


def paired(first: Tokenizer, second: Tokenizer, where: Path) -> TokenizerPair:
    """SDXL's two, of which the second is of `where`; UserError naming it and how they differ."""
    for field in ("max_length", "vocab_size"):
        one, other = getattr(first, field), getattr(second, field)
        if one != other:
            raise UserError(
                f"{where}: {field} is {other}, expected that of the first tokenizer, {one}"
            )
    return TokenizerPair(first, second)


def zeroes_empty(folder: Path, index: Mapping[str, Any], parts: Mapping[str, Any]) -> bool:
    """Whether SDXL's pipeline takes zeros where no negative prompt is given."""
    if not is_double(parts):
        return False
    name, where = "force_zeros_for_empty_prompt", folder / "model_index.json"
    return take(index, name, bool, where, True)


def check_pipeline(
    folder: Path, networks: Mapping[str, Any], tokenizer: Tokenizing, kind: str
) -> None:
    """UserError naming `folder` and the fields by which networks do not fit together.

    `networks` by part, as `SINGLE` or `DOUBLE`, of a pipeline of one of `KINDS`.
    """
    unet, vae, text = (networks[part].config for part in SINGLE)
    latent = vae.latent_channels
    read = ("vae latent_channels", latent)
    if kind in EDITING:
        read = ("twice vae latent_channels", 2 * latent)
    elif kind in INPAINTING:
        read = ("twice vae latent_channels and one", 2 * latent + 1)
    width: tuple[str, int] = ("text_encoder hidden_size", text.hidden_size)
    if is_double(networks):
        second = networks["text_encoder_2"].config
        width = ("the sum of the text encoders' hidden_size", width[1] + second.hidden_size)
        _check_added(folder, unet, second)
    elif unet.addition_embed_type:
        raise UserError(
            f"{folder}: unet addition_embed_type is {unet.addition_embed_type!r}, as SDXL's, but "
            "there is one text encoder"
        )
    for field, other, expected in (
        ("cross_attention_dim", *width),
        ("in_channels", *read),
        ("out_channels", "vae latent_channels", latent),
    ):
        found = getattr(unet, field)
        if found != expected:
            raise UserError(f"{folder}: unet {field} is {found}, but {other} is {expected}")
    if not isinstance(tokenizer, TokenizerPair):
        check_tokenizer(folder, tokenizer, text)
        return
    second = networks["text_encoder_2"].config
    for one, config in ((tokenizer.first, text), (tokenizer.second, second)):
        check_tokenizer(folder, one, config)
    check_end(folder, tokenizer.second, second)


def _check_added(folder: Path, unet: UNet2DConditionConfig, second: CLIPTextConfig) -> None:
    if unet.addition_embed_type is None or unet.addition_time_embed_dim is None:
        raise UserError(
            f"{folder}: unet addition_embed_type is None, expected 'text_time' of SDXL's"
        )
    expected = second.projection_dim + _SIZES * unet.addition_time_embed_dim
    found = unet.projection_class_embeddings_input_dim
    if found != expected:
        raise UserError(
            f"{folder}: unet projection_class_embeddings_input_dim is {found}, but text_encoder_2 "
            f"projection_dim and {_SIZES} sizes make {expected}"
        )


def check_tokenizer(
    folder: Path,
    tokenizer: Tokenizer | TextTokenizer,
    config: CLIPTextConfig | SiglipTextConfig,
) -> None:
    """UserError for a tokenizer with more ids or longer texts than the text encoder reads."""
    for what, found, field in (
        ("ids", tokenizer.vocab_size, "vocab_size"),
        ("tokens a text", tokenizer.max_length, "max_position_embeddings"),
    ):
        limit = getattr(config, field)
        if found > limit:
            raise UserError(
                f"{folder}: the tokenizer gives {found} {what}, "
                f"but the text encoder's {field} is {limit}"
            )


def check_end(folder: Path, tokenizer: Tokenizer, config: CLIPTextConfig) -> None:
    """Pooling looks for the end of text by its id, and takes the first token if it is not there."""
    highest = tokenizer.vocab_size - 1
    expected = highest if config.eos_token_id == LEGACY_EOS else config.eos_token_id
    if tokenizer.eos_token_id != expected:
        raise UserError(
            f"{folder}: the tokenizer's end of text is {tokenizer.eos_token_id}, but the text "
            f"tower's eos_token_id {config.eos_token_id} looks for {expected}"
        )


def model_index(scheduler: str, kind: str, *, zeroes: bool) -> dict[str, Any]:
    """The content of model_index.json for a pipeline of one of `KINDS` and the scheduler's class.

    `zeroes` is SDXL's `force_zeros_for_empty_prompt`.
    """
    index: dict[str, Any] = {
        "_class_name": kind,
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not is_xl(kind):
        return index | {"requires_safety_checker": False, "safety_checker": [None, None]}
    index |= {
        "force_zeros_for_empty_prompt": zeroes,
        "image_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    # The pipeline that edits has no images that prompt.
    without = ("feature_extractor", "image_encoder") if kind in EDITING else ()
    return {name: value for name, value in index.items() if name not in without}
