"""Optimisers and learning-rate schedules from one small dataclass, on top of optax.

Configuration files name them; everything else about optimisation is optax itself.
"""

import dataclasses

import jax
import optax
from jaxtyping import PyTree

NAMES = ("adamw", "adam", "sgd", "lion")
SCHEDULES = ("constant", "cosine", "linear")
DECAY = ("all", "matrices")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated.

    `schedule` falls from `learning_rate` to `min_lr` at `total_steps`, after `warmup_steps` of
    linear rise from 0 (whose first update uses 0). `clip_norm` 0 means no clipping. `decay_on`
    "matrices" spares biases, scales and other vectors. For "sgd", `b1` is the momentum.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    total_steps: int = 0
    min_lr: float = 0.0
    weight_decay: float = 0.01
    decay_on: str = "all"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self):
        for field, allowed in (("name", NAMES), ("schedule", SCHEDULES), ("decay_on", DECAY)):
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"OptimConfig.{field} is {value!r}, expected one of {allowed}")
        if self.warmup_steps < 0 or (self.total_steps and self.warmup_steps > self.total_steps):
            raise ValueError(
                f"OptimConfig.warmup_steps is {self.warmup_steps}, expected 0 to "
                f"total_steps={self.total_steps}"
            )


def make_schedule(config: OptimConfig) -> optax.Schedule:
    """The learning rate as a function of the number of updates done.

    Raises:
        ValueError: a falling schedule without `total_steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule != "constant" and config.total_steps < 1:
        raise ValueError(
            f"OptimConfig.total_steps is {config.total_steps}, but schedule "
            f"{config.schedule!r} needs it"
        )
    rest = max(config.total_steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, config.min_lr, rest)
    else:
        alpha = config.min_lr / peak if peak else 0.0
        after = optax.cosine_decay_schedule(peak, rest, alpha=alpha)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """The optax transformation that `config` describes."""
    rate = make_schedule(config)
    decay = {"weight_decay": config.weight_decay}
    if config.decay_on == "matrices":
        decay["mask"] = _matrices
    if config.name == "adamw":
        tx = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, **decay)
    elif config.name == "lion":
        tx = optax.lion(rate, b1=config.b1, b2=config.b2, **decay)
    else:
        # As in torch: the decay is added to the gradient before the optimiser sees it.
        direction = (
            optax.adam(rate, b1=config.b1, b2=config.b2, eps=config.eps)
            if config.name == "adam"
            else optax.sgd(rate, momentum=config.b1 or None)
        )
        tx = (
            optax.chain(optax.add_decayed_weights(**decay), direction)
            if config.weight_decay
            else direction
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx) if config.clip_norm else tx


def _matrices(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, tree)
