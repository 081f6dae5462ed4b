"""The configs of a checkpoint's networks, from the shapes of its tensors.

Numbers of heads, groups and the like show in no shape: they are those of the published models, as
all programs take them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from jaxsynth.weights.original_names import TEXT_PROJECTION
from jaxsynth.weights.single_file.families import UNET, VAE, XL, Family

# Of the published models: channels of a head, and groups of a norm.
_HEAD, _GROUPS = 64, 32
# SDXL's denoiser reads so many sizes beside the pooled text.
_SIZES = 6


def inferred(
    family: Family, shapes: Mapping[str, tuple[int, ...]], *, v_prediction: bool
) -> dict[str, dict[str, Any]]:
    """The fields of each part's config that the tensors' shapes and the published models tell.

    KeyError with a tensor that is missing, ValueError for a network of another kind.
    """
    side = 1024 if family is XL else 768 if v_prediction and family.open_clip else 512
    vae = _vae(_Shapes(shapes, VAE), side) | family.vae
    texts = {
        part: (_open_clip if part == family.open_clip else _clip)(shapes, prefix)
        for part, prefix in family.texts.items()
    }
    pooled = None
    if family.double:
        pooled = _projected(_Shapes(shapes, family.texts["text_encoder_2"]))
        texts["text_encoder_2"]["projection_dim"] = pooled
    elif family.open_clip:
        # Of the whole tower, which has a projection, the networks read all layers but the last.
        whole = f"{family.texts['text_encoder']}text_projection" in shapes
        layers = texts["text_encoder"]["num_hidden_layers"]
        texts["text_encoder"]["num_hidden_layers"] = layers - (whole or layers == 24)
    latent = side // 2 ** (len(vae["block_out_channels"]) - 1)
    return {"unet": _unet(_Shapes(shapes, UNET), latent, pooled), "vae": vae, **texts}


class _Shape(tuple):
    """A shape that names its tensor where it has too few axes."""

    key: str

    def __new__(cls, key: str, shape: tuple[int, ...]):
        made = super().__new__(cls, shape)
        made.key = key
        return made

    def __getitem__(self, axis):
        try:
            return super().__getitem__(axis)
        except IndexError:
            raise self._too_few() from None

    def pair(self) -> tuple[int, int]:
        """The two axes of a matrix."""
        if len(self) != 2:
            raise self._too_few()
        return self[0], self[1]

    def _too_few(self) -> ValueError:
        return ValueError(f"key {self.key!r} has shape {tuple(self)}, expected other axes")


class _Shapes(dict):
    """Shapes by key behind a prefix; errors have the whole key."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], prefix: str):
        self._prefix = prefix
        inside = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
        super().__init__({k.removeprefix(prefix): _Shape(k, v) for k, v in inside.items()})

    def __missing__(self, key: str) -> _Shape:
        raise KeyError(self._prefix + key)

    def count(self, pattern: str) -> int:
        """One more than the highest number that the pattern finds; 0 for none."""
        found = [re.match(pattern, key) for key in self]
        return max((int(match[1]) + 1 for match in found if match), default=0)


def _unet(shapes: _Shapes, side: int, pooled: int | None) -> dict[str, Any]:
    """Of a U-Net for latents of `side`; `pooled` is the width of the pooled text that it reads."""
    if pooled is None and any(key.startswith("label_emb") for key in shapes):
        raise ValueError("has label_emb, as unCLIP and upscalers: expected a plain U-Net")
    widths, attends, counts, depths = [], [], [], []
    fresh = True
    for i in range(1, shapes.count(r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            fresh = True
            continue
        width = shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]
        depth = shapes.count(rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
        if fresh:
            widths.append(width), attends.append(depth > 0), depths.append(depth), counts.append(0)
            fresh = False
        counts[-1] += 1
    if len(set(counts)) != 1:
        raise ValueError(f"has {counts} residual blocks by level, expected as many at each")
    first = next((key for key in sorted(shapes) if key.endswith("attn2.to_k.weight")), None)
    if first is None:
        raise ValueError("its U-Net attends to no text (attn2.to_k)")
    linear = len(shapes[first.partition("transformer_blocks")[0] + "proj_in.weight"]) == 2
    # The middle has as many transformers as the last level, also where that has none.
    depths[-1] = depths[-1] or shapes.count(r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    deep = [max(1, depth) for depth in depths]
    down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
    return {
        "sample_size": side,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": widths,
        "layers_per_block": counts[0],
        "norm_num_groups": math.gcd(_GROUPS, *widths),
        "cross_attention_dim": shapes[first][1],
        "transformer_layers_per_block": deep[0] if len(set(deep)) == 1 else deep,
        # Of one size where the transformers end in linear layers (2.x, SDXL), else of one number.
        "attention_head_dim": [max(1, width // _HEAD) for width in widths] if linear else 8,
        "use_linear_projection": linear,
        **({} if pooled is None else _added(shapes, pooled)),
    }


def _added(shapes: _Shapes, pooled: int) -> dict[str, Any]:
    """What is added to the time's embedding: the pooled text and six sizes."""
    read = shapes["label_emb.0.0.weight"].pair()[1]
    each, rest = divmod(read - pooled, _SIZES)
    if rest or each < 1:
        raise ValueError(
            f"key '{UNET}label_emb.0.0.weight' reads {read} features, expected {pooled} of the "
            f"pooled text and as many of each of {_SIZES} sizes"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": read,
    }


def _vae(shapes: _Shapes, side: int) -> dict[str, Any]:
    levels = shapes.count(r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "norm_num_groups": math.gcd(_GROUPS, *widths),
        "layers_per_block": shapes.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "sample_size": side,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def _clip(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    first, inner = "embeddings.token_embedding.weight", "text_model."
    # Older files have no text_model.
    found = _Shapes(shapes, prefix if prefix + first in shapes else prefix + inner)
    return _tower(found[first]) | {
        "intermediate_size": found["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": found.count(r"encoder\.layers\.(\d+)\."),
        "max_position_embeddings": found["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
    }


def _open_clip(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    found = _Shapes(shapes, prefix)
    return _tower(found["token_embedding.weight"]) | {
        "intermediate_size": found["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": found.count(r"transformer\.resblocks\.(\d+)\."),
        "max_position_embeddings": found["positional_embedding"][0],
        "hidden_act": "gelu",
    }


def _projected(shapes: _Shapes) -> int:
    """The width of the pooled text; ComfyUI reads the projection in either spelling."""
    turned = f"{TEXT_PROJECTION}.weight"
    if turned in shapes:
        return shapes[turned].pair()[0]
    return shapes[TEXT_PROJECTION].pair()[1]


def _tower(embedding: _Shape) -> dict[str, Any]:
    vocabulary, width = embedding.pair()
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": max(1, width // _HEAD),
        "eos_token_id": vocabulary - 1,
    }
