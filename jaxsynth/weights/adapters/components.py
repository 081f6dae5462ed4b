"""Adapters over several networks of a pipeline: one state of all, or one for each."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxsynth.adapters.inject import AdapterState, MixedConfig, configs_of, matches

# Settings by layer: names or patterns, and values by pattern.
_PLACES = ("targets", "feedforward")
_PATTERNS = ("rank_pattern", "alpha_pattern")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer")


def split_networks(state: AdapterState) -> dict[str, AdapterState]:
    """The states of several networks in one, whose paths start with "unet.", "text_encoder."; none
    where they do not. Each keeps the targets that match its own layers.
    """
    parts: dict[str, dict[str, Any]] = {}
    for path, value in state.arrays.items():
        component, _, rest = path.partition(".")
        if component not in COMPONENTS:
            return {}
        parts.setdefault(component, {})[rest] = value
    states = {}
    for component, arrays in parts.items():
        layers = {path.rpartition(".")[0] for path in arrays}
        configs = []
        for part in configs_of(state.config):
            own = _of_component(part, component)
            targets = tuple(t for t in own.targets if any(matches(t, path) for path in layers))
            if targets:
                configs.append(dataclasses.replace(own, targets=targets))
        config = configs[0] if len(configs) == 1 else MixedConfig(tuple(configs))
        states[component] = AdapterState(arrays, config if configs else None)
    return states


def join_networks(states: Mapping[str, AdapterState], *, mixed: bool = False) -> AdapterState:
    """One state of several networks' ones.

    ValueError where their settings differ. With `mixed` they may: ranks and alphas become patterns,
    other settings a `MixedConfig`.
    """
    if not states:
        raise ValueError("join_networks: no states")
    arrays = {
        f"{component}.{name}": value
        for component, state in states.items()
        for name, value in state.arrays.items()
    }
    first, *others = states
    if any(isinstance(state.config, MixedConfig) for state in states.values()) and mixed:
        return AdapterState(arrays, _together(states))
    joined = _in_component(states[first].config, first)
    for other in others:
        config = _in_component(states[other].config, other)
        ranked = all(hasattr(x, "rank_pattern") for x in (config, joined))
        if mixed and ranked and (config.rank, config.alpha) != (joined.rank, joined.alpha):
            everything = rf"^{re.escape(other)}\..*"
            ranks = {**config.rank_pattern, everything: config.rank}
            alphas = dict(config.alpha_pattern)
            if config.alpha is not None:
                alphas[everything] = config.alpha
            elif joined.alpha is not None:
                alphas = {**alphas, **ranks, **alphas}
            config = dataclasses.replace(
                config,
                rank=joined.rank,
                alpha=joined.alpha,
                rank_pattern=ranks,
                alpha_pattern=alphas,
            )
        if type(config) is not type(joined) or _common(config) != _common(joined):
            if mixed:
                return AdapterState(arrays, _together(states))
            raise ValueError(
                f"{first} and {other} have adapters of different settings: {_common(joined)} and "
                f"{_common(config)}"
            )
        more: dict[str, Any] = {
            name: tuple(dict.fromkeys((*getattr(joined, name), *getattr(config, name))))
            for name in _PLACES
            if hasattr(config, name)
        }
        if isinstance(getattr(joined, "bias", None), tuple):
            more["bias"] = tuple(dict.fromkeys((*joined.bias, *config.bias)))
        for name in _PATTERNS:
            if hasattr(config, name):
                more[name] = {**getattr(joined, name), **getattr(config, name)}
        joined = dataclasses.replace(joined, **more)
    return AdapterState(arrays, joined)


def _together(states: Mapping[str, AdapterState]) -> MixedConfig:
    """All networks' configurations as they are, each for whole paths of its own network."""
    parts = []
    for component, state in states.items():
        paths = sorted({name.rpartition(".")[0] for name in state.arrays})
        for part in configs_of(state.config):
            # A bare name would match in the other networks too.
            own = [p for p in paths if any(matches(t, p) for t in part.targets)]
            exact = tuple(f"^{re.escape(path)}$" for path in own)
            part = dataclasses.replace(part, targets=exact)
            parts.append(_in_component(part, component))
    return MixedConfig(tuple(parts))


def _common(config: Any) -> Any:
    """What networks' settings must agree in: all but places."""
    rest: dict[str, Any] = {name: {} for name in _PATTERNS if hasattr(config, name)}
    places = (*_PLACES, "bias")
    rest |= {name: () for name in places if isinstance(getattr(config, name, None), tuple)}
    return dataclasses.replace(config, **rest)


def _in_component(config: Any, component: str) -> Any:
    """The settings with patterns for whole paths below a component's name."""
    return _renamed(config, "^", rf"^{re.escape(component)}\.")


def _of_component(config: Any, component: str) -> Any:
    """The inverse; patterns of other components stay, and match nothing."""
    return _renamed(config, rf"^{re.escape(component)}\.", "^")


def _renamed(config: Any, old: str, new: str) -> Any:
    def name(pattern: str) -> str:
        return new + pattern.removeprefix(old) if pattern.startswith(old) else pattern

    more: dict[str, Any] = {
        field: tuple(map(name, getattr(config, field)))
        for field in (*_PLACES, "bias")
        if isinstance(getattr(config, field, None), tuple)
    }
    for field in _PATTERNS:
        if hasattr(config, field):
            more[field] = {name(key): value for key, value in getattr(config, field).items()}
    return dataclasses.replace(config, **more)
