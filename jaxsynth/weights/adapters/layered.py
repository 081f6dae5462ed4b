"""Files whose keys name layers in any tool's spelling, read against the networks they are for.

kohya's and LyCORIS', ComfyUI's, OneTrainer's and state dicts of peft's models: the factors are the
same, the names of layers differ (`layer_names`), and a file may mix them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from jaxsynth.core.errors import UserError
from jaxsynth.weights import recognize
from jaxsynth.weights.adapters import comfyui, lora_files, lycoris, tensor_files
from jaxsynth.weights.adapters.layer_names import SECOND, component_of, spellings


def read_layers(source: str | Path, networks: Mapping[str, nnx.Module]) -> dict[str, nnx.Module]:
    """The plain `networks` (`StableDiffusion.adaptable`) that a file is for, with its adapters.

    Embeddings bundled with them are left out. Raises UserError naming the file and what is no
    adapter, a key that fits no layer, or factors that fit no kind or layer.
    """
    source = Path(source)
    tensors, metadata = tensor_files.load(source)
    recognize.check_adapter(list(tensors), source)
    names = {component: spellings(component, model) for component, model in networks.items()}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        if key in recognize.bundled([key]):
            continue
        plain = lora_files.canonical(key)
        own = parts.setdefault(_component(plain, names, source), {})
        if plain in own:
            raise UserError(f"{source}: key {key} gives {plain} a second time")
        own[plain] = value
    found = {}
    for component, own in sorted(parts.items(), reverse=True):
        family = recognize.family_of(f"{name}.{x}" for name, own in names.items() for x in own)
        model = lycoris.fill(own, networks[component], names[component], source, family=family)
        if comfyui.is_for_base_norms(metadata):
            model = comfyui.from_base_norms(model)
        found[component] = model
    return found


def _component(key: str, names: Mapping[str, Mapping[str, str]], source: Path) -> str:
    """The network that a key is of; where no layer is so called, the one that it looks like."""
    ends = [at for at, letter in enumerate(key) if letter == "."]
    wanted = component_of(key)
    for component, modules in names.items():
        # One text encoder may be called by the name of any; of two each has its own.
        others = wanted == SECOND and SECOND in names and component != SECOND
        if not others and any(key[:at] in modules for at in ends):
            return component
    if wanted not in names:
        more = ": the file is of SDXL, and the base is not" if wanted == SECOND else ""
        raise UserError(f"{source}: key {key} is of the {wanted}, which the base lacks{more}")
    return wanted
