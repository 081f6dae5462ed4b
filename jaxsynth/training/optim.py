"""Optimizers and learning-rate schedules of a `TrainingConfig`, on top of optax.

The rate is an argument of the compiled step and not a constant in it: `Rate` holds the schedule's
numbers as arrays in the training's state, so that one program serves every rate and every length,
and stacked trainings may differ in both. optax does the rest: `make_optimizer` is a chain whose
last link multiplies by the rate that `update` is given.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxsynth.training.config import Factors, TrainingConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rate:
    """A learning-rate schedule's numbers; what they mean is the schedule's name."""

    peak: Float[Array, ""]
    floor: Float[Array, ""]  # min_lr / peak
    warmup: Int[Array, ""]
    rest: Int[Array, ""]  # updates after the warm-up

    @classmethod
    def of(cls, config: TrainingConfig) -> "Rate":
        """Of a config with its length in steps (`TrainingConfig.sized`).

        Raises ValueError for a falling schedule without a length.
        """
        if config.schedule != "constant" and config.steps < 1:
            raise ValueError(f"steps: {config.steps}, but schedule {config.schedule!r} needs them")
        peak = config.learning_rate
        return cls(
            peak=np.float32(peak),
            floor=np.float32(config.min_lr / peak if peak else 0.0),
            warmup=np.int32(config.warmup_steps),
            rest=np.int32(max(config.steps - config.warmup_steps, 1)),
        )


def rate_at(schedule: str, rate: Rate, step: Int[Array, ""]) -> Float[Array, ""]:
    """The learning rate of the update that follows `step` updates.

    "cosine" as optax.cosine_decay_schedule (Loshchilov and Hutter 2017, arXiv 1608.03983),
    "linear" as optax.linear_schedule.
    """
    after = jnp.clip(step - rate.warmup, 0, rate.rest)
    if schedule == "constant":
        fallen = rate.peak
    elif schedule == "linear":
        low = rate.floor * rate.peak
        fallen = (rate.peak - low) * (1 - after / rate.rest) + low
    else:
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * after / rate.rest))
        fallen = rate.peak * ((1 - rate.floor) * cosine + rate.floor)
    rising = -rate.peak * (1 - step / jnp.maximum(rate.warmup, 1)) + rate.peak
    return jnp.where(step < rate.warmup, rising, fallen)


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformationExtraArgs:
    """The optax transformation that `config` describes; `update` takes `rate=`."""
    links = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    decay = _decay(config)
    # As in torch: Adam's and SGD's decay is added to the gradient before the optimizer sees it.
    before = config.optimizer in ("adam", "sgd")
    links += [*(decay if before else ()), _direction(config), *(() if before else decay)]
    return optax.chain(*links, scale_by_rate(config.rates))


def scale_by_rate(factors: Factors = ()) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the argument `rate` and the factor of their path's pattern."""

    def update(updates: PyTree, state: Any, params: PyTree = None, *, rate: Array, **_):
        def scaled(path: tuple, value: Array) -> Array:
            factor = factor_of(factors, path)
            step = -rate if factor == 1 else -rate * factor
            return step.astype(value.dtype) * value

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def factor_of(factors: Factors, path: tuple) -> float:
    """The factor of the first pattern found in a leaf's dotted path, 1 where there is none."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return next((factor for pattern, factor in factors if re.search(pattern, name)), 1.0)


def unused_patterns(factors: Factors, tree: PyTree) -> list[str]:
    """The patterns that no leaf's path matches."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return [p for p, _ in factors if not any(re.search(p, name) for name in names)]


def _direction(config: TrainingConfig) -> optax.GradientTransformation:
    name, b1, b2 = config.optimizer, config.b1, config.b2
    if name in ("adam", "adamw"):
        return optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps)
    if name == "lion":
        return optax.scale_by_lion(b1=b1, b2=b2)
    if name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return optax.trace(decay=b1) if b1 else optax.identity()


def _decay(config: TrainingConfig) -> list[optax.GradientTransformation]:
    if not config.weight_decay:
        return []
    if not config.decays and config.decay_on == "all":
        return [optax.add_decayed_weights(config.weight_decay)]

    def strength(path: tuple, leaf: Array) -> float:
        spared = config.decay_on == "matrices" and leaf.ndim < 2
        return 0.0 if spared else config.weight_decay * factor_of(config.decays, path)

    def update(updates: PyTree, state: Any, params: PyTree = None):
        add: Callable[..., Array] = lambda path, g, p: g + strength(path, p) * p  # noqa: E731
        return jax.tree_util.tree_map_with_path(add, updates, params), state

    return [optax.GradientTransformation(lambda params: optax.EmptyState(), update)]
