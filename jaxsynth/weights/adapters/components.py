"""Adapters over several networks of a pipeline: one state of all, or one for each."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxsynth.adapters.inject import AdapterState, matches

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
        own = _of_component(state.config, component)
        targets = tuple(
            target
            for target in own.targets
            if any(matches(target, path.rpartition(".")[0]) for path in arrays)
        )
        states[component] = AdapterState(arrays, dataclasses.replace(own, targets=targets))
    return states


def join_networks(states: Mapping[str, AdapterState], *, mixed: bool = False) -> AdapterState:
    """One state of several networks' ones.

    ValueError where their settings differ; with `mixed` ranks and alphas may, and become patterns.
    """
    if not states:
        raise ValueError("join_networks: no states")
    arrays = {
        f"{component}.{name}": value
        for component, state in states.items()
        for name, value in state.arrays.items()
    }
    first, *others = states
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
        if _common(config) != _common(joined):
            raise ValueError(
                f"{first} and {other} have adapters of different settings: {_common(joined)} and "
                f"{_common(config)}"
            )
        more: dict[str, Any] = {
            name: tuple(dict.fromkeys((*getattr(joined, name), *getattr(config, name))))
            for name in _PLACES
            if hasattr(config, name)
        }
        for name in _PATTERNS:
            if hasattr(config, name):
                more[name] = {**getattr(joined, name), **getattr(config, name)}
        joined = dataclasses.replace(joined, **more)
    return AdapterState(arrays, joined)


def _common(config: Any) -> Any:
    """What networks' settings must agree in: all but places."""
    rest: dict[str, Any] = {name: {} for name in _PATTERNS if hasattr(config, name)}
    rest |= {name: () for name in _PLACES if hasattr(config, name)}
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
        for field in _PLACES
        if hasattr(config, field)
    }
    for field in _PATTERNS:
        if hasattr(config, field):
            more[field] = {name(key): value for key, value in getattr(config, field).items()}
    return dataclasses.replace(config, **more)
