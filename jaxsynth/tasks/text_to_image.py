"""Fine-tuning a text-to-image model with adapters on a few images: one set, or many at once.

DataDream's recipe (arXiv 2407.10910): LoRA on the attention of the UNet and of the text encoder,
the plain denoising loss, no prompt dropout and no prior preservation. One adapter for a whole data
set (`dset`) is one training; one per class (`cls`) is the same step `vmap`ped over stacked adapters
and their images, so all classes train in one compiled program around one frozen base.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import (
    AdapterState,
    Trainable,
    extract,
    seed_dropout,
    trainable_variables,
)
from jaxsynth.core.limits import BelowOne, Count, Finite, Natural, NotNegative, OneOf, Positive
from jaxsynth.data.conditions import as_fractions
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.augment import DiffusionTransform
from jaxsynth.data.pipeline.buckets import cut
from jaxsynth.data.pipeline.epochs import epoch_rows
from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.noising import drawn_crops, sample_noise
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.models.diffusion.text_to_image import TextToImage, encode_texts
from jaxsynth.models.diffusion.vae import encode_images
from jaxsynth.models.shapes import transform
from jaxsynth.training import sharding
from jaxsynth.training.config import SCHEDULES, TrainingConfig
from jaxsynth.training.trainer import Resident, Task, train, train_stacked
from jaxsynth.weights.hf import StableDiffusion

# Of what a batch is made of: arrays with the examples on their first axis.
SHARDED = ("mean", "std", "sizes", "ids", "text")
# Images of the adapted networks, uint8 (n, h, w, 3).
Sampler = Callable[[TextToImage], UInt8[np.ndarray, "n h w 3"]]


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """How a generator is adapted; the defaults are DataDream's released configuration.

    `warmup_steps` are updates, as in the official code: a quarter of a 16-shot class's training.
    `crops_per_image` crops of each image that is not square are encoded beforehand and one drawn
    per step, since the VAE is frozen; a square image has one crop only. `min_steps` gives very few
    shots more epochs, and `steps` overrides both.

    `adapter` is what learns: LoRA of rank 16 as in the paper, or any other kind. `rank`, `alpha`
    and `dropout` are settings of it; left open, the rank is 16 where the kind has one, and the
    scale 1. It goes on `unet_targets` and `text_targets`, unless it has targets of its own.
    """

    epochs: Natural = 200
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    warmup_steps: Natural = 100
    weight_decay: NotNegative = 1e-2
    clip_norm: NotNegative = 1.0
    rank: Count | None = None
    alpha: Finite | None = None
    dropout: BelowOne | None = None
    unet_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    snr_gamma: Positive | None = None
    crops_per_image: Count = 4
    adapter: registry.AdapterChoice | None = None

    def __post_init__(self):
        super().__post_init__()
        self.adapter_config()

    def adapter_config(self) -> Any:
        """The adapter over both networks; no `text_targets` leaves the text encoder frozen."""
        choice = registry.AdapterChoice() if self.adapter is None else self.adapter
        defaults: dict[str, Any] = {"rank": 16}
        if choice.kind in ("lora", "dora", "rslora"):
            defaults["init"] = "gaussian"
        return choice.config(
            targets=(*self.unet_targets, *self.text_targets),
            given={"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout},
            defaults=defaults,
        )


@dataclass(frozen=True)
class Examples:
    """Encoded training images and the token ids of their prompts.

    `mean` and `std` are the latents' posterior, scaled as the UNet wants it, one for each crop;
    `sizes` are those of the crops that SDXL's reads too (`TextCondition`).
    """

    mean: Float[np.ndarray, "n k h w c"]
    std: Float[np.ndarray, "n k h w c"]
    ids: Int[np.ndarray, "n *e t"]
    sizes: Float[np.ndarray, "n k 6"]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: np.ndarray) -> "Examples":
        """The examples at these rows."""
        return Examples(*(values[rows] for values in vars(self).values()))


def encode_examples(
    pipeline: StableDiffusion,
    source: ImageSource,
    prompts: Sequence[str],
    *,
    crops: int,
    seed: int,
    batch_size: int = 8,
    captions: Sequence[str] | None = None,
) -> Examples:
    """The images of `source` as latents, with the tokens of their classes' prompts.

    `captions` of every image take the place of `prompts` of the classes.
    """
    found = encode_source(pipeline, source, crops=crops, seed=seed, batch_size=batch_size)
    if captions is None:
        ids = pipeline.tokenizer(list(prompts))[np.asarray(source.labels)]
    else:
        ids = pipeline.tokenizer(list(captions))
    return Examples(found.mean, found.std, ids, found.sizes)


class Encoded(NamedTuple):
    """The latents of images, as in `Examples`, or of clips of f frames."""

    mean: Float[np.ndarray, "n k *f h w c"]
    std: Float[np.ndarray, "n k *f h w c"]
    sizes: Float[np.ndarray, "n k 6"]


def encode_source(
    pipeline: StableDiffusion,
    source: ImageSource,
    *,
    crops: int,
    seed: int,
    batch_size: int = 8,
    shape: tuple[int, int] | None = None,
) -> Encoded:
    """The latents of every image's crops (one of square images), with the crops' sizes.

    With `shape`, (height, width) in pixels, of the middle of every image in that shape.
    """
    size = pipeline.image_size
    # Of an image there is one such middle, as there is one square of an image that is one.
    single = shape is not None or all(x.image.shape[0] == x.image.shape[1] for x in source)
    crops = 1 if single else crops
    height, width = shape or (size, size)
    to_square = DiffusionTransform(size, random_crop=not single)
    means, stds, sizes = [], [], []
    # A few images at a time: the crops of a large set do not fit in memory.
    for start in range(0, len(source), batch_size):
        pixels = []
        for i in range(start, min(start + batch_size, len(source))):
            image = source[i].image
            for k in range(crops):
                if shape:
                    crop, corner = cut(image, height, width)
                else:
                    crop, corner = to_square.cut(image, np.random.default_rng([seed, i, k]))
                pixels.append(crop)
                sizes.append((*image.shape[:2], *corner, height, width))
        for found, values in zip(
            (means, stds), encode_images(pipeline.vae, np.stack(pixels), batch_size), strict=True
        ):
            found.append(values.reshape(-1, crops, *values.shape[1:]))
    rows = np.asarray(sizes, np.float32).reshape(-1, crops, 6)
    return Encoded(np.concatenate(means), np.concatenate(stds), rows)


def adapted(pipeline: StableDiffusion, config: FinetuneConfig, key: Array) -> TextToImage:
    """The pipeline's networks with fresh adapters; the base weights are shared, not copied."""
    return registry.add(pipeline.networks, config.adapter_config(), rngs=key)


