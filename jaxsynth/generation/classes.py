"""Images from a class-conditional transformer: classes of many data sets in one batch.

Each data set has its own adapters around one frozen transformer (DiffScaler); a batch mixes them,
image by image, and each image depends on its seed, class and number only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from jaxsynth.adapters.surgery.class_rows import ExtendedTable
from jaxsynth.diffusion.learned_range import make_learned_range
from jaxsynth.diffusion.samplers import ANCESTRAL, Sampler, make_sampler
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.conditioners import ClassLabel
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.generation.sampler import ImageSampler, Networks, image_keys
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL

Rows = Int[np.ndarray, " b"]
# (class numbers, image numbers) -> condition images, uint8 in 255ths or fractions.
Conditions = Callable[[Rows, Rows], UInt8[np.ndarray, "b h w k"] | Float[np.ndarray, "b h w k"]]


@dataclass(frozen=True)
class ClassOf:
    """A class to draw: which of the models, and the label that model knows it by."""

    model: int
    label: int


class ClassGenerator:
    """The sampler for classes: `generator(numbers, indices) -> uint8 images` of `classes[number]`.

    `models` are one transformer, or several of one structure that differ in what is `Trainable`
    only, each image then running its own. `config.sampler` "ancestral" draws with the learned
    variance; every other one uses the predicted noise alone. `guide_channels` as in
    `classifier_free`: None guides all of the noise (never the variance), 3 is what the published
    DiT figures were measured with. ValueError for a class that no model has.

    Models with `condition_channels` need `conditions`.
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
        mesh: Mesh | None = None,
    ):
        if config.negative_prompt:
            raise ValueError("generate.negative_prompt: a class-conditional model has no prompts")
        _check_classes(models, classes)
        self._seed, self.batch_size = seed, config.batch_size
        own = models[0].config
        if (conditions is None) == bool(own.condition_channels):
            raise ValueError(
                f"ClassGenerator: the model has {own.condition_channels} condition "
                f"channels, and `conditions` are {'not ' if conditions is None else ''}given"
            )
        self._conditions = conditions
        size, channels = own.sample_size, own.in_channels
        if guide_channels is not None and not 1 <= guide_channels <= channels:
            raise ValueError(f"guide_channels {guide_channels}, expected 1 to {channels}")
        conditioner, sampler = class_sampler(
            own, scheduler_config, config, guide_channels=guide_channels
        )
        self._of = np.array([(c.model, c.label) for c in classes], np.int32)
        self._sampler = ImageSampler(
            Networks.of(models, mesh=mesh, table=ClassLabel.table),
            vae,
            conditioner,
            sampler,
            (size, size, channels),
            batch_size=config.batch_size,
            mesh=mesh,
        )

    def __call__(
        self, numbers: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """Images `indices` of classes `numbers`; fewer than a batch are filled up and cut."""
        return self._run(self._sampler, numbers, indices)

    def latents(self, numbers: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]) -> np.ndarray:
        """The same before the autoencoder, (b, h, w, c)."""
        return self._run(self._sampler.latents, numbers, indices)

    def _run(self, draw: Callable, numbers, indices) -> np.ndarray:
        numbers, indices = (np.asarray(x).astype(np.int32) for x in (numbers, indices))
        which, labels = self._of[numbers].T
        rows = {"label": labels}
        if self._conditions is not None:
            rows["condition"] = np.asarray(self._conditions(numbers, indices))
        keys = image_keys(self._seed, numbers, indices)
        return draw(
            keys,
            rows,
            which,
            describe=lambda i: f"image {indices[i]} of class {numbers[i]}",
        )


def class_sampler(
    own: DiTConfig,
    scheduler_config: dict,
    config: GenerateConfig,
    *,
    guide_channels: int | None = None,
) -> tuple[ClassLabel, Sampler]:
    """How a network of this shape is steered and sampled; ValueError as `ClassGenerator`."""
    schedule = NoiseSchedule.from_config(scheduler_config)
    steps, ancestral = config.num_inference_steps, config.sampler == ANCESTRAL
    learned = own.channels_out == 2 * own.in_channels
    if ancestral and not learned:
        raise ValueError("generate.sampler 'ancestral': the model predicts no variance")
    conditioner = ClassLabel(
        guidance_scale=config.guidance_scale,
        null_label=own.null_label,
        channels=guide_channels or own.in_channels,
        drops_variance=learned and not ancestral,
        rescale=config.guidance_rescale,
    )
    if ancestral:
        return conditioner, make_learned_range(schedule, steps)
    return conditioner, make_sampler(config.sampler or scheduler_config, schedule, steps)


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
