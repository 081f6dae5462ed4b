"""Training a class-conditional diffusion transformer on cached latents: all of it, or adapters.

The recipe is DiT's (arXiv 2212.09748): Adam at a constant rate, no weight decay, labels dropped
with probability 0.1, flips, and where the network predicts its variance the variational bound
beside the error of the noise. What learns is decided by the model alone: everything `Trainable` in
it. Sets of one structure train side by side in one program (`adapt_each`).

`Retention` is Diff-Tuning's option for any of them: the last, nearly noiseless part of the reverse
process is kept on images of the base model while the noisy part learns the target (thuml's
Diffusion-Tuning, NeurIPS 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxsynth.adapters import optim_hooks
from jaxsynth.adapters.inject import Trainable, config_of, seed_dropout, stack, unstack
from jaxsynth.data.conditions import as_bytes, as_fractions
from jaxsynth.data.dataset import ImageSource
from jaxsynth.diffusion.learned_range import learned_range_loss
from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.models.diffusion.vae import AutoencoderKL, encode_images
from jaxsynth.ops.space_to_depth import space_to_depth
from jaxsynth.quality.errors import mean_error
from jaxsynth.training import sharding
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.loop import Constant, fit
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.optim import OptimConfig, make_optimizer, make_schedule
from jaxsynth.training.step import (
    StepFn,
    init_stacked,
    init_state,
    make_train_step,
    scan_steps,
    stacked,
)


@dataclass(frozen=True)
class Retention:
    """Diff-Tuning's two halves of the time axis.

    `share` of each batch (rounded to whole images) are images of the base model, without a label,
    weighted by `weight`. They are noised at times of density (T - t)^power and the target's images
    at times of density t^power, the convention of the authors' code. `images` is how many the base
    draws.
    """

    share: float = 0.2
    weight: float = 0.1
    power: float = 1.0
    images: int = 512

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"retention.share is {self.share}, expected 0 < share < 1")
        if self.power < 0 or self.images < 1:
            raise ValueError(
                f"retention: power {self.power} and images {self.images}, expected at least 0 and 1"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How a transformer or its adapters are trained; the defaults are DiT's.

    `ema_decay` 0 keeps no average. `steps_per_call` steps run in one program call, which tiny
    networks need; it must divide `steps`. `accumulate` cuts a batch into so many parts.
    """

    steps: int = 24_000
    batch_size: int = 256
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    label_dropout: float = 0.1
    accumulate: int = 1
    remat: str | None = None
    steps_per_call: int = 1
    checkpoint_every: int = 1000
    retention: Retention | None = field(default=None)

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "steps_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.steps % self.steps_per_call:
            raise ValueError(
                f"steps {self.steps} is not divisible by steps_per_call {self.steps_per_call}"
            )
        for what, rows in self.rows.items():
            if rows < 1 or rows % self.accumulate:
                raise ValueError(
                    f"batch_size {self.batch_size}: {rows} {what} images in a batch, expected a "
                    f"multiple of accumulate = {self.accumulate}"
                )

    @property
    def rows(self) -> dict[str, int]:
        """How many images of a batch are of the target, and of the base where some are kept."""
        if self.retention is None:
            return {"target": self.batch_size}
        kept = round(self.batch_size * self.retention.share)
        return {"target": self.batch_size - kept, "kept": kept}


