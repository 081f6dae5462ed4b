"""What training must do for a kind of adapter, beyond following its gradients.

AdaLoRA has a budget and a term in the loss, Delta-LoRA keeps the factors that W follows, and the
copies of a shared hypernetwork move together. All other kinds train as any parameters do.
"""

from collections.abc import Callable
from typing import Any

import optax

from jaxsynth.adapters.kinds.adalora import AdaLoRAConfig, budgeted, orthogonality
from jaxsynth.adapters.kinds.delta_lora import DeltaLoRAConfig, following
from jaxsynth.adapters.kinds.hypernetwork import HypernetworkConfig, shared

# peft's default of the weight on AdaLoRA's term.
ORTHOGONALITY = 0.5


def optimiser(
    config: Any, inner: optax.GradientTransformation, total_steps: int
) -> optax.GradientTransformation:
    """`inner` as adapters of `config` (None: no adapters) need it over `total_steps` updates."""
    if isinstance(config, AdaLoRAConfig):
        return budgeted(inner, config, total_steps)
    if isinstance(config, DeltaLoRAConfig):
        return following(inner, config.start)
    if isinstance(config, HypernetworkConfig):
        return shared(inner, config.targets)
    return inner


def needs_length(config: Any) -> bool:
    """Whether the optimizer of adapters of `config` depends on the number of updates."""
    return isinstance(config, AdaLoRAConfig)


def penalised(loss: Callable[..., tuple[Any, Any]], config: Any) -> Callable[..., tuple[Any, Any]]:
    """`loss(trainable, ...) -> (value, metrics)` with the term that adapters of `config` add."""
    if not isinstance(config, AdaLoRAConfig):
        return loss

    def total(trainable: Any, *rest: Any) -> tuple[Any, Any]:
        value, metrics = loss(trainable, *rest)
        return value + ORTHOGONALITY * orthogonality(trainable), metrics

    return total
