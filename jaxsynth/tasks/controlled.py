"""Teaching a Stable Diffusion base to follow condition images: two ways, one training.

- `with_controlnet`: a trainable copy of the encoder with zero convolutions (ControlNet, arXiv
  2302.05543), with two fifths of the parameters of Stable Diffusion's base;
- `with_adapters`: no second network (DiffScaler, arXiv 2404.09976): the condition enters as further
  channels of the first convolution, which starts by ignoring them (`surgery.input_channels`), and
  adapters in the base learn to use it. How the paper lets the condition in is not known; channels
  beside the noisy latents are the way of InstructPix2Pix (arXiv 2211.09800).

Both start as the base itself, and with one seed both see the same images, noise and timesteps at
every step, so their losses compare step by step. `num_trainable` says what each costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from jaxsynth.adapters import inject
from jaxsynth.adapters.inject import mark_trainable, seed_dropout
from jaxsynth.adapters.surgery.input_channels import extend_input
from jaxsynth.core.limits import Count, Natural, NotNegative, Positive, Share
from jaxsynth.core.words import counted
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
from jaxsynth.training import sharding
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.trainer import Resident, Task, train
from jaxsynth.weights.hf import StableDiffusion


def with_controlnet(
    unet: UNet2DCondition, downscale: int, channels: int, *, rngs: nnx.Rngs
) -> ByControlNet:
    """The base with a new ControlNet for conditions of so many channels, all of it trainable.

    `downscale` is how many pixels a latent has along one side.
    """
    controlnet = ControlNet.from_unet(
        unet,
        conditioning_channels=channels,
        conditioning_embedding_out_channels=embedding_channels(downscale),
        rngs=rngs,
    )
    return ByControlNet(unet, mark_trainable(controlnet))


def with_adapters(
    unet: UNet2DCondition,
    downscale: int,
    channels: int,
    make: inject.Maker | None,
    targets: Sequence[str],
    *,
    gate: bool = False,
    rngs: nnx.Rngs,
) -> ByAdapters:
    """The base with adapters of any kind on `targets` and an input for conditions.

    `make` and `targets` are those of `adapters.inject.inject`; `make` None trains the new input
    alone. "conv_in" is wrapped already and cannot be a target. `gate` as in `extend_input`.
    """
    unet = extend_input(unet, "conv_in", channels * downscale**2, gate=gate, rngs=rngs)
    if make is not None:
        unet = inject.inject(unet, make, targets=targets, rngs=rngs)
    return ByAdapters(unet, downscale)


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
class ControlConfig(TrainingConfig):
    """How a base learns to follow conditions; the defaults are ControlNet's.

    `proportion_empty_prompts` of the prompts are replaced by the empty one, so that the condition
    must say what the prompt does not. Adapters need a higher rate: 1e-4 to 1e-3.
    """

    steps: Natural = 10_000
    batch_size: Count = 32
    learning_rate: NotNegative = 1e-5
    weight_decay: NotNegative = 1e-2
    clip_norm: NotNegative = 1.0
    proportion_empty_prompts: Share = 0.5
    snr_gamma: Positive | None = None


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

    def inputs(self, rows: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        """What the denoiser is told about these images."""
        return {"text": self.text[self.prompt[rows]], "condition": self.condition[rows]}


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
    size = pipeline.image_size
    if not len(images) == len(prompts) == len(condition):
        raise ValueError(
            f"encode_triples: {counted(len(images), 'image')}, {counted(len(prompts), 'prompt')}, "
            f"{counted(len(condition), 'condition')}"
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


@dataclass(frozen=True)
class ControlledDenoising:
    """The loss over {"mean", "std", "condition", "text"}; its constant is the noise schedule."""

    snr_gamma: float | None = None
    remat: str | None = None

    def __call__(self, model: Controlled, schedule: NoiseSchedule, batch: dict, key: Array):
        model = seed_dropout(model, jax.random.fold_in(key, 4))
        x0, noise, t = sample_noise(batch["mean"], batch["std"], key, schedule)
        noisy = add_noise(schedule, x0, noise, t)
        output = model(noisy, t, batch["text"], batch["condition"], remat=self.remat)
        return diffusion_loss(schedule, output, x0, noise, t, snr_gamma=self.snr_gamma), {}


@dataclass(frozen=True)
class ControlBatches:
    """Batches of `count` images in the order of `epoch_rows`, a share of the prompts emptied."""

    count: int
    batch_size: int
    proportion_empty_prompts: float

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        order, emptied = jax.random.split(data["order"])
        rows = epoch_rows(order, step, self.count, self.batch_size)
        key = jax.random.fold_in(emptied, step)
        empty = jax.random.bernoulli(key, self.proportion_empty_prompts, rows.shape)
        batch = {name: data[name][rows] for name in ("mean", "std", "condition")}
        return batch | {"text": data["text"][jnp.where(empty, 0, data["prompt"][rows])]}


def control_task(
    model: Controlled,
    triples: Triples,
    schedule: NoiseSchedule,
    config: ControlConfig,
    *,
    seed: int,
    identity: Mapping[str, Any] | None = None,
) -> Task:
    """The training of what is `Trainable` in `model`; all may be shapes, for a plan.

    On a mesh a ControlNet is sharded as the base is, and adapters lie whole on every device.
    """
    order_key, key = jax.random.split(jax.random.key(seed))
    data = {
        # `sample_noise` expects several crops of each image.
        "mean": _with_crops(triples.mean),
        "std": _with_crops(triples.std),
        "condition": triples.condition,
        "text": triples.text,
        "prompt": triples.prompt,
        "order": order_key,
    }
    batches = ControlBatches(len(triples), config.batch_size, config.proportion_empty_prompts)
    return Task(
        model=model,
        loss=ControlledDenoising(config.snr_gamma, config.remat),
        batches=Resident(data, batches, sharded=("mean", "std", "condition", "prompt")),
        table=sharding.CONTROLNET,
        key=key,
        constants=schedule,
        identity={"seed": seed, **(identity or {})},
        learns="table" if isinstance(model, ByControlNet) else "replicate",
    )


def finetune_controlled(
    model: Controlled,
    triples: Triples,
    schedule: NoiseSchedule,
    config: ControlConfig,
    folder: Path,
    *,
    seed: int,
    identity: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    description: str = "control",
) -> Controlled:
    """Train what is `Trainable` in `model`; resumes from `folder/checkpoints`.

    `identity` says what else checkpoints must agree on, such as the base's digest.
    """
    task = control_task(model, triples, schedule, config, seed=seed, identity=identity)
    return train(task, config.sized(len(triples)), folder, mesh=mesh, description=description)


def _with_crops(latents: Any) -> Any:
    """Latents (n, h, w, c), or their shape, as those of one crop of each image."""
    if isinstance(latents, jax.ShapeDtypeStruct):
        count, *rest = latents.shape
        return jax.ShapeDtypeStruct((count, 1, *rest), latents.dtype)
    return latents[:, None]
