"""Every field of every network's configuration: it changes the network, or a reason is given.

A field that is accepted and read by nobody gives silently wrong outputs for the checkpoints that
set it. Each field is changed here, and then the parameters' shapes, the traced program or what it
refuses must differ.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.models import clip, siglip
from jaxsynth.models.classifiers import convnext, dinov2, resnet, swin, vit
from jaxsynth.models.classifiers import siglip as siglip_classifier
from jaxsynth.models.diffusion import controlnet, dit, unet, vae, weight_unet
from jaxsynth.models.gan import e2gan, patchgan, pix2pix
from jaxsynth.weights.models import describe


def shapes(*arrays: tuple[int, ...] | jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    return [
        x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(x, jnp.float32)
        for x in arrays
    ]


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and for each field another value; `unread` are the others, with reasons."""

    model: Callable[..., nnx.Module]
    config: Any
    inputs: list[jax.ShapeDtypeStruct]
    changes: dict[str, Any]
    unread: dict[str, str] = dataclasses.field(default_factory=dict)
    call: Callable[..., Any] = lambda model, *inputs: model(*inputs)


KIND = {"model_type": "names the kind of file; the class follows from it"}
ENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 5 + 6 * 2,
}
ENCODER_CHANGES = {
    "in_channels": 5,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "block_out_channels": (8, 32),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "act_fn": "gelu",
    "norm_num_groups": 2,
    "norm_eps": 1e-4,
    "cross_attention_dim": 7,
    "transformer_layers_per_block": 2,
    "attention_head_dim": 4,
    "use_linear_projection": True,
    "addition_embed_type": None,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 18,
}
# What the networks with "text_time" read besides: a pooled text and sizes.
ADDED = shapes((1, 5), (1, 6))
ENCODER_UNREAD = {"upcast_attention": "attention scores are always float32"}
TOWER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWER_CHANGES = {
    "hidden_size": 16,
    "intermediate_size": 13,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-4,
}
PROJECTION = {"projection_dim": "a vision tower alone is not projected; CLIPConfig's own counts"}
REFUSED = {"attention_dropout": "only 0 is accepted (test_clip, test_siglip)"}
VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
VIT_CHANGES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-3,
    "image_size": 16,
    "patch_size": 2,
    "num_channels": 4,
    "qkv_bias": False,
    "num_labels": 4,
}


def _with_added(model: nnx.Module, *inputs: Any) -> Any:
    *others, pooled, sizes = inputs
    return model(*others, text_embeds=pooled, time_ids=sizes)


