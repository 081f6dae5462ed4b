"""Teaching a Stable Diffusion base to follow condition images: two ways, one training.

- `with_controlnet`: a trainable copy of the encoder with zero convolutions (ControlNet, arXiv
  2302.05543), with two fifths of the parameters of Stable Diffusion's base;
- `with_adapters`: no second network (DiffScaler, arXiv 2404.09976): the condition enters as further
  channels of the first convolution, which starts by ignoring them (`adapters.inputs`), and adapters
  in the base learn to use it. How the paper lets the condition in is not known; channels beside the
  noisy latents are the way of InstructPix2Pix (arXiv 2211.09800).

Both start as the base itself, and with one seed both see the same images, noise and timesteps at
every step, so their losses compare step by step. `num_trainable` says what each costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, UInt8

from jaxsynth.adapters import inject, optim_hooks
from jaxsynth.adapters.inject import Trainable, mark_trainable, seed_dropout
from jaxsynth.adapters.surgery.input_channels import extend_input
from jaxsynth.data.pipeline.augment import DiffusionTransform
from jaxsynth.data.pipeline.epochs import epoch_rows
from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.noising import sample_noise
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.models.diffusion.controlled import ByAdapters, ByControlNet, Controlled
from jaxsynth.models.diffusion.controlnet import ControlNet, embedding_channels
from jaxsynth.models.diffusion.text_to_image import encode_text
from jaxsynth.models.diffusion.unet import UNet2DCondition
from jaxsynth.models.diffusion.vae import encode_images
from jaxsynth.quality.errors import mean_error
from jaxsynth.training import sharding
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.loop import Constant, fit
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.optim import OptimConfig, make_optimizer, make_schedule
from jaxsynth.training.step import init_state, make_train_step, scan_steps
from jaxsynth.weights.hf import StableDiffusion


def with_controlnet(pipeline: StableDiffusion, channels: int, *, rngs: nnx.Rngs) -> ByControlNet:
    """The base with a new ControlNet for conditions of so many channels, all of it trainable."""
    controlnet = ControlNet.from_unet(
        pipeline.unet,
        conditioning_channels=channels,
        conditioning_embedding_out_channels=embedding_channels(pipeline.vae.config.downscale),
        rngs=rngs,
    )
    return ByControlNet(pipeline.unet, mark_trainable(controlnet))


def with_adapters(
    pipeline: StableDiffusion,
    channels: int,
    make: inject.Maker | None,
    targets: Sequence[str],
    *,
    gate: bool = False,
    rngs: nnx.Rngs,
) -> ByAdapters:
    """The base with adapters of any kind on `targets` and an input for conditions.

    `make` and `targets` are those of `adapters.base.inject`; `make` None trains the new input
    alone. "conv_in" is wrapped already and cannot be a target. `gate` as in `extend_input`.
    """
    factor = pipeline.vae.config.downscale
    unet = extend_input(pipeline.unet, "conv_in", channels * factor**2, gate=gate, rngs=rngs)
    if make is not None:
        unet = inject.inject(unet, make, targets=targets, rngs=rngs)
    return ByAdapters(unet, factor)


def merged(model: ByAdapters) -> UNet2DCondition:
    """The plain denoiser that `model` is: of more input channels, for `save_model` and diffusers.

    Its input is the noisy latents and `space_to_depth(condition, downscale)`, in this order.
    """
    unet = inject.merge(model.unet)
    channels = unet.conv_in.kernel.get_value().shape[-2]
    unet.config = replace(unet.config, in_channels=channels)
    unet.conv_in.in_features = channels
    return unet


def num_trainable(model: nnx.Module) -> int:
    """How many numbers training changes."""
    return sum(
        int(np.prod(variable.get_value().shape))
        for variable in inject.trainable_variables(model).values()
    )


@dataclass(frozen=True)
class ControlConfig:
    """How a base learns to follow conditions; the defaults are ControlNet's.

    `proportion_empty_prompts` of the prompts are replaced by the empty one, so that the condition
    must say what the prompt does not. Adapters need a higher rate: 1e-4 to 1e-3. `steps_per_call`
    steps run in one program call, which tiny networks need; it must divide `steps` and
    `checkpoint_every`.
    """

    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    proportion_empty_prompts: float = 0.5
    snr_gamma: float | None = None
    accumulate: int = 1
    remat: bool = False
    steps_per_call: int = 1
    checkpoint_every: int = 1000

    def __post_init__(self):
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(
                f"ControlConfig.proportion_empty_prompts is {self.proportion_empty_prompts}, "
                "expected 0 to 1"
            )

    def optim(self) -> OptimConfig:
        """AdamW, as ControlNet has it."""
        return OptimConfig(
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_steps=min(self.warmup_steps, self.steps),
            total_steps=self.steps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )


@dataclass(frozen=True)
class Triples:
    """Encoded images, their conditions and what the prompts say.

    `mean` and `std` are the latents' posterior, scaled as the UNet wants it. `text` holds the
    states of the distinct prompts, the empty one first, and `prompt` which of them an image has.
    """

    mean: Float[np.ndarray, "n h w c"]
    std: Float[np.ndarray, "n h w c"]
    condition: Float[np.ndarray, "n h2 w2 k"]
    text: Float[np.ndarray, "m t d"]
    prompt: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.prompt)


def encode_triples(
    pipeline: StableDiffusion,
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    prompts: Sequence[str],
    condition: Float[np.ndarray, "n size size k"],
    *,
    batch_size: int = 8,
) -> Triples:
    """Images (short side to the base's size, then the centre), a prompt and a condition for each.

    Conditions are of the base's size already, as `data.conditions.source_conditions` makes them.
    Raises ValueError where counts or sizes do not agree.
    """
    size = pipeline.unet.config.sample_size * pipeline.vae.config.downscale
    if not len(images) == len(prompts) == len(condition):
        raise ValueError(
            f"encode_triples: {len(images)} images, {len(prompts)} prompts, "
            f"{len(condition)} conditions"
        )
    if condition.shape[1:3] != (size, size):
        raise ValueError(
            f"encode_triples: conditions of {condition.shape[1:3]} pixels, expected {(size, size)}"
        )
    cut = DiffusionTransform(size, random_crop=False)
    mean, std = encode_images(pipeline.vae, np.stack([cut(image) for image in images]), batch_size)
    ids, prompt = np.unique(pipeline.tokenizer(list(prompts)), axis=0, return_inverse=True)
    ids = np.concatenate([pipeline.tokenizer([""]), ids])
    text = np.asarray(encode_text(pipeline.text_encoder, ids), np.float32)
    return Triples(mean, std, np.asarray(condition, np.float32), text, prompt.reshape(-1) + 1)


def make_loss(graphdef, schedule: NoiseSchedule, config: ControlConfig, mesh: Mesh | None = None):
    """`loss(trainable, frozen, batch, key)` over {"mean", "std", "condition", "text"}."""

    def loss(trainable, frozen, batch, key):
        if mesh is not None:
            rows = NamedSharding(mesh, sharding.BATCH)
            batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), batch)
        model = seed_dropout(nnx.merge(graphdef, trainable, frozen), jax.random.fold_in(key, 4))
        x0, noise, t = sample_noise(batch["mean"], batch["std"], key, schedule)
        noisy = add_noise(schedule, x0, noise, t)
        output = model(noisy, t, batch["text"], batch["condition"], remat=config.remat)
        return diffusion_loss(schedule, output, x0, noise, t, snr_gamma=config.snr_gamma), {}

    return loss


def draw_batch(step: Array, data: dict[str, Array], config: ControlConfig) -> dict[str, Array]:
    """The batch of a step: images in the order of `epoch_rows`, some prompts emptied."""
    rows = epoch_rows(data["key"], step, len(data["prompt"]), config.batch_size)
    key = jax.random.fold_in(jax.random.fold_in(data["key"], step), 1)
    empty = jax.random.bernoulli(key, config.proportion_empty_prompts, rows.shape)
    batch = {name: data[name][rows] for name in ("mean", "std", "condition")}
    batch["text"] = data["text"][jnp.where(empty, 0, data["prompt"][rows])]
    return batch


def finetune_controlled(
    pipeline: StableDiffusion,
    model: Controlled,
    triples: Triples,
    config: ControlConfig,
    folder: Path,
    *,
    seed: int,
    mesh: Mesh | None = None,
    description: str = "control",
) -> Controlled:
    """Train what is `Trainable` in `model`, made of `pipeline`; resumes from `folder/checkpoints`.

    On a mesh a ControlNet is sharded as the base is, and adapters lie whole on every device.
    """
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    adapter = inject.config_of(model)
    tx = optim_hooks.optimiser(adapter, make_optimizer(config.optim()), config.steps)
    order_key, key = jax.random.split(jax.random.key(seed))
    step = make_train_step(
        optim_hooks.penalised(make_loss(graphdef, schedule, config, mesh), adapter),
        tx,
        accumulate=config.accumulate,
        learning_rate=make_schedule(config.optim()),
    )
    step = scan_steps(step, partial(draw_batch, config=config), config.steps_per_call)
    state = init_state(trainable, tx, key)
    data = {
        # `sample_noise` expects several crops of each image.
        "mean": triples.mean[:, None],
        "std": triples.std[:, None],
        "condition": triples.condition,
        "text": triples.text,
        "prompt": triples.prompt,
        "key": order_key,
    }
    data = jax.tree.map(jnp.asarray, data)
    placed = frozen
    if mesh is not None:
        table = sharding.CONTROLNET
        placed = sharding.shard(frozen, mesh, table)
        net = isinstance(model, ByControlNet)
        state = sharding.shard(state, mesh, table) if net else sharding.replicate(state, mesh)
        data = sharding.replicate(data, mesh)
    with (
        Checkpoints(
            folder / "checkpoints",
            every=config.checkpoint_every,
            keep=1,
            identity={"base": pipeline.digest},
        ) as checkpoint,
        MetricsWriter(folder) as metrics,
    ):
        state = fit(
            state,
            placed,
            Constant(data),
            step,
            steps=config.steps,
            steps_per_call=config.steps_per_call,
            checkpoint=checkpoint,
            metrics=metrics,
            description=description,
        )
    return nnx.merge(graphdef, sharding.gather(state.trainable), frozen)


def held_out_error(
    model: Controlled,
    triples: Triples,
    schedule: NoiseSchedule,
    *,
    seed: int,
    repeats: int = 8,
    batch_size: int = 64,
    empty_prompts: bool = False,
) -> float:
    """Mean training loss at `repeats` fixed (timestep, noise) pairs for each image.

    As `scoring.mean_error` chooses them. `empty_prompts` leaves the condition to say everything.
    """
    prompt = np.zeros_like(triples.prompt) if empty_prompts else triples.prompt
    graphdef, state = nnx.split(model)

    def errors(rows: np.ndarray, noise: np.ndarray, t: np.ndarray) -> Array:
        text, condition = triples.text[prompt[rows]], triples.condition[rows]
        return _errors(graphdef, state, schedule, triples.mean[rows], noise, t, text, condition)

    return mean_error(
        errors,
        len(triples),
        triples.mean.shape[1:],
        schedule.num_train_timesteps,
        seed=seed,
        repeats=repeats,
        batch_size=batch_size,
    )


@partial(jax.jit, static_argnums=0)
def _errors(graphdef, state, schedule, x0, noise, t, text, condition) -> Float[Array, " b"]:
    output = nnx.merge(graphdef, state)(add_noise(schedule, x0, noise, t), t, text, condition)
    return diffusion_loss(schedule, output, x0, noise, t, per_sample=True)
