"""diffusers' LoRA files: several networks of a pipeline by prefix, their settings in the metadata.

`pytorch_lora_weights.safetensors`, or `.bin` until 2023, holds LoRA and DoRA of "unet",
"text_encoder". Files are the same bytes for the same state.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core import io
from jaxsynth.core.documents import parse_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.patterns import in_file
from jaxsynth.weights import hub, recognize
from jaxsynth.weights.adapters import lora_files, tensor_files
from jaxsynth.weights.adapters.components import COMPONENTS

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
TORCH_WEIGHTS = "pytorch_lora_weights.bin"
METADATA = "lora_adapter_metadata"

_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def read_diffusers(path: str | Path) -> dict[str, AdapterState]:
    """The LoRA states of a diffusers file (or a folder with one), by component name.

    Keys without a component, as `unet.save_lora_adapter` writes them, are the UNet's. Text encoder
    paths always start with "text_model.", whichever transformers wrote them. Without a
    configuration in the metadata, alpha is the rank. Embeddings bundled with the LoRA are left out.

    Raises UserError for a file that is missing or cannot be read, an unknown key, a key of another
    kind, a factor without its partner, or a rank other than the configuration's.
    """
    source = find(path)
    tensors, metadata = tensor_files.load(source)
    recognize.check_adapter(list(tensors), source)
    for key in recognize.bundled(tensors):
        del tensors[key]
    lora_files.refuse_other_kinds(tensors, source)
    fields = parse_json(metadata.get(METADATA, "{}"), f"{source}: metadata {METADATA}")
    prefixed = any(key.split(".")[0] in COMPONENTS for key in tensors)
    if not prefixed:
        fields = {f"unet.{name}": value for name, value in fields.items()}

    found: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    renamed: dict[str, dict[str, str]] = {}
    for key, value in tensors.items():
        plain = lora_files.canonical(key)
        component, rest = plain.split(".", 1) if prefixed else ("unet", plain)
        if component not in COMPONENTS:
            raise UserError(f"{source}: key {key} starts with none of the components {COMPONENTS}")
        name, factor = lora_files.parse(key, rest, source)
        pair = (_component_path(component, name), factor)
        if pair in found.setdefault(component, {}):
            raise UserError(f"{source}: key {key} gives {pair[0]}.{factor} a second time")
        found[component][pair] = value
        renamed.setdefault(component, {})[name] = pair[0]

    states = {}
    for component, pairs in found.items():
        own = {
            name.removeprefix(f"{component}."): value
            for name, value in fields.items()
            if name.startswith(f"{component}.")
        }
        where = f"{source} ({component})"
        names = renamed[component]
        with in_file(where):
            config = (
                lora_files.renamed(lora_files.config_from_peft(own, where, list(names)), names)
                if own
                else lora_files.inferred_config(pairs, where)
            )
            states[component] = AdapterState(lora_files.arrays_of(pairs, config, where), config)
    return states


def find(path: str | Path) -> Path:
    """diffusers' file at a path: the path itself, or the file of a folder."""
    source = Path(path)
    if source.is_dir():
        names = (DIFFUSERS_WEIGHTS, TORCH_WEIGHTS)
        source = next((source / n for n in names if (source / n).is_file()), source / names[0])
    if not source.is_file():
        raise UserError(f"{source}: no such file; expected a diffusers LoRA file")
    return source


def fits_diffusers(config: Any) -> bool:
    """Whether diffusers and peft have a LoRA file for adapters of this configuration."""
    return (
        isinstance(config, LoRAConfig)
        and config.decompose != "input"
        and config.init not in ("pissa", "olora")
        and not config.use_tucker
    )


def write_diffusers(target: str | Path, states: dict[str, AdapterState]) -> None:
    """Writes LoRA states by component ("unet", "text_encoder") as the file of a pipeline.

    `target` is the file, or a folder that gets `pytorch_lora_weights.safetensors`.
    """
    tensors, fields = {}, {}
    for component, state in states.items():
        if component not in COMPONENTS:
            raise ValueError(f"component {component!r}: expected one of {COMPONENTS}")
        factors = {
            (_component_path(component, path), factor): value
            for (path, factor), value in lora_files.torch_tensors(state).items()
        }
        ends = _diffusers_names(component, {path for path, _ in factors})
        for (path, factor), value in factors.items():
            names_of = dict(zip(("lora_A", "lora_B"), ends[path], strict=True))
            end = names_of.get(factor, lora_files.peft_name(factor))
            tensors[f"{component}.{path}{end}"] = value
        config = lora_files.for_both_names(state.config, {path for path, _ in factors})
        for field, value in lora_files.config_to_peft(config).items():
            fields[f"{component}.{field}"] = value
    target = Path(target)
    if target.suffix != ".safetensors":
        target.mkdir(parents=True, exist_ok=True)
        target = target / DIFFUSERS_WEIGHTS
    text = json.dumps(fields, indent=2, sort_keys=True)
    wide = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    io.write_bytes(target, hub.to_bytes(wide, {"format": "pt", METADATA: text}))


def _component_path(component: str, path: str) -> str:
    return lora_files.with_text_model(path) if component.startswith("text_encoder") else path


def _diffusers_names(component: str, paths: Collection[str]) -> dict[str, tuple[str, str]]:
    """What follows each path in a key: the ends for lora_A and lora_B.

    diffusers has names of its own for attention projections and peft's for all other layers, but
    reads that mixture only in part: it takes the first key of a UNet for all of them, and a text
    encoder without an attention projection is refused. So a UNet gets peft's names unless only
    attention is adapted, and a text encoder diffusers' names where it has no attention adapted.
    """
    peft_names = (".lora_A.weight", ".lora_B.weight")
    if component.startswith("text_encoder"):
        own = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
        attention = {path for path in paths if path.rpartition(".")[2] in _TEXT_ATTENTION}
        return {path: own if path in attention or not attention else peft_names for path in paths}
    own = (".lora.down.weight", ".lora.up.weight")
    is_attention = all(path.endswith(_ATTENTION) for path in paths)
    return dict.fromkeys(paths, own if is_attention else peft_names)