@dataclass(frozen=True)
class Latents:
    """A labelled data set as the VAE's posteriors, scaled as the transformer wants them.

    `mean` and `std` have an axis of `k` views of each image (itself, and mirrored). `condition`, if
    any, is that of each view at the latents' size: fractions, or uint8 in 255ths (`conditioned`).
    """

    mean: Float[np.ndarray, "n k h w c"]
    std: Float[np.ndarray, "n k h w c"]
    labels: Int[np.ndarray, " n"]
    condition: Shaped[np.ndarray, "n k h w m"] | None = None

    def __post_init__(self):
        if self.condition is not None and self.condition.shape[:-1] != self.mean.shape[:-1]:
            raise ValueError(
                f"Latents: a condition of {self.condition.shape} for latents of {self.mean.shape}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def conditioned(self, pixels: Shaped[np.ndarray, "n height width m"]) -> "Latents":
        """The same with condition images, of the images' size and mirrored where they are.

        `pixels` are fractions or uint8 in 255ths; stored as the latter, at the latents' size with
        nothing lost (`ops.space_to_depth`). ValueError where sizes do not fit.
        """
        values = pixels if pixels.dtype == np.uint8 else as_bytes(pixels)
        views = [values, values[:, :, ::-1]][: self.mean.shape[1]]
        factor = max(values.shape[1] // self.mean.shape[2], 1)
        condition = np.stack([space_to_depth(view, factor) for view in views], axis=1)
        return replace(self, condition=condition)

    def save(self, path: Path) -> None:
        """Write one `.npz`."""
        arrays = {name: getattr(self, name) for name in ("mean", "std", "labels", "condition")}
        np.savez(path, **{name: value for name, value in arrays.items() if value is not None})

    @classmethod
    def load(cls, path: Path) -> "Latents":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{name: file[name] for name in file.files})


def encode_latents(
    vae: AutoencoderKL, source: ImageSource, *, mirror: bool, batch_size: int = 64
) -> Latents:
    """The images of `source`, of one square size, as latents; with `mirror` also mirrored.

    Decoded a batch at a time: a large data set fits in memory as latents, not as pixels.
    """
    parts = []
    for start in range(0, len(source), batch_size):
        rows = range(start, min(start + batch_size, len(source)))
        images = np.stack([source[i].image for i in rows]).astype(np.float32) / 127.5 - 1
        views = [images, images[:, :, ::-1]] if mirror else [images]
        encoded = [encode_images(vae, view, batch_size=batch_size) for view in views]
        parts.append([np.stack(part, axis=1) for part in zip(*encoded, strict=True)])
    mean, std = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Latents(mean, std, np.asarray(source.labels, np.int32))


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


def draw(
    batch: dict[str, Array], key: Array, total: int, config: TrainConfig, null_label: int
) -> Drawn:
    """What one step draws by `key` for a batch of `draw_batch`, at times below `total`.

    Images that are kept come last.
    """
    retention = config.retention
    keys = [jax.random.fold_in(key, i) for i in range(5)]
    count = len(batch["labels"])
    x0 = batch["mean"] + batch["std"] * jax.random.normal(keys[0], batch["mean"].shape)
    dropped = jax.random.bernoulli(keys[1], config.label_dropout, (count,))
    labels = jnp.where(dropped, null_label, batch["labels"])
    t = sample_times(keys[2], count, total, retention.power if retention else 0)
    weights = jnp.full(count, 1 / count)
    condition = batch.get("condition")
    if condition is not None:
        condition = as_fractions(condition)
    if retention:
        kept = len(batch["kept"])
        x0 = jnp.concatenate([x0, batch["kept"]])
        if condition is not None:  # the base's images have none
            condition = jnp.pad(condition, [(0, kept)] + [(0, 0)] * 3)
        labels = jnp.concatenate([labels, jnp.full(kept, null_label)])
        late = total - 1 - sample_times(keys[3], kept, total, retention.power)
        t = jnp.concatenate([t, late])
        weights = jnp.concatenate([weights, jnp.full(kept, retention.weight / kept)])
    noise = jax.random.normal(keys[4], x0.shape)
    return Drawn(x0, noise, t, labels, condition, weights)


def make_loss(
    graphdef: Any, schedule: NoiseSchedule, config: TrainConfig, null_label: int, mesh=None
):
    """`loss(trainable, frozen, batch, key)` over what `draw_batch` draws."""
    total = schedule.num_train_timesteps

    def loss(trainable, frozen, batch, key):
        if mesh is not None:
            rows = NamedSharding(mesh, sharding.BATCH)
            batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), batch)
        x0, noise, t, labels, condition, weights = draw(batch, key, total, config, null_label)
        x_t = add_noise(schedule, x0, noise, t)
        model = seed_dropout(nnx.merge(graphdef, trainable, frozen), jax.random.fold_in(key, 5))
        output = model(x_t, t, labels, condition=condition, remat=config.remat)
        errors = denoising_error(schedule, output, x0, x_t, noise, t)
        return (errors * weights).sum(), {}

    return loss


