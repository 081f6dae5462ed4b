"""timm's classifiers in transformers' names: architectures, their arguments, and every key.

A timm folder has a config.json with `architecture`, `num_classes` and `pretrained_cfg`, and weights
under timm's names, which for ResNet are torchvision's. Each network here is transformers' of the
same function; three things are more than a new name: query, key and value are one matrix in timm,
some of its position embeddings have no row for the class token, and Swin's patches merge at the
start of a stage, not the end of the one before.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from jaxsynth.core.documents import take
from jaxsynth.core.errors import UserError, shown
from jaxsynth.models.classifiers.convnext import ConvNextConfig, ConvNextForImageClassification
from jaxsynth.models.classifiers.dinov2 import Dinov2Config, Dinov2ForImageClassification
from jaxsynth.models.classifiers.resnet import ResNetConfig, ResNetForImageClassification
from jaxsynth.models.classifiers.swin import SwinConfig, SwinForImageClassification
from jaxsynth.models.classifiers.vit import ViTConfig, ViTForImageClassification

# timm's epsilon of every LayerNorm but Swin's and CLIP's.
_EPSILON, _CLIP_EPSILON = 1e-6, 1e-5

# Arguments that decide how a network starts and is regularised, not what it computes.
_OF_TRAINING = (
    "drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate", "proj_drop_rate",
    "pos_drop_rate", "patch_drop_rate", "zero_init_last", "weight_init", "head_init_scale",
)  # fmt: skip

Rename = Callable[[str], tuple[str, ...]]


@dataclass(frozen=True)
class Architecture:
    """A network and where its tensors are in a timm file.

    `rename` gives the names, in transformers' files, of a timm key: one, three for a matrix that is
    split along its rows, none for what is left out. `padded` is a timm key whose tensor may lack
    rows for the tokens before the patches: zeros.
    """

    network: type[nnx.Module]
    config: Any
    rename: Rename
    padded: str = ""


# Widths, depths and heads by timm's names of sizes.
_VIT = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_VIT_NAME = re.compile(
    r"(?P<family>vit|deit|deit3)_(?P<size>tiny|small|medium|base|large|huge)(?P<distilled>_distilled)?"
    r"_patch(?P<patch>\d+)_(?:(?P<clip>clip_(?P<quick>quickgelu_)?)?(?P<image>\d+)"
    r"|(?P<registers>reg4_)?dinov2)"
)
_RESNETS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet26": ("bottleneck", (2, 2, 2, 2)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
_CONVNEXTS = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
_SWINS = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_SWIN_NAME = re.compile(
    r"swin_(?P<size>tiny|small|base|large)_patch4_window(?P<window>\d+)_(?P<image>\d+)"
)
_KNOWN = (
    "vit_, deit_ and deit3_{size}[_distilled]_patch{n}_{size}, vit_{size}_patch14_[reg4_]dinov2, "
    "vit_{size}_patch{n}_clip_[quickgelu_]{size}, "
    f"swin_{{size}}_patch4_window{{n}}_{{size}}, {', '.join(_CONVNEXTS)}, {', '.join(_RESNETS)}"
)


def describe(
    path: Path, config: Mapping[str, Any], image_size: int, keys: Collection[str]
) -> Architecture:
    """The network that a timm config.json (`config`, read from `path`) names.

    `keys` are those of the weights: whether a ResNet's head has a bias, and which Swin is of the
    older layout, only they tell. UserError for an architecture or an argument that is not known.
    """
    name = take(config, "architecture", str, path, "").split(".")[0]
    makers = (
        (_RESNETS.get(name), _resnet),
        (_CONVNEXTS.get(name), _convnext),
        (_SWIN_NAME.fullmatch(name), _swin),
        (_vit_name(name), _vit),
    )
    known, make = next((pair for pair in makers if pair[0] is not None), (None, None))
    if known is None:
        raise UserError(f"{path}: architecture {shown(name)} is not known, only {_KNOWN}")
    args = dict(take(config, "model_args", dict | None, path, None) or {})
    args = {name: value for name, value in args.items() if name not in _OF_TRAINING}
    labels = take(config, "num_classes", int, path, 1000)
    size = args.pop("img_size", image_size)
    size = size[0] if isinstance(size, list | tuple) else size
    pool = args.pop("global_pool", config.get("global_pool"))
    for field, found, allowed in (
        ("global_pool", pool, ("token" if make is _vit else "avg", None)),
        ("in_chans", args.pop("in_chans", 3), (3,)),
        ("model_args.num_classes", args.pop("num_classes", labels), (labels,)),
    ):
        if found not in allowed:
            raise UserError(f"{path}: {field}: expected {shown(allowed[0])}, found {shown(found)}")
    try:
        found = make(known, args, labels, size, keys)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if args:
        raise UserError(f"{path}: model_args: unknown {', '.join(map(repr, sorted(args)))}")
    return found


def _vit_name(name: str) -> re.Match | None:
    found = _VIT_NAME.fullmatch(name)
    # Of the others timm has no such networks.
    is_vit = found is not None and found["family"] == "vit" and not found["distilled"]
    return found if is_vit or found is None or not found["clip"] else None


def _vit(found: re.Match, args: dict, labels: int, image_size: int, keys: Collection[str]):
    width, depth, heads = _VIT[found["size"]]
    width = args.pop("embed_dim", width)
    shape = {
        "hidden_size": width,
        "num_hidden_layers": args.pop("depth", depth),
        "num_attention_heads": args.pop("num_heads", heads),
        "patch_size": args.pop("patch_size", int(found["patch"])),
        "layer_norm_eps": _CLIP_EPSILON if found["clip"] else _EPSILON,
        "num_labels": labels,
    }
    ratio = args.pop("mlp_ratio", 4.0)
    if found["image"] is None:
        kind = "dinov2_with_registers" if found["registers"] else "dinov2"
        config = Dinov2Config(
            model_type=kind,
            image_size=image_size,
            mlp_ratio=ratio,
            num_register_tokens=4 if found["registers"] else 0,
            **shape,
        )
        rename = _renamer(_DINOV2, kind)
        return Architecture(Dinov2ForImageClassification, config, rename, "pos_embed")
    distilled, new = bool(found["distilled"]), found["family"] == "deit3"
    kind = "deit" if distilled else "vit"
    config = ViTConfig(
        model_type=kind,
        image_size=image_size,
        intermediate_size=int(width * ratio),
        distilled=distilled,
        # None takes timm's own value, which only DeiT III has.
        layer_scale=args.pop("init_values", None) is not None or new,
        pre_norm=bool(found["clip"]),
        qkv_bias=args.pop("qkv_bias", True),
        hidden_act=_activation(args.pop("act_layer", "quick_gelu" if found["quick"] else "gelu")),
        **shape,
    )
    head = [(r"head\.", "cls_classifier."), (r"head_dist\.", "distillation_classifier.")]
    rules = [*_VIT_RULES, *(head if distilled else [(r"head\.", "classifier.")])]
    # DeiT III adds positions to patches only.
    padded = "pos_embed" if new else ""
    return Architecture(ViTForImageClassification, config, _renamer(rules, kind), padded)


def _activation(name: Any) -> str:
    """transformers' name of an activation of timm's; ValueError where it has none here."""
    names = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    if name not in names:
        raise ValueError(f"act_layer: {shown(name)}, expected one of {', '.join(names)}")
    return names[name]


def _resnet(found: tuple, args: dict, labels: int, image_size: int, keys: Collection[str]):
    kind, depths = found
    channels = args.pop("channels", (64, 128, 256, 512))
    expansion = 1 if kind == "basic" else 4
    config = ResNetConfig(
        hidden_sizes=tuple(expansion * width for width in channels),
        depths=tuple(args.pop("layers", depths)),
        layer_type=kind,
        num_labels=labels,
        head_bias="fc.bias" in keys or not labels,
    )
    return Architecture(ResNetForImageClassification, config, rename_resnet)


def _convnext(found: tuple, args: dict, labels: int, image_size: int, keys: Collection[str]):
    depths, widths = found
    config = ConvNextConfig(
        depths=tuple(args.pop("depths", depths)),
        hidden_sizes=tuple(args.pop("dims", widths)),
        patch_size=args.pop("patch_size", 4),
        layer_norm_eps=_EPSILON,
        num_labels=labels,
    )
    return Architecture(ConvNextForImageClassification, config, _renamer(_CONVNEXT, "convnext"))


def _swin(found: re.Match, args: dict, labels: int, image_size: int, keys: Collection[str]):
    width, depths, heads = _SWINS[found["size"]]
    config = SwinConfig(
        image_size=image_size,
        patch_size=args.pop("patch_size", 4),
        embed_dim=args.pop("embed_dim", width),
        depths=tuple(args.pop("depths", depths)),
        num_heads=tuple(args.pop("num_heads", heads)),
        window_size=args.pop("window_size", int(found["window"])),
        num_labels=labels,
    )
    # The authors' files, and timm's before version 0.9.
    old = any(key.startswith("layers.0.downsample.") for key in keys)
    return Architecture(
        SwinForImageClassification, config, _renamer(_OLD_SWIN if old else _SWIN, "swin")
    )


# Each rule is (what a key begins with, what takes its place); the first that matches counts. "{}"
# is the name of the base model, and "3-1" is counted down. A rule that ends in "qkv." gives three
# names, an empty one none.
_QKV = ("query", "key", "value")
_BLOCK = r"blocks\.(\d+)\."
_ATTENTION = [
    (_BLOCK + r"attn\.qkv\.", r"{}.encoder.layer.\1.attention.attention.qkv."),
    (_BLOCK + r"attn\.proj\.", r"{}.encoder.layer.\1.attention.output.dense."),
]
_TOKENS = [
    (r"cls_token$", "{}.embeddings.cls_token"),
    (r"pos_embed$", "{}.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "{}.embeddings.patch_embeddings.projection."),
    (r"norm\.", "{}.layernorm."),
]
_VIT_RULES = [
    *_TOKENS,
    (r"dist_token$", "{}.embeddings.distillation_token"),
    (r"norm_pre\.", "{}.pre_layernorm."),
    *_ATTENTION,
    (_BLOCK + r"norm1\.", r"{}.encoder.layer.\1.layernorm_before."),
    (_BLOCK + r"norm2\.", r"{}.encoder.layer.\1.layernorm_after."),
    (_BLOCK + r"mlp\.fc1\.", r"{}.encoder.layer.\1.intermediate.dense."),
    (_BLOCK + r"mlp\.fc2\.", r"{}.encoder.layer.\1.output.dense."),
    # The second spelling is the authors' of DeiT III.
    (_BLOCK + r"(?:ls([12])\.gamma|gamma_([12]))$", r"{}.encoder.layer.\1.layer_scale\2\3.lambda1"),
]
_DINOV2 = [
    *_TOKENS,
    (r"(?:reg_token|register_tokens)$", "{}.embeddings.register_tokens"),
    (r"mask_token$", ""),
    *_ATTENTION,
    (_BLOCK + r"ls([12])\.gamma$", r"{}.encoder.layer.\1.layer_scale\2.lambda1"),
    (_BLOCK + r"(norm[12]|mlp\.fc[12])\.", r"{}.encoder.layer.\1.\2."),
    (r"head\.", "classifier."),
]
_RESIDUAL, _RESIDUAL_HERE = r"layer(\d)\.(\d+)\.", r"{}.encoder.stages.\1-1.layers.\2."
_RESNET = [
    (r"conv1\.", "{}.embedder.embedder.convolution."),
    (r"bn1\.", "{}.embedder.embedder.normalization."),
    (_RESIDUAL + r"conv(\d)\.", _RESIDUAL_HERE + r"layer.\3-1.convolution."),
    (_RESIDUAL + r"bn(\d)\.", _RESIDUAL_HERE + r"layer.\3-1.normalization."),
    (_RESIDUAL + r"downsample\.0\.", _RESIDUAL_HERE + "shortcut.convolution."),
    (_RESIDUAL + r"downsample\.1\.", _RESIDUAL_HERE + "shortcut.normalization."),
    (r"fc\.", "classifier.1."),
]
_MIXER, _MIXER_HERE = r"stages\.(\d)\.blocks\.(\d+)\.", r"{}.encoder.stages.\1.layers.\2."
_CONVNEXT = [
    (r"stem\.0\.", "{}.embeddings.patch_embeddings."),
    (r"stem\.1\.", "{}.embeddings.layernorm."),
    (r"stages\.(\d)\.downsample\.", r"{}.encoder.stages.\1.downsampling_layer."),
    (_MIXER + r"conv_dw\.", _MIXER_HERE + "dwconv."),
    (_MIXER + r"norm\.", _MIXER_HERE + "layernorm."),
    (_MIXER + r"mlp\.fc", _MIXER_HERE + "pwconv"),
    (_MIXER + r"gamma$", _MIXER_HERE + "layer_scale_parameter"),
    (r"head\.norm\.", "{}.layernorm."),
    (r"head\.fc\.", "classifier."),
]
_BLOCK_HERE = r"{}.encoder.layers.\1.blocks.\2."
_SWIN_BLOCK = r"layers\.(\d)\.blocks\.(\d+)\."
_BIAS = "relative_position_bias_table"
_SWIN_STAGES = [
    (r"patch_embed\.proj\.", "{}.embeddings.patch_embeddings.projection."),
    (r"patch_embed\.norm\.", "{}.embeddings.norm."),
    (_SWIN_BLOCK + r"attn\.qkv\.", _BLOCK_HERE + "attention.self.qkv."),
    (_SWIN_BLOCK + r"attn\.proj\.", _BLOCK_HERE + "attention.output.dense."),
    (_SWIN_BLOCK + rf"attn\.{_BIAS}$", _BLOCK_HERE + f"attention.self.{_BIAS}"),
    (_SWIN_BLOCK + r"norm1\.", _BLOCK_HERE + "layernorm_before."),
    (_SWIN_BLOCK + r"norm2\.", _BLOCK_HERE + "layernorm_after."),
    (_SWIN_BLOCK + r"mlp\.fc1\.", _BLOCK_HERE + "intermediate.dense."),
    (_SWIN_BLOCK + r"mlp\.fc2\.", _BLOCK_HERE + "output.dense."),
    (_SWIN_BLOCK + r"(?:attn\.relative_position_index|attn_mask)$", ""),
    (r"norm\.", "{}.layernorm."),
]
_SWIN = [
    *_SWIN_STAGES,
    (r"layers\.(\d)\.downsample\.", r"{}.encoder.layers.\1-1.downsample."),
    (r"head\.fc\.", "classifier."),
]
_OLD_SWIN = [
    *_SWIN_STAGES,
    (r"layers\.(\d)\.downsample\.", r"{}.encoder.layers.\1.downsample."),
    (r"head\.", "classifier."),
]
_COUNTER = re.compile(r".*\.num_batches_tracked")


def _renamer(rules: list[tuple[str, str]], prefix: str) -> Rename:
    """The names of a key by `rules`; a key that none matches keeps its own, to be refused."""
    compiled = [(re.compile(begin), new.replace("{}", prefix)) for begin, new in rules]

    def rename(key: str) -> tuple[str, ...]:
        if _COUNTER.fullmatch(key):
            return ()
        for begin, new in compiled:
            match = begin.match(key)
            if match is None:
                continue
            if not new:
                return ()
            name = match.expand(new) + key[match.end() :]
            name = re.sub(r"(\d+)-1\b", lambda number: str(int(number[1]) - 1), name)
            if ".qkv." in name:
                return tuple(name.replace(".qkv.", f".{part}.") for part in _QKV)
            return (name,)
        return (key,)

    return rename


rename_resnet = _renamer(_RESNET, "resnet")
