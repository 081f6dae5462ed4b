"""ComfyUI's spelling of adapter files: `diffusion_model.<module>.<factor>`.

The factors are LyCORIS' (`lycoris`), with `lora_A` and `lora_B` of peft; the modules of a UNet have
the names of the original Stable Diffusion code ("input_blocks.1.1...."), those of a text encoder
start with `text_encoders.`. kohya's files of SDXL flatten the same names.

ComfyUI divides DoRA's magnitudes of outputs by the norm of the base's weight, and not by that of
the changed one as the paper, peft and LyCORIS do. What is written here is multiplied by their
ratio, so that its result is the right one, and marked in the metadata, so that it is undone when it
is read here. (Other readers of a marked file get the norms wrong.)
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds import dora
from jaxsynth.adapters.kinds.update import UpdateLayer
from jaxsynth.weights.adapters import lycoris
from jaxsynth.weights.adapters.layer_names import comfyui_names

# In the metadata: the norm that magnitudes are for.
_MARK = ("jaxsynth.dora", "base_norm")


def write_comfyui(target: str | Path, adapted: Mapping[str, nnx.Module]) -> None:
    """Writes the adapters of networks by component ("unet", "text_encoder") as ComfyUI's file."""
    tensors: dict[str, np.ndarray] = {}
    mark = False
    for component, model in adapted.items():
        changed, marked = _for_base_norms(model)
        mark |= marked
        tensors |= lycoris.tensors_of(changed, comfyui_names(component, model))
    if not any(key.endswith(".lora_mid.weight") for key in tensors):
        tensors = {
            key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B."): value
            for key, value in tensors.items()
        }
    lycoris.save(target, tensors, dict([_MARK]) if mark else None)


def is_for_base_norms(metadata: Mapping[str, str]) -> bool:
    """Whether a file's magnitudes are to be divided by the base's norms."""
    return metadata.get(_MARK[0]) == _MARK[1]


def from_base_norms(model: nnx.Module) -> nnx.Module:
    """The network with the magnitudes of such a file as DoRA has them."""
    return _scaled(model, -1)[0]


def _decomposed(layer: nnx.Module) -> bool:
    return (
        isinstance(layer, UpdateLayer)
        and layer.magnitude is not None
        and layer.config.decompose == "output"
    )


def _scaled(model: nnx.Module, sign: int) -> tuple[nnx.Module, bool]:
    changed = False

    def scale(_: str, layer: nnx.Module) -> nnx.Module:
        nonlocal changed
        if not _decomposed(layer):
            return layer
        changed = True
        magnitude = layer.magnitude[...]
        norms = magnitude / layer.ratios()
        ratio = dora.lengths(layer.weight(), layer.place, "output") / norms
        value = magnitude * ratio if sign > 0 else magnitude / ratio
        return inject.with_attributes(layer, magnitude=inject.Trainable(value))

    return inject.map_layers(scale, model), changed


def _for_base_norms(model: nnx.Module) -> tuple[nnx.Module, bool]:
    """The network with magnitudes to be divided by the base's norms, and whether it has any."""
    return _scaled(model, 1)
