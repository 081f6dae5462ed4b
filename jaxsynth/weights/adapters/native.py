"""The adapter format of this package: any kind's trainable values in one safetensors file.

Other libraries' formats know LoRA and its relatives only; this one keeps whatever a network's
`AdapterState` holds (Affiners, new class rows, biases, a whole fine-tuned network) under the same
names, and the kind's configuration in the metadata.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import (
    AdapterState,
    MixedConfig,
    T,
    configs_of,
    load_state,
    mark_trainable,
    with_values,
)
from jaxsynth.adapters.registry import MAKERS
from jaxsynth.core import io
from jaxsynth.core.documents import parse_json, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.weights import hub
from jaxsynth.weights.safetensors import opened

STATE_FILE = "adapter.safetensors"
_FORMAT = "jaxsynth.adapter"
_NO_CONFIG = type(None).__name__
_CONFIGS = {cls.__name__: cls for cls in MAKERS}


def write_state(path: Path, state: AdapterState) -> None:
    """Write a state in the types that it has, the same bytes for the same state.

    Through a temporary file. TypeError for a configuration without a format.
    """
    kind = type(state.config).__name__
    config: Any = None
    if isinstance(state.config, MixedConfig):
        parts = [(type(part).__name__, dataclasses.asdict(part)) for part in state.config.parts]
        config = [{"kind": name, "config": fields} for name, fields in parts]
    elif state.config is not None:
        config = dataclasses.asdict(state.config)
    for name in [type(part).__name__ for part in configs_of(state.config)]:
        if name not in _CONFIGS:
            known = sorted(_CONFIGS)
            raise TypeError(f"write_state: no format for {name}, expected one of {known}")
    metadata = {"format": _FORMAT, "kind": kind, "config": json.dumps(config, sort_keys=True)}
    data = hub.to_bytes({name: np.asarray(x) for name, x in state.arrays.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write_bytes(path, data)


def is_state(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is of this format."""
    return metadata.get("format") == _FORMAT


def read_state(path: Path) -> AdapterState:
    """Read what `write_state` wrote; UserError naming the file for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an adapter of jaxsynth")
    with opened(path) as file:
        metadata = file.metadata
        if not is_state(metadata):
            raise UserError(
                f"{path}: format {quoted(metadata.get('format'))}, expected {_FORMAT!r}; adapters "
                "of peft and diffusers are read by weights.adapters"
            )
        arrays = {key: jax.device_put(file.read_any(key)) for key in sorted(file.keys)}
    kind = metadata.get("kind")
    if kind == _NO_CONFIG:
        return AdapterState(arrays, None)
    text = metadata.get("config", "")
    if kind != MixedConfig.__name__:
        config = _config(kind, path)
        return AdapterState(arrays, parse_json(text, f"{path}: config of {kind}", config))
    where = f"{path}: config of {kind}"
    parts = tuple(
        take(part, "config", _config(take(part, "kind", str, where), path), where)
        for part in parse_json(text, where, list[dict])
    )
    return AdapterState(arrays, MixedConfig(parts))


def _config(kind: Any, path: Path) -> type:
    if kind not in _CONFIGS:
        raise UserError(f"{path}: kind {quoted(kind)}, expected one of {sorted(_CONFIGS)}")
    return _CONFIGS[kind]


def read_network(plain: T, path: Path) -> T:
    """A network of this shape with all values of a file that holds them, frozen.

    `plain` may be abstract. UserError where names or shapes differ.
    """
    try:
        loaded = load_state(mark_trainable(plain), read_state(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return with_values(plain, nnx.state(loaded))