@dataclass(frozen=True)
class Denoising:
    """The loss over a batch {"mean", "std", "sizes", "ids"}; its constant is the schedule.

    "text", the conditions that frozen text encoders make of the ids, may stand in their place; the
    texts that are not "given" are zeros. A denoiser that reads no sizes needs none. With "image",
    an image encoder's features, the model is an `ImagePrompted` of one adapter; with "condition",
    a picture of a face's keypoints (uint8), an `IdentityPrompted`. With "weight" each
    example's loss counts so many times in the mean, and with "places" each of its latents'
    positions. `noise_offset` as `sample_noise`.
    """

    snr_gamma: float | None = None
    remat: str | None = None
    noise_offset: float = 0.0

    def __call__(self, model: TextToImage, schedule: NoiseSchedule, batch: dict, key: Array):
        model = seed_dropout(model, jax.random.fold_in(key, 4))
        x0, noise, t = sample_noise(
            batch["mean"], batch["std"], key, schedule, offset=self.noise_offset
        )
        text = batch["text"] if "text" in batch else model.encode(batch["ids"])
        if "given" in batch:
            text = text.where(batch["given"])
        if "sizes" in batch:
            text = text.sized(drawn_crops(batch["sizes"], key))
        if "image" in batch:
            (projection,) = model.image_projections
            text = text.followed_by(projection(batch["image"]))
        more = {}
        if "condition" in batch:
            more["condition"] = as_fractions(batch["condition"])
        noisy = add_noise(schedule, x0, noise, t)
        output = model.denoise(noisy, t, text, remat=self.remat, **more)
        losses = diffusion_loss(
            schedule, output, x0, noise, t, snr_gamma=self.snr_gamma, places=batch.get("places"),
            per_sample=True,
        )  # fmt: skip
        return (losses * batch.get("weight", 1.0)).mean(), {}


