"""The adapter format of this package: any kind's trainable values in one safetensors file.

Other libraries' formats know LoRA and its relatives only; this one keeps whatever a network's
`AdapterState` holds (Affiners, new class rows, biases, a whole fine-tuned network) under the same
names, and the kind's configuration in the metadata.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import AdapterState, T, load_state, mark_trainable, with_values
from jaxsynth.adapters.registry import MAKERS
from jaxsynth.core.documents import parse_json
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.core.io import replacing
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
    if state.config is not None and kind not in _CONFIGS:
        raise TypeError(f"write_state: no format for {kind}, expected one of {sorted(_CONFIGS)}")
    config = None if state.config is None else dataclasses.asdict(state.config)
    metadata = {"format": _FORMAT, "kind": kind, "config": json.dumps(config, sort_keys=True)}
    data = hub.to_bytes({name: np.asarray(x) for name, x in state.arrays.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def is_state(path: Path) -> bool:
    """Whether a safetensors file is of this format."""
    with opened(path) as file:
        return file.metadata.get("format") == _FORMAT


def read_state(path: Path) -> AdapterState:
    """Read what `write_state` wrote; UserError naming the file for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an adapter of jaxsynth")
    with opened(path) as file:
        metadata = file.metadata
        if metadata.get("format") != _FORMAT:
            raise UserError(
                f"{path}: format {quoted(metadata.get('format'))}, expected {_FORMAT!r}; those of "
                "peft and diffusers are read by weights.adapters"
            )
        arrays = {key: jnp.asarray(value) for key, value in file.adapter().items()}
    kind = metadata.get("kind")
    if kind == _NO_CONFIG:
        return AdapterState(arrays, None)
    if kind not in _CONFIGS:
        raise UserError(f"{path}: kind {quoted(kind)}, expected one of {sorted(_CONFIGS)}")
    where = f"{path}: config of {kind}"
    return AdapterState(arrays, parse_json(metadata.get("config", ""), where, _CONFIGS[kind]))


def read_network(plain: T, path: Path) -> T:
    """A network of this shape with all values of a file that holds them, frozen.

    `plain` may be abstract. UserError where names or shapes differ.
    """
    try:
        loaded = load_state(mark_trainable(plain), read_state(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return with_values(plain, nnx.state(loaded))
