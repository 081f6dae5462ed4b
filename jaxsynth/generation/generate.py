"""Filling an image store from a text-to-image model, any classes and adapters in one batch.

Image i of class c has the key `fold_in(fold_in(key(seed), c), i)`, so the picture does not depend
on batch size, devices or restarts, and no two classes share their noise. Shards hold whole batches:
a restarted run repeats exactly the batches of the shards that were not finished.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, Key, UInt8

from jaxsynth.adapters.inject import AdapterState, Trainable, can_merge, merge, route, stack
from jaxsynth.core.console import progress
from jaxsynth.data.store import Entry, StoreWriter
from jaxsynth.diffusion.guidance import classifier_free
from jaxsynth.diffusion.samplers import initial_noise, make_sampler, sample
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.routing import per_image
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.diffusion.vae import decode_scaled
from jaxsynth.training import sharding
from jaxsynth.weights.adapters.diffusers import attach
from jaxsynth.weights.hf import StableDiffusion


@dataclass(frozen=True)
class GenerateConfig:
    """How images are sampled; the defaults are DataDream's.

    `sampler` "" takes the one the model's folder names. `batch_size` counts images, each of which
    costs two rows of the UNet under guidance. `batches_per_shard` sets how much a kill can lose.
    """

    images_per_class: int = 500
    guidance_scale: float = 2.0
    num_inference_steps: int = 50
    sampler: str = ""
    negative_prompt: str = ""
    batch_size: int = 16
    batches_per_shard: int = 8


def image_keys(seed: int, labels: Int[Array, " b"], indices: Int[Array, " b"]) -> Key[Array, " b"]:
    """The key of each image: a function of seed, class and number only."""

    def one(label: Array, index: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), label), index)

    return jax.vmap(one)(labels, indices)


class Generator:
    """A compiled sampler for a set of classes: `generator(labels, indices) -> uint8 images`.

    `adapters` is None (the base alone), one state for all classes, or one state per class, which is
    then picked per image. `prompts[c]` is the text of class c.
    """

    def __init__(
        self,
        pipeline: StableDiffusion,
        prompts: Sequence[str],
        config: GenerateConfig,
        *,
        seed: int,
        adapters: AdapterState | Sequence[AdapterState] | None = None,
        mesh: Mesh | None = None,
    ):
        self._seed, self._mesh = seed, mesh
        self.batch_size = self._rows = config.batch_size
        if mesh is not None:
            parts = mesh.shape["data"] * mesh.shape["fsdp"]
            self._rows = -(-config.batch_size // parts) * parts
        schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
        self._sampler = make_sampler(
            config.sampler or pipeline.scheduler_config, schedule, config.num_inference_steps
        )
        size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
        self._shape = (size, size, channels)
        self._guidance = config.guidance_scale
        base = TextToImage(pipeline.unet, pipeline.text_encoder)
        ids = jnp.asarray(pipeline.tokenizer(list(prompts)))
        empty = jnp.asarray(pipeline.tokenizer([config.negative_prompt]))
        routed = isinstance(adapters, Sequence)
        if routed and len(adapters) != len(prompts):
            raise ValueError(f"Generator: {len(adapters)} adapters for {len(prompts)} prompts")
        if routed:
            model = attach(base, adapters[0])
            self._graphdef, _, frozen = nnx.split(model, Trainable, ...)
            factors = stack([nnx.state(attach(base, one), Trainable) for one in adapters])
        else:
            model = base if adapters is None else attach(base, adapters)
            # 16-bit weights would lose most of a small update to their rounding.
            wide = pipeline.unet.conv_in.kernel[...].dtype == jnp.float32
            if model is not base and wide and can_merge(model):
                model = merge(model)
            self._graphdef, factors, frozen = nnx.split(model, Trainable, ...)
        vae_graphdef, vae = nnx.split(pipeline.vae)
        if mesh is not None:
            frozen = sharding.shard(frozen, mesh, [*sharding.UNET, *sharding.CLIP])
            vae = sharding.shard(vae, mesh, sharding.VAE)
            factors = sharding.replicate(factors, mesh)
        self._routed = routed
        cond, uncond = self._text_states(factors, frozen, ids, empty)
        self._arrays = (factors, frozen, vae, cond, uncond)

        def draw(arrays, labels, indices):
            factors, frozen, vae, cond, uncond = arrays
            latents = self._sample(factors, frozen, cond, uncond, labels, indices)
            return decode_scaled(nnx.merge(vae_graphdef, vae), latents)

        self._draw = jax.jit(draw)

    def __call__(
        self, labels: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """Images number `indices` of classes `labels`; fewer than a batch are filled up and cut."""
        count = len(labels)
        if count > self.batch_size:
            raise ValueError(f"Generator: {count} images, but batch_size is {self.batch_size}")
        fill = np.zeros(self._rows - count, np.int32)
        rows = [np.concatenate([x, fill]).astype(np.int32) for x in (labels, indices)]
        if self._mesh is not None:
            place = NamedSharding(self._mesh, sharding.BATCH)
            rows = [jax.device_put(x, place) for x in rows]
        return np.asarray(self._draw(self._arrays, *rows))[:count]

    def _text_states(self, factors, frozen, ids: Array, empty: Array) -> tuple[Array, Array]:
        """Each class's text states and its unconditional ones, (classes, tokens, dim) each."""

        def encode(factors, frozen, ids, empty):
            model = nnx.merge(self._graphdef, factors, frozen)
            both = model.text_encoder(jnp.stack([ids, empty])).last_hidden_state
            return both[0], both[1]

        axes = (0 if self._routed else None, None, 0, None)
        encode_all = jax.jit(jax.vmap(encode, in_axes=axes))
        return encode_all(factors, frozen, ids, empty[0])

    def _sample(self, factors, frozen, cond, uncond, labels, indices) -> Array:
        keys = image_keys(self._seed, labels, indices)
        x_T = initial_noise(keys, self._shape, self._sampler)

        def run(factors, frozen, x: Array, t: Array, text: Array) -> Array:
            return nnx.merge(self._graphdef, factors, frozen).unet(x, t, text)

        if self._routed:
            denoise = per_image(run, route(factors, labels), frozen, len(labels))
        else:
            denoise = partial(run, factors, frozen)
        guided = classifier_free(denoise, self._guidance, cond[labels], uncond[labels])
        return sample(guided, x_T, self._sampler, keys=keys)


