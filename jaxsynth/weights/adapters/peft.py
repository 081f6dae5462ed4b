"""peft's adapter folders, one network each: `adapter_config.json` and `adapter_model.safetensors`.

LoRA and DoRA are here, with biases trained beside them (BitFit) and whole modules saved beside them
(`modules_to_save`); all other kinds are in `peft_kinds`. `adapter_model.bin`, peft's format until
2023, is read too. Files are the same bytes for the same state.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.inject import AdapterState
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core import io
from jaxsynth.core.documents import read_json, take
from jaxsynth.core.errors import UserError, shown
from jaxsynth.core.patterns import in_file
from jaxsynth.weights import hub
from jaxsynth.weights.adapters import (
    factors,
    lora_files,
    peft_kinds,
    peft_settings,
    tensor_files,
)
from jaxsynth.weights.adapters.layer_names import TEXT_MODEL

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"

_PREFIX = "base_model.model."
_PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
# The first names of a text encoder's layers since transformers 5.6.
_TEXT_PATHS = ("encoder.layers.", "embeddings.token_embedding", "embeddings.position_embedding")
_WHOLE = ("kernel", "scale", "embedding")


def read_peft(
    folder: str | Path, model: nnx.Module | None = None, *, targets: Collection[str] = ()
) -> AdapterState:
    """The state of a peft folder.

    `model`, the network that it is for, is needed where a file does not tell all: convolutions with
    flattened factors (LoHa, LoKr, AdaLoRA), and VeRA, which is read as LoRA unless its projections
    are those that we draw. `targets` are needed for prompts and prefixes, whose places no file
    tells. Paths of a text encoder start with "text_model.", whichever transformers wrote them.

    Raises UserError for a missing file, a kind or a setting that is not implemented, an unknown
    key, a key of another kind, a factor without its partner, or a rank other than the
    configuration's.
    """
    folder = Path(folder)
    where = folder / PEFT_CONFIG
    if not where.is_file():
        raise UserError(f"{folder}: no {PEFT_CONFIG}; expected a peft adapter folder")
    source = weights_of(folder)
    fields = read_json(where)
    tensors, _ = tensor_files.load(source)
    kind = take(fields, "peft_type", str, where, "LORA")
    is_prompt = kind in ("PROMPT_TUNING", "PREFIX_TUNING")
    if kind == "LORA":
        lora_files.refuse_other_kinds(tensors, source)
    found = {}
    for key, value in tensors.items():
        # VeRA's projections, and prompts, belong to no layer.
        start = "base_model." if key in _PROJECTIONS else "" if is_prompt else _PREFIX
        if not key.startswith(start):
            raise UserError(f"{source}: key {key} does not start with {start!r}")
        found[lora_files.canonical(key.removeprefix(start))] = value
    prefix = _missing_prefix(found, model)
    old_names = {f"{prefix}{key}" if key.startswith(_TEXT_PATHS) else key: key for key in found}
    found = {new: found[old] for new, old in old_names.items()}
    saved = _take_saved(found, fields, model, where)
    biases = _take_biases(found, fields, where)
    fields = {name: x for name, x in fields.items() if name not in ("bias", "modules_to_save")}
    with in_file(where):
        if kind == "LORA":
            state = _lora(fields, found, prefix, where, source)
        else:
            state = peft_kinds.from_peft(fields, found, source, model, targets, prefix)
    return AdapterState({**state.arrays, **biases, **saved}, state.config)


def weights_of(folder: Path) -> Path:
    """The file of a peft folder that holds the weights."""
    for name in (PEFT_WEIGHTS, TORCH_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {PEFT_WEIGHTS}; expected a peft adapter folder")


def _lora(
    fields: dict[str, Any], found: Mapping[str, np.ndarray], prefix: str, where: Path, source: Path
) -> AdapterState:
    pairs = {lora_files.parse(f"{_PREFIX}{key}", key, source): x for key, x in found.items()}
    names = {path.removeprefix(prefix): path for path, _ in pairs}
    config = lora_files.config_from_peft(fields, where, list(names))
    biases = sum(factor == "bias" for _, factor in pairs)
    if biases and not config.bias:
        raise UserError(f"{where}: lora_bias is False, and the weights hold {biases} lora_B.bias")
    config = lora_files.renamed(config, names)
    return AdapterState(lora_files.arrays_of(pairs, config, source), config)


def _missing_prefix(keys: Collection[str], model: nnx.Module | None) -> str:
    """What transformers >= 5.6 leaves out at the start of an encoder's names; "" where nothing."""
    if not any(key.startswith(_TEXT_PATHS) for key in keys):
        return ""
    if model is None:
        return TEXT_MODEL
    paths = list(inject.layers(model))
    if any(path.startswith(_TEXT_PATHS) for path in paths):
        return ""
    found = {path.partition(".")[0] for path in paths if f".{_TEXT_PATHS[0]}" in path}
    return TEXT_MODEL if f"{TEXT_MODEL[:-1]}" in found else f"{min(found)}." if found else ""


