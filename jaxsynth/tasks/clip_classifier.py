"""A CLIP as an image classifier: zero-shot, or with LoRA on both towers (DataDream, after DISEF).

Logits are cosine similarities between an image and the prompt of each class, times CLIP's logit
scale. Training adapts q and v of every layer of both towers; images are real, synthetic or both,
with the loss `real_weight * CE(real) + (1 - real_weight) * CE(synthetic)` over a batch that holds a
fixed number of each (the official code divides by zero where one kind is missing).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import extract, seed_dropout, trainable_variables
from jaxsynth.adapters.registry import attach
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import BelowOne, Count, Finite, Natural, NotNegative, OneOf, Share
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.augment import Augment, EvalTransform, TrainTransform
from jaxsynth.data.pipeline.batches import (
    Batch,
    eval_batches,
    mixed_batches,
    real_count,
    train_batches,
)
from jaxsynth.data.pipeline.mixing import mix_batch, one_hot
from jaxsynth.data.pipeline.normalize import normalize_pixels
from jaxsynth.data.prompts import check_template
from jaxsynth.models.clip import CLIPModel
from jaxsynth.models.shapes import is_abstract, transform
from jaxsynth.training import sharding
from jaxsynth.training.config import SCHEDULES, TrainingConfig, aside
from jaxsynth.training.trainer import Streamed, Task, train
from jaxsynth.weights.adapters.native import STATE_FILE, read_state, write_state
from jaxsynth.weights.hf import Clip
from jaxsynth.weights.hub import write_json


@dataclass(frozen=True)
class ClassifyConfig(TrainingConfig):
    """How the classifier is trained.

    Rank, targets, rates and augmentation are the official code's. It leaves the number of epochs
    per data set unpublished; 50 is what followers use (ProtoAug). An epoch is as many images as the
    synthetic set holds, whatever the mode, so that every mode takes the same number of steps;
    `steps` overrides it. `real_fraction` is the share of real images in a batch of both kinds.
    `adapter` is what learns: LoRA, or any other kind. `rank`, `alpha` and `dropout` are settings of
    it; left open, the rank is 16, the dropout 0.1 and the scale 2, where the kind has them.
    """

    rank: Count | None = None
    alpha: Finite | None = None
    dropout: BelowOne | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    epochs: Natural = 50
    warmup_epochs: Natural = 3
    batch_size: Count = 64
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    min_lr: NotNegative = 1e-8
    weight_decay: NotNegative = 1e-4
    real_weight: Share = 0.8
    real_fraction: Share = 0.5
    mix_probability: Share = 0.2
    label_smoothing: BelowOne = 0.0
    augment: Augment = field(default_factory=Augment)
    num_workers: Natural = aside(0)
    checkpoint_every: Count = aside(500)
    adapter: registry.AdapterChoice = field(default_factory=registry.AdapterChoice)

    def __post_init__(self):
        super().__post_init__()
        self.adapter_config()

    def adapter_config(self) -> Any:
        """The adapter on both towers."""
        return self.adapter.config(
            targets=self.targets,
            given={"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout},
            defaults={"rank": 16, "dropout": 0.1},
            scale=2.0,
        )


@dataclass(frozen=True)
class Classification:
    """The loss over a batch {"image", "label", "is_real"}: cross entropy, as the module says.

    Its constants are the classes' token ids, or their text features where no part of the text tower
    learns, and the mean and deviation of pixels. `num_real` of a batch's images are real; 0 where
    all are of one kind.
    """

    num_classes: int
    num_real: int
    real_weight: float
    label_smoothing: float
    mix_probability: float
    accumulate: int
    remat: str | None

    def __call__(self, model: CLIPModel, constants: dict[str, Array], batch: dict, key: Array):
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        num_real = self.num_real // self.accumulate
        if num_real:  # each process's part has its own real images first
            order = jnp.argsort(~batch["is_real"], stable=True)
            batch = {name: values[order] for name, values in batch.items()}
        labels = one_hot(batch["label"], self.num_classes, self.label_smoothing)
        pixels = normalize_pixels(batch["image"], constants["mean"], constants["std"])
        images, labels = mix_batch(
            keys[0], pixels, labels, num_real=num_real, probability=self.mix_probability
        )
        model = seed_dropout(model, keys[1])
        text = constants.get("text")
        if text is None:
            text = _encode_text(model, constants["ids"], remat=self.remat)
        logits = _compare(model, text, images, remat=self.remat)
        each = optax.softmax_cross_entropy(logits, labels)
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        value = each.mean()
        if num_real:
            weight = self.real_weight
            value = weight * each[:num_real].mean() + (1 - weight) * each[num_real:].mean()
        return value, {"accuracy": right.mean()}


def classifier_task(
    clip: Clip,
    prompts: Sequence[str],
    config: ClassifyConfig,
    *,
    seed: int,
    both: bool,
    start: Callable[[], Iterator[Batch]] | None = None,
) -> Task:
    """Training of the CLIP's adapters on images of one kind, or of `both`, real and synthetic.

    `start` makes the iterator of batches; a plan needs none, and its `clip` may be of shapes.
    UserError where a batch of both kinds cannot be cut as `config` asks.
    """
    parts = jax.process_count()
    num_real = 0
    if both:
        num_real = real_count(config.batch_size, config.real_fraction)
        for what, rows in (("real", num_real), ("synthetic", config.batch_size - num_real)):
            if config.accumulate > 1 and rows % (parts * config.accumulate):
                raise UserError(
                    f"accumulate: {config.accumulate} parts, but a process's batch has "
                    f"{rows / parts:g} {what} images; expected a divisor"
                )
    init_key, step_key = jax.random.split(jax.random.key(seed))
    adapter = config.adapter_config()
    model = transform(lambda base: registry.add(base, adapter, rngs=init_key), clip.model)
    ids = jnp.asarray(clip.tokenizer(list(prompts)))
    constants = {
        "mean": np.asarray(clip.mean, np.float32),
        "std": np.asarray(clip.std, np.float32),
    }
    if any(path.startswith("text_") for path in trainable_variables(model)):
        constants["ids"] = ids
    else:
        encode = partial(jax.eval_shape, _encode_text) if is_abstract(model) else _encode_text
        constants["text"] = encode(clip.model, ids)

    return Task(
        model=model,
        loss=Classification(
            num_classes=len(prompts),
            num_real=num_real,
            real_weight=config.real_weight,
            label_smoothing=config.label_smoothing,
            mix_probability=config.mix_probability,
            accumulate=config.accumulate,
            remat=config.remat,
        ),
        batches=Streamed(start, batch_shapes(clip.image_size, config.batch_size, both=both)),
        table=sharding.CLIP,
        key=step_key,
        constants=constants,
        identity={"base": clip.digest},
    )


def _batches(
    clip: Clip,
    config: ClassifyConfig,
    seed: int,
    real: ImageSource | None,
    synthetic: ImageSource | None,
) -> Iterator[Batch]:
    """This process's part of each batch, without end."""
    transform = TrainTransform(clip.image_size, config.augment)
    share = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_workers": config.num_workers,
    }
    args = (config.batch_size, seed, transform)
    if real is not None and synthetic is not None:
        return mixed_batches(real, synthetic, *args, real_fraction=config.real_fraction, **share)
    source = real if synthetic is None else synthetic
    if source is None:
        raise ValueError("train_classifier: neither real nor synthetic images")
    return train_batches(source, *args, **share)


