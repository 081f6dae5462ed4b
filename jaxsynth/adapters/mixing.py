"""Weighted sums of LoRA adapters as one LoRA, exactly: one for each image that is drawn.

    sum_k w_k s B_k A_k = B A,  A = [A_1 ... A_n],  B = [w_1 s B_1 ... w_n s B_n]

is LoRA of the ranks' sum at scale 1, as LoFT fuses the adapters of two images (Kim et al. 2025,
arXiv 2505.11703). Where all A are one, as in ChimeraLoRA's heads, the B are summed and the rank
stays. `combine` does the same to whole networks of any kind of adapter.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.state import AdapterState

DOWN, UP = "lora_A", "lora_B"


def check_mixes(config: object) -> LoRAConfig:
    """The configuration of adapters that are mixed; ValueError saying why others are not."""
    if not isinstance(config, LoRAConfig):
        raise ValueError(f"{type(config).__name__}: its sum is no adapter of its kind; take lora")
    others = {
        "init": config.init in ("pissa", "olora"),
        "use_tucker": config.use_tucker,
        "decompose": config.decompose != "none",
        "bias": bool(config.bias),
    }
    for name, given in others.items():
        if given:
            raise ValueError(f"{name}: sums of several adapters are of plain LoRA; leave it out")
    return config


def mixed_config(config: LoRAConfig, count: int) -> LoRAConfig:
    """That of the sum of `count` adapters: of their ranks' sum, at scale 1."""
    return dataclasses.replace(
        config,
        rank=count * config.rank,
        rank_pattern={name: count * rank for name, rank in config.rank_pattern.items()},
        alpha=None,
        alpha_pattern={},
        use_rslora=False,
    )


def mix(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """The sum of LoRA adapters of one configuration, on the host.

    Args:
        weights: one for each of `states`.

    Returns:
        A state of `mixed_config(config, len(states))`, or, where all have the same down
        projections, of `mixed_config(config, 1)`.

    Raises:
        ValueError: the adapters differ in configuration or layers, or are no plain LoRA.
    """
    if len(states) != len(weights) or not states:
        raise ValueError(f"mix: {len(weights)} weights for {len(states)} adapters")
    config = check_mixes(states[0].config)
    for number, state in enumerate(states[1:], 1):
        if state.config != config or state.arrays.keys() != states[0].arrays.keys():
            raise ValueError(f"mix: adapter {number} is of another configuration than adapter 0")
    each = [{name: np.asarray(x) for name, x in own.arrays.items()} for own in states]
    downs = [name for name in each[0] if name.endswith(DOWN)]
    if others := [n for n in each[0] if n not in downs and not n.endswith(UP)]:
        raise ValueError(f"mix: {others[0]} is of no linear layer or convolution")
    shared = all(np.array_equal(own[name], each[0][name]) for own in each for name in downs)
    arrays = {}
    for name in downs:
        # The factor of a layer's path, as its adapter has it.
        path, up = name.removesuffix(f".{DOWN}"), name.removesuffix(DOWN) + UP
        scale = config.scaling_at(path)
        ups = [w * scale * own[up] for w, own in zip(weights, each, strict=True)]
        if shared:
            arrays[name], arrays[up] = each[0][name], np.sum(ups, axis=0)
        else:
            arrays[name] = np.concatenate([own[name] for own in each], axis=-1)
            arrays[up] = np.concatenate(ups, axis=-2)
    return AdapterState(arrays, mixed_config(config, 1 if shared else len(states)))
