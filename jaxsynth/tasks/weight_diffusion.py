"""Training a network that denoises blocks of weights, and making blocks with it.

Gong et al. 2024 (arXiv 2407.11966): the datum is a block, its number and a text; w_t = alpha_t w +
sigma_t noise; one step from a chosen t gives the weights. They predict the noise. From a noise
prediction that step multiplies the network's error by sigma_t / alpha_t, 3.4 at t = 500 of the
linear schedule and 157 at its end, so nearly pure noise gives nothing; predicting x_0 or v has no
such factor. All three are here (the schedule's `prediction_type`), as is sampling in a few steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsynth.adapters.inject import Trainable, mark_trainable, with_values
from jaxsynth.diffusion.losses import target
from jaxsynth.diffusion.samplers import Sampler, make_sampler, sample
from jaxsynth.diffusion.schedules import PREDICTION_TYPES, NoiseSchedule, add_noise, to_x0_eps
from jaxsynth.models.diffusion.weight_unet import WeightUNet
from jaxsynth.training import sharding
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.loop import Constant, fit
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.optim import OptimConfig, make_optimizer, make_schedule
from jaxsynth.training.step import StepFn, init_state, make_train_step, scan_steps


@dataclass(frozen=True)
class WeightTrainConfig:
    """How the denoiser of weights is trained. A batch is of blocks, of any concepts and places.

    `prediction_type` is "epsilon" (the paper's), "v_prediction" or "sample". Times are drawn with a
    density of t ** `noise_bias`: one step from noise asks for the last ones alone. `ema_decay` 0
    keeps no average. `steps_per_call` must divide `steps`.
    """

    steps: int = 100_000
    batch_size: int = 512
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    prediction_type: str = "sample"
    beta_schedule: str = "linear"
    num_train_timesteps: int = 1000
    noise_bias: float = 0.0
    steps_per_call: int = 1
    checkpoint_every: int = 5000

    def __post_init__(self):
        for name in ("steps", "batch_size", "steps_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.steps % self.steps_per_call:
            raise ValueError(
                f"steps {self.steps} is not divisible by steps_per_call {self.steps_per_call}"
            )
        if self.noise_bias < 0:
            raise ValueError(f"noise_bias is {self.noise_bias}, expected at least 0")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type {self.prediction_type!r}, expected one of {PREDICTION_TYPES}"
            )

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule, its timesteps spaced from the last one so that sampling starts in noise."""
        return NoiseSchedule.from_config(
            {
                "_class_name": "DDIMScheduler",
                "num_train_timesteps": self.num_train_timesteps,
                "beta_schedule": self.beta_schedule,
                "prediction_type": self.prediction_type,
                "timestep_spacing": "trailing",
                "clip_sample": False,
            }
        )


@dataclass(frozen=True)
class WeightData:
    """What is learnt: normalised blocks of concepts' checkpoints, and the states of their texts.

    Concept c has the texts 0 .. counts[c] - 1; what `context` holds beyond is never drawn. `mask`
    tells where values lie.
    """

    blocks: Float[np.ndarray, "c k n v"]
    context: Float[np.ndarray, "c p tokens d"]
    counts: Int[np.ndarray, " c"]
    mask: Bool[np.ndarray, "n v"]

    def __post_init__(self):
        concepts = {len(self.blocks), len(self.context), len(self.counts)}
        if len(concepts) != 1 or self.blocks.shape[2:] != self.mask.shape:
            raise ValueError(
                f"WeightData: blocks {self.blocks.shape}, context {self.context.shape}, counts "
                f"{self.counts.shape} and mask {self.mask.shape} do not belong together"
            )

    def tree(self, key: Key[Array, ""]) -> dict[str, Any]:
        """What `draw_batch` draws from."""
        return {
            "blocks": self.blocks,
            "context": self.context,
            "counts": np.asarray(self.counts, np.int32),
            "mask": self.mask,
            "key": key,
        }


def draw_batch(step: Array, data: dict[str, Array], batch_size: int) -> dict[str, Array]:
    """The batch of a step, with replacement: "x0" and "mask" (b, v), "index" (b,), "context"."""
    keys = jax.random.split(jax.random.fold_in(data["key"], step), 4)
    concepts, checkpoints, count, _ = data["blocks"].shape

    def pick(key: Array, size: int) -> Array:
        return jax.random.randint(key, (batch_size,), 0, size)

    rows, index = pick(keys[0], concepts), pick(keys[2], count)
    text = jax.random.randint(keys[3], (batch_size,), 0, data["counts"][rows])
    return {
        "x0": data["blocks"][rows, pick(keys[1], checkpoints), index],
        "mask": data["mask"][index],
        "index": index,
        "context": data["context"][rows, text],
    }


def make_loss(
    graphdef: Any, schedule: NoiseSchedule, mesh: Mesh | None = None, *, noise_bias: float = 0.0
):
    """`loss(trainable, frozen, batch, key)` over what `draw_batch` draws: a mean over values."""

    def loss(trainable, frozen, batch, key):
        if mesh is not None:
            rows = NamedSharding(mesh, sharding.BATCH)
            batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), batch)
        x0 = batch["x0"]
        share = jax.random.uniform(jax.random.fold_in(key, 0), x0.shape[:1])
        last = schedule.num_train_timesteps - 1  # where rounding would go beyond
        t = jnp.minimum(jnp.int32(share ** (1 / (1 + noise_bias)) * (last + 1)), last)
        noise = jax.random.normal(jax.random.fold_in(key, 1), x0.shape)
        model = nnx.merge(graphdef, trainable, frozen)
        output = model(add_noise(schedule, x0, noise, t), t, batch["index"], batch["context"])
        error = jnp.square(output - target(schedule, x0, noise, t)) * batch["mask"]
        return error.sum() / jnp.maximum(batch["mask"].sum(), 1), {}

    return loss


