"""Adapter files: states to and from peft's folder and diffusers' single file.

- peft: `adapter_config.json` and `adapter_model.safetensors`, one network a folder. LoRA and DoRA
  are here, with biases trained beside them (BitFit); all other kinds in `peft_kinds`.
- diffusers: `pytorch_lora_weights.safetensors`, several networks ("unet", "text_encoder") by
  prefix, their configurations in the metadata.

Names and semantics are those that peft 0.21 and diffusers 0.42 write and read; the tests load every
file in both directions. Reading is strict, because a key that peers skip silently is an adapter
that does not act. Files are written to a temporary name and renamed, and are the same bytes for the
same state.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import (
    AdapterState,
    inject,
    load_state,
    mark_trainable,
    matches,
    parameters,
    trainable_variables,
)
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import replacing
from jaxsynth.weights import hub
from jaxsynth.weights.adapters import factors, peft_settings
from jaxsynth.weights.adapters import peft as peft_kinds
from jaxsynth.weights.adapters.components import COMPONENTS
from jaxsynth.weights.safetensors import opened

Model = TypeVar("Model", bound=nnx.Module)

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

_PEFT_PREFIX = "base_model.model."
_PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
_METADATA = "lora_adapter_metadata"

_FACTORS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}
# diffusers before 0.20: the attention processors held the adapters.
_LEGACY = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_OTHER_KINDS = {
    "LyCORIS DoRA": r"\.dora_scale$",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "IA3": r"\.ia3_",
    "AdaLoRA": r"\.lora_E$",
    "OFT": r"\.(oft_R|oft_blocks|boft_R|boft_s)",
    "LoCon (Tucker)": r"\.lora_mid\.",
    "kohya-format": r"\.(lora_down|lora_up)\.weight$",
}
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

# Initialisations that leave the base weights as they are; others (pissa, olora, ...) change them.
_INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian", "orthogonal": "kaiming"}


def attach(model: Model, state: AdapterState) -> Model:
    """A copy of `model` with the adapter of `state` wrapped around its targets and filled in.

    Parameters of the network's own that the state holds (biases) are `Trainable` in it. Raises
    UserError where the targets and the state's keys, or any two shapes, do not agree.
    """
    try:
        adapted = model
        if state.config is not None:
            # The initial values are all replaced: any key will do.
            make = registry.maker(state.config)
            adapted = inject(model, make, targets=state.config.targets, rngs=nnx.Rngs(0))
        own = (state.arrays.keys() & parameters(adapted)) - trainable_variables(adapted).keys()
        if own:
            adapted = mark_trainable(adapted, [f"^{re.escape(name)}$" for name in sorted(own)])
        return load_state(adapted, state)
    except (TypeError, ValueError) as error:
        raise UserError(f"the adapter does not fit this network: {error}") from error


def read_peft(
    folder: str | Path, model: nnx.Module | None = None, *, targets: Collection[str] = ()
) -> AdapterState:
    """The state of a peft folder.

    `model`, the network that it is for, is needed where a file does not tell all: convolutions with
    flattened factors (LoHa, LoKr, AdaLoRA), and VeRA, which is read as LoRA unless its projections
    are those that we draw. `targets` are needed for prompts and prefixes, whose places no file
    tells.

    Raises UserError for a missing file, a kind or a setting that is not implemented, an unknown
    key, a key of another kind, a factor without its partner, or a rank other than the
    configuration's.
    """
    folder = Path(folder)
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; expected a peft adapter folder")
    where = folder / PEFT_CONFIG
    fields = read_json(where)
    source = folder / PEFT_WEIGHTS
    tensors, _ = _read_safetensors(source)
    kind = fields.get("peft_type", "LORA")
    is_prompt = kind in ("PROMPT_TUNING", "PREFIX_TUNING")
    if kind == "LORA":
        _refuse_other_kinds(tensors, source)
    found = {}
    for key, value in tensors.items():
        # VeRA's projections, and prompts, belong to no layer.
        start = "base_model." if key in _PROJECTIONS else "" if is_prompt else _PEFT_PREFIX
        if not key.startswith(start):
            raise UserError(f"{source}: key {key} does not start with {start!r}")
        found[key.removeprefix(start)] = value
    biases = _take_biases(found, fields, where)
    if kind == "LORA":
        pairs = {_parse(f"{_PEFT_PREFIX}{key}", key, source): x for key, x in found.items()}
        config = _config_from_peft(fields, where)
        state = AdapterState(_arrays(pairs, config, source), config)
    else:
        fields = {name: value for name, value in fields.items() if name != "bias"}
        state = peft_kinds.from_peft(fields, found, source, model, targets)
    return AdapterState({**state.arrays, **biases}, state.config)


def _take_biases(
    tensors: dict[str, np.ndarray], fields: dict[str, Any], source: Path
) -> dict[str, jnp.ndarray]:
    """The biases that were trained beside an adapter, taken out of `tensors`."""
    setting = fields.get("bias", "none")
    allowed = ("none", "all", peft_settings.BIASES.get(fields.get("peft_type", "LORA"), "none"))
    if setting not in allowed:
        raise UserError(f"{source}: bias is {setting!r}, expected one of {allowed}")
    keys = [key for key in tensors if key.endswith(".bias")]
    if bool(keys) != (setting != "none"):
        raise UserError(f"{source}: bias is {setting!r}, and the weights hold {len(keys)} biases")
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
    layers). `model`, the network, plain or adapted, tells which layers are convolutions ((IA)^3,
    OFT) and their sizes (VeRA). Raises ValueError naming what peft has no form for.
    """
    folder = Path(folder)
    if state.config is None:
        raise TypeError("peft's folders are of adapters: expected the state of one, found NoneType")
    biases = {name: x for name, x in state.arrays.items() if name.endswith(".bias")}
    own = AdapterState({n: x for n, x in state.arrays.items() if n not in biases}, state.config)
    shared: dict[str, np.ndarray] = {}
    if isinstance(state.config, LoRAConfig):
        fields = _config_to_peft(state.config)
        tensors = {
            f"{path}{_peft_name(factor)}": value
            for (path, factor), value in _torch_tensors(own).items()
        }
    else:
        fields, tensors, shared = peft_kinds.to_peft(own, model)
    wrapped = {name.rpartition(".")[0] for name in own.arrays}
    if biases:
        kind = fields["peft_type"]
        if kind not in peft_settings.BIASES:
            raise ValueError(f"{sorted(biases)[0]}: peft trains no biases beside {kind}")
        only = all(name.removesuffix(".bias") in wrapped for name in biases)
        fields["bias"] = peft_settings.BIASES[kind] if only else "all"
    for name, value in biases.items():
        path = name.removesuffix(".bias")
        end = "base_layer.bias" if path in wrapped else "bias"
        tensors[f"{path}.{end}"] = np.asarray(value)
    start = "" if "prompt_embeddings" in shared else "base_model."
    named = {f"{_PEFT_PREFIX}{name}": value for name, value in tensors.items()}
    named |= {f"{start}{name}": value for name, value in shared.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration comes last: a folder that has it is complete.
    _write(folder / PEFT_WEIGHTS, hub.to_bytes(_wide(named), {"format": "pt"}))
    plain = {"auto_mapping": None, "inference_mode": True, "task_type": None}
    fields = {**plain, **fields, "base_model_name_or_path": base_model}
    hub.write_json(folder / PEFT_CONFIG, fields)


def read_diffusers(path: str | Path) -> dict[str, AdapterState]:
    """The LoRA states of a diffusers file (or a folder with one), by component name.

    Keys without a component, as `unet.save_lora_adapter` writes them, are the UNet's. Text encoder
    paths always start with "text_model.", whichever transformers wrote them. Without a
    configuration in the metadata, alpha is the rank. Raises UserError as `read_peft` does.
    """
    source = Path(path)
    source = source / DIFFUSERS_WEIGHTS if source.is_dir() else source
    if not source.is_file():
        raise UserError(f"{source}: no such file; expected a diffusers LoRA file")
    tensors, metadata = _read_safetensors(source)
    _refuse_other_kinds(tensors, source)
    try:
        fields = json.loads(metadata.get(_METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: metadata {_METADATA} is not JSON: {error}") from None
    prefixed = any(key.split(".")[0] in COMPONENTS for key in tensors)
    if not prefixed:
        fields = {f"unet.{name}": value for name, value in fields.items()}

    found: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for key, value in tensors.items():
        component, rest = key.split(".", 1) if prefixed else ("unet", key)
        if component not in COMPONENTS:
            raise UserError(f"{source}: key {key} starts with none of the components {COMPONENTS}")
        name, factor = _parse(key, rest, source)
        pair = (_component_path(component, name), factor)
        if pair in found.setdefault(component, {}):
            raise UserError(f"{source}: key {key} gives {pair[0]}.{factor} a second time")
        found[component][pair] = value

    states = {}
    for component, pairs in found.items():
        own = {
            name.removeprefix(f"{component}."): value
            for name, value in fields.items()
            if name.startswith(f"{component}.")
        }
        where = f"{source} ({component})"
        config = _config_from_peft(own, where) if own else _inferred_config(pairs, where)
        states[component] = AdapterState(_arrays(pairs, config, where), config)
    return states


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
            for (path, factor), value in _torch_tensors(state).items()
        }
        ends = _diffusers_names(component, {path for path, _ in factors})
        for (path, factor), value in factors.items():
            names_of = dict(zip(("lora_A", "lora_B"), ends[path], strict=True))
            end = names_of.get(factor, _peft_name(factor))
            tensors[f"{component}.{path}{end}"] = value
        for field, value in _config_to_peft(state.config).items():
            fields[f"{component}.{field}"] = value
    target = Path(target)
    if target.suffix != ".safetensors":
        target.mkdir(parents=True, exist_ok=True)
        target = target / DIFFUSERS_WEIGHTS
    _write(target, hub.to_bytes(_wide(tensors), {"format": "pt", _METADATA: _json(fields)}))


def _component_path(component: str, path: str) -> str:
    """transformers >= 5.6 drops "text_model." from names; every reader understands it."""
    is_text = component.startswith("text_encoder")
    if not is_text or path.startswith(("text_model.", "text_projection")):
        return path
    return f"text_model.{path}"


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


def _peft_name(factor: str) -> str:
    if factor == "magnitude":
        return ".lora_magnitude_vector"
    return f".{factor}" if factor.startswith("lora_embedding_") else f".{factor}.weight"


def _parse(key: str, name: str, source: Path) -> tuple[str, str]:
    """(module path, factor) of a key without its prefix."""
    legacy = _LEGACY.fullmatch(name)
    if legacy:
        parent, layer, direction = legacy.groups()
        layer = "to_out.0" if layer == "to_out" else layer
        return f"{parent}.{layer}", {"down": "lora_A", "up": "lora_B"}[direction]
    for suffix, factor in _FACTORS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), factor
    raise UserError(f"{source}: unknown key {key}")


def _refuse_other_kinds(tensors: dict[str, Any], source: Path) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        for key in tensors:
            if re.search(pattern, key):
                raise UserError(
                    f"{source}: key {key} is of a {kind} adapter; expected a LoRA of peft or "
                    "diffusers"
                )


def _arrays(found: dict[tuple[str, str], np.ndarray], config: LoRAConfig, source: Any) -> dict:
    """The factors in NNX's layout and float32, checked against each other and the configuration."""
    if not found:
        raise UserError(f"{source}: holds no LoRA factors")
    arrays = {}
    for path in sorted({path for path, _ in found}):
        pair = [f"{'lora_embedding_' if _is_table(path, found) else 'lora_'}{end}" for end in "AB"]
        for factor in pair:
            if (path, factor) not in found:
                raise UserError(f"{source}: {path} has no {factor}")
        down, up = (found[path, factor] for factor in pair)
        rank = config.rank_at(path)
        if (
            down.ndim not in (2, 3, 4, 5)
            or up.ndim != down.ndim
            or (down.shape[0], up.shape[1]) != (rank, rank)
            or math.prod(up.shape[2:]) != 1
        ):
            raise UserError(
                f"{source}: {path} has factors of shapes {down.shape} and {up.shape}, expected "
                f"({rank}, in) and (out, {rank}), or the convolutions ({rank}, in, kh, kw) and "
                f"(out, {rank}, 1, 1)"
            )
        if not any(matches(target, path) for target in config.targets):
            raise UserError(f"{source}: {path} is not among the targets {config.targets}")
        for factor, value in zip(pair, (down, up), strict=True):
            arrays[f"{path}.{factor}"] = jnp.asarray(factors.from_torch(factor, value), jnp.float32)
        magnitude = found.get((path, "magnitude"))
        if (magnitude is None) == (config.decompose == "output"):
            expected = "one" if magnitude is None else "none"
            raise UserError(
                f"{source}: {path} has {'no' if magnitude is None else 'a'} magnitude vector, "
                f"expected {expected}: use_dora is {magnitude is None}"
            )
        if magnitude is not None:
            if magnitude.size != up.shape[0]:
                raise UserError(
                    f"{source}: {path} has a magnitude vector of shape {magnitude.shape}, expected "
                    f"{up.shape[0]} values"
                )
            arrays[f"{path}.magnitude"] = jnp.asarray(magnitude.ravel(), jnp.float32)
    return arrays


def _is_table(path: str, found: dict[tuple[str, str], np.ndarray]) -> bool:
    return (path, "lora_embedding_A") in found or (path, "lora_embedding_B") in found


def _torch_tensors(state: AdapterState) -> dict[tuple[str, str], np.ndarray]:
    """The factors in torch's layout, float32, by (path, factor)."""
    config = state.config
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"expected the state of a LoRA, found {type(config).__name__}")
    if config.init in ("pissa", "olora"):
        raise ValueError("a LoRA that started from W has factors beside it: write `as_lora` of it")
    if config.decompose == "input":
        raise ValueError("peft and diffusers have DoRA's magnitudes for outputs, not for inputs")
    tensors = {}
    for key, value in sorted(state.arrays.items()):
        path, _, factor = key.rpartition(".")
        value = np.asarray(value, np.float32)
        if factor == "magnitude":
            axes = (
                state.arrays[f"{path}.lora_A"].ndim - 2 if f"{path}.lora_A" in state.arrays else 0
            )
            tensors[path, factor] = value.reshape(1, -1, *(1,) * axes) if axes else value
            continue
        if factor not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            raise ValueError(f"{key}: a LoRA file holds lora_A and lora_B, not {factor}")
        if value.ndim < 2 or (factor.endswith("_B") and math.prod(value.shape[:-2]) != 1):
            raise ValueError(
                f"{key} has shape {value.shape}: expected a matrix, or one pointwise convolution "
                "(unstack a stacked state)"
            )
        tensors[path, factor] = factors.to_torch(factor, value)
    # What the reader would refuse must not be written.
    _arrays(tensors, config, "adapter state")
    return tensors


