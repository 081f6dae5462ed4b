"""Training a text-to-image model's networks from scratch: a CLIP, an autoencoder, a denoiser.

All draw their batches on the device from a small data set: `RandomRows` names rows, and each loss
takes what it needs of its constants.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.models.clip import CLIPModel
from jaxsynth.models.diffusion.unet import UNet2DCondition
from jaxsynth.models.diffusion.vae import AutoencoderKL
from jaxsynth.training import sharding
from jaxsynth.training.trainer import Loss, Resident, Task


@dataclass(frozen=True)
class RandomRows:
    """Rows of `count` examples, drawn with replacement, of every array that batches consist of."""

    count: int
    batch_size: int
    names: tuple[str, ...]

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        key, _ = jax.random.split(jax.random.fold_in(data["key"], step))
        rows: Int[Array, " b"] = jax.random.randint(key, (self.batch_size,), 0, self.count)
        return {name: data[name][rows] for name in self.names}


def pretraining_task(
    model: nnx.Module,
    loss: Loss,
    data: dict[str, Any],
    *,
    batch_size: int,
    seed: int,
    table: sharding.Table,
    constants: Any = None,
) -> Task:
    """Training of every parameter of `model` on rows of `data`, arrays of one length or shapes."""
    key, names = jax.random.key(seed), tuple(data)
    count = next(iter(data.values())).shape[0]
    rows = RandomRows(count, batch_size, names)
    return Task(
        model=mark_trainable(model),
        loss=loss,
        batches=Resident({**data, "key": key}, rows, sharded=names),
        table=table,
        key=key,
        constants=constants,
        learns="table",
    )


def _own_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of what a step draws besides its rows."""
    return jax.random.split(key)[1]


@dataclass(frozen=True)
class Contrastive:
    """A CLIP's loss over {"images", "is_photo", "row"}; constants: tokens, pixels' mean and std.

    Every pair with the same caption is a match (UniCL, Yang et al. 2022, arXiv 2204.03610): plain
    CLIP would push apart the many images of a batch that share one caption.
    """

    def __call__(self, model: CLIPModel, constants: dict[str, Array], batch: dict, key: Array):
        row = batch["row"]
        pixels = jitter(batch["images"], batch["is_photo"], _own_key(key))
        pixels = (pixels.astype(jnp.float32) / 255 - constants["mean"]) / constants["std"]
        image = model.encode_image(pixels)
        text = model.encode_text(constants["tokens"][row])
        image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
        logits = jnp.exp(jnp.minimum(model.logit_scale[...], jnp.log(100.0))) * image @ text.T
        same = (row[:, None] == row[None]).astype(jnp.float32)
        target = same / same.sum(-1, keepdims=True)
        to_text = -(target * jax.nn.log_softmax(logits, -1)).sum(-1).mean()
        to_image = -(target * jax.nn.log_softmax(logits.T, -1)).sum(-1).mean()
        accuracy = jnp.take_along_axis(same, logits.argmax(-1)[:, None], 1).mean()
        return (to_text + to_image) / 2, {"accuracy": accuracy}


@dataclass(frozen=True)
class Autoencoding:
    """An autoencoder's loss over {"images"}: absolute and squared error, and the KL term."""

    kl_weight: float

    def __call__(self, model: AutoencoderKL, constants: None, batch: dict, key: Array):
        pixels = batch["images"].astype(jnp.float32) / 127.5 - 1
        posterior = model.encode(pixels)
        error = model.decode(posterior.sample(_own_key(key))) - pixels
        mean, logvar = posterior.mean, posterior.logvar
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        absolute, square = jnp.abs(error).mean(), (error**2).mean()
        metrics = {"psnr": 10 * jnp.log10(4 / square), "kl": kl}
        return absolute + square + self.kl_weight * kl, metrics


@dataclass(frozen=True)
class CaptionedDenoising:
    """A denoiser's loss over {"mean", "std", "row"}, latents with rows of captions.

    Constants: "schedule", the captions' "states" (u, t, d) and the "empty" text's (t, d), which
    takes the place of a share `caption_dropout` of them.
    """

    caption_dropout: float
    snr_gamma: float | None
    remat: str | None = None

    def __call__(self, model: UNet2DCondition, constants: dict[str, Any], batch: dict, key: Array):
        schedule: NoiseSchedule = constants["schedule"]
        keys = [jax.random.fold_in(_own_key(key), i) for i in range(4)]
        count = len(batch["row"])
        x0 = batch["mean"] + batch["std"] * jax.random.normal(keys[0], batch["mean"].shape)
        noise = jax.random.normal(keys[1], x0.shape)
        t = jax.random.randint(keys[2], (count,), 0, schedule.num_train_timesteps)
        text = constants["states"][batch["row"]]
        dropped = jax.random.bernoulli(keys[3], self.caption_dropout, (count,))
        text = jnp.where(dropped[:, None, None], constants["empty"], text)
        output = model(add_noise(schedule, x0, noise, t), t, text, remat=self.remat)
        return diffusion_loss(schedule, output, x0, noise, t, snr_gamma=self.snr_gamma), {}


def jitter(images: Array, may_mirror: Array, key: Array, reach: int = 4) -> Array:
    """Shifts each picture by up to `reach` pixels over its own edge; mirrors half the photos."""
    shift_key, flip_key = jax.random.split(key)
    size = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * reach + 1)

    def crop(picture: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(picture, (*offset, 0), (size, size, 3))

    shifted = jax.vmap(crop)(padded, offsets)
    mirror = jax.random.bernoulli(flip_key, 0.5, (len(images),)) & may_mirror
    return jnp.where(mirror[:, None, None, None], shifted[:, :, ::-1], shifted)


def pixel_constants(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, np.ndarray]:
    """The constants of `Contrastive` that normalize pixels."""
    return {"mean": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)}
