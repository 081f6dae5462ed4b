"""A CLIP as an image classifier: zero-shot, or with LoRA on both towers (DataDream, after DISEF).

Logits are cosine similarities between an image and the prompt of each class, times CLIP's logit
scale. Training adapts q and v of every layer of both towers; images are real, synthetic or both,
with the loss `real_weight * CE(real) + (1 - real_weight) * CE(synthetic)` over a batch that holds a
fixed number of each (the official code divides by zero where one kind is missing).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from jaxsynth.adapters import optim_hooks, registry
from jaxsynth.adapters.inject import Trainable, extract, seed_dropout
from jaxsynth.core.documents import read_json
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.augment import Augment, EvalTransform, TrainTransform
from jaxsynth.data.pipeline.batches import eval_batches, mixed_batches, real_count, train_batches
from jaxsynth.data.pipeline.mixing import mix_batch, one_hot
from jaxsynth.data.pipeline.normalize import normalize_pixels
from jaxsynth.data.prompts import check_template
from jaxsynth.models.clip import CLIPModel
from jaxsynth.training import sharding
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.loop import fit
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.optim import OptimConfig, make_optimizer, make_schedule
from jaxsynth.training.step import init_state, make_train_step
from jaxsynth.weights.adapters.diffusers import attach
from jaxsynth.weights.adapters.native import STATE_FILE, read_state, write_state
from jaxsynth.weights.hf import Clip
from jaxsynth.weights.hub import write_json


@dataclass(frozen=True)
class ClassifyConfig:
    """How the classifier is trained.

    Rank, targets, rates and augmentation are the official code's. It leaves the number of epochs
    per data set unpublished; 50 is what followers use (ProtoAug). An epoch is as many images as the
    synthetic set holds, whatever the mode, so that every mode takes the same number of steps;
    `steps` overrides it. `real_fraction` is the share of real images in a batch of both kinds.
    `adapter` is what learns: LoRA, or any other kind. `rank`, `alpha` and `dropout` are settings of
    it; left open, the rank is 16, the dropout 0.1 and the scale 2, where the kind has them.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 1e-4
    min_lr: float = 1e-8
    weight_decay: float = 1e-4
    epochs: int = 50
    warmup_epochs: int = 3
    steps: int = 0
    batch_size: int = 64
    real_weight: float = 0.8
    real_fraction: float = 0.5
    mix_probability: float = 0.2
    label_smoothing: float = 0.0
    augment: Augment = field(default_factory=Augment)
    num_workers: int = 0
    checkpoint_every: int = 500
    adapter: registry.AdapterChoice = field(default_factory=registry.AdapterChoice)

    def __post_init__(self):
        self.adapter_config()

    def adapter_config(self) -> Any:
        """The adapter on both towers."""
        return self.adapter.config(
            targets=self.targets,
            given={"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout},
            defaults={"rank": 16, "dropout": 0.1},
            scale=2.0,
        )

    def num_steps(self, images: int) -> int:
        """Updates where the synthetic set holds `images`."""
        return self.steps or self.epochs * -(-images // self.batch_size)


def logits_of(
    model: CLIPModel, pixels: Float[Array, "b h w 3"], ids: Int[Array, "c t"]
) -> Float[Array, "b c"]:
    """float32 class logits; `ids` are the tokens of the classes' prompts."""
    return _compare(model, _encode_text(model, ids), pixels)


def train_classifier(
    clip: Clip,
    prompts: Sequence[str],
    config: ClassifyConfig,
    folder: Path,
    *,
    steps: int,
    seed: int,
    real: ImageSource | None = None,
    synthetic: ImageSource | None = None,
    validation: ImageSource | None = None,
    mesh: Mesh | None = None,
    description: str = "classify",
) -> CLIPModel:
    """The CLIP with trained adapters; resumes from `folder/checkpoints`.

    With both `real` and `synthetic` the loss is weighted; with one of them it is plain. The result
    is the last step's, or the one that does best on `validation` (the first of equals), which is
    looked at after every epoch and kept in `folder/best`.
    """
    if real is None and synthetic is None:
        raise ValueError("train_classifier: neither real nor synthetic images")
    key = jax.random.key(seed)
    adapter = config.adapter_config()
    init_key, step_key = jax.random.split(key)
    model = registry.add(clip.model, adapter, rngs=init_key)
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    ids = jnp.asarray(clip.tokenizer(list(prompts)))
    both = real is not None and synthetic is not None
    parts = jax.process_count()
    num_real = 0
    if both:
        num_real = parts * real_count(config.batch_size // parts, config.real_fraction)

    def loss(trainable, rest, batch, key):
        frozen, ids = rest
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        if both and parts > 1:  # each process's part has its own real images first
            order = jnp.argsort(~batch["is_real"], stable=True)
            batch = {name: values[order] for name, values in batch.items()}
        labels = one_hot(batch["label"], len(prompts), config.label_smoothing)
        pixels = normalize_pixels(batch["image"], clip.mean, clip.std)
        images, labels = mix_batch(
            keys[0], pixels, labels, num_real=num_real, probability=config.mix_probability
        )
        model = seed_dropout(nnx.merge(graphdef, trainable, frozen), keys[1])
        logits = logits_of(model, images, ids)
        each = optax.softmax_cross_entropy(logits, labels)
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        value = each.mean()
        if both:
            weight = config.real_weight
            value = weight * each[:num_real].mean() + (1 - weight) * each[num_real:].mean()
        return value, {"accuracy": right.mean()}

    transform = TrainTransform(clip.image_size, config.augment)
    share = {
        "process_index": jax.process_index(),
        "process_count": parts,
        "num_workers": config.num_workers,
    }
    if both:
        batches = mixed_batches(
            real,
            synthetic,
            config.batch_size,
            seed,
            transform,
            real_fraction=config.real_fraction,
            **share,
        )
    else:
        source = real if synthetic is None else synthetic
        batches = train_batches(source, config.batch_size, seed, transform, **share)
    per_epoch = max(steps // max(config.epochs, 1), 1)
    optim = OptimConfig(
        learning_rate=config.learning_rate,
        warmup_steps=min(config.warmup_epochs * per_epoch, steps),
        total_steps=steps,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        clip_norm=0.0,
    )
    tx = optim_hooks.optimiser(adapter, make_optimizer(optim), steps)
    state = init_state(trainable, tx, step_key)
    place, placed = None, frozen
    if mesh is not None:
        placed = sharding.shard(frozen, mesh, sharding.CLIP)
        ids = sharding.replicate(ids, mesh)
        state = sharding.replicate(state, mesh)

        def place(batch):
            return sharding.shard_batch(batch, mesh)

    best = None if validation is None else _Best(folder / "best", clip, prompts, validation)

    def evaluate(state) -> dict[str, float]:
        learnt = sharding.gather(state.trainable)
        return best(int(state.step), nnx.merge(graphdef, learnt, frozen))

    with (
        Checkpoints(
            folder / "checkpoints",
            every=config.checkpoint_every,
            keep=1,
            identity={"base": clip.digest},
        ) as checkpoint,
        MetricsWriter(folder) as metrics,
    ):
        state = fit(
            state,
            (placed, ids),
            batches,
            make_train_step(
                optim_hooks.penalised(loss, adapter), tx, learning_rate=make_schedule(optim)
            ),
            steps=steps,
            place=place,
            checkpoint=checkpoint,
            metrics=metrics,
            evaluate=None if best is None else evaluate,
            evaluate_every=per_epoch,
            description=description,
        )
    if best is not None:
        return best.model(clip.model)
    return nnx.merge(graphdef, sharding.gather(state.trainable), frozen)


class _Best:
    """The adapter with the highest validation accuracy so far, on disk, so a restart knows it."""

    def __init__(self, folder: Path, clip: Clip, prompts: Sequence[str], source: ImageSource):
        self._folder, self._clip, self._prompts, self._source = folder, clip, prompts, source

    def __call__(self, step: int, model: CLIPModel) -> dict[str, float]:
        logits = predict(self._clip, model, self._prompts, self._source)
        accuracy = float((logits.argmax(-1) == np.asarray(self._source.labels)).mean())
        known = read_json(self._folder / "best.json", optional=True)
        # A resumed run looks again at steps it had seen: the same result is no better.
        better = not known or accuracy > known["accuracy"]
        if better and jax.process_index() == 0:
            write_state(self._folder / STATE_FILE, extract(model))
            write_json(self._folder / "best.json", {"step": step, "accuracy": accuracy})
        return {"accuracy": accuracy}

    def model(self, base: CLIPModel) -> CLIPModel:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("best adapter written")
        return attach(base, read_state(self._folder / STATE_FILE))


def predict(
    clip: Clip,
    model: CLIPModel,
    prompts: Sequence[str],
    source: ImageSource,
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "n c"]:
    """Logits of every image of `source`, in order; `model` is `clip.model` or an adapted copy.

    Every process computes all of them, on its own devices: `mesh` is one of those only.
    """
    text = _encode_text(model, jnp.asarray(clip.tokenizer(list(prompts))))
    put = jnp.asarray
    if mesh is not None:
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, sharding.replicate(state, mesh))
        text = sharding.replicate(text, mesh)
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        batch_size = -(-batch_size // parts) * parts
        put = partial(jax.device_put, device=NamedSharding(mesh, sharding.BATCH))
    out = np.zeros((len(source), len(prompts)), np.float32)
    transform = EvalTransform(clip.image_size, clip.mean, clip.std)
    for batch in eval_batches(source, batch_size, transform):
        valid = batch["valid"]
        out[batch["index"][valid]] = np.asarray(_compare(model, text, put(batch["image"])))[valid]
    return out


def of_pixels(
    clip: Clip, model: CLIPModel, names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Partial:
    """A function of images (b, h, w, 3) in [0, 1], of the CLIP's size, to float32 logits (b, c).

    A class's text is the mean of its normalised embeddings in all `templates`, normalised again
    (Radford et al. 2021, section 3.1.4). The normalisation of pixels is inside; `model` is
    `clip.model` or an adapted copy, its weights arguments.
    """
    texts = [
        _encode_text(model, jnp.asarray(clip.tokenizer([each.format(x) for x in names])))
        for each in map(check_template, templates)
    ]
    text = sum(texts[1:], texts[0]) / len(texts)
    if len(texts) > 1:
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
    return Partial(_of_pixels, model, text, jnp.asarray(clip.mean), jnp.asarray(clip.std))


def _of_pixels(model: CLIPModel, text: Array, mean: Array, std: Array, images: Array) -> Array:
    return _compare(model, text, (images - mean) / std)


# Compiled once for all evaluations of a training.
@jax.jit
def _encode_text(model: CLIPModel, ids: Array) -> Array:
    text = model.encode_text(ids).astype(jnp.float32)
    return text / jnp.linalg.norm(text, axis=-1, keepdims=True)


@jax.jit
def _compare(model: CLIPModel, text: Array, pixels: Array) -> Array:
    image = model.encode_image(pixels).astype(jnp.float32)
    image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
    # Logits are up to 100 times a cosine: the few bits that TPUs keep by default would show.
    cosines = jnp.matmul(image, text.T, precision="highest")
    return jnp.exp(model.logit_scale[...].astype(jnp.float32)) * cosines


def scores(
    logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], class_names: Sequence[str]
) -> dict:
    """Top-1 over images, its mean over classes (macro), and each class's, as fractions."""
    right = logits.argmax(-1) == labels
    per_class = {
        name: float(right[labels == c].mean()) if (labels == c).any() else None
        for c, name in enumerate(class_names)
    }
    known = [value for value in per_class.values() if value is not None]
    return {
        "top1": float(right.mean()),
        "macro": float(np.mean(known)),
        "per_class": per_class,
        "images": len(labels),
    }
