"""The text-conditioned denoiser of Stable Diffusion 1.x, 2.x and XL.

A U-Net of residual blocks with transformers at most levels (Rombach et al. 2022, arXiv 2112.10752).
Structure and weight names are those of diffusers' `UNet2DConditionModel`, in NHWC; what the output
means (noise, velocity or sample) is the scheduler's business. SDXL's (Podell et al. 2023, arXiv
2307.01952) also reads a pooled text and the sizes of the training image (section 2.2).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models import fields, layers
from jaxsynth.models.diffusion.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from jaxsynth.models.diffusion.transformer2d import Transformer2DModel
from jaxsynth.models.remat import checkpointed

# What diffusers' class can do and this one does not: only the value that switches it off is read.
ONLY: dict[str, tuple[Any, ...]] = {
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# Read only when one of the above is on, or never.
IGNORED = (
    "addition_embed_type_num_heads",
    *fields.EMA_NOTES,
)
# SDXL's addition to the embedding of the time.
TEXT_TIME = "text_time"
_ATTENDS = {
    "CrossAttnDownBlock2D": True,
    "DownBlock2D": False,
    "CrossAttnUpBlock2D": True,
    "UpBlock2D": False,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The half of the denoiser that a ControlNet repeats: all but the way up.

    `attention_head_dim` is the NUMBER of heads (one, or one per level): diffusers named it wrongly
    and every published config relies on that. `upcast_attention` changes nothing here, where
    attention scores are always float32. With `addition_embed_type` "text_time" the time's embedding
    has added to it one of `projection_class_embeddings_input_dim` features: those of a pooled text,
    and `addition_time_embed_dim` of each size.
    """

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    def __post_init__(self):
        name, levels = type(self).__name__, len(self.block_out_channels)
        self._check_blocks("down_block_types", "Down")
        if not isinstance(self.norm_num_groups, int):
            raise ValueError(f"{name}.norm_num_groups: expected an int, got {self.norm_num_groups}")
        fields.check_groups(name, self.norm_num_groups, self.block_out_channels)
        if not isinstance(self.cross_attention_dim, int):
            raise ValueError(
                f"{name}.cross_attention_dim: expected an int, got {self.cross_attention_dim}"
            )
        for field in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            values = self.per_level(field)
            if len(values) != levels or not all(isinstance(value, int) for value in values):
                raise ValueError(
                    f"{name}.{field}: expected an int or {levels} of them, "
                    f"got {getattr(self, field)}"
                )
        for heads, channels in zip(
            self.per_level("attention_head_dim"), self.block_out_channels, strict=True
        ):
            if channels % heads:
                raise ValueError(
                    f"{name}.attention_head_dim: {heads} heads do not divide {channels} channels"
                )
        layers.activation(self.act_fn)
        if self.addition_embed_type not in (None, TEXT_TIME):
            raise ValueError(
                f"{name}.addition_embed_type: expected None or {TEXT_TIME!r}, got "
                f"{self.addition_embed_type!r}"
            )
        if self.addition_embed_type:
            for field in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if not getattr(self, field):
                    raise ValueError(f"{name}.{field}: expected a number for {TEXT_TIME!r}")

    def _check_blocks(self, field: str, side: str) -> None:
        name, types = type(self).__name__, getattr(self, field)
        fields.check_blocks(name, {field: types}, len(self.block_out_channels))
        supported = sorted(block for block in _ATTENDS if f"{side}Block2D" in block)
        for block in types:
            if block not in supported:
                raise ValueError(f"{name}.{field}: expected one of {supported}, got {block!r}")

    def per_level(self, field: str) -> tuple[int, ...]:
        """The field's value at each level, from the widest feature map to the deepest."""
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def time_channels(self) -> int:
        return 4 * self.block_out_channels[0]


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(EncoderConfig):
    """Shape of the denoiser; field names and defaults are diffusers'."""

    sample_size: int | tuple[int, int] | None = None
    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    def __post_init__(self):
        super().__post_init__()
        self._check_blocks("up_block_types", "Up")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From a unet folder's config.json; an unknown field or value is a ValueError naming it."""
        return cls(**fields.known_fields(cls, config, only=ONLY, ignored=IGNORED))


