"""Images from a class-conditional transformer: classes of many data sets in one batch.

Each data set has its own adapters around one frozen transformer (DiffScaler); a batch mixes them,
image by image, and each image depends on its seed, class and number only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from jaxsynth.adapters.inject import Trainable, route, stack
from jaxsynth.adapters.surgery.class_rows import ExtendedTable
from jaxsynth.data.conditions import as_fractions
from jaxsynth.diffusion.guidance import classifier_free
from jaxsynth.diffusion.learned_range import make_learned_range, without_variance
from jaxsynth.diffusion.samplers import initial_noise, make_sampler, sample
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import GenerateConfig, image_keys
from jaxsynth.generation.routing import per_image
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.models.diffusion.vae import AutoencoderKL, decode_scaled

ANCESTRAL = "ancestral"

Rows = Int[np.ndarray, " b"]
# The condition of each image, from its class's number and its own; uint8 in 255ths, or fractions.
Conditions = Callable[[Rows, Rows], UInt8[np.ndarray, "b h w k"] | Float[np.ndarray, "b h w k"]]


@dataclass(frozen=True)
class ClassOf:
    """A class to draw: which of the models, and the label that model knows it by."""

    model: int
    label: int


class ClassGenerator:
    """A compiled sampler: `generator(numbers, indices) -> uint8 images` of `classes[number]`.

    `models` are one transformer, or several of one structure that differ in what is `Trainable`
    only, each image then running its own. `config.sampler` "ancestral" draws with the learned
    variance; every other one uses the predicted noise alone. `guide_channels` as in
    `classifier_free`: None guides all of the noise (never the variance), 3 is what the published
    DiT figures were measured with. ValueError for a class that no model has.

    Models with `condition_channels` need `conditions`. Guidance strengthens the class, not the
    condition: the branch without a class sees it too, as in ControlNet.
    """

    def __init__(
        self,
        models: Sequence[DiT],
        vae: AutoencoderKL,
        scheduler_config: dict,
        classes: Sequence[ClassOf],
        config: GenerateConfig,
        *,
        seed: int,
        guide_channels: int | None = None,
        conditions: Conditions | None = None,
    ):
        if config.negative_prompt:
            raise ValueError("generate.negative_prompt: a class-conditional model has no prompts")
        _check_classes(models, classes)
        self._seed, self.batch_size = seed, config.batch_size
        schedule = NoiseSchedule.from_config(scheduler_config)
        steps = config.num_inference_steps
        self._ancestral = config.sampler == ANCESTRAL
        self._sampler = (
            make_learned_range(schedule, steps)
            if self._ancestral
            else make_sampler(config.sampler or scheduler_config, schedule, steps)
        )
        model = models[0]
        if (conditions is None) == bool(model.config.condition_channels):
            raise ValueError(
                f"ClassGenerator: the model has {model.config.condition_channels} condition "
                f"channels, and `conditions` are {'not ' if conditions is None else ''}given"
            )
        self._conditions = conditions
        size, channels = model.config.sample_size, model.config.in_channels
        self._shape, self._null = (size, size, channels), model.config.null_label
        if guide_channels is not None and not 1 <= guide_channels <= channels:
            raise ValueError(f"guide_channels {guide_channels}, expected 1 to {channels}")
        self._guidance, self._guide_channels = config.guidance_scale, guide_channels or channels
        self._learned = model.config.channels_out == 2 * channels
        if self._ancestral and not self._learned:
            raise ValueError("generate.sampler 'ancestral': the model predicts no variance")
        self._graphdef, first, frozen = nnx.split(model, Trainable, ...)
        self._routed = len(models) > 1
        factors = stack([nnx.state(m, Trainable) for m in models]) if self._routed else first
        self._of = np.array([(c.model, c.label) for c in classes], np.int32)
        vae_graphdef, vae_state = nnx.split(vae)
        self._arrays = (factors, frozen, vae_state)

        def draw(arrays, which, labels, numbers, indices, condition):
            factors, frozen, vae_state = arrays
            keys = image_keys(seed, numbers, indices)
            latents = self._sample(factors, frozen, which, labels, keys, condition)
            return decode_scaled(nnx.merge(vae_graphdef, vae_state), latents)

        self._draw = jax.jit(draw)
        self._latents = jax.jit(self._sample)

    def __call__(
        self, numbers: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """Images `indices` of classes `numbers`; fewer than a batch are filled up and cut."""
        rows = self._rows(numbers, indices)
        return np.asarray(self._draw(self._arrays, *rows))[: len(numbers)]

    def latents(self, numbers: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]) -> np.ndarray:
        """The same before the autoencoder, (b, h, w, c)."""
        which, labels, numbers_, indices_, condition = self._rows(numbers, indices)
        keys = image_keys(self._seed, jnp.asarray(numbers_), jnp.asarray(indices_))
        factors, frozen, _ = self._arrays
        found = self._latents(factors, frozen, which, labels, keys, condition)
        return np.asarray(found)[: len(numbers)]

    def _rows(self, numbers, indices) -> list[np.ndarray | None]:
        count = len(numbers)
        if count > self.batch_size:
            raise ValueError(f"ClassGenerator: {count} images, batch_size is {self.batch_size}")
        fill = np.zeros(self.batch_size - count, np.int32)
        numbers, indices = (np.concatenate([x, fill]).astype(np.int32) for x in (numbers, indices))
        which, labels = self._of[numbers].T
        given = self._conditions
        condition = None if given is None else np.asarray(given(numbers, indices))
        return [which, labels, numbers, indices, condition]

    def _sample(self, factors, frozen, which, labels, keys, condition) -> Array:
        def run(factors, frozen, x: Array, t: Array, labels: Array, *condition: Array) -> Array:
            model = nnx.merge(self._graphdef, factors, frozen)
            return model(x, t, labels, condition=condition[0] if condition else None)

        if self._routed:
            own = route(factors, which)
            denoise = per_image(run, own, frozen, len(labels), stacked=DiT.stacked)
        else:
            denoise = partial(run, factors, frozen)
        if self._learned and not self._ancestral:
            denoise = without_variance(denoise)
        more = () if condition is None else (as_fractions(condition),)
        guided = classifier_free(
            lambda x, t, given: denoise(x, t, *given),
            self._guidance,
            (labels, *more),
            (jnp.full_like(labels, self._null), *more),
            channels=self._guide_channels,
        )
        x_T = initial_noise(keys, self._shape, self._sampler)
        return sample(guided, x_T, self._sampler, keys=keys)


def _check_classes(models: Sequence[DiT], classes: Sequence[ClassOf]) -> None:
    """Inside a program, a model or label out of range would silently be the last one."""
    counts = [_label_count(model) for model in models]
    for one in classes:
        if not 0 <= one.model < len(models):
            raise ValueError(f"classes: model {one.model} of {len(models)}")
        if not 0 <= one.label < counts[one.model]:
            raise ValueError(
                f"classes: label {one.label}, model {one.model} has 0 to {counts[one.model] - 1}"
            )


def _label_count(model: DiT) -> int:
    table = model.class_embedder.embedding_table
    if isinstance(table, ExtendedTable):
        return table.base.num_embeddings + len(table.rows.get_value())
    return table.num_embeddings
