"""Adapters over several networks of a pipeline: one state of all, or one for each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsynth.adapters.base import AdapterState, matches

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
        targets = tuple(
            target
            for target in state.config.targets
            if any(matches(target, path.rpartition(".")[0]) for path in arrays)
        )
        states[component] = AdapterState(arrays, dataclasses.replace(state.config, targets=targets))
    return states


def join_networks(states: Mapping[str, AdapterState]) -> AdapterState:
    """One state of several networks' ones; ValueError where their settings differ."""
    if not states:
        raise ValueError("join_networks: no states")
    arrays = {
        f"{component}.{name}": value
        for component, state in states.items()
        for name, value in state.arrays.items()
    }
    configs = {c: dataclasses.replace(s.config, targets=()) for c, s in states.items()}
    first, *others = configs
    for other in others:
        if configs[other] != configs[first]:
            raise ValueError(
                f"{first} and {other} have adapters of different settings: {configs[first]} and "
                f"{configs[other]}"
            )
    targets = dict.fromkeys(target for s in states.values() for target in s.config.targets)
    return AdapterState(arrays, dataclasses.replace(configs[first], targets=tuple(targets)))
