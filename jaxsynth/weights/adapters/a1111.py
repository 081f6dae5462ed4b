"""Hypernetworks of the A1111 web UI: a .pt file with a pair of networks for each width.

    {width: (network before to_k, network before to_v), "layer_structure": [1, 2, 1], ...}

A network is an `nn.Sequential` "linear" of linear layers, each but the last (and the last too with
"activate_output") with its activation, and with "is_layer_norm" a LayerNorm after each. One network
serves all layers of its width; here each has a copy (`adapters.hypernetwork`), and copies that
differ cannot be written.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.hypernetwork import HypernetworkConfig
from jaxsynth.core.config import to_dataclass
from jaxsynth.core.documents import checked
from jaxsynth.core.errors import UserError, quoted, shown
from jaxsynth.core.words import counted
from jaxsynth.weights.torch_files.reader import read_nested
from jaxsynth.weights.torch_files.writer import write_pickled

TARGETS = ("to_k", "to_v")
_KEY = re.compile(r"linear\.\d{1,4}\.(weight|bias)")


def read_hypernetwork(source: str | Path, model: Any) -> Any:
    """A copy of the plain UNet `model` with the networks of a file before its keys and values.

    Layers of a width that the file lacks have none. Raises UserError naming the file and what is
    not implemented, or fits no layer.
    """
    source = Path(source)
    content = read_nested(source)
    widths = {key: pair for key, pair in content.items() if type(key) is int}
    for width, pair in widths.items():
        if not isinstance(pair, (list, tuple)) or len(pair) != len(TARGETS):
            raise UserError(
                f"{source}: {quoted(width)}: expected two networks, found {shown(pair)}"
            )
    if not widths:
        raise UserError(f"{source}: no networks by width among {sorted(map(str, content))}")
    config = _config(content, source)
    layers = inject.layers(model)
    paths = {
        path: layer.kernel.get_value().shape[0]
        for path, layer in layers.items()
        if path.rpartition(".")[2] in TARGETS and isinstance(layer, nnx.Linear)
    }
    used = {path: width for path, width in paths.items() if width in widths}
    if not used:
        raise UserError(
            f"{source}: networks of widths {sorted(widths)}, and the keys and values here have "
            f"{sorted(set(paths.values()))}"
        )
    arrays: dict[str, Any] = {}
    for path, width in used.items():
        own = _network(widths[width][TARGETS.index(path.rpartition(".")[2])], config, source)
        arrays |= {f"{path}.{name}": value for name, value in own.items()}
    if len(used) < len(paths):
        config = dataclasses.replace(config, targets=tuple(sorted(used)))
    adapted = registry.add(model, config, rngs=jax.random.key(0))
    try:
        return inject.load_state(adapted, inject.AdapterState(arrays, config))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def write_hypernetwork(target: str | Path, adapted: nnx.Module, *, name: str = "") -> None:
    """Writes the hypernetworks of a UNet; ValueError naming a layer that the format cannot hold."""
    found = {p: x for p, x in inject.layers(adapted).items() if isinstance(x, inject.AdapterLayer)}
    config = inject.config_of(adapted)
    if not isinstance(config, HypernetworkConfig):
        kind = next((layer.kind for layer in found.values()), "no adapter")
        raise ValueError(f"a hypernetwork's file holds hypernetworks, found {kind}")
    networks: dict[int, dict[str, tuple[str, dict[str, np.ndarray]]]] = {}
    for path, layer in found.items():
        last = path.rpartition(".")[2]
        if last not in TARGETS:
            raise ValueError(f"{path}: hypernetworks stand before {TARGETS}")
        own = {
            key: np.asarray(value.get_value(), np.float32)
            for key, value in vars(layer).items()
            if isinstance(value, inject.Trainable)
        }
        width = own["kernel_0"].shape[-2]
        first = networks.setdefault(width, {}).setdefault(last, (path, own))
        if any(not np.array_equal(first[1][key], value) for key, value in own.items()):
            raise ValueError(
                f"{path}: differs from {first[0]}, and the format has one network for both; train "
                "them with `hypernetwork.shared`"
            )
    content: dict[Any, Any] = {}
    for width, pair in sorted(networks.items()):
        if set(pair) != set(TARGETS):
            raise ValueError(f"width {width}: networks before {sorted(pair)}, expected {TARGETS}")
        content[width] = tuple(_state_dict(pair[last][1], config) for last in TARGETS)
    content |= {
        "step": 0,
        "name": name or Path(target).stem,
        "layer_structure": list(config.structure),
        "activation_func": config.activation,
        "is_layer_norm": config.layer_norm,
        "weight_initialization": "Normal",
        "use_dropout": False,
        "activate_output": config.activate_output,
        "last_layer_dropout": False,
        "dropout_structure": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "optional_info": None,
    }
    write_pickled(target, content)


def _config(content: dict[Any, Any], source: Path) -> HypernetworkConfig:
    settings = {
        "targets": TARGETS,
        "structure": content.get("layer_structure") or (1, 2, 1),
        "activation": content.get("activation_func") or "linear",
        "layer_norm": bool(content.get("is_layer_norm", False)),
        "activate_output": bool(content.get("activate_output", True)),
    }
    return checked(source, to_dataclass, HypernetworkConfig, settings, path="hypernetwork")


def _network(state: Any, config: HypernetworkConfig, source: Path) -> dict[str, Any]:
    """Our factors of one network."""
    if not isinstance(state, dict):
        raise UserError(f"{source}: a network is a {type(state).__name__}, expected its weights")
    # Before there was a choice of layers.
    old = {"linear1.": "linear.0.", "linear2.": "linear.1."}
    state = {next((new + k[8:] for o, new in old.items() if k.startswith(o)), k): v
             for k, v in state.items() if isinstance(k, str)}  # fmt: skip
    depth = len(config.structure) - 1
    for key, value in state.items():
        if not _KEY.fullmatch(key) or not isinstance(value, np.ndarray):
            raise UserError(f"{source}: {quoted(key)} is no layer's weight or bias")
    numbers = sorted({int(key.split(".")[1]) for key in state})
    for key in (f"linear.{n}.{name}" for n in numbers for name in ("weight", "bias")):
        if key not in state:
            raise UserError(f"{source}: {key} is missing")
    axes = {n: np.ndim(state.get(f"linear.{n}.weight")) for n in numbers}
    linear = [n for n in numbers if axes[n] == 2]
    norms = [n for n in numbers if axes[n] == 1]
    if len(linear) != depth or len(norms) != (depth if config.layer_norm else 0):
        raise UserError(
            f"{source}: a network of {counted(len(linear), 'layer')} and {len(norms)} norms, "
            f"expected {depth} "
            f"and {depth if config.layer_norm else 0} of layer_structure {config.structure}"
        )
    found = {}
    for i, n in enumerate(linear):
        found[f"kernel_{i}"] = jnp.asarray(np.asarray(state[f"linear.{n}.weight"], np.float32).T)
        found[f"bias_{i}"] = jnp.asarray(state[f"linear.{n}.bias"], jnp.float32)
    for i, n in enumerate(norms):
        found[f"norm_{i}"] = jnp.asarray(state[f"linear.{n}.weight"], jnp.float32)
        found[f"shift_{i}"] = jnp.asarray(state[f"linear.{n}.bias"], jnp.float32)
    return found


def _state_dict(own: dict[str, np.ndarray], config: HypernetworkConfig) -> dict[str, np.ndarray]:
    """A network's weights, numbered as its layers stand in the Sequential."""
    result, number, depth = {}, 0, len(config.structure) - 1
    for i in range(depth):
        result[f"linear.{number}.weight"] = np.ascontiguousarray(own[f"kernel_{i}"].T)
        result[f"linear.{number}.bias"] = own[f"bias_{i}"]
        number += 1
        activated = i < depth - 1 or config.activate_output
        number += activated and config.activation != "linear"
        if config.layer_norm:
            result[f"linear.{number}.weight"] = own[f"norm_{i}"]
            result[f"linear.{number}.bias"] = own[f"shift_{i}"]
            number += 1
    return result
