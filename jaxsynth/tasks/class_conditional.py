"""Training a class-conditional diffusion transformer on cached latents: all of it, or adapters.

The recipe is DiT's (arXiv 2212.09748): Adam at a constant rate, no weight decay, labels dropped
with probability 0.1, flips, and where the network predicts its variance the variational bound
beside the error of the noise. What learns is decided by the model alone: everything `Trainable` in
it. Sets of one structure train side by side in one program (`adapt_each`), from the disk in turn.

Diff-Tuning (thuml's Diffusion-Tuning, NeurIPS 2024) is a second pair of batches and loss for any of
them (`Retention`): the last, nearly noiseless part of the reverse process is kept on images of the
base model while the noisy part learns the target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jaxsynth.adapters.inject import seed_dropout
from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import Count, Natural, NotNegative, Range, Share, check_limits
from jaxsynth.data.conditions import as_fractions
from jaxsynth.diffusion.learned_range import learned_range_loss
from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.tasks.latents import Latents, RandomBatches, RetainingBatches, stream_latents
from jaxsynth.training import sharding
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.trainer import Resident, Streamed, Task, train, train_stacked


@dataclass(frozen=True)
class Retention:
    """Diff-Tuning's two halves of the time axis.

    `share` of each batch (rounded to whole images) are images of the base model, without a label,
    weighted by `weight`. They are noised at times of density (T - t)^power and the target's images
    at times of density t^power, the convention of the authors' code. `images` is how many the base
    draws.
    """

    share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    weight: NotNegative = 0.1
    power: NotNegative = 1.0
    images: Count = 512

    def __post_init__(self):
        check_limits(self)

    def rows(self, batch_size: int) -> int:
        """How many images of a batch are of the base."""
        return round(batch_size * self.share)


@dataclass(frozen=True)
class AdaptConfig(TrainingConfig):
    """How a transformer or its adapters are trained; the defaults are DiT's.

    Labels are dropped with probability `label_dropout`, for guidance. `retention` is Diff-Tuning's,
    None plain training. `streamed`: latents stay on the disk, and the host reads those of a batch
    ahead of it: the same batches as from devices that hold all, for sets that do not fit there.
    """

    steps: Natural = 24_000
    batch_size: Count = 256
    label_dropout: Share = 0.1
    retention: Retention | None = None
    streamed: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.retention is None:
            return
        kept = self.retention.rows(self.batch_size)
        for what, rows in (("target", self.batch_size - kept), ("kept", kept)):
            if rows < 1 or rows % self.accumulate:
                raise ValueError(
                    f"batch_size: {self.batch_size} with retention.share {self.retention.share} "
                    f"has {rows} {what} images, expected a multiple of accumulate = "
                    f"{self.accumulate}"
                )


def sample_times(key: Key[Array, ""], count: int, total: int, power: float) -> Int[Array, " b"]:
    """Timesteps 0 to total - 1: whole parts of times of density t^power on (0, total).

    So t has the probability ((t + 1)^(power + 1) - t^(power + 1)) / total^(power + 1).
    """
    if power == 0:
        return jax.random.randint(key, (count,), 0, total)
    # The distribution function of t^power is t^(power + 1).
    uniform = jax.random.uniform(key, (count,))
    return jnp.minimum((total * uniform ** (1 / (power + 1))).astype(jnp.int32), total - 1)


def denoising_error(
    schedule: NoiseSchedule, output: Array, x0: Array, x_t: Array, noise: Array, t: Array
) -> Float[Array, " b"]:
    """Each sample's training loss, with the variance's bound where the output has a variance."""
    if output.shape[-1] == 2 * x0.shape[-1]:
        return learned_range_loss(schedule, output, x0, x_t, noise, t, per_sample=True)
    return diffusion_loss(schedule, output, x0, noise, t, per_sample=True)


class Drawn(NamedTuple):
    """What one step is about; the loss is the sum of the samples' errors by their `weights`."""

    x0: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    t: Int[Array, " b"]
    labels: Int[Array, " b"]
    condition: Float[Array, "b h w m"] | None
    weights: Float[Array, " b"]