def make_step(
    graphdef: Any, config: WeightTrainConfig, mesh: Mesh | None = None
) -> tuple[optax.GradientTransformation, StepFn]:
    """The optimiser, and `step(state, frozen, data)` of `config.steps_per_call` updates."""
    optim = OptimConfig(
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        warmup_steps=min(config.warmup_steps, config.steps),
        total_steps=config.steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    tx = make_optimizer(optim)
    step = make_train_step(
        make_loss(graphdef, config.noise_schedule(), mesh, noise_bias=config.noise_bias),
        tx,
        ema_decay=_warmed(config.ema_decay) if config.ema_decay else None,
        learning_rate=make_schedule(optim),
    )
    draw = partial(draw_batch, batch_size=config.batch_size)
    return tx, scan_steps(step, draw, config.steps_per_call)


def _warmed(decay: float) -> Callable[[Array], Array]:
    """A decay that rises to `decay`: a short run's average would be of its first parameters."""
    return lambda step: jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def check_rows(config: WeightTrainConfig, mesh: Mesh) -> None:
    """ValueError unless a batch divides over the devices of `mesh`."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible over data x fsdp = {parts} devices"
        )


def train(
    model: WeightUNet,
    data: WeightData,
    config: WeightTrainConfig,
    folder: Path,
    *,
    seed: int,
    mesh: Mesh | None = None,
    description: str = "weights",
) -> WeightUNet:
    """The network trained on `data` (its average where there is one); resumes from `folder`.

    On a mesh the state is cut by `sharding.WEIGHT_UNET` and the batch over "data" and "fsdp".
    """
    graphdef, trainable, frozen = nnx.split(mark_trainable(model), Trainable, ...)
    tx, step = make_step(graphdef, config, mesh)
    order, key = jax.random.split(jax.random.key(seed))
    state = init_state(trainable, tx, key, ema=bool(config.ema_decay))
    batch = jax.tree.map(jnp.asarray, data.tree(order))
    if mesh is not None:
        check_rows(config, mesh)
        state = sharding.shard(state, mesh, sharding.WEIGHT_UNET)
        frozen, batch = sharding.replicate(frozen, mesh), sharding.replicate(batch, mesh)
    with (
        Checkpoints(folder / "checkpoints", every=config.checkpoint_every, keep=1) as checkpoint,
        MetricsWriter(folder) as metrics,
    ):
        state = fit(
            state, frozen, Constant(batch), step, steps=config.steps,
            steps_per_call=config.steps_per_call, checkpoint=checkpoint, metrics=metrics,
            description=description,
        )  # fmt: skip
    learnt = sharding.gather(state.trainable if state.ema is None else state.ema)
    return with_values(model, learnt)


def few_steps(config: WeightTrainConfig, steps: int) -> Sampler:
    """DDIM in so many steps from the last time."""
    return make_sampler("ddim", config.noise_schedule(), steps)


@partial(jax.jit, static_argnames="count")
def recover(
    model: WeightUNet,
    schedule: NoiseSchedule,
    context: Float[Array, "m tokens d"],
    t: Int[Array, ""],
    key: Key[Array, ""],
    *,
    count: int,
) -> Float[Array, "m count v"]:
    """All `count` blocks for each text in one step from noise, taken to be w_t at time `t`."""
    noise, index, texts = _start(model, context, key, count)
    times = jnp.broadcast_to(t, index.shape)
    output = model(noise, times, index, texts)
    x0, _ = to_x0_eps(schedule, output, noise, times)
    return x0.reshape(len(context), count, -1)


@partial(jax.jit, static_argnames="count")
def denoise(
    model: WeightUNet,
    sampler: Sampler,
    context: Float[Array, "m tokens d"],
    key: Key[Array, ""],
    *,
    count: int,
) -> Float[Array, "m count v"]:
    """All `count` blocks for each text by the steps of `sampler`."""
    noise, index, texts = _start(model, context, key, count)

    def predict(x: Array, t: Array) -> Array:
        return model(x, t, index, texts)

    x0 = sample(predict, noise * sampler.init_noise_sigma, sampler)
    return x0.reshape(len(context), count, -1)


def _start(model: WeightUNet, context: Array, key: Array, count: int):
    """Noise, the block's number and the text of every block of every text, as one batch.

    The noise is the same for every text, so that texts are compared under one noise.
    """
    texts = len(context)
    noise = jax.random.normal(key, (count, model.config.sample_size))
    return (
        jnp.tile(noise, (texts, 1)),
        jnp.tile(jnp.arange(count), texts),
        jnp.repeat(context, count, axis=0),
    )
