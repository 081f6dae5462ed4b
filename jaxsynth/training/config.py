"""How anything here is trained: one dataclass, which every method's configurations extend.

A method nests it under its own name (`finetune`, `classify`, `train`) with defaults of its own and
what its loss needs besides, so that `--config.<name>.learning_rate=` and every other field here
means the same everywhere.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from jaxsynth.models.remat import POLICIES

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

    steps: int = 0
    epochs: int = 0
    min_steps: int = 0
    batch_size: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    warmup_epochs: int = 0
    min_lr: float = 0.0
    weight_decay: float = 0.0
    decay_on: str = "all"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0
    rates: Factors = ()
    decays: Factors = ()
    accumulate: int = 1
    remat: str | None = None
    ema_decay: float = 0.0
    precision: str = "default"
    steps_per_call: int = 1
    checkpoint_every: int = aside(1000)
    checkpoint_minutes: float = aside(10.0)
    log_every: int = aside(50)
    evaluate_every: int = aside(0)
    sample_every: int = aside(0)
    tensorboard: bool = aside(False)
    profile: bool = aside(False)

    def __post_init__(self):
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("decay_on", DECAYED),
            ("remat", (None, *POLICIES)),
            ("precision", PRECISIONS),
        ):
            if (value := getattr(self, name)) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise ValueError(f"{name}: {value!r}, expected one of {choices}")
        for name in ("batch_size", "accumulate", "steps_per_call", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        for name in (
            "steps", "epochs", "min_steps", "warmup_steps", "warmup_epochs", "evaluate_every",
            "sample_every", "weight_decay", "clip_norm", "min_lr", "learning_rate",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay}, expected 0 <= ema_decay < 1")
        if self.checkpoint_minutes <= 0:
            raise ValueError(f"checkpoint_minutes: {self.checkpoint_minutes}, expected above 0")
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