@dataclass(frozen=True)
class LabelledDenoising:
    """The loss over a batch of `RandomBatches`; its constant is the noise schedule.

    Times have the density t^power, 0 for equally likely ones.
    """

    null_label: int
    label_dropout: float = 0.1
    remat: str | None = None
    power: float = 0.0

    def __call__(self, model: DiT, schedule: NoiseSchedule, batch: dict[str, Array], key: Array):
        x0, noise, t, labels, condition, weights = self.draw(schedule, batch, key)
        x_t = add_noise(schedule, x0, noise, t)
        model = seed_dropout(model, jax.random.fold_in(key, 5))
        output = model(x_t, t, labels, condition=condition, remat=self.remat)
        errors = denoising_error(schedule, output, x0, x_t, noise, t)
        return (errors * weights).sum(), {}

    def draw(self, schedule: NoiseSchedule, batch: dict[str, Array], key: Array) -> Drawn:
        """What one step draws by `key` for a batch."""
        keys = [jax.random.fold_in(key, i) for i in range(5)]
        count = len(batch["labels"])
        x0 = batch["mean"] + batch["std"] * jax.random.normal(keys[0], batch["mean"].shape)
        dropped = jax.random.bernoulli(keys[1], self.label_dropout, (count,))
        condition = batch.get("condition")
        return Drawn(
            x0=x0,
            noise=jax.random.normal(keys[4], x0.shape),
            t=sample_times(keys[2], count, schedule.num_train_timesteps, self.power),
            labels=jnp.where(dropped, self.null_label, batch["labels"]),
            condition=None if condition is None else as_fractions(condition),
            weights=jnp.full(count, 1 / count),
        )


@dataclass(frozen=True)
class RetainingDenoising(LabelledDenoising):
    """The same over a batch of `RetainingBatches`, whose images of the base come last.

    They have the mean `weight`, no label and no condition, and times of density (T - t)^power.
    """

    weight: float = 0.1

    def draw(self, schedule: NoiseSchedule, batch: dict[str, Array], key: Array) -> Drawn:
        target = super().draw(schedule, batch, key)
        keys = [jax.random.fold_in(key, i) for i in range(5)]
        kept, total = len(batch["kept"]), schedule.num_train_timesteps
        late = total - 1 - sample_times(keys[3], kept, total, self.power)
        x0 = jnp.concatenate([target.x0, batch["kept"]])
        condition = target.condition
        if condition is not None:
            condition = jnp.pad(condition, [(0, kept)] + [(0, 0)] * 3)
        return Drawn(
            x0=x0,
            noise=jax.random.normal(keys[4], x0.shape),
            t=jnp.concatenate([target.t, late]),
            labels=jnp.concatenate([target.labels, jnp.full(kept, self.null_label)]),
            condition=condition,
            weights=jnp.concatenate([target.weights, jnp.full(kept, self.weight / kept)]),
        )


