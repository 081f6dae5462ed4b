"""Training a network that denoises blocks of weights, and making blocks with it.

Gong et al. 2024 (arXiv 2407.11966): the datum is a block, its number and a text; w_t = alpha_t w +
sigma_t noise; one step from a chosen t gives the weights. They predict the noise. From a noise
prediction that step multiplies the network's error by sigma_t / alpha_t, 3.4 at t = 500 of the
linear schedule and 157 at its end, so nearly pure noise gives nothing; predicting x_0 or v has no
such factor. All three are here (the schedule's `prediction_type`), as is sampling in a few steps.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsynth.adapters.inject import mark_trainable, with_values
from jaxsynth.core.limits import BelowOne, Count, Natural, NotNegative, OneOf
from jaxsynth.diffusion.losses import target
from jaxsynth.diffusion.samplers import Sampler, make_sampler, sample
from jaxsynth.diffusion.schedules import PREDICTION_TYPES, NoiseSchedule, add_noise, to_x0_eps
from jaxsynth.models.diffusion.weight_unet import WeightUNet
from jaxsynth.training import sharding, trainer
from jaxsynth.training.config import SCHEDULES, TrainingConfig, aside
from jaxsynth.training.trainer import Resident, Task


@dataclass(frozen=True)
class WeightTrainConfig(TrainingConfig):
    """How the denoiser of weights is trained. A batch is of blocks, of any concepts and places.

    `prediction_type` is "epsilon" (the paper's), "v_prediction" or "sample". Times are drawn with a
    density of t ** `noise_bias`: one step from noise asks for the last ones alone.
    """

    steps: Natural = 100_000
    batch_size: Count = 512
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    clip_norm: NotNegative = 1.0
    ema_decay: BelowOne = 0.999
    checkpoint_every: Count = aside(5000)
    prediction_type: str = "sample"
    beta_schedule: str = "linear"
    num_train_timesteps: Count = 1000
    noise_bias: NotNegative = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type: {self.prediction_type!r}, expected one of {PREDICTION_TYPES}"
            )
        if self.remat is not None:
            raise ValueError(f"remat: {self.remat!r}, but the denoiser of weights keeps everything")

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

    def arrays(self) -> dict[str, np.ndarray]:
        """What batches are drawn from."""
        return {
            "blocks": self.blocks,
            "context": self.context,
            "counts": np.asarray(self.counts, np.int32),
            "mask": self.mask,
        }


@dataclass(frozen=True)
class BlockBatches:
    """Batches of `batch_size` blocks of `concepts` concepts, drawn with replacement.

    A batch is "x0" and "mask" (b, v), "index" (b,) and "context" (b, tokens, d).
    """

    concepts: int
    batch_size: int

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        keys = jax.random.split(jax.random.fold_in(data["order"], step), 4)
        _, checkpoints, count, _ = data["blocks"].shape

        def pick(key: Array, size: int) -> Array:
            return jax.random.randint(key, (self.batch_size,), 0, size)

        rows, index = pick(keys[0], self.concepts), pick(keys[2], count)
        text = jax.random.randint(keys[3], (self.batch_size,), 0, data["counts"][rows])
        return {
            "x0": data["blocks"][rows, pick(keys[1], checkpoints), index],
            "mask": data["mask"][index],
            "index": index,
            "context": data["context"][rows, text],
        }


@dataclass(frozen=True)
class BlockDenoising:
    """The loss over what `BlockBatches` draws, a mean over values; its constant is the schedule."""

    noise_bias: float = 0.0

    def __call__(self, model: WeightUNet, schedule: NoiseSchedule, batch: dict, key: Array):
        x0 = batch["x0"]
        share = jax.random.uniform(jax.random.fold_in(key, 0), x0.shape[:1])
        last = schedule.num_train_timesteps - 1  # where rounding would go beyond
        t = jnp.minimum(jnp.int32(share ** (1 / (1 + self.noise_bias)) * (last + 1)), last)
        noise = jax.random.normal(jax.random.fold_in(key, 1), x0.shape)
        output = model(add_noise(schedule, x0, noise, t), t, batch["index"], batch["context"])
        error = jnp.square(output - target(schedule, x0, noise, t)) * batch["mask"]
        return error.sum() / jnp.maximum(batch["mask"].sum(), 1), {}


def weight_task(
    model: WeightUNet, arrays: dict[str, Any], config: WeightTrainConfig, *, seed: int
) -> Task:
    """A training of all of `model`; `arrays` are `WeightData.arrays`, or for a plan their shapes.

    On a mesh what learns is cut by `sharding.WEIGHT_UNET`, and the concepts over "data" and "fsdp".
    """
    order, key = jax.random.split(jax.random.key(seed))
    return Task(
        model=mark_trainable(model),
        loss=BlockDenoising(config.noise_bias),
        batches=Resident(
            {**arrays, "order": order},
            BlockBatches(arrays["blocks"].shape[0], config.batch_size),
            sharded=("blocks", "context", "counts"),
        ),
        table=sharding.WEIGHT_UNET,
        key=key,
        constants=config.noise_schedule(),
        identity={"task": "weights"},
        learns="table",
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
    """The network trained on `data` (its average where there is one); resumes from `folder`."""
    task = weight_task(model, data.arrays(), config, seed=seed)
    checkpoints, blocks = data.blocks.shape[1:3]
    sized = config.sized(len(data.blocks) * checkpoints * blocks)
    trained = trainer.train(task, sized, folder, mesh=mesh, description=description)
    return with_values(model, nnx.state(trained))


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
