"""Adapter files: LoRA states to and from peft's folder and diffusers' single file.

- peft: `adapter_config.json` and `adapter_model.safetensors`, one network a folder.
- diffusers: `pytorch_lora_weights.safetensors`, several networks ("unet", "text_encoder") by
  prefix, their configurations in the metadata.

Names and semantics are those that peft 0.21 and diffusers 0.42 write and read; the tests load every
file in both directions. Reading is strict, because a key that peers skip silently is an adapter
that does not act. Files are written to a temporary name and renamed, and are the same bytes for the
same state.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jaxsynth.adapters.base import AdapterState, Maker, inject, load_state, matches
from jaxsynth.adapters.lora import LoRAConfig, lora

Model = TypeVar("Model", bound=nnx.Module)

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

_PEFT_PREFIX = "base_model.model."
_METADATA = "lora_adapter_metadata"
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer")
_MAKERS: dict[type, Callable[[Any], Maker]] = {LoRAConfig: lora}

_FACTORS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
}
# diffusers before 0.20: the attention processors held the adapters.
_LEGACY = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_OTHER_KINDS = {
    "DoRA": r"\.(lora_magnitude_vector|dora_scale)(\.|$)",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "IA3": r"\.ia3_",
    "AdaLoRA": r"\.lora_E$",
    "OFT": r"\.(oft_R|oft_blocks|boft_R|boft_s)",
    "LoRA embedding": r"\.lora_embedding_[AB]$",
    "LoCon (Tucker)": r"\.lora_mid\.",
    "kohya-format": r"\.(lora_down|lora_up)\.weight$",
}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

# Fields of peft's LoraConfig that do not change what an adapter computes once it is trained.
_IRRELEVANT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# Initialisations that leave the base weights as they are; others (pissa, olora, ...) change them.
_INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian", "orthogonal": "kaiming"}


def attach(model: Model, state: AdapterState) -> Model:
    """A copy of `model` with the adapter of `state` wrapped around its targets and filled in.

    Raises ValueError where the targets and the state's keys, or any two shapes, do not agree.
    """
    if type(state.config) not in _MAKERS:
        raise TypeError(f"attach: cannot make adapters of a {type(state.config).__name__}")
    make = _MAKERS[type(state.config)](state.config)
    # The initial values are all replaced: any key will do.
    adapted = inject(model, make, targets=state.config.targets, rngs=nnx.Rngs(0))
    return load_state(adapted, state)


def read_peft(folder: str | Path) -> AdapterState:
    """The LoRA state of a peft folder.

    Raises:
        FileNotFoundError: the folder lacks one of its two files.
        ValueError: another kind of adapter, a setting that this reader does not implement, an
            unknown key, a factor without its partner, or a rank other than the configuration's.
    """
    folder = Path(folder)
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; expected a peft adapter folder")
    text = (folder / PEFT_CONFIG).read_text(encoding="utf-8")
    fields = _parse_json(text, folder / PEFT_CONFIG)
    config = _config_from_peft(fields, folder / PEFT_CONFIG)
    source = folder / PEFT_WEIGHTS
    tensors, _ = _read_safetensors(source)
    _refuse_other_kinds(tensors, source)
    found = {}
    for key, value in tensors.items():
        if not key.startswith(_PEFT_PREFIX):
            raise ValueError(f"{source}: key {key} does not start with {_PEFT_PREFIX!r}")
        found[_parse(key, key.removeprefix(_PEFT_PREFIX), source)] = value
    return AdapterState(_arrays(found, config, source), config)


def write_peft(folder: str | Path, state: AdapterState, *, base_model: str | None = None) -> None:
    """Writes a LoRA state as a peft folder; `base_model` is the id or path of its base network."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PEFT_PREFIX}{path}.{factor}.weight": value
        for (path, factor), value in _torch_tensors(state).items()
    }
    fields = {**_config_to_peft(state.config), "base_model_name_or_path": base_model}
    # The configuration comes last: a folder that has it is complete.
    _write(folder / PEFT_WEIGHTS, _safetensors(tensors, {"format": "pt"}))
    _write(folder / PEFT_CONFIG, (_json(fields) + "\n").encode())