def _take_saved(
    tensors: dict[str, np.ndarray], fields: dict[str, Any], model: nnx.Module | None, source: Path
) -> dict[str, jnp.ndarray]:
    """The tensors of whole modules that were trained and saved, taken out of `tensors`."""
    modules = fields.get("modules_to_save") or ()
    if isinstance(modules, str) or not all(isinstance(name, str) for name in modules):
        raise UserError(f"{source}: modules_to_save is {shown(modules)}, expected a list of names")
    if not modules:
        return {}
    layers = {} if model is None else inject.layers(model)
    saved = {}
    for key in list(tensors):
        path, _, end = key.rpartition(".")
        outer = path.split(".")
        inside = any(
            inject.matches(name, ".".join(outer[: i + 1]))
            for name in modules
            for i in range(len(outer))
        )
        if end not in ("weight", "bias") or not inside or ".lora_" in f".{path}":
            continue
        value = tensors.pop(key)
        name = "bias" if end == "bias" else _weight_name(path, value, layers.get(path))
        if name == "kernel":
            value = factors.from_torch("kernel", value)
        saved[f"{path}.{name}"] = jnp.asarray(value, jnp.float32)
    if not saved:
        raise UserError(
            f"{source}: modules_to_save is {list(modules)}, and the weights hold no tensor of them"
        )
    return saved


def _weight_name(path: str, value: np.ndarray, layer: nnx.Module | None) -> str:
    """What NNX calls a layer's weight."""
    for name in _WHOLE:
        if getattr(layer, name, None) is not None:
            return name
    if value.ndim == 1:
        return "scale"
    return "embedding" if "embedding" in path.rpartition(".")[2] else "kernel"


def _take_biases(
    tensors: dict[str, np.ndarray], fields: dict[str, Any], source: Path
) -> dict[str, jnp.ndarray]:
    """The biases that were trained beside an adapter, taken out of `tensors`."""
    setting = fields.get("bias", "none")
    allowed = ("none", "all", peft_settings.BIASES.get(fields.get("peft_type", "LORA"), "none"))
    if setting not in allowed:
        raise UserError(f"{source}: bias is {shown(setting)}, expected one of {allowed}")
    keys = [key for key in tensors if key.endswith(".bias") and not key.endswith(".lora_B.bias")]
    if bool(keys) != (setting != "none"):
        raise UserError(
            f"{source}: bias is {shown(setting)}, and the weights hold {len(keys)} biases"
        )
    return {
        key.replace(".base_layer.bias", ".bias"): jnp.asarray(tensors.pop(key), jnp.float32)
        for key in keys
    }


def write_peft(
    folder: str | Path,
    state: AdapterState,
    *,
    model: nnx.Module | None = None,
    base_model: str | None = None,
) -> None:
    """Writes a state as a peft folder; `base_model` is the id or path of its base network.

    Biases in the state are written as peft's `bias="all"` (or "lora_only" where all are of adapted
    layers), whole layers as its `modules_to_save`. A text encoder's keys have "text_model.", and
    its patterns match with and without; transformers >= 5.6, whose CLIPTextModel has lost the name,
    reads them with `PeftModel.from_pretrained(..., key_mapping={r"^text_model\\.": ""})`. `model`,
    the network, plain or adapted, tells which layers are convolutions ((IA)^3, OFT) and their sizes
    (VeRA). Raises ValueError naming what peft has no form for.
    """
    folder = Path(folder)
    if state.config is None:
        raise TypeError("peft's folders are of adapters: expected the state of one, found NoneType")
    if isinstance(state.config, inject.MixedConfig):
        kinds = " and ".join(type(x).__name__.removesuffix("Config") for x in state.config.parts)
        raise ValueError(f"a peft folder is of one kind and setting, found {kinds}")
    saved = {name for name in state.arrays if name.rpartition(".")[2] in _WHOLE}
    whole = {name.rpartition(".")[0] for name in saved}
    saved |= {f"{path}.bias" for path in whole} & state.arrays.keys()
    biases = {n for n in state.arrays if n.endswith(".bias") and n not in saved}
    own = {name: x for name, x in state.arrays.items() if name not in saved | biases}
    wrapped = {name.rpartition(".")[0] for name in own}
    state = AdapterState(state.arrays, lora_files.for_both_names(state.config, wrapped))
    adapter = dataclasses.replace(state, arrays=own)
    shared: dict[str, np.ndarray] = {}
    if isinstance(state.config, LoRAConfig):
        fields = lora_files.config_to_peft(state.config)
        tensors = {
            f"{path}{lora_files.peft_name(factor)}": value
            for (path, factor), value in lora_files.torch_tensors(adapter).items()
        }
    else:
        fields, tensors, shared = peft_kinds.to_peft(adapter, model)
    if biases:
        kind = fields["peft_type"]
        if kind not in peft_settings.BIASES:
            raise ValueError(f"{min(biases)}: peft trains no biases beside {kind}")
        only = all(name.removesuffix(".bias") in wrapped for name in biases)
        fields["bias"] = peft_settings.BIASES[kind] if only else "all"
    for name in biases:
        path = name.removesuffix(".bias")
        end = "base_layer.bias" if path in wrapped else "bias"
        tensors[f"{path}.{end}"] = np.asarray(state.arrays[name])
    if whole:
        fields["modules_to_save"] = sorted(whole)
    for name in saved:
        path, _, end = name.rpartition(".")
        value = np.asarray(state.arrays[name])
        value = factors.to_torch("kernel", value) if end == "kernel" else value
        tensors[f"{path}.{'bias' if end == 'bias' else 'weight'}"] = value
    start = "" if "prompt_embeddings" in shared else "base_model."
    named = {f"{_PREFIX}{name}": value for name, value in tensors.items()}
    named |= {f"{start}{name}": value for name, value in shared.items()}
    wide = {name: np.asarray(value, np.float32) for name, value in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration comes last: a folder that has it is complete.
    io.write_bytes(folder / PEFT_WEIGHTS, hub.to_bytes(wide, {"format": "pt"}))
    plain = {"auto_mapping": None, "inference_mode": True, "task_type": None}
    fields = {**plain, **fields, "base_model_name_or_path": base_model}
    io.write_json(folder / PEFT_CONFIG, fields, indent=2, sort_keys=True)