def make_step(
    graphdef: Any,
    schedule: NoiseSchedule,
    config: TrainConfig,
    null_label: int,
    mesh: Mesh | None = None,
    adapter: Any = None,
) -> tuple[optax.GradientTransformation, StepFn]:
    """The optimiser, and `step(state, frozen, data)` of `config.steps_per_call` updates.

    `data` is what `draw_batch` draws from, `adapter` the configuration of what learns.
    """
    optim = OptimConfig(
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        warmup_steps=min(config.warmup_steps, config.steps),
        total_steps=config.steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    tx = optim_hooks.optimiser(adapter, make_optimizer(optim), config.steps)
    loss = make_loss(graphdef, schedule, config, null_label, mesh)
    step = make_train_step(
        optim_hooks.penalised(loss, adapter),
        tx,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay or None,
        learning_rate=make_schedule(optim),
    )
    return tx, scan_steps(step, partial(draw_batch, config=config), config.steps_per_call)


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """ValueError unless every part of a batch divides over the devices of `mesh`."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for what, rows in config.rows.items():
        if rows // config.accumulate % parts:
            raise ValueError(
                f"batch_size {config.batch_size}: {rows} {what} images in {config.accumulate} "
                f"parts (accumulate) are not divisible over data x fsdp = {parts} devices"
            )


def draw_batch(step: Array, data: dict[str, Array], config: TrainConfig) -> dict[str, Array]:
    """The batch of a step, with replacement: "mean" and "std" (b, h, w, c), "labels", "kept".

    "condition" (b, h, w, m) is in it where the data has one, (n, k, h, w, m).
    `data` has "mean" and "std" (n, k, h, w, c), "labels" (n,), of which the first "count" images
    and "views" views are drawn, "key", and for retention "kept" (m, h, w, c).
    """
    keys = jax.random.split(jax.random.fold_in(data["key"], step), 3)
    shape = (config.rows["target"],)
    rows = jax.random.randint(keys[0], shape, 0, data["count"])
    view = jax.random.randint(keys[1], shape, 0, data["views"])
    viewed = [name for name in ("mean", "std", "condition") if name in data]
    batch = {name: data[name][rows, view] for name in viewed}
    batch["labels"] = data["labels"][rows]
    if config.retention:
        shape = (config.rows["kept"],)
        batch["kept"] = data["kept"][jax.random.randint(keys[2], shape, 0, len(data["kept"]))]
    return batch


def adapt(
    model: DiT,
    latents: Latents,
    schedule: NoiseSchedule,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    kept: Float[np.ndarray, "m h w c"] | None = None,
    mesh: Mesh | None = None,
    description: str = "train",
) -> DiT:
    """Train what is `Trainable` in `model` on `latents`; resumes from `folder/checkpoints`.

    `kept` are latents drawn by the base model, for `config.retention`. Returns the trained model
    (its average where there is one).
    """
    (trained,) = _adapt([model], [latents], schedule, config, folder, seed, kept, mesh, description)
    return trained


def adapt_each(
    models: Sequence[DiT],
    latents: Sequence[Latents],
    schedule: NoiseSchedule,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    kept: Float[np.ndarray, "m h w c"] | None = None,
    mesh: Mesh | None = None,
    description: str = "train",
) -> list[DiT]:
    """`adapt` for models of one structure around one frozen base, all in one compiled program.

    Model i becomes what `adapt` makes of it alone, up to rounding. Sets may differ in size and in
    views. On a mesh the models lie along "data"; where their number is not divisible by it, the
    last one is trained more than once.
    """
    models, latents, count = list(models), list(latents), len(models)
    if mesh is not None:
        short = -count % mesh.shape["data"]
        models, latents = models + models[-1:] * short, latents + latents[-1:] * short
    return _adapt(
        models, latents, schedule, config, folder, seed, kept, mesh, description, together=True
    )[:count]


def _adapt(
    models, latents, schedule, config, folder, seed, kept, mesh, description, *, together=False
) -> list[DiT]:
    if config.retention and kept is None:
        raise ValueError("retention needs `kept`, latents that the base model drew")
    graphdef, _, frozen = nnx.split(models[0], Trainable, ...)
    trainables = [nnx.state(model, Trainable) for model in models]
    data = _padded(latents)
    if config.retention:
        data["kept"] = np.stack([kept] * len(models))
    if mesh is not None and not together:
        check_rows(config, mesh)
    null = models[0].config.null_label
    tx, step = make_step(
        graphdef, schedule, config, null, None if together else mesh, config_of(models[0])
    )
    order_key, key = jax.random.split(jax.random.key(seed))
    ema = bool(config.ema_decay)
    data["key"] = jnp.stack([order_key] * len(models))
    batch = jax.tree.map(jnp.asarray, data)
    if together:
        # Every set draws what it would draw alone.
        state = init_stacked(stack(trainables), tx, jnp.stack([key] * len(models)), ema=ema)
        step = stacked(step)
    else:
        batch = jax.tree.map(lambda x: x[0], batch)
        state = init_state(trainables[0], tx, key, ema=ema)
    placed = frozen
    if mesh is not None:
        placed = sharding.shard(frozen, mesh, sharding.DIT)
        place = sharding.shard_stack if together else sharding.replicate
        state, batch = place(state, mesh), place(batch, mesh)
    with (
        Checkpoints(folder / "checkpoints", every=config.checkpoint_every, keep=1) as checkpoint,
        MetricsWriter(folder) as metrics,
    ):
        state = fit(
            state, placed, Constant(batch), step, steps=config.steps,
            steps_per_call=config.steps_per_call, checkpoint=checkpoint, metrics=metrics,
            description=description,
        )  # fmt: skip
    learnt = sharding.gather(state.trainable if state.ema is None else state.ema)
    return [nnx.merge(graphdef, one, frozen) for one in (unstack(learnt) if together else [learnt])]


def _padded(sets: Sequence[Latents]) -> dict[str, np.ndarray]:
    """Sets of any sizes, stacked; what a short one is filled up with is never drawn."""
    counts, views = [len(one) for one in sets], [one.mean.shape[1] for one in sets]

    def filled(values: np.ndarray, *most: int) -> np.ndarray:
        short = [size - own for size, own in zip(most, values.shape, strict=False)]
        return np.pad(values, [(0, by) for by in short] + [(0, 0)] * (values.ndim - len(short)))

    channels = {0 if one.condition is None else one.condition.shape[-1] for one in sets}
    if len(channels) > 1:
        raise ValueError(f"sets side by side: conditions of {sorted(channels)} channels, not one")
    names = ("mean", "std") if channels == {0} else ("mean", "std", "condition")
    arrays = {
        name: np.stack([filled(getattr(one, name), max(counts), max(views)) for one in sets])
        for name in names
    }
    arrays["labels"] = np.stack([filled(one.labels, max(counts)) for one in sets])
    return arrays | {"count": np.array(counts, np.int32), "views": np.array(views, np.int32)}


def held_out_error(
    model: DiT,
    latents: Latents,
    schedule: NoiseSchedule,
    *,
    seed: int,
    repeats: int = 8,
    batch_size: int = 256,
) -> float:
    """Mean squared error of the predicted noise at `repeats` fixed (time, noise) pairs an image.

    As `scoring.mean_error` chooses them.
    """

    def errors(rows: np.ndarray, noise: np.ndarray, t: np.ndarray) -> Array:
        arrays = [latents.mean[rows, 0], noise, t, latents.labels[rows]]
        if latents.condition is not None:
            arrays.append(as_fractions(latents.condition[rows, 0]))
        return _noise_errors(model, schedule, *map(jnp.asarray, arrays))

    return mean_error(
        errors,
        len(latents),
        latents.mean.shape[2:],
        schedule.num_train_timesteps,
        seed=seed,
        repeats=repeats,
        batch_size=batch_size,
    )


@jax.jit
def _noise_errors(
    model: DiT,
    schedule: NoiseSchedule,
    x0: Array,
    noise: Array,
    t: Array,
    labels: Array,
    condition: Array | None = None,
) -> Float[Array, " b"]:
    x_t = add_noise(schedule, x0, noise, t)
    output = model(x_t, t, labels, condition=condition)[..., : x0.shape[-1]]
    return diffusion_loss(schedule, output, x0, noise, t, per_sample=True)
