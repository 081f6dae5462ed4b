"""Images as prompts: cross-attention that reads an image's tokens beside the text's.

IP-Adapter (Ye et al. 2023, arXiv 2308.06721): at every cross-attention the same queries attend to
the text and, with keys and values of their own, to tokens that a small network makes of a CLIP's
features of the image; the second result is added, so many times as the adapter's scale says. The
tokens stand at the end of the text's states, where `DecoupledAttention` finds them. Modules carry
the names of the published files.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models import layers
from jaxsynth.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.diffusion.transformer2d import Attention
from jaxsynth.models.diffusion.unet import UNet2DCondition
from jaxsynth.ops.attention import attention
from jaxsynth.ops.resize import torch_cubic_matrix

# Of every resampler that is published, and assumed by those who read its files.
HEAD_DIM = 64


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """`features` numbers of an image become `tokens` tokens of `width`; files have 4."""

    features: int
    width: int
    tokens: int = 4


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Tokens of `features` numbers become `tokens` tokens of `width`, by way of `hidden`."""

    features: int
    width: int
    tokens: int = 16
    hidden: int = 768
    depth: int = 4

    def __post_init__(self):
        if self.hidden % HEAD_DIM:
            raise ValueError(f"hidden: {self.hidden}, expected a multiple of {HEAD_DIM}")


class ImageProjection(nnx.Module):
    """Tokens of the projected feature of an image (IP-Adapter)."""

    def __init__(self, config: ProjectionConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.config = config
        self.proj = layers.Linear(config.features, config.tokens * config.width, **make)
        self.norm = layers.layer_norm(config.width, **make)

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, "b n d"]:
        tokens = self.proj(features).reshape(len(features), self.config.tokens, -1)
        return self.norm(tokens)