def batch_shapes(size: int, rows: int, *, both: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of images of `size` pixels, of one kind or `both`."""
    shapes = {
        "image": jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((rows,), np.int32),
    }
    return shapes | ({"is_real": jax.ShapeDtypeStruct((rows,), np.bool_)} if both else {})


def train_classifier(
    clip: Clip,
    prompts: Sequence[str],
    config: ClassifyConfig,
    folder: Path,
    *,
    images: int,
    seed: int,
    real: ImageSource | None = None,
    synthetic: ImageSource | None = None,
    validation: ImageSource | None = None,
    mesh: Mesh | None = None,
    description: str = "classify",
) -> CLIPModel:
    """The CLIP with trained adapters; resumes from `folder/checkpoints`.

    An epoch is `images` images. With both `real` and `synthetic` the loss is weighted; with one of
    them it is plain. The result is the last step's, or the one that does best on `validation` (the
    first of equals), which is looked at every `config.evaluate_every` steps, by default after every
    epoch, and kept in `folder/best`.
    """
    sized = config.sized(images)
    task = classifier_task(
        clip,
        prompts,
        config,
        seed=seed,
        both=real is not None and synthetic is not None,
        start=partial(_batches, clip, config, seed, real, synthetic),
    )
    if validation is None:
        return train(task, sized, folder, mesh=mesh, description=description)
    best = _Best(folder / "best", clip, prompts, validation)
    per_epoch = max(sized.steps // max(config.epochs, 1), 1)
    sized = replace(sized, evaluate_every=config.evaluate_every or per_epoch)
    train(replace(task, evaluate=best), sized, folder, mesh=mesh, description=description)
    return best.model(clip.model)


class _Best:
    """The adapter with the highest validation accuracy so far, on disk, so a restart knows it."""

    def __init__(self, folder: Path, clip: Clip, prompts: Sequence[str], source: ImageSource):
        self._folder, self._clip, self._prompts, self._source = folder, clip, prompts, source

    def __call__(self, model: CLIPModel, step: int) -> dict[str, float]:
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
@partial(jax.jit, static_argnames="remat")
def _encode_text(model: CLIPModel, ids: Array, *, remat: str | None = None) -> Array:
    text = model.encode_text(ids, remat=remat).astype(jnp.float32)
    return text / jnp.linalg.norm(text, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames="remat")
def _compare(model: CLIPModel, text: Array, pixels: Array, *, remat: str | None = None) -> Array:
    image = model.encode_image(pixels, remat=remat).astype(jnp.float32)
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
