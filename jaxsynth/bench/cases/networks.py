"""The networks that are timed, with random weights: speed does not depend on what they learnt.

`tiny` has the shapes of the shipped 32x32 base, where the cost of starting operations counts;
`sd-shaped` is Stable Diffusion 2.x at half its width and on 32x32 latents, where products and
convolutions count; `sd21` is Stable Diffusion 2.1 itself, for accelerators. The transformers are
the small one of configs/diffscaler.py and two published sizes.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsynth.methods.tiny_base import config as tiny_networks
from jaxsynth.models.clip import CLIPTextConfig, CLIPTextModel
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.weights.hf import StableDiffusion
from jaxsynth.weights.layout import stored
from jaxsynth.weights.models import describe
from jaxsynth.weights.single_file.families import SCHEDULE
from jaxsynth.weights.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Networks:
    """Hugging Face configurations of one pipeline."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]


def tiny() -> Networks:
    """The shipped base: 8x8 latents, 16 tokens."""
    config = tiny_networks.Config()
    return Networks(
        unet=tiny_networks.unet_config(config),
        vae=tiny_networks.vae_config(config),
        text_encoder=tiny_networks.clip_config(config)["text_config"],
        scheduler=tiny_networks.SCHEDULER_CONFIG,
    )


def sd_shaped() -> Networks:
    """Stable Diffusion 2.x at half its width, 32x32 latents, 77 tokens and a short text encoder."""
    width, vocab = 512, 1024
    return Networks(
        unet={
            "sample_size": 32,
            "block_out_channels": (160, 320, 640, 640),
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": width,
            "use_linear_projection": True,
        },
        vae={
            "block_out_channels": (64, 128, 256, 256),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "sample_size": 256,
        },
        text_encoder={
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "gelu",
            "bos_token_id": vocab - 2,
            "eos_token_id": vocab - 1,
            "projection_dim": width,
        },
        scheduler={
            "_class_name": "DDIMScheduler",
            **SCHEDULE,
            "prediction_type": "epsilon",
        },
    )


def sd21() -> Networks:
    """Stable Diffusion 2.1 at 512 pixels: 866M parameters of the UNet, 340M of the text encoder."""
    half = sd_shaped()
    width, vocab = 1024, 49408
    return Networks(
        unet=half.unet
        | {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": width,
        },
        vae=half.vae | {"block_out_channels": (128, 256, 512, 512), "sample_size": 512},
        text_encoder=half.text_encoder
        | {
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "bos_token_id": vocab - 2,
            "eos_token_id": vocab - 1,
            "projection_dim": 512,
        },
        scheduler=half.scheduler,
    )


NETWORKS = {"tiny": tiny, "sd-shaped": sd_shaped, "sd21": sd21}


def tiny_dit() -> DiTConfig:
    """The transformer of configs/diffscaler.py: 8x8x4 latents, 16 tokens."""
    return DiTConfig(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        sample_size=8,
        out_channels=8,
        num_embeds_ada_norm=20,
        norm_eps=1e-6,
    )


# 32x32x4 latents, 256 tokens; with the timestep's frequencies of diffusers.
DITS = {
    "tiny": tiny_dit,
    "dit-s2": lambda: DiTConfig.preset("DiT-S/2", freq_shift=1),
    "dit-b2": lambda: DiTConfig.preset("DiT-B/2", freq_shift=1),
}


def random_pipeline(networks: Networks, seed: int = 0, dtype: str = "float32") -> StableDiffusion:
    """The pipeline with random weights, and a tokenizer trained on a few words.

    It computes in `dtype`, in which its weights are stored too, those of norms excepted.
    """
    generator = np.random.default_rng(seed)
    text_config = CLIPTextConfig.from_dict(networks.text_encoder)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(
            ["a photo of a cat"],
            text_config.vocab_size,
            text_config.max_position_embeddings,
            Path(folder),
        )
    return StableDiffusion(
        unet=random_network(
            UNet2DCondition, UNet2DConditionConfig.from_dict(networks.unet), generator, dtype
        ),
        vae=random_network(
            AutoencoderKL, AutoencoderKLConfig.from_dict(networks.vae), generator, dtype
        ),
        text_encoder=random_network(CLIPTextModel, text_config, generator, dtype),
        tokenizer=tokenizer,
        scheduler_config=networks.scheduler,
    )


def random_dit(config: DiTConfig, seed: int = 0) -> DiT:
    """The transformer with random weights."""
    return random_network(DiT, config, np.random.default_rng(seed))


def random_network(
    model_cls, config, generator: np.random.Generator | int = 0, dtype: str = "float32"
) -> Any:
    """A network whose activations keep their size from layer to layer, with no zero bias."""
    generator = np.random.default_rng(generator)
    graphdef, state = nnx.split(describe(model_cls, config, jax.numpy.dtype(dtype)))
    stacked = getattr(model_cls, "stacked", ())

    def fill(path, variable) -> nnx.Variable:
        shape = variable.shape
        noise = generator.standard_normal(shape, np.float32)
        if path[-1] == "kernel":
            noise /= np.sqrt(np.prod(shape[path[0] in stacked : -1]))
        elif path[-1] == "scale":
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.1
        return variable.replace(jax.numpy.asarray(noise, np.float32))

    filled = [(path, fill(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, stored(nnx.from_flat_state(filled), dtype))