class Resampler(nnx.Module):
    """Tokens of the states of all patches of an image (IP-Adapter Plus).

    A Perceiver (Alayrac et al. 2022, arXiv 2204.14198): learned queries attend to the states and
    to themselves.
    """

    def __init__(self, config: ResamplerConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.config = config
        hidden = config.hidden
        drawn = jax.random.normal(rngs.params(), (1, config.tokens, hidden))
        self.latents = nnx.Param(drawn * hidden**-0.5)
        self.proj_in = layers.Linear(config.features, hidden, **make)
        self.layers = nnx.List(
            nnx.List([PerceiverAttention(hidden, **make), _feed_forward(hidden, **make)])
            for _ in range(config.depth)
        )
        self.proj_out = layers.Linear(hidden, config.width, **make)
        self.norm_out = layers.layer_norm(config.width, **make)

    def __call__(self, features: Float[Array, "b t f"]) -> Float[Array, "b n d"]:
        x = self.proj_in(features)
        latents = self.latents[...].astype(x.dtype)
        latents = jnp.broadcast_to(latents, (len(x), *latents.shape[1:]))
        for attend, (norm, widen, _, narrow) in self.layers:
            latents = latents + attend(x, latents)
            latents = latents + narrow(layers.gelu(widen(norm(latents))))
        return self.norm_out(self.proj_out(latents))


class PerceiverAttention(nnx.Module):
    """Latents attend to the image's states and to themselves."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.layer_norm(width, **make)
        self.norm2 = layers.layer_norm(width, **make)
        self.to_q = layers.Linear(width, width, use_bias=False, **make)
        self.to_kv = layers.Linear(width, 2 * width, use_bias=False, **make)
        self.to_out = layers.Linear(width, width, use_bias=False, **make)

    def __call__(
        self, x: Float[Array, "b t c"], latents: Float[Array, "b n c"]
    ) -> Float[Array, "b n c"]:
        def split(values: Array) -> Array:
            return values.reshape(*values.shape[:2], -1, HEAD_DIM)

        latents = self.norm2(latents)
        seen = jnp.concatenate([self.norm1(x), latents], axis=1)
        key, value = jnp.split(self.to_kv(seen), 2, axis=-1)
        out = attention(split(self.to_q(latents)), split(key), split(value))
        return self.to_out(out.reshape(latents.shape))


def _feed_forward(width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.List:
    """Norm, wider, GELU (which has no parameters) and narrower again, numbered as in files."""
    make = {"dtype": dtype, "rngs": rngs}
    return nnx.List(
        [
            layers.layer_norm(width, **make),
            layers.Linear(width, 4 * width, use_bias=False, **make),
            nnx.Dropout(0.0),
            layers.Linear(4 * width, width, use_bias=False, **make),
        ]
    )


class ImageKernel(nnx.Module):
    """The keys or values of an image's tokens: a product without a bias."""

    def __init__(self, kernel: Float[Array, "i o"]):
        self.kernel = nnx.Param(kernel)

    def __call__(self, tokens: Float[Array, "b n i"]) -> Float[Array, "b n o"]:
        return tokens @ self.kernel[...].astype(tokens.dtype)


@dataclasses.dataclass(frozen=True)
class ImageAdapter:
    """An IP-Adapter: what makes an image's tokens, and the (in, out) kernels of each attention.

    `kernels` are those of keys and of values by the path of the cross-attention.
    """

    projection: ImageProjection | Resampler
    kernels: Mapping[str, tuple[Array, Array]]


class DecoupledAttention(nnx.Module):
    """Cross-attention to a text, and to the tokens of image prompts at the end of the context.

    Of each prompt: `tokens`, how many there are, its `scales`, part of the program, and where
    there are `masks` (h, w), how much of it the positions get, bicubic as in diffusers. At scale 0
    nothing of it is computed.
    """

    def __init__(
        self,
        base: Attention,
        kernels: Sequence[tuple[Array, Array]],
        tokens: Sequence[int],
        scales: Sequence[float],
        masks: Sequence[Array | None],
    ):
        self.heads = base.heads
        self.to_q, self.to_k, self.to_v = base.to_q, base.to_k, base.to_v
        self.to_out = base.to_out
        self.to_k_ip = nnx.List(ImageKernel(key) for key, _ in kernels)
        self.to_v_ip = nnx.List(ImageKernel(value) for _, value in kernels)
        self.tokens, self.scales = tuple(tokens), tuple(scales)
        self.masks = nnx.List(
            nnx.data(None) if mask is None else nnx.Variable(mask) for mask in masks
        )

    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b n c"]:
        def split(values: Array) -> Array:
            return values.reshape(*values.shape[:2], self.heads, -1)

        text = context.shape[1] - sum(self.tokens)
        if text < 1:
            raise ValueError(
                f"a context of {context.shape[1]} tokens, {sum(self.tokens)} an image's"
            )
        context, images = context[:, :text], context[:, text:]
        query = split(self.to_q(x))
        out = attention(query, split(self.to_k(context)), split(self.to_v(context)))
        parts = zip(self.tokens, self.scales, self.to_k_ip, self.to_v_ip, self.masks, strict=True)
        for count, scale, to_k, to_v, mask in parts:
            own, images = images[:, :count], images[:, count:]
            if scale == 0:
                continue
            seen = attention(query, split(to_k(own)), split(to_v(own)))
            if mask is not None:
                seen = seen * _at_positions(mask[...], x.shape[1])[:, None, None].astype(x.dtype)
            out = out + scale * seen
        return self.to_out[0](out.reshape(x.shape))


def _at_positions(mask: Float[Array, "h w"], positions: int) -> Float[Array, " n"]:
    """The mask at so many positions of a smaller feature map of the same form."""
    height, width = mask.shape
    step = math.sqrt(height * width / positions)
    rows, columns = round(height / step), round(width / step)
    if rows * columns != positions or rows * width != columns * height:
        raise ValueError(f"a mask of {width}x{height} pixels, expected the form of the image")
    down, across = (torch_cubic_matrix(*sides) for sides in ((height, rows), (width, columns)))
    return (down @ mask @ across.T).reshape(-1)


class ImagePrompted(TextToImage):
    """The networks of a text-to-image pipeline and those that make tokens of images."""

    def __init__(
        self,
        unet: UNet2DCondition,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection | None,
        projections: Sequence[ImageProjection | Resampler],
    ):
        super().__init__(unet, text_encoder, text_encoder_2)
        self.image_projections = nnx.List(projections)


def attention_places(unet: nnx.Module) -> dict[str, Attention | DecoupledAttention]:
    """The cross-attentions by path, in the order that files number them: down, up, middle."""
    found: dict[str, Attention | DecoupledAttention] = {}

    def note(path: str, layer: Attention | DecoupledAttention) -> nnx.Module:
        found[path] = layer
        return layer

    _map_attentions(note, unet)
    sides = ("down_blocks", "up_blocks", "mid_block")

    def order(path: str) -> list[int]:
        side, *rest = path.split(".")
        return [sides.index(side), *(int(part) for part in rest if part.isdigit())]

    return {path: found[path] for path in sorted(found, key=order)}


def initial_adapter(unet: UNet2DCondition, projection: ImageProjection | Resampler) -> ImageAdapter:
    """An untrained adapter, whose kernels are those of the text, as IP-Adapter's start."""
    kernels = {
        path: (layer.to_k.kernel[...], layer.to_v.kernel[...])
        for path, layer in attention_places(unet).items()
    }
    return ImageAdapter(projection, kernels)


def with_image_prompts(
    model: TextToImage,
    adapters: Sequence[ImageAdapter],
    *,
    images: Sequence[int] | None = None,
    scales: Sequence[Callable[[str], float] | float] | None = None,
    masks: Sequence[Array | None] | None = None,
) -> ImagePrompted:
    """The networks with adapters, whose tokens the contexts end in, `images` times each.

    A scale is a number, or one for each path of a cross-attention.
    """
    count = len(adapters)
    images = images or [1] * count
    scales = scales or [1.0] * count
    masks = masks or [None] * count
    tokens = [
        adapter.projection.config.tokens * times
        for adapter, times in zip(adapters, images, strict=True)
    ]

    def decouple(path: str, layer: Attention | DecoupledAttention) -> nnx.Module:
        own = [float(scale(path) if callable(scale) else scale) for scale in scales]
        kernels = [adapter.kernels[path] for adapter in adapters]
        return DecoupledAttention(layer, kernels, tokens, own, masks)

    unet = _map_attentions(decouple, model.unet)
    projections = [one.projection for one in adapters]
    return ImagePrompted(unet, model.text_encoder, model.text_encoder_2, projections)


def adapter_of(model: ImagePrompted) -> ImageAdapter:
    """The one adapter of a model."""
    (projection,) = model.image_projections
    kernels = {
        path: (layer.to_k_ip[0].kernel[...], layer.to_v_ip[0].kernel[...])
        for path, layer in attention_places(model.unet).items()
    }
    return ImageAdapter(projection, kernels)


def _map_attentions(function: Callable[[str, nnx.Module], nnx.Module], unet: nnx.Module):
    """The network with each cross-attention replaced; what is kept is shared."""

    def is_leaf(node) -> bool:
        return isinstance(node, (nnx.Variable, Attention, DecoupledAttention))

    def visit(path: tuple, node):
        name = ".".join(
            str(getattr(p, "name", getattr(p, "idx", getattr(p, "key", p)))) for p in path
        )
        if not name.endswith(".attn2"):
            return node
        return function(name, node)

    return jax.tree_util.tree_map_with_path(visit, unet, is_leaf=is_leaf)
