"""Fine-tuning a text-to-image model with adapters on a few images: one set, or many at once.

DataDream's recipe (arXiv 2407.10910): LoRA on the attention of the UNet and of the text encoder,
the plain denoising loss, no prompt dropout and no prior preservation. One adapter for a whole data
set (`dset`) is one training; one per class (`cls`) is the same step `vmap`ped over stacked adapters
and their images, so all classes train in one compiled program around one frozen base.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from jaxsynth.adapters import optim_hooks, registry
from jaxsynth.adapters.inject import AdapterState, Trainable, extract, seed_dropout, unstack
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.augment import DiffusionTransform
from jaxsynth.data.pipeline.epochs import epoch_rows
from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.noising import sample_noise
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.models.diffusion.text_to_image import TextToImage, encode_text
from jaxsynth.models.diffusion.vae import encode_images
from jaxsynth.training import sharding
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.loop import Constant, fit
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.optim import OptimConfig, make_optimizer, make_schedule
from jaxsynth.training.step import (
    init_stacked,
    init_state,
    make_train_step,
    scan_steps,
    stacked,
)
from jaxsynth.weights.hf import StableDiffusion


@dataclass(frozen=True)
class FinetuneConfig:
    """How a generator is adapted; the defaults are DataDream's released configuration.

    `warmup_steps` are updates, as in the official code: a quarter of a 16-shot class's training.
    `crops_per_image` crops of each image that is not square are encoded beforehand and one drawn
    per step, since the VAE is frozen; a square image has one crop only. `min_steps` gives very few
    shots more epochs, and `steps` overrides both.

    `adapter` is what learns: LoRA of rank 16 as in the paper, or any other kind. `rank`, `alpha`
    and `dropout` are settings of it; left open, the rank is 16 where the kind has one, and the
    scale 1. It goes on `unet_targets` and `text_targets`, unless it has targets of its own.
    """

    epochs: int = 200
    min_steps: int = 0
    steps: int = 0
    batch_size: int = 8
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 1e-2
    eps: float = 1e-8
    clip_norm: float = 1.0
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    unet_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    snr_gamma: float | None = None
    crops_per_image: int = 4
    accumulate: int = 1
    remat: bool = False
    checkpoint_every: int = 1000
    adapter: registry.AdapterChoice | None = None

    def __post_init__(self):
        self.adapter_config()

    def num_steps(self, images: int) -> int:
        """Updates for a training set of `images`."""
        return self.steps or max(self.epochs * -(-images // self.batch_size), self.min_steps)

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

    `mean` and `std` are the latents' posterior, scaled as the UNet wants it, one for each crop.
    """

    mean: Float[np.ndarray, "n k h w c"]
    std: Float[np.ndarray, "n k h w c"]
    ids: Int[np.ndarray, "n t"]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: np.ndarray) -> "Examples":
        """The examples at these rows."""
        return Examples(self.mean[rows], self.std[rows], self.ids[rows])


def encode_examples(
    pipeline: StableDiffusion,
    source: ImageSource,
    prompts: Sequence[str],
    *,
    crops: int,
    seed: int,
    batch_size: int = 8,
) -> Examples:
    """The images of `source` as latents, with the tokens of their classes' prompts."""
    size = pipeline.unet.config.sample_size * pipeline.vae.config.downscale
    square = all(record.image.shape[0] == record.image.shape[1] for record in source)
    crops = 1 if square else crops
    cut = DiffusionTransform(size, random_crop=not square)
    means, stds = [], []
    # A few images at a time: the crops of a large set do not fit in memory.
    for start in range(0, len(source), batch_size):
        pixels = []
        for i in range(start, min(start + batch_size, len(source))):
            image = source[i].image
            pixels += [cut(image, np.random.default_rng([seed, i, k])) for k in range(crops)]
        for found, values in zip(
            (means, stds), encode_images(pipeline.vae, np.stack(pixels), batch_size), strict=True
        ):
            found.append(values.reshape(-1, crops, *values.shape[1:]))
    ids = pipeline.tokenizer(list(prompts))[np.asarray(source.labels)]
    return Examples(np.concatenate(means), np.concatenate(stds), ids)


def adapted(pipeline: StableDiffusion, config: FinetuneConfig, key: Array) -> TextToImage:
    """The pipeline's networks with fresh adapters; the base weights are shared, not copied."""
    model = TextToImage(pipeline.unet, pipeline.text_encoder)
    return registry.add(model, config.adapter_config(), rngs=key)


def make_loss(graphdef, schedule: NoiseSchedule, config: FinetuneConfig, mesh: Mesh | None = None):
    """`loss(trainable, frozen, batch, key)` over a batch {"mean", "std", "ids"} of examples.

    "text", the states that a frozen text encoder makes of the ids, may stand in their place.
    """

    def denoise(model: TextToImage, noisy: Array, t: Array, batch: dict) -> Array:
        text = batch.get("text")
        if text is None:
            text = model.text_encoder(batch["ids"]).last_hidden_state
        return model.unet(noisy, t, text, remat=config.remat)

    def loss(trainable, frozen, batch, key):
        if mesh is not None:
            rows = NamedSharding(mesh, sharding.BATCH)
            batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), batch)
        model = nnx.merge(graphdef, trainable, frozen)
        model = seed_dropout(model, jax.random.fold_in(key, 4))
        x0, noise, t = sample_noise(batch["mean"], batch["std"], key, schedule)
        noisy = add_noise(schedule, x0, noise, t)
        output = denoise(model, noisy, t, batch)
        return diffusion_loss(schedule, output, x0, noise, t, snr_gamma=config.snr_gamma), {}

    return loss


