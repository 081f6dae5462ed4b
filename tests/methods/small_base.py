"""A Stable Diffusion and a CLIP of random weights, small enough to compile in seconds."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxsynth.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.tasks.networks import NetworkConfig
from jaxsynth.weights.hf import Clip, StableDiffusion, save_clip, save_pipeline
from jaxsynth.weights.models import describe
from jaxsynth.weights.networks.classifiers import Classifier, save_classifier
from jaxsynth.weights.pipeline_parts import TokenizerPair
from jaxsynth.weights.preprocessing import Preprocessing
from jaxsynth.weights.tokenizer import Tokenizer, train_tokenizer

VOCAB, LENGTH, WIDTH = 560, 12, 16
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": VOCAB - 2,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": VOCAB - 1,
    "projection_dim": WIDTH,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
UNET = {
    "sample_size": 4,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}
# With a block without attention and a change of size, where these matter.
DEEPER = UNET | {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 8,
    "scaling_factor": 0.5,
}
# SDXL's, small: encoders of two widths with more than one layer, of which the last is not read.
XL_TEXT = TEXT | {"num_hidden_layers": 2}
XL_TEXT_2 = XL_TEXT | {
    "hidden_size": 24,
    "intermediate_size": 32,
    "hidden_act": "gelu",
    "num_attention_heads": 3,
    "pad_token_id": 0,
    "projection_dim": 10,
}
XL_UNET = DEEPER | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 16 + 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def random_network(model_cls, config, seed: int) -> nnx.Module:
    """Every value random and of a size that keeps signals at their own."""
    generator = np.random.default_rng(seed)
    graphdef, state = nnx.split(describe(model_cls, config))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        shape = variable.shape
        noise = generator.standard_normal(shape).astype(np.float32)
        if path[-1] in ("kernel", "embedding"):
            fan_in = np.prod(shape[:-1]) if path[-1] == "kernel" else 1
            value = noise / np.sqrt(fan_in)
        elif path[-1] == "logit_scale":
            value = np.float32(2.0)
        else:
            value = 0.1 * noise + (path[-1] == "scale")
        flat.append((path, variable.replace(jax.device_put(value.astype(np.float32)))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def write_base(folder: Path, unet: dict = UNET) -> Path:
    """A pipeline's folder with the CLIP in `clip/`, like the shipped `tiny`."""
    captions = [f"a photo of the digit {name}" for name in DIGITS] * 2
    tokenizer = train_tokenizer(captions, VOCAB, LENGTH, folder / "words")
    clip_config = {"text_config": TEXT, "vision_config": VISION, "projection_dim": WIDTH}
    pipeline = StableDiffusion(
        unet=random_network(UNet2DCondition, UNet2DConditionConfig.from_dict(unet), 1),
        vae=random_network(AutoencoderKL, AutoencoderKLConfig.from_dict(VAE), 2),
        text_encoder=random_network(CLIPTextModel, CLIPTextConfig.from_dict(TEXT), 3),
        tokenizer=tokenizer,
        scheduler_config=SCHEDULER,
    )
    save_pipeline(pipeline, folder)
    model = random_network(CLIPModel, CLIPConfig.from_dict(clip_config), 4)
    save_clip(Clip(model, tokenizer, VISION["image_size"]), folder / "clip")
    return folder


def write_sdxl(folder: Path) -> Path:
    """The folder of an SDXL of random weights."""
    captions = [f"a photo of the digit {name}" for name in DIGITS] * 2
    first = train_tokenizer(captions, VOCAB, LENGTH, folder / "words")
    second = Tokenizer(folder / "words", pad_token="!")
    text_2 = CLIPTextConfig.from_dict(XL_TEXT_2)
    pipeline = StableDiffusion(
        unet=random_network(UNet2DCondition, UNet2DConditionConfig.from_dict(XL_UNET), 1),
        vae=random_network(AutoencoderKL, AutoencoderKLConfig.from_dict(VAE), 2),
        text_encoder=random_network(CLIPTextModel, CLIPTextConfig.from_dict(XL_TEXT), 3),
        tokenizer=TokenizerPair(first, second),
        scheduler_config=SCHEDULER,
        text_encoder_2=random_network(CLIPTextModelWithProjection, text_2, 4),
        zeroes_empty=True,
    )
    save_pipeline(pipeline, folder)
    return folder


def write_classifier(folder: Path) -> Path:
    """The folder of a residual network of random weights, of images of 16 pixels."""
    network = NetworkConfig("resnet", image_size=16, width=4, depths=(1,))
    seen = Preprocessing(16, 16, False, "bicubic", network.mean, network.std, "floor")
    save_classifier(Classifier(network.make(2, jax.random.key(0)), seen), folder)
    return folder
