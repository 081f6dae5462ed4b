"""How anything here is trained: one dataclass, which every method's configurations extend.

A method nests it under its own name (`finetune`, `classify`, `train`) with defaults of its own and
what its loss needs besides, so that `--config.<name>.learning_rate=` and every other field here
means the same everywhere.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from jaxsynth.core.limits import (
    BelowOne,
    Count,
    Natural,
    NotNegative,
    OneOf,
    Positive,
    check_limits,
)
from jaxsynth.models.remat import NAMES

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor")
SCHEDULES = ("constant", "cosine", "linear")
DECAYED = ("all", "matrices")
PRECISIONS = ("default", "high", "highest")

# (regular expression of a dotted parameter path, factor)
Factors = tuple[tuple[str, float], ...]


def aside(default: Any) -> Any:
    """A field that decides how a training is watched or interrupted, never what it learns.

    It is no part of a stage's identity, so it may change between two starts of one run.
    """
    return field(default=default, metadata={"identity": False})


@dataclass(frozen=True)
class TrainingConfig:
    """How parameters are updated, for how long, and what is written on the way.

    Length: `steps` updates, or `epochs` over the training set if it is 0, but at least `min_steps`.
    `batch_size` counts examples of one update on all devices; `accumulate` cuts it into so many
    parts whose gradients are averaged.

    Optimizer: `optimizer` is one of OPTIMIZERS, with `b1`, `b2`, `eps` and
    `weight_decay`; for "sgd", `b1` is the momentum. The rate rises
    linearly from 0 over `warmup_steps` updates (or `warmup_epochs`), then follows `schedule` from
    `learning_rate` to `min_lr` at the end. `decay_on` "matrices" spares biases, scales and other
    vectors. `clip_norm` 0 means no clipping of the gradient's norm. `rates` and `decays` multiply
    rate and weight decay of the parameters whose dotted path a regular expression is found in; the
    first match counts. So `rates=(("text_encoder", 0.1),)` trains one network at a tenth of the
    rate, and `rates=(("lora_B", 16.0),)` is LoRA+ (arXiv 2402.12354).

    `ema_decay` 0 keeps no average; otherwise the result is the debiased exponential average of the
    parameters. `remat` names what the backward pass computes again: None for nothing, "block" for
    the inside of each block, "dots" for all but its matrix products. `precision` is that of
    products on accelerators (JAX's matmul precision). `steps_per_call` updates run in one call of
    the program, which tiny networks need.

    Beside the training: a checkpoint every `checkpoint_every` updates and at the latest after
    `checkpoint_minutes`, metrics every `log_every`, an evaluation every `evaluate_every` and images
    every `sample_every` where the method has them (0: none), files for TensorBoard (`tensorboard`),
    and an XLA profile of a few early steps (`profile`).
    """

    steps: Natural = 0
    epochs: Natural = 0
    min_steps: Natural = 0
    batch_size: Count = 8
    optimizer: Annotated[str, OneOf(*OPTIMIZERS)] = "adamw"
    learning_rate: NotNegative = 1e-4
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "constant"
    warmup_steps: Natural = 0
    warmup_epochs: Natural = 0
    min_lr: NotNegative = 0.0
    weight_decay: NotNegative = 0.0
    decay_on: Annotated[str, OneOf(*DECAYED)] = "all"
    b1: BelowOne = 0.9
    b2: BelowOne = 0.999
    eps: NotNegative = 1e-8
    clip_norm: NotNegative = 0.0
    rates: Factors = ()
    decays: Factors = ()
    accumulate: Count = 1
    remat: Annotated[str | None, OneOf(None, *NAMES)] = None
    ema_decay: BelowOne = 0.0
    precision: Annotated[str, OneOf(*PRECISIONS)] = "default"
    steps_per_call: Count = 1
    checkpoint_every: Count = aside(1000)
    checkpoint_minutes: Positive = aside(10.0)
    log_every: Count = aside(50)
    evaluate_every: Natural = aside(0)
    sample_every: Natural = aside(0)
    tensorboard: bool = aside(False)
    profile: bool = aside(False)

    def __post_init__(self):
        check_limits(self)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size: {self.batch_size} is not divisible by accumulate = {self.accumulate}"
            )
        for name in ("rates", "decays"):
            for pattern, _ in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"{name}: {pattern!r} is no regular expression: {error}"
                    ) from None
        if self.steps and self.steps % self.steps_per_call:
            raise ValueError(
                f"steps: {self.steps} is not divisible by steps_per_call = {self.steps_per_call}"
            )

    def steps_per_epoch(self, examples: int) -> int:
        """Updates that see `examples` examples once."""
        return max(-(-examples // self.batch_size), 1)

    def num_steps(self, examples: int) -> int:
        """Updates of a training on `examples` examples, a whole number of calls."""
        found = self.steps or max(self.epochs * self.steps_per_epoch(examples), self.min_steps)
        return -(-found // self.steps_per_call) * self.steps_per_call

    def sized(self, examples: int) -> "TrainingConfig":
        """The same with lengths in updates alone, for a training set of `examples`."""
        steps = self.num_steps(examples)
        warmup = self.warmup_steps
        if self.warmup_epochs:
            per_epoch = max(steps // max(self.epochs, 1), 1)
            warmup = self.warmup_epochs * per_epoch
        return dataclasses.replace(
            self,
            steps=steps,
            epochs=0,
            min_steps=0,
            warmup_epochs=0,
            warmup_steps=min(warmup, steps),
        )