def finetune(
    pipeline: StableDiffusion,
    examples: Examples,
    config: FinetuneConfig,
    folder: Path,
    *,
    seed: int,
    index: int = 0,
    mesh: Mesh | None = None,
    description: str = "fine-tune",
) -> AdapterState:
    """One adapter trained on all examples; resumes from `folder/checkpoints`.

    All randomness follows from the key `fold_in(key(seed), index)`.
    """
    (state,) = _finetune(pipeline, [examples], config, folder, seed, index, mesh, description)
    return state


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
    sizes = {len(examples) for examples in sets}
    if len(sizes) != 1:
        raise ValueError(f"finetune_each: sets of {sorted(sizes)} images, expected one size")
    count = len(sets)
    if mesh is not None:
        sets = [*sets, *[sets[-1]] * (-count % mesh.shape["data"])]
    return _finetune(pipeline, sets, config, folder, seed, first, mesh, description, together=True)[
        :count
    ]


def _finetune(
    pipeline, sets, config, folder, seed, first, mesh, description, *, together=False
) -> list[AdapterState]:
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    count = len(sets[0])
    steps = config.num_steps(count)
    if mesh is not None and not together:
        _check_rows(config, mesh)
    optim = OptimConfig(
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        warmup_steps=min(config.warmup_steps, steps),
        total_steps=steps,
        weight_decay=config.weight_decay,
        eps=config.eps,
        clip_norm=config.clip_norm,
    )
    adapter = config.adapter_config()
    tx = optim_hooks.optimiser(adapter, make_optimizer(optim), steps)
    numbers = jnp.arange(first, first + len(sets))
    init_keys, order_keys, step_keys = jax.vmap(
        lambda i: jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 3),
        out_axes=1,
    )(numbers)
    graphdef, _, frozen = nnx.split(adapted(pipeline, config, init_keys[0]), Trainable, ...)
    # One surgery for all adapters: on a large network it takes about a second.
    trainables = jax.vmap(lambda key: nnx.state(adapted(pipeline, config, key), Trainable))(
        init_keys
    )
    data = {
        "mean": np.stack([examples.mean for examples in sets]),
        "std": np.stack([examples.std for examples in sets]),
        "order": order_keys,
        **_texts(pipeline, sets, cache=not jax.tree.leaves(dict(trainables).get("text_encoder"))),
    }

    def batch_of(step: Array, data: dict) -> dict:
        rows = epoch_rows(data["order"], step, count, config.batch_size)
        batch = {name: data[name][rows] for name in ("mean", "std", "ids") if name in data}
        if "states" in data:
            batch["text"] = data["states"][data["state"][rows]]
        return batch

    loss = make_loss(graphdef, schedule, config, None if together else mesh)
    step = make_train_step(
        optim_hooks.penalised(loss, adapter),
        tx,
        accumulate=config.accumulate,
        learning_rate=make_schedule(optim),
    )
    step = scan_steps(step, batch_of, 1)
    batch = jax.tree.map(jnp.asarray, data)
    if together:
        state = init_stacked(trainables, tx, step_keys)
        step = stacked(step)
    else:
        trainable, batch = jax.tree.map(lambda x: x[0], (trainables, batch))
        state = init_state(trainable, tx, step_keys[0])
    placed = frozen
    if mesh is not None:
        placed = sharding.shard(frozen, mesh, [*sharding.UNET, *sharding.CLIP])
        place = sharding.shard_stack if together else sharding.replicate
        state, batch = place(state, mesh), place(batch, mesh)
    identity = {"base": pipeline.digest, "first": first, "adapters": len(sets)}
    with (
        Checkpoints(
            folder / "checkpoints", every=config.checkpoint_every, keep=1, identity=identity
        ) as checkpoint,
        MetricsWriter(folder) as metrics,
    ):
        state = fit(
            state,
            placed,
            Constant(batch),
            step,
            steps=steps,
            checkpoint=checkpoint,
            metrics=metrics,
            description=description,
        )
    learnt = sharding.gather(state.trainable)
    return [
        extract(nnx.merge(graphdef, one, frozen))
        for one in (unstack(learnt) if together else [learnt])
    ]


def _check_rows(config: FinetuneConfig, mesh: Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size // config.accumulate % parts:
        raise ValueError(
            f"finetune.batch_size {config.batch_size} in {config.accumulate} parts (accumulate) is "
            f"not divisible over data x fsdp = {parts} devices"
        )


def _texts(pipeline: StableDiffusion, sets: Sequence[Examples], *, cache: bool) -> dict:
    """Token ids of every example (sets, n, t), or the states of a frozen text encoder.

    `states` (sets, texts, t, dim) holds each set's distinct texts and `state` (sets, n) which of
    them an example has.
    """
    if not cache:
        return {"ids": np.stack([examples.ids for examples in sets])}
    found = [np.unique(examples.ids, axis=0, return_inverse=True) for examples in sets]
    most = max(len(texts) for texts, _ in found)
    # Filled up with repetitions, since sets are stacked.
    ids = np.stack([np.resize(texts, (most, texts.shape[1])) for texts, _ in found])
    states = encode_text(pipeline.text_encoder, ids.reshape(-1, ids.shape[-1]))
    return {
        "states": states.reshape(*ids.shape, -1),
        "state": np.stack([rows.reshape(-1) for _, rows in found]),
    }
