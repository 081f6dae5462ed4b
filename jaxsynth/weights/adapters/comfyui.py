"""ComfyUI's spelling of adapter files: `diffusion_model.<module>.<factor>`.

The factors are LyCORIS' (`lycoris`), with `lora_A` and `lora_B` of peft; the modules of a UNet have
the names of the original Stable Diffusion code ("input_blocks.1.1...."), those of a text encoder
start with `text_encoders.`. kohya's files of SDXL flatten the same names.

ComfyUI divides DoRA's magnitudes of outputs by the norm of the base's weight, and not by that of
the changed one as the paper, peft and LyCORIS do. What is written here is multiplied by their
ratio, so that its result is the right one, and marked in the metadata, so that it is undone when it
is read here. (Other readers of a marked file get the norms wrong.)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds import dora
from jaxsynth.adapters.kinds.update import UpdateLayer
from jaxsynth.core.errors import UserError
from jaxsynth.weights.adapters import lycoris

# In the metadata: the norm that magnitudes are for.
MARK = ("jaxsynth.dora", "base_norm")
_UNET = "diffusion_model."
_TEXT = "text_encoders."
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
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(
    r"(?P<side>down_blocks|up_blocks|mid_block)(?:\.(?P<i>\d+))?"
    r"\.(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<j>\d+)(?:\.(?P<rest>.*))?"
)


def original_name(path: str, model: Any) -> str:
    """A UNet's layer in the original code's names; KeyError for one that has none."""
    if path in _TOP:
        return _TOP[path]
    found = _BLOCK.fullmatch(path)
    if found is None:
        raise KeyError(path)
    i, j, part, rest = int(found["i"] or 0), int(found["j"]), found["part"], found["rest"]
    counts = set(model.config.per_level("layers_per_block"))
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
        attends = len(model.up_blocks[i].attentions) > 0
        return f"output_blocks.{each * i + each - 1}.{2 if attends else 1}.conv"
    place = "1" if part == "attentions" else "0"
    if found["side"] == "down_blocks":
        return f"input_blocks.{each * i + j + 1}.{place}.{rest}"
    return f"output_blocks.{each * i + j}.{place}.{rest}"


def names_of(component: str, model: Any) -> dict[str, str]:
    """ComfyUI's name of each layer of a network, "unet" or "text_encoder", by path.

    The text encoder of Stable Diffusion 1 is its "clip_l", that of 2 its "clip_h".
    """
    paths = lycoris.layer_paths(model)
    if component == "unet":
        return {path: f"{_UNET}{original_name(path, model)}" for path in paths}
    if component != "text_encoder":
        raise ValueError(f"component {component!r}: expected unet or text_encoder")
    clip = "clip_h" if model.config.hidden_size >= 1024 else "clip_l"
    return {path: f"{_TEXT}{clip}.transformer.{path}" for path in paths}


def write_comfyui(target: str | Path, adapted: Mapping[str, nnx.Module]) -> None:
    """Writes the adapters of networks by component ("unet", "text_encoder") as ComfyUI's file."""
    tensors: dict[str, np.ndarray] = {}
    mark = False
    for component, model in adapted.items():
        changed, marked = _for_base_norms(model)
        mark |= marked
        tensors |= lycoris.tensors_of(changed, names_of(component, model))
    if not any(key.endswith(".lora_mid.weight") for key in tensors):
        tensors = {
            key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B."): value
            for key, value in tensors.items()
        }
    lycoris.save(target, tensors, dict([MARK]) if mark else None)


def is_comfyui(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether keys are spelt as ComfyUI's."""
    return all(key.startswith((_UNET, _TEXT)) for key in tensors)


def read_comfyui(
    source: Path,
    tensors: dict[str, np.ndarray],
    metadata: Mapping[str, str],
    networks: Mapping[str, nnx.Module],
) -> dict[str, nnx.Module]:
    """The plain `networks` of a file's components with its adapters; UserError as `lycoris.fill`.

    A UNet's modules may have diffusers' names instead.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        component = "unet" if key.startswith(_UNET) else "text_encoder"
        # Whichever encoder a file names, Stable Diffusion 1 and 2 have one.
        key = re.sub(r"^text_encoders\.(?:clip_[lhg]\.)?(?:transformer\.)?", _TEXT, key)
        parts.setdefault(component, {})[key] = value
    found = {}
    for component, own in parts.items():
        if component not in networks:
            raise UserError(f"{source}: holds adapters of {component}, which the base lacks")
        model = networks[component]
        paths = lycoris.layer_paths(model)
        if component == "unet":
            names = {f"{_UNET}{path}": path for path in paths}
            names |= {name: path for path, name in names_of("unet", model).items()}
        else:
            names = {f"{_TEXT}{path}": path for path in paths}
        adapted = lycoris.fill(own, model, names, source)
        marked = metadata.get(MARK[0]) == MARK[1]
        found[component] = _from_base_norms(adapted) if marked else adapted
    return found


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


def _from_base_norms(model: nnx.Module) -> nnx.Module:
    return _scaled(model, -1)[0]
