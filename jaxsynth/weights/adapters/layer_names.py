"""How files of all tools call the layers of Stable Diffusion's networks.

kohya and LyCORIS flatten a path with underscores, diffusers, peft and OneTrainer write it with dots
behind the network's name, ComfyUI uses the names of the original Stable Diffusion code. The text
encoder's paths begin with "text_model." here and in transformers before 5.6, and without it since;
files have both. SDXL's second text encoder always has the name of the network before them. A
flattened name is ambiguous by itself, so every name is looked up among those of the network that
the file is for.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.models.diffusion.unet import UNet2DConditionConfig
from jaxsynth.weights.original_names import unet_name

TEXT_MODEL = "text_model."
SECOND = "text_encoder_2"
# kohya's and ComfyUI's names of text encoders: of one, and of SDXL's two.
_KOHYA = {"text_encoder": ("lora_te", "lora_te1"), SECOND: ("lora_te2",)}
_CLIPS = {"text_encoder": ("clip_l", "clip_h", "clip_g"), SECOND: ("clip_g",)}
_SECONDS = (f"{SECOND}.", "lora_te2", "text_encoders.clip_g.")
_TEXTS = ("lora_te", "text_encoder", "text_model.", "encoder.", "text_projection")


def layer_paths(model: nnx.Module) -> list[str]:
    """The paths of the layers that hold anything; an empty list of modules does not."""
    return [
        path
        for path, layer in inject.layers(model).items()
        if isinstance(layer, inject.AdapterLayer)
        or any(isinstance(value, nnx.Variable) for value in vars(layer).values())
    ]


def kohya_names(component: str, model: Any, *, double: bool) -> dict[str, str]:
    """The name of each layer of a network in kohya's files, by path.

    Those of a pipeline with two text encoders (`double`), SDXL, name the UNet's layers as the
    original code does. KeyError for a layer that it cannot have, ValueError for another network.
    """
    paths = layer_paths(model)
    if component == "unet":
        own = {path: unet_name(path, model.config) if double else path for path in paths}
        prefix = "lora_unet"
    else:
        if component not in _KOHYA:
            raise ValueError(f"kohya's files of Stable Diffusion have no {component}")
        own = {path: path for path in paths}
        prefix = _KOHYA[component][-1 if double else 0]
    return {path: f"{prefix}_{name.replace('.', '_')}" for path, name in own.items()}


def component_of(key: str) -> str:
    """The network that a key looks like one of."""
    if key.startswith(_SECONDS):
        return SECOND
    return "text_encoder" if key.startswith(_TEXTS) else "unet"


def comfyui_names(component: str, model: Any) -> dict[str, str]:
    """ComfyUI's name of each layer of a network, "unet" or a text encoder, by path.

    The text encoder of Stable Diffusion 1 and the first of SDXL are its "clip_l", that of 2 its
    "clip_h", the second of SDXL its "clip_g".
    """
    paths = layer_paths(model)
    if component == "unet":
        return {path: f"diffusion_model.{unet_name(path, model.config)}" for path in paths}
    if component not in _CLIPS:
        raise ValueError(f"component {component!r}: expected unet or a text encoder")
    clip = "clip_h" if model.config.hidden_size >= 1024 else "clip_l"
    clip = "clip_g" if component == SECOND else clip
    return {path: f"text_encoders.{clip}.transformer.{path}" for path in paths}


def spellings(component: str, model: Any) -> dict[str, str]:
    """The path of each layer of a network by all names that files have for it.

    A name that two layers would have is left out.
    """
    found: dict[str, str] = {}
    doubtful = set()
    for path in layer_paths(model):
        for name in _names(component, path, model):
            if found.setdefault(name, path) != path:
                doubtful.add(name)
    return {name: path for name, path in found.items() if name not in doubtful}


def _names(component: str, path: str, model: Any) -> Iterator[str]:
    if component == "unet":
        paths = [path]
        config = getattr(model, "config", None)
        if isinstance(config, UNet2DConditionConfig):
            with suppress(KeyError):  # a network that the original code cannot have
                paths.append(unet_name(path, config))
        flat, dotted = ("lora_unet", "lycoris"), ("unet", "lora_unet", "diffusion_model")
    else:
        short = path.removeprefix(TEXT_MODEL)
        paths = list(dict.fromkeys([path, short, f"{TEXT_MODEL}{short}"]))
        flat, dotted = _KOHYA[component], (component, *_KOHYA[component])
        if component != SECOND:
            flat = (*flat, "lycoris")
    middles = ("", "transformer.")
    for name in paths:
        if component != SECOND:  # without a prefix it is the first one's
            yield name
        yield from (f"{prefix}_{name.replace('.', '_')}" for prefix in flat)
        yield from (f"{prefix}.{name}" for prefix in dotted)
        if component != "unet":
            for clip in _CLIPS[component]:
                yield from (f"text_encoders.{clip}.{middle}{name}" for middle in middles)
            if component != SECOND:
                yield from (f"text_encoders.{middle}{name}" for middle in middles)