class UNet2DCondition(nnx.Module):
    """Predicts noise (or velocity, or the clean sample) from a noisy sample, timestep and text."""

    def __init__(
        self, config: UNet2DConditionConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        """`dtype` is that of the computation; parameters are created in float32."""
        self.config = config
        self.dtype = dtype
        make = {"dtype": dtype, "rngs": layers.InitKeys(rngs)}
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = layers.conv2d(config.in_channels, widths[0], config.conv_in_kernel, **make)
        self.time_embedding = TimestepEmbedding(config, **make)
        if config.addition_embed_type:
            self.add_embedding = AddedEmbedding(config, **make)
        self.down_blocks = nnx.List(
            DownBlock(config, level, downsample=level < last, **make) for level in range(last + 1)
        )
        self.mid_block = MidBlock(config, **make)
        self.up_blocks = nnx.List(
            UpBlock(config, level, upsample=level > 0, **make)
            for level in reversed(range(last + 1))
        )
        self.conv_norm_out = layers.group_norm(
            config.norm_num_groups, widths[0], epsilon=config.norm_eps, **make
        )
        self.conv_out = layers.conv2d(
            widths[0], config.out_channels, config.conv_out_kernel, **make
        )
        self.act = layers.activation(config.act_fn)

    def __call__(
        self,
        sample: Float[Array, "b h w i"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        encoder_hidden_states: Float[Array, "b t d"],
        *,
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Float[Array, "b s"] | None = None,
        down_block_additional_residuals: Sequence[Float[Array, "b _h _w _c"]] | None = None,
        mid_block_additional_residual: Float[Array, "b _h _w _c"] | None = None,
        remat: str | None = None,
    ) -> Float[Array, "b h w o"]:
        """The prediction for `sample` at `timesteps` (any height and width).

        `text_embeds` and `time_ids` are the pooled text and the sizes that SDXL's reads too.
        `down_block_additional_residuals` (one per skip connection, in the order they are made) and
        `mid_block_additional_residual` are what a ControlNet adds; ValueError if their number is
        wrong. `remat` names what of each block the backward pass computes again
        (`models.remat`).
        """
        time = embed_time(self, timesteps, text_embeds, time_ids)
        context = encoder_hidden_states.astype(self.dtype)
        x, skips = encode(self, self.conv_in(sample), time, context, remat=remat)
        extra = down_block_additional_residuals
        if extra is not None:
            if len(extra) != len(skips):
                raise ValueError(
                    f"down_block_additional_residuals: expected {len(skips)} arrays, "
                    f"got {len(extra)}"
                )
            skips = [skip + residual for skip, residual in zip(skips, extra, strict=True)]
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        for block in self.up_blocks:
            taken = len(block.resnets)
            size = skips[-taken - 1].shape[1:3] if block.upsamplers else None
            x = _run(partial(block, size=size), remat, x, skips[: -taken - 1 : -1], time, context)
            skips = skips[:-taken]
        return self.conv_out(self.act(self.conv_norm_out(x)))


def time_features(
    config: EncoderConfig, timesteps: Int[Array, " b"] | Float[Array, " b"]
) -> Float[Array, "b f"]:
    """The sinusoidal features that `TimestepEmbedding` reads, in float32."""
    return layers.timestep_embedding(
        timesteps,
        config.block_out_channels[0],
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
    )


def embed_time(
    model: Any,
    timesteps: Int[Array, " b"] | Float[Array, " b"],
    text_embeds: Float[Array, "b p"] | None,
    time_ids: Float[Array, "b s"] | None,
) -> Float[Array, "b e"]:
    """What the blocks of a denoiser or a ControlNet read of time, pooled text and sizes.

    ValueError where these are missing for "text_time", or given without it.
    """
    config = model.config
    time = model.time_embedding(time_features(config, timesteps).astype(model.dtype))
    added = config.addition_embed_type is not None
    if {text_embeds is not None, time_ids is not None} != {added}:
        raise ValueError(
            "text_embeds and time_ids: with addition_embed_type "
            f"{config.addition_embed_type!r} expected {'both' if added else 'none'}"
        )
    return time + model.add_embedding(text_embeds, time_ids) if added else time


def encode(
    model: nnx.Module,
    x: Float[Array, "b h w c"],
    time: Float[Array, "b e"],
    context: Float[Array, "b t d"],
    *,
    remat: str | None,
) -> tuple[Float[Array, "b h2 w2 c2"], list[Float[Array, "b _h _w _c"]]]:
    """What `mid_block` makes of `x` after `down_blocks`, and the skip connections on the way."""
    skips = [x]
    for block in model.down_blocks:
        x, made = _run(block, remat, x, time, context)
        skips += made
    return _run(model.mid_block, remat, x, time, context), skips


def _run(block: Callable, remat: str | None, *inputs: Any) -> Any:
    return checkpointed(lambda *inputs: block(*inputs), remat)(*inputs)


class TimestepEmbedding(nnx.Module):
    """Two linear layers over the sinusoidal features of the timestep."""

    def __init__(self, config: EncoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.linear_1 = layers.Linear(config.block_out_channels[0], config.time_channels, **make)
        self.linear_2 = layers.Linear(config.time_channels, config.time_channels, **make)
        self.act = layers.activation(config.act_fn)

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, "b e"]:
        return self.linear_2(self.act(self.linear_1(features)))


class AddedEmbedding(nnx.Module):
    """Two linear layers over a pooled text and the sinusoidal features of sizes.

    Sizes in pixels are those of the original image, of the corner that its crop begins at, and of
    the crop: (height, width, top, left, height, width) (arXiv 2307.01952, section 2.2).
    """

    def __init__(self, config: EncoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        width, out = config.projection_class_embeddings_input_dim, config.time_channels
        self.config, self.dtype = config, dtype
        self.linear_1 = layers.Linear(width, out, **make)
        self.linear_2 = layers.Linear(out, out, **make)

    def __call__(
        self, text_embeds: Float[Array, "b p"], time_ids: Float[Array, "b s"]
    ) -> Float[Array, "b e"]:
        """ValueError where text and sizes have another number of features than the layer."""
        config = self.config
        sizes = layers.timestep_embedding(
            time_ids.reshape(-1),
            config.addition_time_embed_dim,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        ).reshape(len(time_ids), -1)
        features = jnp.concatenate([text_embeds.astype(sizes.dtype), sizes], axis=-1)
        if features.shape[-1] != config.projection_class_embeddings_input_dim:
            raise ValueError(
                f"text_embeds {text_embeds.shape} and time_ids {time_ids.shape}: "
                f"{features.shape[-1]} features, expected "
                f"{config.projection_class_embeddings_input_dim}"
            )
        hidden = jax.nn.silu(self.linear_1(features.astype(self.dtype)))
        return self.linear_2(hidden)


class DownBlock(nnx.Module):
    """`DownBlock2D` or `CrossAttnDownBlock2D`: residual blocks, transformers, downsampler."""

    def __init__(
        self,
        config: EncoderConfig,
        level: int,
        *,
        downsample: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        widths = config.block_out_channels
        width, count = widths[level], config.per_level("layers_per_block")[level]
        inputs = [widths[max(level - 1, 0)], *[width] * (count - 1)]
        attends = _ATTENDS[config.down_block_types[level]]
        self.resnets = nnx.List(_resnet(config, channels, width, **make) for channels in inputs)
        self.attentions = nnx.List(
            _transformer(config, level, **make) for _ in range(count if attends else 0)
        )
        self.downsamplers = nnx.List(
            [Downsample2D(width, padding=config.downsample_padding, **make)] if downsample else []
        )

    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b e"], context: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b h2 w2 o"], list[Float[Array, "b _h _w o"]]]:
        """The output, and the outputs of every layer for the skip connections."""
        made = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[index](x, context)
            made.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            made.append(x)
        return x, made


class MidBlock(nnx.Module):
    """`UNetMidBlock2DCrossAttn`: residual block, transformer, residual block."""

    def __init__(self, config: EncoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        width, deepest = config.block_out_channels[-1], len(config.block_out_channels) - 1
        self.resnets = nnx.List(_resnet(config, width, width, **make) for _ in range(2))
        self.attentions = nnx.List([_transformer(config, deepest, **make)])

    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b e"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b h w c"]:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpBlock(nnx.Module):
    """`UpBlock2D` or `CrossAttnUpBlock2D`: each residual block also reads a skip connection."""

    def __init__(
        self,
        config: UNet2DConditionConfig,
        level: int,
        *,
        upsample: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        widths = config.block_out_channels
        width, count = widths[level], config.per_level("layers_per_block")[level] + 1
        deeper = widths[min(level + 1, len(widths) - 1)]
        # The last skip of a level is what entered it on the way down.
        skips = [*[width] * (count - 1), widths[max(level - 1, 0)]]
        inputs = [skip + (deeper if index == 0 else width) for index, skip in enumerate(skips)]
        attends = _ATTENDS[config.up_block_types[len(widths) - 1 - level]]
        self.resnets = nnx.List(_resnet(config, channels, width, **make) for channels in inputs)
        self.attentions = nnx.List(
            _transformer(config, level, **make) for _ in range(count if attends else 0)
        )
        self.upsamplers = nnx.List([Upsample2D(width, **make)] if upsample else [])

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        skips: Sequence[Float[Array, "b h w _c"]],
        time: Float[Array, "b e"],
        context: Float[Array, "b t d"],
        size: tuple[int, int] | None,
    ) -> Float[Array, "b h2 w2 o"]:
        """`skips` are in the order of use; `size` is the height and width to upsample to."""
        for index, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = resnet(jnp.concatenate([x, skip], axis=-1), time)
            if self.attentions:
                x = self.attentions[index](x, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, size)
        return x


def _resnet(
    config: EncoderConfig,
    in_channels: int,
    out_channels: int,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out_channels,
        groups=config.norm_num_groups,
        epsilon=config.norm_eps,
        act_fn=config.act_fn,
        time_channels=config.time_channels,
        dtype=dtype,
        rngs=rngs,
    )


def _transformer(
    config: EncoderConfig, level: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> Transformer2DModel:
    return Transformer2DModel(
        config.block_out_channels[level],
        heads=config.per_level("attention_head_dim")[level],
        depth=config.per_level("transformer_layers_per_block")[level],
        context_dim=config.cross_attention_dim,
        groups=config.norm_num_groups,
        linear_projection=config.use_linear_projection,
        dtype=dtype,
        rngs=rngs,
    )
