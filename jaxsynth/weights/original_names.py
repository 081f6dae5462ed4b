"""The names that the original Stable Diffusion code (LDM) gives the parameters of its networks.

Checkpoints in one file, ComfyUI and A1111 name them so. Paths here are those of Hugging Face's
files, which the networks share: of layers for the U-Net, whole keys for the others.
"""

import re

from jaxsynth.models.diffusion.unet import UNet2DConditionConfig

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(
    r"(?P<side>down_blocks|up_blocks|mid_block)(?:\.(?P<i>\d+))?"
    r"\.(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<j>\d+)(?:\.(?P<rest>.*))?"
)
# In the order in which they are tried.
_VAE = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
# The transpose there of what Hugging Face's files call so with a ".weight" behind it.
TEXT_PROJECTION = "text_projection"
_OPEN_CLIP = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.", ".attn."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    ("text_projection.weight", TEXT_PROJECTION),
)


def unet_name(path: str, config: UNet2DConditionConfig) -> str:
    """Of a U-Net's layer; KeyError for one that the original code cannot have."""
    if path in _TOP:
        return _TOP[path]
    found = _BLOCK.fullmatch(path)
    if found is None:
        raise KeyError(path)
    i, j, part, rest = int(found["i"] or 0), int(found["j"]), found["part"], found["rest"]
    counts = set(config.per_level("layers_per_block"))
    if len(counts) > 1:
        raise KeyError(path)
    each = counts.pop() + 1
    if part == "resnets":
        rest = _RESNET[rest]
    if found["side"] == "mid_block":
        return f"middle_block.{1 if part == 'attentions' else 2 * j}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{each * (i + 1)}.0.op"
    if part == "upsamplers":
        attends = config.up_block_types[i].startswith("CrossAttn")
        return f"output_blocks.{each * i + each - 1}.{2 if attends else 1}.conv"
    place = "1" if part == "attentions" else "0"
    if found["side"] == "down_blocks":
        return f"input_blocks.{each * i + j + 1}.{place}.{rest}"
    return f"output_blocks.{each * i + j}.{place}.{rest}"


def vae_name(key: str, levels: int) -> str:
    """Of an autoencoder's key; its levels on the way up are counted from below."""
    for pattern, name in _VAE:
        key = re.sub(pattern, name, key)
    key = re.sub(r"\bup\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", key)
    head, attention, rest = key.partition(".attn_1.")
    layer, _, leaf = rest.rpartition(".")
    return f"{head}{attention}{_VAE_ATTENTION[layer]}.{leaf}" if attention else key


def open_clip_name(key: str) -> str:
    """Of a text encoder's key in OpenCLIP's names, with q, k and v apart, as they are not there."""
    for ours, theirs in _OPEN_CLIP:
        key = key.replace(ours, theirs)
    return key
