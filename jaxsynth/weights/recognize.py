"""What a file of tensors is, by all of its keys: an adapter in some spelling, or something else.

One key decides nothing: a LoRA may carry an embedding, and a checkpoint may hold a key that looks
like an adapter's. What is no adapter is named as what it is, with the way out.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxsynth.core.errors import UserError

# The ends of keys of adapters' factors, in all spellings.
_FACTOR = re.compile(
    r"(\.lora_(A|B|E|up|down|mid)\b|\.lora\.(up|down)\.|\.lora_linear_layer\.|_lora\.(up|down)\."
    r"|\.lora_(magnitude_vector|embedding_[AB])|\.hada_|\.lokr_|\.dora_scale$|\.diff(_b)?$"
    r"|\.[wb]_norm$|\.on_input$|\.alpha$|\.[ab][12]\.weight$|\.(oft|boft)_|\.ia3_l|\.vera_"
    r"|\.glora_)"
)
# Those that only LyCORIS and the tools of its spelling have; the rest is peft's and diffusers'.
_LYCORIS = re.compile(
    r"(\.lora_(up|down|mid)\.|\.hada_|\.lokr_|\.dora_scale$|\.diff(_b)?$|\.[wb]_norm$|\.on_input$"
    r"|\.alpha$|\.[ab][12]\.weight$|\.oft_blocks$)"
)
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_", "lora_transformer_")
_COMFYUI = ("diffusion_model.", "text_encoders.")
_BUNDLE = "bundle_emb."
_CHECKPOINT = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.", "conditioner.")
_CONTROL = ("control_model.", "controlnet_cond_embedding.", "input_hint_block.")
# What only AnimateDiff's modules and LoRA on them have in their keys.
MOTION_PLACE = ".motion_modules."
MOTION = "motion modules (AnimateDiff)"
_IMAGES = {"image_proj", "ip_adapter"}
EMBEDDING = "an embedding (textual inversion)"
_HINTS = {
    EMBEDDING: "; a prompt's new word is given by --embedding=FILE",
    "an IP-Adapter": "; it is given by --image-adapter=FILE, with --image-prompt",
    "a checkpoint": "; an adapter's file holds factors such as lora_up and lora_down",
    MOTION: "; they are given by --motion=PATH",
    "the weights": "; a network is loaded from a folder with its config.json",
}
_EMBEDDING_KEYS = {"emb_params", "string_to_param", "string_to_token", "clip_l", "clip_g", "t5"}
# Layers that only other models than Stable Diffusion 1 and 2 have.
_FAMILIES = {
    "FLUX": r"double_blocks|single_transformer_blocks|single_blocks",
    "Stable Diffusion 3": r"joint_blocks|joint_attn",
    "SDXL": (
        r"lora_te2_|^conditioner\.|^text_encoder_2\."
        r"|_blocks?[._].*[._]transformer_blocks[._][1-9]"
    ),
}


def family_of(keys: Iterable[str]) -> str:
    """The model other than Stable Diffusion 1 and 2 that layers are of, "" where none shows."""
    text = list(keys)
    for name, pattern in _FAMILIES.items():
        if any(re.search(pattern, key) for key in text):
            return name
    return ""


def bundled(keys: Iterable[str]) -> list[str]:
    """The keys of embeddings that OneTrainer puts beside a LoRA."""
    return [key for key in keys if key.startswith(_BUNDLE)]


def bundled_names(keys: Iterable[str]) -> list[str]:
    """The words of those embeddings."""
    return sorted({key.split(".")[1] for key in bundled(keys)})


def is_diffusers(keys: Sequence[str]) -> bool:
    """Whether all keys are spelt as diffusers and peft do, and none as other tools do."""
    return not any(_LYCORIS.search(key) or key.startswith((*_KOHYA, *_COMFYUI)) for key in keys)


def kind_of(keys: Sequence[str]) -> tuple[str, str]:
    """What a file is, by most of its keys, and one of them that says so.

    "an adapter", "a checkpoint of whole networks in one file", "an embedding (textual inversion)",
    "an IP-Adapter", "a ControlNet", `MOTION`, "the weights of a network", with the family where it
    is another than Stable Diffusion 1 and 2; "" for none of these.
    """
    if not keys:
        return "a file without tensors", ""
    if {key.split(".")[0] for key in keys} == _IMAGES:
        return "an IP-Adapter", keys[0]
    family = family_of(keys)
    of = f" of {family}" if family else ""
    # LyCORIS' (IA)^3 calls its factor like a network's weight, beside an on_input.
    scaled = {key.removesuffix(".on_input") for key in keys if key.endswith(".on_input")}
    known = [
        key
        for key in keys
        if _FACTOR.search(key) or key.startswith(_BUNDLE) or key.removesuffix(".weight") in scaled
    ]
    if len(known) > len(keys) / 2:
        return f"an adapter{of}", known[0]
    others = [key for key in keys if key not in known]
    if all(MOTION_PLACE in key for key in others):
        return MOTION, others[0]
    if any(key.startswith(_CONTROL) for key in others):
        return f"a ControlNet{of}", next(key for key in others if key.startswith(_CONTROL))
    if found := next((key for key in others if key.startswith(_CHECKPOINT)), ""):
        return f"a checkpoint of whole networks in one file{of}", found
    if all(key.split(".")[0] in _EMBEDDING_KEYS or "." not in key for key in others):
        return EMBEDDING, others[0]
    if family or all(key.endswith((".weight", ".bias")) for key in others):
        return f"the weights of a network{of}", others[0]
    return "", others[0]


def check_adapter(keys: Sequence[str], source: Any) -> None:
    """UserError naming what the file is where most of its keys are of no adapter."""
    kind, key = kind_of(keys)
    if kind.startswith("an adapter"):
        if moving := next((key for key in keys if MOTION_PLACE in key), ""):
            raise UserError(
                f"{source}: is a LoRA of {MOTION}, not of the base ({moving}); it is given by "
                "--motion-lora=FILE"
            )
        return
    if not keys:
        raise UserError(f"{source}: holds no tensors")
    shown = f"most of its {len(keys)} keys are such as {key}"
    if not kind:
        raise UserError(f"{source}: holds no adapter of a kind known here ({shown})")
    hint = _HINTS.get(kind.partition(" of ")[0], "")
    raise UserError(f"{source}: {said(kind)}, not an adapter of layers ({shown}){hint}")


def said(kind: str) -> str:
    """A kind with its verb."""
    return f"{'holds' if kind.startswith(('the weights', 'motion')) else 'is'} {kind}"