TEXT, VISION = clip.CLIPTextConfig, clip.CLIPVisionConfig
CASES = {
    "AutoencoderKLConfig": Case(
        lambda config, dtype, rngs: vae.AutoencoderKL(config, dtype=jnp.bfloat16, rngs=rngs),
        vae.AutoencoderKLConfig(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        shapes((1, 8, 8, 3)),
        {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 2,
            "act_fn": "gelu",
            "latent_channels": 3,
            "norm_num_groups": 2,
            "scaling_factor": 0.5,
            "force_upcast": False,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
        },
        {
            "down_block_types": "one kind is implemented, others are refused (test_vae)",
            "up_block_types": "one kind is implemented, others are refused (test_vae)",
            "sample_size": "a note of the images that it was trained on",
        },
        # Callers scale.
        lambda model, x: model.decode(model.encode(x).mode() / model.config.scaling_factor),
    ),
    "UNet2DConditionConfig": Case(
        unet.UNet2DCondition,
        unet.UNet2DConditionConfig(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **ENCODER),
        [*shapes((1, 4, 4, 4)), integers(1), *shapes((1, 3, 6)), *ADDED],
        {
            **ENCODER_CHANGES,
            "out_channels": 5,
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "conv_in_kernel": 1,
            "conv_out_kernel": 1,
        },
        {**ENCODER_UNREAD, "sample_size": "the latents' size without another, for callers"},
        call=_with_added,
    ),
    "ControlNetConfig": Case(
        controlnet.ControlNet,
        controlnet.ControlNetConfig(conditioning_embedding_out_channels=(4, 8), **ENCODER),
        [*shapes((1, 4, 4, 4)), integers(1), *shapes((1, 3, 6), (1, 8, 8, 3)), *ADDED],
        {
            **ENCODER_CHANGES,
            "conditioning_channels": 4,
            "conditioning_embedding_out_channels": (4, 6),
        },
        ENCODER_UNREAD,
        call=_with_added,
    ),
    "DiTConfig": Case(
        dit.DiT,
        dit.DiTConfig(
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=2,
            sample_size=4,
            num_embeds_ada_norm=3,
        ),
        [*shapes((1, 4, 4, 4)), integers(1), integers(1)],
        {
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "in_channels": 5,
            "out_channels": 8,
            "num_layers": 3,
            "attention_bias": False,
            "sample_size": 8,
            "patch_size": 1,
            "num_embeds_ada_norm": 4,
            "norm_eps": 1e-3,
            "freq_shift": 0,
            "condition_channels": 1,
        },
    ),
    "WeightUNetConfig": Case(
        weight_unet.WeightUNet,
        weight_unet.WeightUNetConfig(
            sample_size=16,
            block_out_channels=(8, 8),
            attention_head_dim=4,
            cross_attention_dim=6,
            norm_num_groups=4,
        ),
        [*shapes((2, 16)), integers(2), integers(2), *shapes((2, 3, 6))],
        {
            "sample_size": 32,
            "patch_size": 2,
            "block_out_channels": (8, 16),
            "attention_head_dim": 8,
            "transformer_layers_per_block": 2,
            "cross_attention_dim": 5,
            "norm_num_groups": 2,
        },
    ),
    "CLIPTextConfig": Case(
        clip.CLIPTextModelWithProjection,
        TEXT(vocab_size=20, max_position_embeddings=6, eos_token_id=19, projection_dim=5, **TOWER),
        [integers(2, 6)],
        {
            **TOWER_CHANGES,
            "vocab_size": 21,
            "max_position_embeddings": 7,
            "eos_token_id": 18,
            "projection_dim": 6,
        },
        REFUSED,
    ),
    "CLIPVisionConfig": Case(
        clip.CLIPVisionModel,
        VISION(image_size=8, patch_size=4, **TOWER),
        shapes((2, 8, 8, 3)),
        {**TOWER_CHANGES, "num_channels": 4, "image_size": 16, "patch_size": 2},
        PROJECTION | REFUSED,
    ),
    "CLIPConfig": Case(
        clip.CLIPModel,
        clip.CLIPConfig(
            TEXT(vocab_size=20, max_position_embeddings=6, eos_token_id=19, **TOWER),
            VISION(image_size=8, patch_size=4, **TOWER),
            projection_dim=5,
        ),
        [integers(2, 6), *shapes((2, 8, 8, 3))],
        {
            "text_config": TEXT(
                vocab_size=20,
                max_position_embeddings=6,
                eos_token_id=19,
                **TOWER | {"hidden_size": 4},
            ),
            "vision_config": VISION(image_size=8, patch_size=4, **TOWER | {"hidden_size": 4}),
            "projection_dim": 6,
        },
        {"logit_scale_init_value": "an initial value (tested below)"},
        call=lambda model, ids, pixels: (model.encode_text(ids), model.encode_image(pixels)),
    ),
    "SiglipTextConfig": Case(
        siglip.SiglipTextModel,
        siglip.SiglipTextConfig(vocab_size=20, max_position_embeddings=6, **TOWER),
        [integers(2, 6)],
        {
            **TOWER_CHANGES,
            "vocab_size": 21,
            "max_position_embeddings": 7,
            "projection_size": 6,
        },
        REFUSED,
    ),
    "SiglipVisionConfig": Case(
        siglip.SiglipVisionModel,
        siglip.SiglipVisionConfig(image_size=8, patch_size=4, **TOWER),
        shapes((2, 8, 8, 3)),
        {
            **TOWER_CHANGES,
            "num_channels": 4,
            "image_size": 16,
            "patch_size": 2,
            "vision_use_head": False,
        },
        REFUSED,
    ),
    "SiglipConfig": Case(
        siglip.SiglipModel,
        siglip.SiglipConfig(
            siglip.SiglipTextConfig(vocab_size=20, max_position_embeddings=6, **TOWER),
            siglip.SiglipVisionConfig(image_size=8, patch_size=4, **TOWER),
        ),
        [integers(2, 6), *shapes((2, 8, 8, 3))],
        {
            "text_config": siglip.SiglipTextConfig(vocab_size=21, **TOWER),
            "vision_config": siglip.SiglipVisionConfig(image_size=8, patch_size=2, **TOWER),
        },
        call=lambda model, ids, pixels: (model.encode_text(ids), model.encode_image(pixels)),
    ),
    "SiglipClassifierConfig": Case(
        siglip_classifier.SiglipForImageClassification,
        siglip_classifier.SiglipClassifierConfig(image_size=8, patch_size=4, num_labels=3, **TOWER),
        shapes((1, 8, 8, 3)),
        {
            **TOWER_CHANGES,
            "num_channels": 4,
            "image_size": 16,
            "patch_size": 2,
            "vision_use_head": False,
            "num_labels": 4,
        },
        KIND | REFUSED,
    ),
    "ViTConfig": Case(
        vit.ViTForImageClassification,
        vit.ViTConfig(model_type="deit", intermediate_size=12, **VIT),
        shapes((1, 8, 8, 3)),
        {
            **VIT_CHANGES,
            "model_type": "vit",
            "intermediate_size": 13,
            "distilled": True,
            "layer_scale": True,
            "pre_norm": True,
        },
    ),
    "Dinov2Config": Case(
        dinov2.Dinov2ForImageClassification,
        dinov2.Dinov2Config(**VIT),
        shapes((1, 8, 8, 3)),
        {
            **VIT_CHANGES,
            "mlp_ratio": 2,
            "use_swiglu_ffn": True,
            "num_register_tokens": 2,
            "head_layers": 0,
        },
        KIND,
    ),
    "ResNetConfig": Case(
        resnet.ResNetForImageClassification,
        resnet.ResNetConfig(embedding_size=4, hidden_sizes=(16, 32), depths=(1, 2), num_labels=3),
        shapes((1, 16, 16, 3)),
        {
            "num_channels": 4,
            "embedding_size": 8,
            "hidden_sizes": (16, 48),
            "depths": (1, 1),
            "layer_type": "basic",
            "hidden_act": "gelu",
            "downsample_in_first_stage": True,
            "downsample_in_bottleneck": True,
            "num_labels": 4,
            "head_bias": False,
        },
        KIND,
    ),
    "ConvNextConfig": Case(
        convnext.ConvNextForImageClassification,
        convnext.ConvNextConfig(hidden_sizes=(4, 8), depths=(1, 1), num_labels=3),
        shapes((1, 16, 16, 3)),
        {
            "num_channels": 4,
            "patch_size": 2,
            "hidden_sizes": (4, 16),
            "depths": (1, 2),
            "hidden_act": "relu",
            "layer_norm_eps": 1e-3,
            "layer_scale_init_value": 0.0,
            "num_labels": 4,
        },
        KIND,
    ),
    "SwinConfig": Case(
        swin.SwinForImageClassification,
        swin.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=4,
            depths=(1, 2),
            num_heads=(1, 2),
            window_size=4,
            num_labels=3,
        ),
        shapes((1, 16, 16, 3)),
        {
            "image_size": 32,
            "patch_size": 1,
            "num_channels": 4,
            "embed_dim": 8,
            "depths": (2, 2),
            "num_heads": (2, 2),
            "window_size": 2,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
            "hidden_act": "relu",
            "layer_norm_eps": 1e-3,
            "num_labels": 4,
        },
        {**KIND, "use_absolute_embeddings": "only False is accepted (test_classifiers)"},
    ),
    "E2GANConfig": Case(
        e2gan.E2GAN,
        e2gan.E2GANConfig(widths=(4, 8), num_attention_heads=2, cross_attention_dim=6),
        shapes((1, 8, 8, 3), (1, 3, 6)),
        {
            "widths": (4, 16),
            "kernel_size": 3,
            "num_attention_heads": 4,
            "cross_attention_dim": 5,
            "in_channels": 4,
            "out_channels": 4,
        },
    ),
    "PatchGANConfig": Case(
        patchgan.PatchGAN,
        patchgan.PatchGANConfig(ndf=4),
        shapes((1, 32, 32, 3), (1, 32, 32, 3)),
        {"in_channels": 5, "ndf": 8, "n_layers": 2, "norm": "instance", "text_dim": 6},
    ),
    "Pix2PixConfig": Case(
        pix2pix.Pix2Pix,
        pix2pix.Pix2PixConfig(num_downs=6, ngf=4),
        shapes((1, 64, 64, 3)),
        {
            "num_downs": 5,
            "ngf": 8,
            "norm": "instance",
            "dropout": 0.1,
            "in_channels": 4,
            "out_channels": 4,
        },
        call=lambda model, x: model(x, key=jax.random.key(0)),
    ),
}