def read_diffusers(path: str | Path) -> dict[str, AdapterState]:
    """The LoRA states of a diffusers file (or a folder with one), by component name.

    Keys without a component, as `unet.save_lora_adapter` writes them, are the UNet's. Text encoder
    paths always start with "text_model.", whichever transformers wrote them. Without a
    configuration in the metadata, alpha is the rank. Raises ValueError as `read_peft` does.
    """
    source = Path(path)
    source = source / DIFFUSERS_WEIGHTS if source.is_dir() else source
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; expected a diffusers LoRA file")
    tensors, metadata = _read_safetensors(source)
    _refuse_other_kinds(tensors, source)
    fields = _parse_json(metadata.get(_METADATA, "{}"), f"{source}, metadata {_METADATA}")
    prefixed = any(key.split(".")[0] in _COMPONENTS for key in tensors)
    if not prefixed:
        fields = {f"unet.{name}": value for name, value in fields.items()}

    found: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for key, value in tensors.items():
        component, rest = key.split(".", 1) if prefixed else ("unet", key)
        if component not in _COMPONENTS:
            raise ValueError(
                f"{source}: key {key} starts with none of the components {_COMPONENTS}"
            )
        name, factor = _parse(key, rest, source)
        pair = (_component_path(component, name), factor)
        if pair in found.setdefault(component, {}):
            raise ValueError(f"{source}: key {key} gives {pair[0]}.{factor} a second time")
        found[component][pair] = value

    states = {}
    for component, factors in found.items():
        own = {
            name.removeprefix(f"{component}."): value
            for name, value in fields.items()
            if name.startswith(f"{component}.")
        }
        where = f"{source} ({component})"
        config = _config_from_peft(own, where) if own else _inferred_config(factors)
        states[component] = AdapterState(_arrays(factors, config, where), config)
    return states


def write_diffusers(path: str | Path, states: dict[str, AdapterState]) -> None:
    """Writes LoRA states by component ("unet", "text_encoder") as the file of a pipeline.

    `path` is the file, or a folder that gets `pytorch_lora_weights.safetensors`.
    """
    tensors, fields = {}, {}
    for component, state in states.items():
        if component not in _COMPONENTS:
            raise ValueError(f"component {component!r}: expected one of {_COMPONENTS}")
        for (name, factor), value in _torch_tensors(state).items():
            name = _component_path(component, name)
            tensors[f"{component}.{name}{_diffusers_suffix(name, factor)}"] = value
        for field, value in _config_to_peft(state.config).items():
            fields[f"{component}.{field}"] = value
    path = Path(path)
    if path.suffix != ".safetensors":
        path.mkdir(parents=True, exist_ok=True)
        path = path / DIFFUSERS_WEIGHTS
    _write(path, _safetensors(tensors, {"format": "pt", _METADATA: _json(fields)}))


def _component_path(component: str, path: str) -> str:
    """transformers >= 5.6 drops "text_model." from names; every reader understands it."""
    is_text = component.startswith("text_encoder")
    if not is_text or path.startswith(("text_model.", "text_projection")):
        return path
    return f"text_model.{path}"


def _diffusers_suffix(path: str, factor: str) -> str:
    """diffusers names the factors of attention projections otherwise than all others."""
    direction = {"lora_A": "down", "lora_B": "up"}[factor]
    if path.endswith(tuple(f".{name}" for name in _ATTENTION)):
        return f".lora.{direction}.weight"
    if path.endswith(tuple(f".{name}" for name in _TEXT_ATTENTION)):
        return f".lora_linear_layer.{direction}.weight"
    return f".{factor}.weight"


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
    raise ValueError(f"{source}: unknown key {key}")


def _refuse_other_kinds(tensors: dict[str, Any], source: Path) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        for key in tensors:
            if re.search(pattern, key):
                raise ValueError(
                    f"{source}: key {key} is of a {kind} adapter; expected a LoRA of peft or "
                    "diffusers"
                )


def _arrays(found: dict[tuple[str, str], np.ndarray], config: LoRAConfig, source: Any) -> dict:
    """The factors in NNX's layout and float32, checked against each other and the configuration."""
    if not found:
        raise ValueError(f"{source}: holds no LoRA factors")
    arrays = {}
    for path in sorted({path for path, _ in found}):
        for factor in ("lora_A", "lora_B"):
            if (path, factor) not in found:
                raise ValueError(f"{source}: {path} has no {factor}")
        down, up = found[path, "lora_A"], found[path, "lora_B"]
        rank = config.rank_at(path)
        if (
            down.ndim not in (2, 4)
            or up.ndim != down.ndim
            or (down.shape[0], up.shape[1]) != (rank, rank)
            or up.shape[2:] not in ((), (1, 1))
        ):
            raise ValueError(
                f"{source}: {path} has factors of shapes {down.shape} and {up.shape}, expected "
                f"({rank}, in) and (out, {rank}), or the convolutions ({rank}, in, kh, kw) and "
                f"(out, {rank}, 1, 1)"
            )
        if not any(matches(target, path) for target in config.targets):
            raise ValueError(f"{source}: {path} is not among the targets {config.targets}")
        for factor, value in (("lora_A", down), ("lora_B", up)):
            moved = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
            arrays[f"{path}.{factor}"] = jnp.asarray(moved, jnp.float32)
    return arrays