def adapt_tasks(
    models: Sequence[DiT],
    sets: Sequence[Latents],
    schedule: NoiseSchedule,
    config: AdaptConfig,
    *,
    seed: int,
    kept: Float[np.ndarray, "m h w c"] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> list[Task]:
    """A task for each model and its set: all draw with the same keys what they would draw alone.

    Sets may differ in size and in views. `kept` are latents drawn by the base model, for
    `config.retention`; `identity` says what else checkpoints must agree on. Models and arrays may
    be shapes, for a plan.

    Raises:
        UserError: `config.retention` without `kept`, or sets whose conditions differ in channels.
    """
    retention, null_label = config.retention, models[0].config.null_label
    if retention is not None and kept is None:
        raise UserError("retention needs `kept`, latents that the base model drew")
    loss = LabelledDenoising(null_label, config.label_dropout, config.remat)
    next_batch: Any = RandomBatches(config.batch_size)
    more = {}
    if retention is not None and kept is not None:
        loss = RetainingDenoising(
            null_label, config.label_dropout, config.remat, retention.power, retention.weight
        )
        rows = retention.rows(config.batch_size)
        target = RandomBatches(config.batch_size - rows)
        next_batch, more = RetainingBatches(target, rows, len(kept)), {"kept": kept}
    order_key, key = jax.random.split(jax.random.key(seed))
    tasks = []
    padded = sets if config.streamed else _padded(sets)
    for model, one in zip(models, padded, strict=True):
        batches: Resident | Streamed
        if config.streamed:
            batches = stream_latents(one, next_batch, order_key, config.steps, kept)
        else:
            own = {**one, **more, "key": order_key}
            examples = ("mean", "std", "labels", "condition", "kept")
            sharded = tuple(name for name in examples if name in own)
            batches = Resident(own, next_batch, sharded=sharded)
        tasks.append(
            Task(
                model=model,
                loss=loss,
                batches=batches,
                table=sharding.DIT,
                key=key,
                constants=schedule,
                identity={"seed": seed, **(identity or {})},
            )
        )
    return tasks


def adapt(
    model: DiT,
    latents: Latents,
    schedule: NoiseSchedule,
    config: AdaptConfig,
    folder: Path,
    *,
    seed: int,
    kept: Float[np.ndarray, "m h w c"] | None = None,
    identity: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    description: str = "train",
) -> DiT:
    """Train what is `Trainable` in `model` on `latents`; resumes from `folder/checkpoints`.

    Arguments and errors as `adapt_tasks`. Returns the trained model (its average where there is
    one).
    """
    config = config.sized(len(latents))
    (task,) = adapt_tasks(
        [model], [latents], schedule, config, seed=seed, kept=kept, identity=identity
    )
    return train(task, config, folder, mesh=mesh, description=description)


def adapt_each(
    models: Sequence[DiT],
    sets: Sequence[Latents],
    schedule: NoiseSchedule,
    config: AdaptConfig,
    folder: Path,
    *,
    seed: int,
    kept: Float[np.ndarray, "m h w c"] | None = None,
    identity: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    description: str = "train",
) -> list[DiT]:
    """`adapt` for models of one structure around one frozen base, all in one compiled program.

    Model i becomes what `adapt` makes of it alone, up to rounding. An epoch is one over the largest
    set. On a mesh the models lie along "data"; where their number is not divisible by it, the last
    one is trained more than once. With `config.streamed` they train in turn, each in a folder of
    its own below `folder`.
    """
    if config.streamed:
        options = {"seed": seed, "kept": kept, "identity": identity, "mesh": mesh}
        return [
            adapt(
                model, one, schedule, config, folder / str(place),
                description=f"{description}, {place + 1} of {len(sets)}", **options,
            )
            for place, (model, one) in enumerate(zip(models, sets, strict=True))
        ]  # fmt: skip
    tasks = adapt_tasks(models, sets, schedule, config, seed=seed, kept=kept, identity=identity)
    sized = config.sized(max(map(len, sets)))
    return train_stacked(tasks, sized, folder, mesh=mesh, description=description)


def _padded(sets: Sequence[Latents]) -> list[dict[str, Any]]:
    """The arrays of sets of any sizes in one shape; what fills up a short one is never drawn."""
    count, views = max(map(len, sets)), max(one.mean.shape[1] for one in sets)
    channels = {0 if one.condition is None else one.condition.shape[-1] for one in sets}
    if len(channels) > 1:
        raise UserError(f"sets side by side: conditions of {sorted(channels)} channels, not one")
    made = []
    for one in sets:
        arrays = {name: getattr(one, name) for name in ("mean", "std", "condition")}
        data = {name: _filled(x, count, views) for name, x in arrays.items() if x is not None}
        data["labels"] = _filled(one.labels, count)
        data |= {"count": np.int32(len(one)), "views": np.int32(one.mean.shape[1])}
        made.append(data)
    return made


def _filled(values: Any, *sizes: int) -> Any:
    """`values` with zeros after it, up to `sizes` on its first axes."""
    if values.shape[: len(sizes)] == sizes:
        return values
    short = [size - own for size, own in zip(sizes, values.shape, strict=False)]
    return np.pad(values, [(0, by) for by in short] + [(0, 0)] * (values.ndim - len(short)))