def parameters(model: nnx.Module) -> str:
    return str(jax.tree.map(lambda x: x.shape, nnx.state(model)))


def program(case: Case, model: nnx.Module) -> str:
    """The traced call and its constants, or what it refuses."""
    graphdef, state = nnx.split(model)

    def run(state, *inputs):
        return case.call(nnx.merge(graphdef, state), *inputs)

    try:
        traced = jax.make_jaxpr(run)(state, *case.inputs)
    except (TypeError, ValueError) as error:
        return f"refused: {error}"
    return f"{traced} {[np.asarray(x).tobytes() for x in traced.consts]}"


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_every_field_is_read_or_a_reason_is_given(name):
    case = CASES[name]
    assert type(case.config).__name__ == name
    names = {field.name for field in dataclasses.fields(case.config)}
    assert names == case.changes.keys() | case.unread.keys()
    assert not case.changes.keys() & case.unread.keys()
    base = describe(case.model, case.config)
    before = program(case, base)
    assert not before.startswith("refused"), before
    for field, value in case.changes.items():
        changed = describe(case.model, dataclasses.replace(case.config, **{field: value}))
        if parameters(changed) == parameters(base):
            assert program(case, changed) != before, f"{name}.{field} changes nothing"


def test_the_logit_scale_begins_at_its_field():
    config = dataclasses.replace(CASES["CLIPConfig"].config, logit_scale_init_value=1.5)
    assert float(clip.CLIPModel(config, rngs=nnx.Rngs(0)).logit_scale[...]) == 1.5


def test_no_configuration_is_left_out():
    modules = (clip, siglip, convnext, dinov2, resnet, siglip_classifier, swin, vit)
    found = {
        name
        for module in (*modules, controlnet, dit, unet, vae, weight_unet, e2gan, patchgan, pix2pix)
        for name, value in vars(module).items()
        if dataclasses.is_dataclass(value) and hasattr(value, "from_dict")
    }
    assert found == CASES.keys()
