"""Motion modules: attention over the frames of an animation, inside a denoiser of single images.

AnimateDiff (Guo et al. 2023, arXiv 2307.04725, section 4.2): behind each transformer of the U-Net,
or behind the residual block where a level has none, each position attends to itself in all frames.
The U-Net is as it was and takes frames for images, which the modules alone group into animations;
their last layer starts at zero, and with it the U-Net is the base. Structure and weight names are
those of diffusers' `MotionAdapter`.

    moving = with_motion(unet, modules, frames=16)
    moving(x, t, text)  # 16 frames of the first animation, then 16 of the next
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsynth.models import fields, layers
from jaxsynth.models.diffusion.transformer2d import BasicTransformerBlock
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig

# What diffusers' class can do and this one does not.
_ONLY: dict[str, tuple[Any, ...]] = {
    "conv_in_channels": (None,),
    "motion_mid_block_layers_per_block": (1,),
    "motion_transformer_layers_per_block": (1,),
    "motion_transformer_layers_per_mid_block": (1, (1,)),
}
# Frames that the modules of the first version are for at the most; later ones have 32.
_FIRST = 24
# Frames of a window where modules have places for fewer than all: as many as they are trained with.
WINDOW = 16


@dataclasses.dataclass(frozen=True)
class MotionConfig:
    """Shape of motion modules; field names and defaults are diffusers'.

    `motion_layers_per_block` are those of each level on the way down; on the way up there is one
    more. `motion_max_seq_length` is the number of frames that have a position.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    motion_layers_per_block: int | tuple[int, ...] = 2
    motion_num_attention_heads: int | tuple[int, ...] = 8
    motion_norm_num_groups: int = 32
    motion_max_seq_length: int = 32
    use_motion_mid_block: bool = True

    def __post_init__(self):
        name, levels = type(self).__name__, len(self.block_out_channels)
        fields.check_groups(name, self.motion_norm_num_groups, self.block_out_channels)
        for field in ("motion_layers_per_block", "motion_num_attention_heads"):
            if len(self.per_level(field)) != levels:
                raise ValueError(
                    f"{name}.{field}: expected an int or {levels} of them, "
                    f"got {getattr(self, field)}"
                )
        heads = self.per_level("motion_num_attention_heads")
        for count, channels in zip(heads, self.block_out_channels, strict=True):
            if channels % count or channels % 2:
                raise ValueError(
                    f"{name}.motion_num_attention_heads: {count} heads do not divide {channels} "
                    "channels, or these are odd"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From a config.json; an unknown field or value is a ValueError naming it."""
        return cls(**fields.known_fields(cls, config, only=_ONLY))

    def per_level(self, field: str) -> tuple[int, ...]:
        """The field's value at each level, from the widest feature map to the deepest."""
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def version(self) -> str:
        """The version of AnimateDiff whose modules have this form."""
        if len(self.block_out_channels) == 3:
            return "SDXL beta"
        if self.use_motion_mid_block:
            return "v2"
        return "v1" if self.motion_max_seq_length <= _FIRST else "v3"


class MotionModules(nnx.Module):
    """All motion modules of a denoiser, by the places that they are for."""

    def __init__(self, config: MotionConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        """`dtype` is that of the computation; parameters are created in float32."""
        self.config = config
        make = {"dtype": dtype, "rngs": layers.InitKeys(rngs)}
        levels = range(len(config.block_out_channels))
        counts = config.per_level("motion_layers_per_block")
        self.down_blocks = nnx.List(
            MotionBlock(config, level, counts[level], **make) for level in levels
        )
        if config.use_motion_mid_block:
            self.mid_block = MotionBlock(config, levels[-1], 1, **make)
        self.up_blocks = nnx.List(
            MotionBlock(config, level, counts[level] + 1, **make) for level in reversed(levels)
        )


class MotionBlock(nnx.Module):
    """The motion modules of one block of the denoiser."""

    def __init__(
        self, config: MotionConfig, level: int, count: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.motion_modules = nnx.List(
            MotionModule(
                config.block_out_channels[level],
                heads=config.per_level("motion_num_attention_heads")[level],
                groups=config.motion_norm_num_groups,
                length=config.motion_max_seq_length,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(count)
        )


class MotionModule(nnx.Module):
    """Norm, projection, a transformer block over the frames, projection back: what is added."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        groups: int,
        length: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        make = {"dtype": dtype, "rngs": rngs}
        self.length = length
        self.norm = layers.group_norm(groups, channels, epsilon=1e-6, **make)
        self.proj_in = layers.Linear(channels, channels, **make)
        self.transformer_blocks = nnx.List([TemporalBlock(channels, heads=heads, **make)])
        zeros = nnx.initializers.zeros
        self.proj_out = layers.Linear(channels, channels, kernel_init=zeros, **make)

    def __call__(
        self, x: Float[Array, "n h w c"], *, frames: int, joint_norm: bool
    ) -> Float[Array, "n h w c"]:
        """What to add to the feature maps of animations of so many frames each, one after another.

        The norm's statistics are those of each frame, or of all frames together (`joint_norm`).
        ValueError for more frames than have a position.
        """
        if frames > self.length:
            raise ValueError(f"{frames} frames, and the motion module has places for {self.length}")
        _, height, width, channels = x.shape
        grouped = x.reshape(-1, frames * height, width, channels) if joint_norm else x
        tokens = self.norm(grouped).reshape(-1, frames, height * width, channels)
        tokens = tokens.swapaxes(1, 2).reshape(-1, frames, channels)
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, jnp.asarray(positions(frames, channels), tokens.dtype))
        out = self.proj_out(tokens).reshape(-1, height * width, frames, channels)
        return out.swapaxes(1, 2).reshape(x.shape)


class TemporalBlock(BasicTransformerBlock):
    """Twice attention of the frames to each other, and feed-forward; each is a residual."""

    def __init__(self, channels: int, *, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(channels, heads=heads, context_dim=channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "n f c"], positions: Float[Array, "f c"]
    ) -> Float[Array, "n f c"]:
        for norm, attend in ((self.norm1, self.attn1), (self.norm2, self.attn2)):
            placed = norm(x) + positions
            x = x + attend(placed, placed)
        return x + self.ff(self.norm3(x))


def positions(frames: int, channels: int) -> Float[np.ndarray, "f c"]:
    """Sines and cosines in turns, of frequencies from 1 to 1/10000 (arXiv 1706.03762)."""
    rates = np.exp(np.arange(0, channels, 2) * (-np.log(10000.0) / channels))
    angles = np.arange(frames)[:, None] * rates
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(frames, channels).astype("f4")


class WithMotion(nnx.Module):
    """A layer of the denoiser, and the motion module behind it.

    `scale` multiplies what the module adds; at 0 it is not computed.
    """

    def __init__(
        self,
        base: nnx.Module,
        motion: MotionModule,
        *,
        frames: int,
        scale: float,
        joint_norm: bool,
    ):
        self.base = base
        self.motion = motion
        self.frames, self.scale, self.joint_norm = frames, scale, joint_norm

    def __call__(
        self, x: Float[Array, "n h w i"], *others: Float[Array, "n ..."]
    ) -> Float[Array, "n h w o"]:
        x = self.base(x, *others)
        if self.scale == 0:
            return x
        moved = self.motion(x, frames=self.frames, joint_norm=self.joint_norm)
        return x + self.scale * moved


def with_motion(
    unet: UNet2DCondition,
    modules: MotionModules,
    *,
    frames: int,
    scale: float = 1.0,
    joint_norm: bool = False,
) -> nnx.Module:
    """The denoiser with motion modules; what is kept is shared.

    It then takes batches of animations of `frames` frames, in windows where the modules have places
    for fewer (`InWindows`). The published modules were trained with norms of each frame, while
    diffusers' are of all frames together (`joint_norm`). Adapters and image prompts go into the
    denoiser before. ValueError for modules of another base.
    """
    check_base(modules.config, unet.config)
    most = modules.config.motion_max_seq_length
    seen = frames if frames <= most else min(WINDOW, most)
    behind = {id(place): module for place, module in _places(unet, modules)}

    def place(node: Any) -> Any:
        if id(node) not in behind:
            return node
        settings = {"frames": seen, "scale": scale, "joint_norm": joint_norm}
        return WithMotion(node, behind[id(node)], **settings)

    def is_leaf(node: Any) -> bool:
        return isinstance(node, nnx.Variable) or id(node) in behind

    moving = jax.tree.map(place, unet, is_leaf=is_leaf)
    return moving if seen == frames else InWindows(moving, frames, seen)


def modules_of(unet: nnx.Module, modules: MotionModules) -> MotionModules:
    """The motion modules that stand in a denoiser of `with_motion`, such as a trained one.

    `modules` are any of the same form.
    """
    found = {id(module): place.motion for place, module in _places(unet, modules)}

    def is_leaf(node: Any) -> bool:
        return isinstance(node, (nnx.Variable, MotionModule))

    return jax.tree.map(lambda node: found.get(id(node), node), modules, is_leaf=is_leaf)


def _places(unet: Any, modules: MotionModules) -> list[tuple[Any, MotionModule]]:
    """The layers of a denoiser that have a motion module behind them, each with its own."""
    found = []
    for side in ("down_blocks", "up_blocks"):
        for block, own in zip(getattr(unet, side), getattr(modules, side), strict=True):
            places = block.attentions or block.resnets
            found += zip(places, own.motion_modules, strict=True)
    if modules.config.use_motion_mid_block:
        found += zip(unet.mid_block.attentions, modules.mid_block.motion_modules, strict=True)
    return found


class OfClips(nnx.Module):
    """A denoiser with motion modules that takes clips for its rows, as a training has them.

    The frames of a clip share its time and what the denoiser is told.
    """

    def __init__(self, base: nnx.Module):
        self.base = base

    def __call__(
        self,
        x: Float[Array, "n f h w i"],
        timesteps: Int[Array, " n"] | Float[Array, " n"],
        encoder_hidden_states: Float[Array, "n t d"],
        *,
        remat: str | None = None,
        **told: Array,
    ) -> Float[Array, "n f h w o"]:
        frames = x.shape[1]
        rows = (timesteps, encoder_hidden_states)
        own, more = jax.tree.map(lambda value: jnp.repeat(value, frames, axis=0), (rows, told))
        out = self.base(x.reshape(-1, *x.shape[2:]), *own, remat=remat, **more)
        return out.reshape(-1, frames, *out.shape[1:])


def windows(frames: int, length: int) -> Int[np.ndarray, "w l"]:
    """The frames of each window: a quarter is the next one's too, and the last ends with all."""
    step = length - length // 4
    starts = [*range(0, frames - length, step), frames - length]
    return np.array(starts)[:, None] + np.arange(length)


class InWindows(nnx.Module):
    """A denoiser with motion modules that sees animations by windows of fewer frames.

    What windows say of the frames that they share is averaged, at every step of the sampler.
    """

    def __init__(self, base: nnx.Module, frames: int, length: int):
        self.base = base
        self.frames, self.length = frames, length

    def __call__(
        self,
        x: Float[Array, "n h w i"],
        timesteps: Int[Array, " n"] | Float[Array, " n"],
        encoder_hidden_states: Float[Array, "n t d"],
        **residuals: Any,
    ) -> Float[Array, "n h w o"]:
        """As the denoiser, whose rows are frames."""
        places = windows(self.frames, self.length)
        rows = (x, timesteps, encoder_hidden_states)

        def run(place: Int[Array, " l"]) -> Array:
            def cut(value: Array) -> Array:
                frames = value.reshape(-1, self.frames, *value.shape[1:])[:, place]
                return frames.reshape(-1, *value.shape[1:])

            own, more = jax.tree.map(cut, (rows, residuals))
            out = self.base(*own, **more)
            return out.reshape(-1, self.length, *out.shape[1:])

        seen = jax.lax.map(run, places)
        total = jnp.zeros((seen.shape[1], self.frames, *seen.shape[3:]), jnp.float32)
        for place, own in zip(places, seen, strict=True):
            total = total.at[:, place].add(own.astype(jnp.float32))
        times = np.bincount(places.ravel())[:, None, None, None]
        return (total / times).reshape(-1, *seen.shape[3:]).astype(seen.dtype)


def check_base(config: MotionConfig, base: UNet2DConditionConfig) -> None:
    """ValueError for motion modules of another base, saying which they are."""
    for field, own, theirs in (
        ("block_out_channels", config.block_out_channels, base.block_out_channels),
        (
            "layers_per_block",
            config.per_level("motion_layers_per_block"),
            base.per_level("layers_per_block"),
        ),
    ):
        if own != theirs:
            raise ValueError(
                f"motion modules {config.version} for a base whose {field} is {own}, and this "
                f"base's is {theirs}: they are for another base"
            )
