"""What training must do for a kind of adapter, beyond following its gradients.

AdaLoRA has a budget and a term in the loss, Delta-LoRA keeps the factors that W follows, and the
copies of a shared hypernetwork move together. All other kinds train as any parameters do.
"""

from collections.abc import Callable
from typing import Any

import optax

from jaxsynth.adapters.inject import configs_of
from jaxsynth.adapters.kinds.adalora import AdaLoRAConfig, budgeted, orthogonality
from jaxsynth.adapters.kinds.delta_lora import DeltaLoRAConfig, following
from jaxsynth.adapters.kinds.hypernetwork import HypernetworkConfig, shared

# peft's default of the weight on AdaLoRA's term.
ORTHOGONALITY = 0.5


def optimiser(
    config: Any, inner: optax.GradientTransformation, total_steps: int
) -> optax.GradientTransformation:
    """`inner` as adapters of `config` (None: no adapters) need it over `total_steps` updates."""
    for part in configs_of(config):
        if isinstance(part, AdaLoRAConfig):
            inner = budgeted(inner, part, total_steps)
        if isinstance(part, DeltaLoRAConfig):
            inner = following(inner, part.start)
        if isinstance(part, HypernetworkConfig):
            inner = shared(inner, part.targets)
    return inner


def has_own_optimizer(config: Any) -> bool:
    """Whether adapters of `config` cannot do with the optimizer that they are given."""
    kinds = (AdaLoRAConfig, DeltaLoRAConfig, HypernetworkConfig)
    return any(isinstance(part, kinds) for part in configs_of(config))


def needs_length(config: Any) -> bool:
    """Whether the optimizer of adapters of `config` depends on the number of updates."""
    return isinstance(config, AdaLoRAConfig)


def penalised(loss: Callable[..., tuple[Any, Any]], config: Any) -> Callable[..., tuple[Any, Any]]:
    """`loss(trainable, ...) -> (value, metrics)` with the term that adapters of `config` add."""
    if not any(isinstance(part, AdaLoRAConfig) for part in configs_of(config)):
        return loss

    def total(trainable: Any, *rest: Any) -> tuple[Any, Any]:
        value, metrics = loss(trainable, *rest)
        return value + ORTHOGONALITY * orthogonality(trainable), metrics

    return total