def _config_from_peft(fields: dict[str, Any], source: Any) -> LoRAConfig:
    """A LoRAConfig from peft's fields; a setting that is not implemented is an error."""
    taken = peft_settings.Fields(fields, source)
    taken.take("bias")
    init = taken.expect("init_lora_weights", tuple(_INITS))
    try:
        config = LoRAConfig(
            **peft_settings.ranked(taken, "lora_alpha"),
            dropout=taken.take("lora_dropout", 0.0),
            use_rslora=taken.take("use_rslora", False),
            decompose="output" if taken.take("use_dora", False) else "none",
            init=_INITS[init],
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error
    taken.finish()
    return config


def _config_to_peft(config: LoRAConfig) -> dict[str, Any]:
    """The fields of peft's LoraConfig that its readers need."""
    return {
        **peft_settings.patterns(config),
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if config.init == "kaiming" else config.init,
        "lora_alpha": peft_settings.alpha_of(config),
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": peft_settings.targets_of(config.targets),
        "task_type": None,
        "use_dora": config.decompose == "output",
        "use_rslora": config.use_rslora,
    }


def _inferred_config(factors: dict[tuple[str, str], np.ndarray], source: str) -> LoRAConfig:
    """The configuration of a file without one: the ranks of its factors, and alpha = rank."""
    ranks = {
        path: value.shape[0] for (path, factor), value in factors.items() if factor == "lora_A"
    }
    if not ranks:
        raise UserError(f"{source}: {next(iter(factors))[0]} has no lora_A")
    # Of equally common ranks the smaller, so that the result does not depend on the file's order.
    rank = max(sorted(Counter(ranks.values()).items()), key=lambda item: item[1])[0]
    others = {f"^{re.escape(path)}": own for path, own in sorted(ranks.items()) if own != rank}
    return LoRAConfig(
        rank=rank,
        alpha=rank,
        targets=tuple(sorted({path for path, _ in factors})),
        rank_pattern=others,
        alpha_pattern=dict(others),
        decompose="output" if any(f == "magnitude" for _, f in factors) else "none",
    )


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, sort_keys=True)


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with opened(path) as file:
        return file.adapter(), file.metadata


def _wide(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)
