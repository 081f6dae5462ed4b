"""Images from texts, one by one, in batches or as an image store, and what a sampler is set to.

`Generator` is the sampler of `generation.sampler` for texts; adapters may differ from class to
class. Shards of a store hold whole batches: a restarted run repeats exactly the batches of the
shards that were not finished.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree, UInt8

from jaxsynth.adapters.inject import AdapterState, can_merge, merge
from jaxsynth.adapters.registry import attach
from jaxsynth.core import preemption
from jaxsynth.core.console import progress
from jaxsynth.core.limits import Count, Finite, Share, check_limits
from jaxsynth.core.space import check_space, size_of
from jaxsynth.core.words import counted
from jaxsynth.data.store import Entry, StoreWriter
from jaxsynth.diffusion.samplers import check_sampler
from jaxsynth.generation.animations import Motion, at_once, frame_keys, on_linear_schedule
from jaxsynth.generation.conditioners import Text
from jaxsynth.generation.controls import Control, WithControlNets, control_rows, controlled
from jaxsynth.generation.image_prompts import ImagePrompt, prompted, with_tokens
from jaxsynth.generation.pictures import Pictures, beginning_of
from jaxsynth.generation.sampler import (
    ImageSampler,
    Networks,
    image_keys,
    latent_shape,
    sampler_of,
)
from jaxsynth.models.diffusion.text_to_image import TextCondition, TextToImage, whole_image
from jaxsynth.weights.hf import StableDiffusion

# ArrayRecord fills its files up to a multiple of so many bytes.
_BLOCK = 1 << 16
# Seconds of drawing that are finished after a request to stop: machines are taken after 30.
_SOON = 15.0


@dataclass(frozen=True)
class GenerateConfig:
    """How images are sampled; the defaults are DataDream's.

    `images_per_class` are drawn in `num_inference_steps` each, guided by `guidance_scale` away from
    `negative_prompt`. `guidance_rescale` is the share by which guided outputs are brought back to
    their standard deviation without guidance (0.7 is usual for zero terminal SNR). `sampler` ""
    takes the one the model's folder names. `batch_size` counts images, each of which costs two rows
    of the UNet under guidance. `batches_per_shard` sets how much a kill can lose.
    """

    images_per_class: Count = 500
    guidance_scale: Finite = 2.0
    guidance_rescale: Share = 0.0
    num_inference_steps: Count = 50
    sampler: str = ""
    negative_prompt: str = ""
    batch_size: Count = 16
    batches_per_shard: Count = 8

    def __post_init__(self):
        check_limits(self)
        check_sampler(self.sampler)


class Generator:
    """The sampler for a set of texts: `generator(labels, indices) -> uint8 images`.

    `prompts[c]` is the text of class c, and `negative_prompts[c]` what it is guided away from (the
    config's for all, unless given). `adapters` is None (the base alone), one state for all classes,
    or one state per class, which is then picked per image. `model`, the pipeline's networks with
    adapters in them, replaces both; with `factors`, stacked, image c has the c-th of what is
    `Trainable` in it. `size` (height, width) in pixels is the base's unless given.
    `pictures` are images to begin with, those of class c at number c, `image_prompts` such that
    prompt it beside the text, and `controls` ControlNets with conditions that it follows. With
    `motion` each image is an animation, and a batch as many of them as have its number of frames.
    """

    def __init__(
        self,
        pipeline: StableDiffusion,
        prompts: Sequence[str],
        config: GenerateConfig,
        *,
        seed: int,
        adapters: AdapterState | Sequence[AdapterState] | None = None,
        model: TextToImage | None = None,
        factors: PyTree = None,
        negative_prompts: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        pictures: Pictures | None = None,
        image_prompts: Sequence[ImagePrompt] = (),
        controls: Sequence[Control] = (),
        motion: Motion | None = None,
        mesh: Mesh | None = None,
    ):
        self._seed, self.prompts = seed, list(prompts)
        negative = [config.negative_prompt] * len(prompts)
        negative = negative if negative_prompts is None else list(negative_prompts)
        if isinstance(adapters, Sequence) and len(adapters) != len(prompts):
            raise ValueError(
                f"Generator: {counted(len(adapters), 'adapter')} for "
                f"{counted(len(prompts), 'prompt')}"
            )
        if len(negative) != len(prompts):
            raise ValueError(
                f"Generator: {counted(len(negative), 'negative prompt')} for "
                f"{counted(len(prompts), 'prompt')}"
            )
        if motion is not None:
            if isinstance(adapters, Sequence):
                raise ValueError(
                    "Generator: motion with an adapter for each prompt; give one for all"
                )
            pipeline = on_linear_schedule(pipeline)
        shape = latent_shape(pipeline, size)
        pixels = tuple(side * pipeline.vae.config.downscale for side in shape[:2])
        text = Text(config.guidance_scale, config.guidance_rescale)
        begins = beginning_of(pipeline, text, pictures, pixels)
        self._begins, self._pictures, self._controls = begins, pictures, controls
        conditioner = begins.conditioner
        models = _adapted(pipeline, adapters) if model is None else [model]
        if image_prompts:
            models = [prompted(one, image_prompts) for one in models]
        if motion is not None:
            models = [motion.moving(one) for one in models]
        if controls:
            conditioner = controlled(
                conditioner,
                controls,
                tokens=[prompt.tokens for prompt in image_prompts],
                pixels=pixels,
                unet=pipeline.unet,
            )
            nets = [control.controlnet for control in controls]
            models = [WithControlNets(one, nets) for one in models]
        networks = Networks.of(models, factors=factors, mesh=mesh, table=conditioner.table)
        texts = _conditions(pipeline, networks, (self.prompts, negative), pixels)
        images = config.batch_size
        self.batch_size = images if motion is None else at_once(images, motion.frames, mesh)
        self._motion = motion
        self.sampler = ImageSampler(
            networks,
            pipeline.vae,
            conditioner,
            sampler_of(pipeline, config.sampler, config.num_inference_steps, begins.strength),
            shape,
            batch_size=self.batch_size * (1 if motion is None else motion.frames),
            tables=with_tokens(texts, image_prompts),
            mesh=mesh,
        )
        self.networks = networks

    def __call__(
        self, labels: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]
    ) -> UInt8[np.ndarray, "b *f h w 3"]:
        """Images number `indices` of classes `labels`, at most a batch of them."""
        labels, indices = np.asarray(labels, np.int32), np.asarray(indices, np.int32)
        return self.draw(image_keys(self._seed, labels, indices), labels, indices)

    def draw(
        self,
        keys: Key[Array, " b"],
        labels: Int[np.ndarray, " b"],
        indices: Int[np.ndarray, " b"],
    ) -> UInt8[np.ndarray, "b *f h w 3"]:
        """Images of classes `labels` from keys of one's own; `indices` are for messages."""
        frames = 1 if self._motion is None else self._motion.frames
        if self._motion is not None:
            keys = frame_keys(keys, frames)
            labels, indices = np.repeat(labels, frames), np.repeat(indices, frames)

        def describe(i: int) -> str:
            return f"image {indices[i]} of {self.prompts[labels[i]]!r}"

        rows: dict[str, Any] = {"prompt": labels}
        if self._pictures is not None:
            rows |= self._pictures.rows(self._begins.rows, labels, indices)
        rows |= control_rows(self._controls, labels)
        images = self.sampler(keys, rows, labels, describe=describe)
        if self._motion is None:
            return images
        return images.reshape(-1, frames, *images.shape[1:])


def _adapted(pipeline: StableDiffusion, adapters) -> list[TextToImage]:
    """The pipeline's networks with each adapter; one alone is merged where nothing is lost."""
    base = pipeline.networks
    if adapters is None:
        return [base]
    if isinstance(adapters, Sequence):
        return [attach(base, one) for one in adapters]
    model = attach(base, adapters)
    return [merge(model) if merges(pipeline, model) else model]


def merges(pipeline: StableDiffusion, model: TextToImage) -> bool:
    """Whether the one adapter of `model` is merged into the pipeline's weights to draw images.

    16-bit weights would lose most of a small update to their rounding.
    """
    return pipeline.unet.conv_in.kernel.get_value().dtype == jnp.float32 and can_merge(model)


def _conditions(
    pipeline: StableDiffusion,
    networks: Networks,
    texts: tuple[Sequence[str], Sequence[str]],
    size: tuple[int, int],
) -> tuple[TextCondition, TextCondition]:
    """What each prompt says, and its negative prompt, of whole images of `size` pixels."""
    ids = [jnp.asarray(pipeline.tokenizer(own)) for own in texts]
    positive, negative = _prompt_states(networks.structure, *networks.arrays, *ids)
    if pipeline.zeroes_empty:
        negative = negative.where(pipeline.given(texts[1]))
    sizes = whole_image(size)
    return positive.sized(sizes), negative.sized(sizes)


@partial(jax.jit, static_argnums=0)
def _prompt_states(structure, own, shared, ids, negative) -> tuple[TextCondition, TextCondition]:
    """Each text's condition and that of its negative prompt, without sizes."""

    def encode(own, ids, negative):
        both = structure.merge(own, shared).encode(jnp.stack([ids, negative]))
        return both.take(0), both.take(1)

    return jax.vmap(encode, in_axes=(0 if structure.routed else None, 0, 0))(own, ids, negative)


def sample_images(
    pipeline: StableDiffusion,
    prompts: Sequence[str],
    config: GenerateConfig,
    *,
    seed: int,
    count: int = 1,
    adapters: AdapterState | Sequence[AdapterState] | None = None,
    model: TextToImage | None = None,
    image_prompts: Sequence[ImagePrompt] = (),
    controls: Sequence[Control] = (),
    motion: Motion | None = None,
    mesh: Mesh | None = None,
) -> UInt8[np.ndarray, "prompts count *f h w 3"]:
    """`count` pictures of each prompt, as a training's evaluation shows them.

    `model`, `adapters`, `image_prompts`, `controls` and `motion` are `Generator`'s. A second call
    with networks of the same structure compiles nothing.
    """
    labels = np.repeat(np.arange(len(prompts)), count)
    indices = np.tile(np.arange(count), len(prompts))
    frames = 1 if motion is None else motion.frames
    config = replace(config, batch_size=min(config.batch_size, len(labels) * frames))
    generator = Generator(
        pipeline, prompts, config, seed=seed, adapters=adapters, model=model,
        image_prompts=image_prompts, controls=controls, motion=motion, mesh=mesh,
    )  # fmt: skip
    size = generator.batch_size
    images = [
        generator(labels[i : i + size], indices[i : i + size]) for i in range(0, len(labels), size)
    ]
    found = np.concatenate(images)
    return found.reshape(len(prompts), count, *found.shape[1:])


def drawn_bytes(classes: int, config: GenerateConfig, height: int, width: int = 0) -> int:
    """Bytes that the store of `fill_store` has at the most, of images of so many pixels.

    `width` 0 is that of squares. A PNG of noise is about as large as its pixels; ArrayRecord fills
    its files up.
    """
    count = classes * config.images_per_class
    shards = -(-count // (config.batch_size * config.batches_per_shard))
    return count * (3 * height * (width or height) + 1_000) + shards * 2 * _BLOCK


def fill_store(
    generator: Callable[[np.ndarray, np.ndarray], np.ndarray],
    folder: Path,
    class_names: Sequence[str],
    prompts: Sequence[str] | Callable[[int, int], str],
    config: GenerateConfig,
    *,
    seed: int,
    adapter_digests: Sequence[str] = (),
    datasets: Sequence[str] = (),
    description: str = "generate",
) -> int:
    """Write `images_per_class` images of every class to a store; returns how many it holds.

    Classes take turns, so that a batch mixes them. Of several processes each writes every n-th
    shard. `prompts` are one for each class, or a function of class and image number, for the
    manifest: `generator` knows what it draws. `adapter_digests` (one, or one per class) go into
    the manifest, as do `datasets`: whose class each is, where the classes are those of several
    data sets.
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
    prompt_of = prompts if callable(prompts) else lambda label, _: prompts[label]
    with progress(description, own, start=done) as bar:
        for shard in mine:
            preemption.stop_if_requested(f"with {done} of {counted(own, 'image')} drawn")
            positions = np.array(writer.span(shard))
            labels, indices = positions % classes, positions // classes
            images: list[np.ndarray] = []
            began = time.monotonic()
            for start in range(0, len(positions), config.batch_size):
                if images and preemption.requested():
                    # A shard is finished where that is soon, and else drawn again.
                    left = (len(positions) - start) * (time.monotonic() - began) / start
                    if left > _SOON:
                        preemption.stop_if_requested(
                            f"with {done - start} of {counted(own, 'image')} kept"
                        )
                rows = slice(start, start + config.batch_size)
                images.append(generator(labels[rows], indices[rows]))
                if len(images) == 1 and shard == mine[0]:
                    needs = drawn_bytes(classes, config, *images[0].shape[1:3])
                    check_space(description, folder, needs - size_of(folder))
                done += len(images[-1])
                bar.update(done)
            entries = [
                Entry(
                    label=int(label),
                    class_name=class_names[label],
                    index=int(index),
                    prompt=prompt_of(int(label), int(index)),
                    seed=seed,
                    guidance=config.guidance_scale,
                    adapter=digests[label % len(digests)],
                    dataset=datasets[label] if datasets else "",
                )
                for label, index in zip(labels, indices, strict=True)
            ]
            writer.write_shard(shard, np.concatenate(images), entries)
    return total
