"""One sampler for every way to make images: schedule, sampler, guidance, denoiser, decoder, uint8.

`ImageSampler` runs it as one program, compiled once for each shape. What steers the images is a
conditioner (`generation.conditioners`); adapters may differ from image to image. `Generator` is the
sampler for texts, `classes.ClassGenerator` for classes, `controlled.draw_controlled` for condition
images, `edited.edit_images` for images to be edited.

Image i of class c has the key `fold_in(fold_in(key(seed), c), i)`, so the picture does not depend
on batch size, devices or restarts, and no two classes share their noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxsynth.adapters.inject import Constant, Trainable, route, stack, with_scale
from jaxsynth.core.errors import UserError
from jaxsynth.core.words import counted
from jaxsynth.diffusion.guidance import guide
from jaxsynth.diffusion.samplers import NAMES, Sampler, initial_noise, make_sampler, noised, sample
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.conditioners import Conditioner
from jaxsynth.generation.routing import per_image
from jaxsynth.models.diffusion.vae import AutoencoderKL, from_uint8, to_uint8
from jaxsynth.training import sharding
from jaxsynth.weights.hf import StableDiffusion


def image_keys(
    seed: int | Int[np.ndarray, " b"], labels: Int[Array, " b"], indices: Int[Array, " b"]
) -> Key[Array, " b"]:
    """The key of each image: a function of seed, class and number only.

    `seed` is one for all images or one for each; of its bits the lowest 32 count.
    """
    seeds = (np.asarray(seed, np.int64) & 0xFFFFFFFF).astype(np.uint32)
    return _keys(np.broadcast_to(seeds, labels.shape), labels, indices)


@jax.jit
@jax.vmap
def _keys(seed: Array, label: Array, index: Array) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), label), index)


def sampler_of(
    pipeline: StableDiffusion, sampler: str, steps: int, strength: float | None = None
) -> Sampler:
    """The sampler by name, or for "" the one that the pipeline's folder names.

    `strength` is for images that start from others (`samplers.make_sampler`).
    UserError naming the file and the way out where that one is not implemented.
    """
    try:
        schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
        return make_sampler(
            sampler or pipeline.scheduler_config, schedule, steps, strength=strength
        )
    except ValueError as error:
        folder = pipeline.folder or Path()
        where = folder / "scheduler" / "scheduler_config.json" if folder.is_dir() else folder
        if sampler:
            raise UserError(f"sampler={sampler} on the schedule of {where}: {error}") from error
        raise UserError(
            f"{where}: {error}; or set another sampler, such as "
            f"--config.generate.sampler=ddim or --sampler=ddim ({', '.join(NAMES)})"
        ) from error


@dataclass(frozen=True)
class Networks:
    """A denoiser split for sampling, or several that differ in what is `Trainable` alone.

    Of several, `factors` are stacked and each image runs its own, at the strength that `weights`
    says where they are given. `constants` are the adapters' frozen buffers.
    """

    graphdef: Any
    factors: PyTree
    constants: PyTree
    frozen: PyTree
    weights: Float[Array, " n"] | None
    routed: bool
    stacked: tuple[str, ...]

    @classmethod
    def of(
        cls,
        models: Sequence[nnx.Module],
        *,
        weights: Sequence[float] | None = None,
        factors: PyTree = None,
        mesh: Mesh | None = None,
        table: sharding.Table = (),
    ) -> "Networks":
        """Splits models of one structure around the same frozen arrays.

        `factors` are what is `Trainable` in each of several models, stacked, of which `models`
        holds one. On a mesh the frozen arrays lie as the table says, and what adapters brought is
        on every device.
        """
        routed = factors is not None or len(models) > 1 or weights is not None
        graphdef, own, constants, frozen = nnx.split(models[0], Trainable, Constant, ...)
        if factors is None and not routed:
            factors = own
        elif factors is None:
            factors = stack([nnx.state(model, Trainable) for model in models])
        strengths = None if weights is None else jnp.asarray(weights, jnp.float32)
        if mesh is not None:
            frozen = sharding.shard(frozen, mesh, table)
            brought = (factors, constants, strengths)
            factors, constants, strengths = sharding.replicate(brought, mesh)
        stacked = tuple(getattr(models[0], "stacked", ()))
        return cls(graphdef, factors, constants, frozen, strengths, routed, stacked)

    @property
    def structure(self) -> "Structure":
        """What of it is part of a program."""
        return Structure(self.graphdef, self.routed, self.stacked)

    @property
    def arrays(self) -> tuple[PyTree, PyTree]:
        """What each image may have of its own, and what all share."""
        return (self.factors, self.weights), (self.constants, self.frozen)


@dataclass(frozen=True)
class Structure:
    """The static part of `Networks`."""

    graphdef: Any
    routed: bool
    stacked: tuple[str, ...]

    def merge(self, own: PyTree, shared: PyTree) -> Any:
        """The network with the arrays of one image."""
        factors, weight = own
        model = nnx.merge(self.graphdef, factors, *shared)
        return model if weight is None else with_scale(model, weight)


class ImageSampler:
    """`sampler(keys, rows) -> uint8 images`, one program for each shape.

    `shape` (h, w, c) is that of the latents; `tables` are the conditioner's. On a mesh, where the
    networks must lie already, a batch lies along "data" and "fsdp".
    """

    def __init__(
        self,
        networks: Networks,
        vae: AutoencoderKL,
        conditioner: Conditioner,
        sampler: Sampler,
        shape: tuple[int, int, int],
        *,
        batch_size: int,
        tables: PyTree = None,
        mesh: Mesh | None = None,
    ):
        self.batch_size, self._mesh = batch_size, mesh
        parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self._rows = -(-batch_size // parts) * parts
        graph, state = nnx.split(vae)
        if mesh is not None:
            state = sharding.shard(state, mesh, sharding.VAE)
            tables = sharding.replicate(tables, mesh)
        self._static = (networks.structure, graph, conditioner, shape)
        self._arrays = (networks.arrays, state, tables, sampler)

    def __call__(
        self,
        keys: Key[Array, " b"],
        rows: dict[str, Any],
        which: Int[np.ndarray, " b"] | None = None,
        *,
        describe: Callable[[int], str],
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """One image for each key; fewer than a batch are filled up and cut.

        `rows` are the conditioner's, and "start", uint8 images (b, h, w, 3) that the sampler's
        first step starts from. `which` is the network of each image where there are several.
        `describe(i)` names image i in the UserError for one that is not finite.
        """
        batch = self._batch(keys, rows, which)
        images, finite = draw_images(*self._static, self._arrays, *batch)
        _check_finite(finite, len(keys), describe)
        return np.asarray(images)[: len(keys)]

    def latents(
        self,
        keys: Key[Array, " b"],
        rows: dict[str, Any],
        which: Int[np.ndarray, " b"] | None = None,
        *,
        describe: Callable[[int], str],
    ) -> Float[np.ndarray, "b h w c"]:
        """The same before the autoencoder."""
        batch = self._batch(keys, rows, which)
        latents, finite = _draw_latents(*self._static, self._arrays, *batch)
        _check_finite(finite, len(keys), describe)
        return np.asarray(latents)[: len(keys)]

    def _batch(self, keys, rows, which) -> tuple:
        count = len(keys)
        if count > self.batch_size:
            raise ValueError(f"{counted(count, 'image')}, but batch_size is {self.batch_size}")
        filled = np.resize(np.arange(count), self._rows)
        batch = jax.tree.map(lambda x: x[filled], (jax.random.key_data(keys), rows, which))
        if self._mesh is None:
            return batch
        place = NamedSharding(self._mesh, sharding.BATCH)
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x), place), batch)


def _sample(structure, vae, conditioner, shape, arrays, tables, sampler, key_data, rows, which):
    """The latents of a batch."""
    own, shared = arrays
    keys = jax.random.wrap_key_data(key_data)
    branches = conditioner.branches(tables, rows, vae)

    def run(own: PyTree, shared: PyTree, x: Array, t: Array, condition: PyTree) -> Array:
        return conditioner.denoise(structure.merge(own, shared), x, t, condition)

    if structure.routed:
        routed = route(own, which)
        denoise = per_image(run, routed, shared, len(key_data), stacked=structure.stacked)
    else:
        denoise = partial(run, own, shared)
    guided = guide(
        denoise, conditioner.scales, branches, channels=conditioner.channels,
        rescale=conditioner.rescale,
    )  # fmt: skip
    if "start" in rows:
        posterior = vae.encode(from_uint8(rows["start"]))
        scale = vae.config.scaling_factor
        x = noised(keys, posterior.mean * scale, posterior.std * scale, sampler)
    else:
        x = initial_noise(keys, shape, sampler)
    return sample(guided, x, sampler, keys=keys)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def draw_images(structure, vae_graph, conditioner, shape, arrays, key_data, rows, which):
    """Images and whether each is finite; the program is kept for the next of these shapes."""
    networks, vae_state, tables, sampler = arrays
    vae = nnx.merge(vae_graph, vae_state)
    batch = (key_data, rows, which)
    latents = _sample(structure, vae, conditioner, shape, networks, tables, sampler, *batch)
    pixels = vae.decode(latents / vae.config.scaling_factor)
    return to_uint8(pixels), _are_finite(latents) & _are_finite(pixels)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw_latents(structure, vae_graph, conditioner, shape, arrays, key_data, rows, which):
    networks, vae_state, tables, sampler = arrays
    vae = nnx.merge(vae_graph, vae_state)
    batch = (key_data, rows, which)
    latents = _sample(structure, vae, conditioner, shape, networks, tables, sampler, *batch)
    return latents, _are_finite(latents)


def _are_finite(values: Float[Array, "b h w c"]) -> Array:
    return jnp.isfinite(values).all(axis=(1, 2, 3))


def _check_finite(finite: Array, count: int, describe: Callable[[int], str]) -> None:
    broken = np.flatnonzero(~np.asarray(finite)[:count])
    if len(broken):
        more = f" and {len(broken) - 1} more of its batch" if len(broken) > 1 else ""
        raise UserError(
            f"{describe(int(broken[0]))}{more}: the sampled values are not finite (NaN or "
            "infinite); the weights of the base or of the adapter are damaged or too large"
        )


def sample_numbered(
    sampler: ImageSampler,
    count: int,
    rows_of: Callable[[Int[np.ndarray, " b"]], dict[str, Any]],
    *,
    seed: int,
    describe: Callable[[int], str],
) -> UInt8[np.ndarray, "n h w 3"]:
    """Images 0 to `count` - 1; `rows_of(numbers)` are the conditioner's rows of a whole batch."""
    made = []
    for start in range(0, count, sampler.batch_size):
        # One shape for what `rows_of` computes too: the last batch is filled up.
        end = min(start + sampler.batch_size, count)
        numbers = np.resize(np.arange(start, end), sampler.batch_size)
        keys = image_keys(seed, np.zeros_like(numbers), numbers)
        images = sampler(keys, rows_of(numbers), describe=lambda i, n=numbers: describe(n[i]))
        made.append(images[: end - start])
    return np.concatenate(made)


def latent_shape(
    pipeline: StableDiffusion, size: tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """(h, w, c) of the latents of images of `size` pixels (height, width), the base's for None.

    UserError for sides that the autoencoder and the denoiser's levels do not divide.
    """
    down, side = pipeline.vae.config.downscale, pipeline.unet.config.sample_size
    channels = pipeline.vae.config.latent_channels
    if size is None and not pipeline.size:
        return side, side, channels
    size, factor = size or (pipeline.size, pipeline.size), size_factor(pipeline)
    if min(size) < factor or any(side % factor for side in size):
        raise UserError(
            f"size: {size[1]}x{size[0]} pixels (width x height), expected multiples of {factor} "
            "for this base"
        )
    return size[0] // down, size[1] // down, channels


def size_factor(pipeline: StableDiffusion) -> int:
    """What the autoencoder and the denoiser's levels divide the sides of images by."""
    return pipeline.vae.config.downscale * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)


def check_size(pipeline: StableDiffusion, side: int) -> None:
    """UserError naming `image_size` for a side in pixels that the base cannot draw (0: its own)."""
    try:
        latent_shape(pipeline.sized(side))
    except UserError as error:
        raise UserError(f"image_size: {side}: {error}") from None