def _torch_tensors(state: AdapterState) -> dict[tuple[str, str], np.ndarray]:
    """The factors in torch's layout, float32, by (path, factor)."""
    config = state.config
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"expected the state of a LoRA, found {type(config).__name__}")
    tensors = {}
    for key, value in sorted(state.arrays.items()):
        path, _, factor = key.rpartition(".")
        value = np.asarray(value, np.float32)
        if factor not in ("lora_A", "lora_B"):
            raise ValueError(f"{key}: a LoRA file holds lora_A and lora_B, not {factor}")
        if value.ndim not in (2, 4):
            raise ValueError(
                f"{key} has shape {value.shape}: expected 2 or 4 axes (unstack a stacked state)"
            )
        moved = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)
        tensors[path, factor] = np.ascontiguousarray(moved)
    # What the reader would refuse must not be written.
    _arrays(tensors, config, "adapter state")
    return tensors


def _config_from_peft(fields: dict[str, Any], source: Any) -> LoRAConfig:
    """A LoRAConfig from peft's fields; a setting that is not implemented is an error."""
    fields = dict(fields)
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{source}: peft_type is {kind}, expected LORA")
    targets = fields.pop("target_modules", None)
    if not targets:
        raise ValueError(f"{source}: target_modules is {targets!r}, expected names or a pattern")
    init = fields.pop("init_lora_weights", True)
    if init not in _INITS:
        raise ValueError(f"{source}: init_lora_weights {init!r}, expected one of {list(_INITS)}")
    bias = fields.pop("bias", "none")
    if bias != "none":
        raise ValueError(f"{source}: bias is {bias!r}, expected 'none'")
    rank = fields.pop("r", 8)
    config = LoRAConfig(
        rank=rank,
        alpha=fields.pop("lora_alpha", 8) or rank,
        dropout=fields.pop("lora_dropout", 0.0),
        # A string is a pattern for the whole path, where a listed name may be the end of one.
        targets=(f"^(?:{targets})$",) if isinstance(targets, str) else tuple(targets),
        use_rslora=fields.pop("use_rslora", False),
        init=_INITS[init],
        rank_pattern=fields.pop("rank_pattern", None) or {},
        alpha_pattern=fields.pop("alpha_pattern", None) or {},
    )
    for name, value in fields.items():
        if value and name not in _IRRELEVANT:
            raise ValueError(f"{source}: {name} is {value!r}, which is not implemented")
    return config


def _config_to_peft(config: LoRAConfig) -> dict[str, Any]:
    """The fields of peft's LoraConfig that its readers need."""
    return {
        "alpha_pattern": {name: _number(value) for name, value in config.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if config.init == "kaiming" else config.init,
        "lora_alpha": _number(config.rank if config.alpha is None else config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": _peft_targets(config.targets),
        "task_type": None,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def _peft_targets(targets: tuple[str, ...]) -> list[str] | str:
    """peft takes a list of names, or one pattern for the whole path."""
    names = [target for target in targets if re.fullmatch(r"[\w.]+", target)]
    if len(names) == len(targets):
        return names
    return "|".join(
        rf"(?:.*\.)?{re.escape(target)}" if target in names else f"(?:{target})"
        for target in targets
    )


def _inferred_config(factors: dict[tuple[str, str], np.ndarray]) -> LoRAConfig:
    """The configuration of a file without one: the ranks of its factors, and alpha = rank."""
    ranks = {
        path: value.shape[0] for (path, factor), value in factors.items() if factor == "lora_A"
    }
    if not ranks:
        raise ValueError(f"{next(iter(factors))[0]} has no lora_A")
    # Of equally common ranks the smaller, so that the result does not depend on the file's order.
    rank = max(sorted(Counter(ranks.values()).items()), key=lambda item: item[1])[0]
    others = {f"^{re.escape(path)}": own for path, own in sorted(ranks.items()) if own != rank}
    return LoRAConfig(
        rank=rank,
        alpha=rank,
        targets=tuple(sorted({path for path, _ in factors})),
        rank_pattern=others,
        alpha_pattern=dict(others),
    )


def _number(value: float) -> int | float:
    """Whole numbers as integers, as peft writes them."""
    return int(value) if float(value).is_integer() else float(value)


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, sort_keys=True)


def _parse_json(text: str, source: Any) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{source}: expected a JSON object, found a {type(fields).__name__}")
    return fields


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _safetensors(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file of float32 tensors.

    The safetensors library orders metadata at random, so its files differ from run to run.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset, payload = 0, []
    for name, value in sorted(tensors.items()):
        data = np.ascontiguousarray(value, "<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        payload.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format aligns the data to 8 bytes with spaces.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(payload)


def _write(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
