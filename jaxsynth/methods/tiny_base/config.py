"""The shapes of the shipped `tiny` networks and everything that decides their training.

Four latent tokens a side, few channels and 8-pixel patches: a step takes a tenth of a second or two
on one CPU core. Configurations are those of the Hugging Face folders.
"""

from dataclasses import dataclass, field
from typing import Annotated

from jaxsynth.core.limits import (
    BelowOne,
    Count,
    Natural,
    NotNegative,
    OneOf,
    Positive,
    Seed,
    Share,
    Some,
)
from jaxsynth.data.dataset import DataConfig
from jaxsynth.training.config import SCHEDULES, TrainingConfig, aside
from jaxsynth.training.sharding import MeshConfig

PHOTO_TEMPLATES = ("a photo of a {}", "a photo of a {}", "a small photo of a {}", "a {}")
# OpenAI CLIP's own statistics; any fixed pair would do for a model trained from scratch.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CorpusConfig:
    """What the base sees: photos of `photos.class_names` only, printed digits, shapes."""

    photos: DataConfig = field(default_factory=DataConfig)
    digits: Natural = 30_000
    shapes: Natural = 10_000
    image_size: Count = 32


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """How one network is trained from scratch."""

    steps: Natural = 10_000
    batch_size: Count = 64
    learning_rate: NotNegative = 1e-3
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    warmup_steps: Natural = 500
    weight_decay: NotNegative = 0.01
    clip_norm: NotNegative = 1.0
    ema_decay: BelowOne = 0.999
    log_every: Count = aside(100)


@dataclass(frozen=True)
class Config:
    """Everything that decides the shipped weights."""

    method: str = "tiny_base"
    seed: Seed = 0
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    vocab_size: Count = 1024
    max_length: Count = 16
    width: Count = 128
    vision_layers: Count = 6
    text_layers: Count = 3
    patch_size: Count = 8
    clip: PretrainConfig = field(default_factory=PretrainConfig)
    vae_channels: Annotated[tuple[Count, ...], Some()] = (16, 32, 64)
    latent_channels: Count = 4
    kl_weight: NotNegative = 1e-3
    vae: PretrainConfig = field(default_factory=PretrainConfig)
    unet_channels: Annotated[tuple[Count, ...], Some()] = (64, 128)
    unet_heads: Count = 4
    unet: PretrainConfig = field(default_factory=PretrainConfig)
    caption_dropout: Share = 0.1
    snr_gamma: Positive = 5.0
    # Of the sheet of samples: images of each prompt.
    preview_images: Count = 10
    preview_steps: Count = 25
    mesh: MeshConfig = field(default_factory=MeshConfig)


def clip_config(config: Config) -> dict:
    """The tiny CLIP's `config.json`."""
    width = config.width
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "logit_scale_init_value": 2.6592,
        "text_config": tower
        | {
            "model_type": "clip_text_model",
            "num_hidden_layers": config.text_layers,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_length,
            "bos_token_id": config.vocab_size - 2,
            "eos_token_id": config.vocab_size - 1,
            "pad_token_id": config.vocab_size - 1,
            "projection_dim": width,
        },
        "vision_config": tower
        | {
            "model_type": "clip_vision_model",
            "num_hidden_layers": config.vision_layers,
            "image_size": config.corpus.image_size,
            "patch_size": config.patch_size,
            "num_channels": 3,
            "projection_dim": width,
        },
    }


def vae_config(config: Config, scaling_factor: float = 1.0) -> dict:
    """The tiny autoencoder's `config.json`; each level but the last halves the picture."""
    levels = len(config.vae_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.vae_channels),
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": 8,
        "sample_size": config.corpus.image_size,
        "scaling_factor": scaling_factor,
    }


def unet_config(config: Config) -> dict:
    """The tiny UNet's `config.json`: cross-attention on every level."""
    levels = len(config.unet_channels)
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.corpus.image_size // 2 ** (len(config.vae_channels) - 1),
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D"] * levels,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D"] * levels,
        "only_cross_attention": False,
        "block_out_channels": list(config.unet_channels),
        "layers_per_block": 1,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": 16,
        "norm_eps": 1e-5,
        "cross_attention_dim": config.width,
        "attention_head_dim": config.unet_heads,
        "use_linear_projection": True,
    }


SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}

PREVIEW_PROMPTS = (
    *(f"a photo of the digit {name}" for name in ("zero", "three", "five", "seven")),
    "a photo of a red star",
    "a photo of a blue circle",
    "a photo of a dog",
    "a photo of a horse",
    "a photo of a truck",
    "a photo of an airplane",
)

CARD = """\
# tiny

A Stable Diffusion (VAE, text encoder, UNet) and a CLIP (`clip/`) for 32x32 images, small enough for
two CPU cores. It exists to try and to test jaxsynth; it knows little of the world.

Trained from scratch by `configs/tiny_base.py`, without any other weights, on
- photos of CIFAR-10 (Krizhevsky, 2009; training part), these classes only: {classes};
- {digits} printed digits in the fonts that matplotlib ships, no handwriting;
- {shapes} coloured shapes.

automobile, bird, deer and ship of CIFAR-10 were left out: they are unseen few-shot targets.

| network | steps | batch | learning rate | over the last steps |
|---|---|---|---|---|
{rows}

The text encoder is the CLIP's text tower. The UNet predicts v under a cosine schedule; weights are
exponential averages, stored in float16.
"""