@dataclass(frozen=True)
class EpochBatches:
    """Batches of `count` examples in the order of `epoch_rows`."""

    count: int
    batch_size: int

    def rows(self, step: Array, data: dict[str, Array]) -> Int[Array, " b"]:
        """Which examples a step's batch holds."""
        return epoch_rows(data["order"], step, self.count, self.batch_size)

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        rows = self.rows(step, data)
        names = ("mean", "std", "sizes", "ids")
        batch: dict[str, Any] = {name: data[name][rows] for name in names if name in data}
        if "texts" in data:
            batch["text"] = data["texts"].take(data["text"][rows])
        return batch


def finetune_tasks(
    pipeline: StableDiffusion,
    sets: Sequence[Examples],
    config: FinetuneConfig,
    *,
    seed: int,
    first: int = 0,
) -> list[Task]:
    """A task for each set of examples, all of one size.

    All randomness of task i follows from the key `fold_in(key(seed), first + i)`.
    """
    sizes = {len(examples) for examples in sets}
    if len(sizes) != 1:
        raise ValueError(f"finetune_tasks: sets of {sorted(sizes)} images, expected one size")
    numbers = jnp.arange(first, first + len(sets))
    init_keys, order_keys, step_keys = jax.vmap(
        lambda i: jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 3),
        out_axes=1,
    )(numbers)
    graphdef, _, rest = nnx.split(adapted(pipeline, config, init_keys[0]), Trainable, ...)
    # One surgery for all adapters: on a large network it takes about a second.
    trainables = jax.vmap(lambda key: nnx.state(adapted(pipeline, config, key), Trainable))(
        init_keys
    )
    texts = _texts(pipeline, sets, cache=not learns_text(nnx.merge(graphdef, trainables, rest)))
    tasks = []
    for i, examples in enumerate(sets):
        values = jax.tree.map(lambda x: x[i], trainables)  # noqa: B023
        own = {name: jax.tree.map(lambda x: x[i], rows) for name, rows in texts.items()}  # noqa: B023
        data = {"mean": examples.mean, "std": examples.std, "order": order_keys[i], **own}
        data["sizes"] = examples.sizes
        task = _task(pipeline, nnx.merge(graphdef, values, rest), data, config, step_keys[i])
        identity = {"base": pipeline.digest, "first": first, "adapters": len(sets)}
        tasks.append(replace(task, identity=identity))
    return tasks


def planned_task(
    pipeline: StableDiffusion, config: FinetuneConfig, *, images: int, size: int = 0
) -> Task:
    """The task of `finetune_tasks` for so many square images, of shapes alone.

    `pipeline` may be of shapes too (`weights.hf.describe_pipeline`); `size` is the side of the
    images in pixels, 0 for the pipeline's own.
    """
    key = jax.random.key(0)
    model = transform(
        lambda base: registry.add(base, config.adapter_config(), rngs=key), pipeline.networks
    )
    side = (size or pipeline.image_size) // pipeline.vae.config.downscale
    latents = jax.ShapeDtypeStruct(
        (images, 1, side, side, pipeline.unet.config.in_channels), np.float32
    )
    data: dict[str, Any] = {"mean": latents, "std": latents, "order": key}
    data["sizes"] = jax.ShapeDtypeStruct((images, 1, 6), np.float32)
    ids = jax.ShapeDtypeStruct((images, *pipeline.tokenizer.shape), np.int32)
    if learns_text(model):
        data["ids"] = ids
    else:
        data["texts"] = jax.eval_shape(encode_texts, model, ids)
        data["text"] = jax.ShapeDtypeStruct((images,), np.int32)
    return _task(pipeline, model, data, config, key)