def fill_store(
    generator: Generator,
    folder: Path,
    class_names: Sequence[str],
    prompts: Sequence[str],
    config: GenerateConfig,
    *,
    seed: int,
    adapter_digests: Sequence[str] = (),
    datasets: Sequence[str] = (),
    description: str = "generate",
) -> int:
    """Write `images_per_class` images of every class to a store; returns how many it holds.

    Classes take turns, so that a batch mixes them. Of several processes each writes every n-th
    shard. `adapter_digests` (one, or one per class) go into the manifest, as do `datasets`: whose
    class each is, where the classes are those of several data sets.
    """
    classes = len(class_names)
    total = classes * config.images_per_class
    shard_size = config.batch_size * config.batches_per_shard
    first = jax.process_index() == 0
    writer = StoreWriter(folder, class_names, total, shard_size, datasets=datasets, first=first)
    share = range(jax.process_index(), writer.num_shards, jax.process_count())
    mine = sorted(set(share) & set(writer.pending()))
    own = sum(len(writer.span(shard)) for shard in share)
    done = own - sum(len(writer.span(shard)) for shard in mine)
    digests = adapter_digests or [""]
    with progress(description, own, start=done) as bar:
        for shard in mine:
            positions = np.array(writer.span(shard))
            labels, indices = positions % classes, positions // classes
            images = []
            for start in range(0, len(positions), config.batch_size):
                rows = slice(start, start + config.batch_size)
                images.append(generator(labels[rows], indices[rows]))
                done += len(images[-1])
                bar.update(done)
            entries = [
                Entry(
                    label=int(label),
                    class_name=class_names[label],
                    index=int(index),
                    prompt=prompts[label],
                    seed=seed,
                    guidance=config.guidance_scale,
                    adapter=digests[label % len(digests)],
                    dataset=datasets[label] if datasets else "",
                )
                for label, index in zip(labels, indices, strict=True)
            ]
            writer.write_shard(shard, np.concatenate(images), entries)
    return total
