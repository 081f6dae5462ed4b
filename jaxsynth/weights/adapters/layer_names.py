"""How files of all tools call the layers of Stable Diffusion's networks.

kohya and LyCORIS flatten a path with underscores, diffusers, peft and OneTrainer write it with dots
behind the network's name, ComfyUI uses the names of the original Stable Diffusion code. The text
encoder's paths begin with "text_model." here and in transformers before 5.6, and without it since;
files have both. A flattened name is ambiguous by itself, so every name is looked up among those of
the network that the file is for.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.models.diffusion.unet import UNet2DConditionConfig
from jaxsynth.weights.original_names import unet_name

TEXT_MODEL = "text_model."
# kohya's name of each network.
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
_CLIPS = ("clip_l", "clip_h", "clip_g")


def layer_paths(model: nnx.Module) -> list[str]:
    """The paths of the layers that hold anything; an empty list of modules does not."""
    return [
        path
        for path, layer in inject.layers(model).items()
        if isinstance(layer, inject.AdapterLayer)
        or any(isinstance(value, nnx.Variable) for value in vars(layer).values())
    ]


def comfyui_names(component: str, model: Any) -> dict[str, str]:
    """ComfyUI's name of each layer of a network, "unet" or "text_encoder", by path.

    The text encoder of Stable Diffusion 1 is its "clip_l", that of 2 its "clip_h".
    """
    paths = layer_paths(model)
    if component == "unet":
        return {path: f"diffusion_model.{unet_name(path, model.config)}" for path in paths}
    if component != "text_encoder":
        raise ValueError(f"component {component!r}: expected unet or text_encoder")
    clip = "clip_h" if model.config.hidden_size >= 1024 else "clip_l"
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
        flat, dotted = ("lora_te", "lora_te1", "lycoris"), (component, "lora_te", "lora_te1")
    for name in paths:
        yield name
        yield from (f"{prefix}_{name.replace('.', '_')}" for prefix in flat)
        yield from (f"{prefix}.{name}" for prefix in dotted)
        if component != "unet":
            yield from (f"text_encoders.{clip}.transformer.{name}" for clip in _CLIPS)
            yield from (f"text_encoders.{clip}.{name}" for clip in _CLIPS)
            yield from (f"text_encoders.{middle}{name}" for middle in ("", "transformer."))