def learns_text(model: TextToImage) -> bool:
    """Whether anything learns in the text encoders."""
    return any(path.startswith("text_encoder") for path in trainable_variables(model))


def _task(
    pipeline: StableDiffusion,
    model: TextToImage,
    data: dict[str, Any],
    config: FinetuneConfig,
    key: Array,
) -> Task:
    return Task(
        model=model,
        loss=Denoising(config.snr_gamma, config.remat),
        batches=Resident(
            data,
            EpochBatches(data["mean"].shape[0], config.batch_size),
            sharded=tuple(name for name in SHARDED if name in data),
        ),
        table=(*sharding.UNET, *sharding.CLIP),
        key=key,
        constants=NoiseSchedule.from_config(pipeline.scheduler_config),
    )


def finetune(
    pipeline: StableDiffusion,
    examples: Examples,
    config: FinetuneConfig,
    folder: Path,
    *,
    seed: int,
    index: int = 0,
    mesh: Mesh | None = None,
    sample: Sampler | None = None,
    description: str = "fine-tune",
) -> AdapterState:
    """One adapter trained on all examples; resumes from `folder/checkpoints`.

    All randomness follows from the key `fold_in(key(seed), index)`. `sample` makes images of the
    adapted networks every `config.sample_every` steps.
    """
    (task,) = finetune_tasks(pipeline, [examples], config, seed=seed, first=index)
    task = replace(task, sample=sample)
    sized = config.sized(len(examples))
    return extract(train(task, sized, folder, mesh=mesh, description=description))


def finetune_each(
    pipeline: StableDiffusion,
    sets: Sequence[Examples],
    config: FinetuneConfig,
    folder: Path,
    *,
    seed: int,
    first: int = 0,
    mesh: Mesh | None = None,
    description: str = "fine-tune",
) -> list[AdapterState]:
    """One adapter for each set of examples, all trained together in one program.

    The sets must be of one size. Adapter i is what `finetune` makes of set i with
    `index=first + i`, up to rounding. On a mesh the adapters lie along "data"; where their number
    is not divisible by it, the last ones are trained more than once.
    """
    tasks = finetune_tasks(pipeline, sets, config, seed=seed, first=first)
    sized = config.sized(len(sets[0]))
    trained = train_stacked(tasks, sized, folder, mesh=mesh, description=description)
    return [extract(model) for model in trained]


def _texts(pipeline: StableDiffusion, sets: Sequence[Examples], *, cache: bool) -> dict:
    """Token ids of every example (sets, n, t), or the conditions of frozen text encoders.

    `texts` (sets, texts, ...) holds those of each set's distinct texts and `text` (sets, n) which
    of them an example has.
    """
    if not cache:
        return {"ids": np.stack([examples.ids for examples in sets])}
    found = [np.unique(examples.ids, axis=0, return_inverse=True) for examples in sets]
    most = max(len(texts) for texts, _ in found)
    # Filled up with repetitions, since sets are stacked.
    ids = np.stack([np.resize(texts, (most, *texts.shape[1:])) for texts, _ in found])
    texts = encode_texts(pipeline.networks, ids.reshape(-1, *ids.shape[2:]))
    return {
        "texts": jax.tree.map(lambda x: x.reshape(*ids.shape[:2], *x.shape[1:]), texts),
        "text": np.stack([rows.reshape(-1) for _, rows in found]),
    }
