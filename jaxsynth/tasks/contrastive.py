"""Clones: backbones trained on synthetic images without classes, by one contrastive method each.

    simclr      two views of an image are a match
    stablerep   all images of a caption are
    synclr      as StableRep, against an averaged teacher, with small crops and iBOT's patch loss
    synclip     an image and its caption, softmax or (`sigmoid`) pair by pair

(`contrastive_losses` has the formulas and their sources.) A batch is `captions` captions of
`per_caption` images each. What differs from SynCLR's published recipe: the decay of the teacher and
the weight decay are constant, the teacher is the debiased average of the parameters so far, and the
drop path of the backbone is left out.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.limits import Count, Natural, NotNegative, OneOf, Positive, Share
from jaxsynth.data.pipeline.augment import Augment
from jaxsynth.data.pipeline.on_device import ON_DEVICE, augmented, check_on_device
from jaxsynth.models.clip import CLIPTextConfig, CLIPTextModel
from jaxsynth.models.layers import Linear
from jaxsynth.tasks import contrastive_losses as losses
from jaxsynth.tasks.clone_network import CloneNetwork, HeadsConfig
from jaxsynth.tasks.networks import NetworkConfig, started
from jaxsynth.tasks.supervised import TABLE, Pool
from jaxsynth.training.config import DECAYED, SCHEDULES, TrainingConfig
from jaxsynth.training.trainer import Resident, Task
from jaxsynth.weights.networks.classifiers import Classifier

METHODS = ("simclr", "stablerep", "synclr", "synclip")


@dataclass(frozen=True)
class CloneConfig(TrainingConfig):
    """How a clone is trained.

    A batch is `captions` captions of `per_caption` images, which `batch_size` must be the product
    of. `temperature` is the contrastive one. SynCLR: `local_crops` crops of `local_size` pixels
    whose areas are `local_scale` of the image; on a share `masked_images` of the images a share
    `masked_patches` of the patches is hidden, weighing `patch_weight`; teacher and student compare
    patches at `teacher_temperature` and `student_temperature`. SynCLIP: `sigmoid` in the place of
    the softmax, and a text tower of `text_layers` layers.
    """

    method: Annotated[str, OneOf(*METHODS)] = "stablerep"
    captions: Count = 10
    per_caption: Count = 6
    batch_size: Count = 60
    temperature: Positive = 0.1
    local_crops: Natural = 2
    local_size: Count = 16
    local_scale: tuple[float, float] = (0.08, 0.32)
    masked_images: Share = 0.5
    masked_patches: Share = 0.5
    patch_weight: NotNegative = 1.0
    teacher_temperature: Positive = 0.04
    student_temperature: Positive = 0.1
    sigmoid: bool = False
    text_layers: Count = 2
    steps: Natural = 500
    learning_rate: NotNegative = 1e-3
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    weight_decay: NotNegative = 0.05
    decay_on: Annotated[str, OneOf(*DECAYED)] = "matrices"
    heads: HeadsConfig = field(default_factory=lambda: HeadsConfig(256, 64, 512))
    augment: Augment = field(default_factory=lambda: ON_DEVICE)

    def __post_init__(self):
        super().__post_init__()
        check_on_device(self.augment)
        if self.batch_size != self.captions * self.per_caption:
            raise ValueError(
                f"batch_size: {self.batch_size}, expected captions x per_caption = "
                f"{self.captions * self.per_caption}"
            )
        if self.method == "stablerep" and self.per_caption < 2:
            raise ValueError("per_caption: 1, but StableRep's positives are images of one caption")
        if self.method == "synclr" and not self.ema_decay:
            raise ValueError("ema_decay: 0, but SynCLR's keys are an averaged teacher's")
        if self.accumulate > 1:
            raise ValueError("accumulate: a contrastive loss is over whole batches, expected 1")
        low, high = self.local_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"local_scale: {self.local_scale}, expected 0 < low <= high <= 1")


@dataclass(frozen=True)
class CaptionRows:
    """Batches of `captions` of `known` captions, each with `per_caption` of its images.

    Captions are drawn without replacement, a caption's images from a random place on in a fixed
    order, so that they are distinct where it has so many.
    """

    known: int
    captions: int
    per_caption: int

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        which, where = jax.random.split(jax.random.fold_in(data["key"], step))
        chosen = jax.random.permutation(which, self.known)[: self.captions]
        counts = data["counts"][chosen][:, None]
        start = jax.random.randint(where, (self.captions, 1), 0, 2**30)
        places = (start + jnp.arange(self.per_caption)) % counts
        rows = jnp.take_along_axis(data["members"][chosen], places, 1)
        return {"row": rows.reshape(-1), "caption": jnp.repeat(chosen, self.per_caption)}


def caption_members(captions: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Each caption's images (c, most), filled up, and how many there are (c,)."""
    own = [np.flatnonzero(captions == c) for c in range(int(captions.max()) + 1)]
    most = max(map(len, own))
    return np.stack([np.resize(rows, most) for rows in own]).astype(np.int32), np.array(
        list(map(len, own)), np.int32
    )


class ImageText(nnx.Module):
    """SynCLIP's network: the backbone's class token and a text tower, projected alike."""

    def __init__(self, clone: CloneNetwork, text: CLIPTextConfig, outputs: int, *, rngs: nnx.Rngs):
        self.clone = clone
        self.text = CLIPTextModel(text, rngs=rngs)
        width, make = clone.vit.config.hidden_size, {"use_bias": False, "dtype": jnp.float32}
        self.visual_projection = Linear(width, outputs, rngs=rngs, **make)
        self.text_projection = Linear(text.hidden_size, outputs, rngs=rngs, **make)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(10.0)))
        self.logit_bias = nnx.Param(jnp.float32(-10.0))


@dataclass(frozen=True)
class Contrastive:
    """The loss of a method over {"row", "caption"}; constants: the pool's "images", "tokens"."""

    config: CloneConfig
    network: NetworkConfig

    def __call__(self, model: Any, constants: dict[str, Any], batch: dict, key: Array):
        method = getattr(self, f"_{self.config.method}")
        value, features = method(model, constants, batch, key)
        return value, losses.spread(jax.lax.stop_gradient(features))

    def _crops(self, constants, batch, key, number: int, recipe=None, size: int = 0) -> Array:
        own = jax.random.fold_in(key, number)
        pixels = constants["images"][batch["row"]]
        side = size or self.network.image_size
        return self.network.normalized(augmented(pixels, own, recipe or self.config.augment, side))

    def _simclr(self, model: CloneNetwork, constants, batch, key):
        cls = [model.tokens(self._crops(constants, batch, key, i))[:, 0] for i in range(2)]
        z = jnp.concatenate([model.project(each) for each in cls])
        ids = jnp.tile(batch["row"], 2)
        same = jnp.eye(len(z), dtype=bool)
        return losses.multi_positive(
            z, z, ids, ids, temperature=self.config.temperature, left_out=same
        ), cls[0]

    def _stablerep(self, model: CloneNetwork, constants, batch, key):
        cls = model.tokens(self._crops(constants, batch, key, 0))[:, 0]
        z, ids = model.project(cls), batch["caption"]
        same = jnp.eye(len(z), dtype=bool)
        return losses.multi_positive(
            z, z, ids, ids, temperature=self.config.temperature, left_out=same
        ), cls

    def _synclr(self, model: CloneNetwork, constants, batch, key):
        config, teacher = self.config, constants["teacher"]
        whole = self._crops(constants, batch, key, 0)
        count = len(whole)
        patches = (whole.shape[1] // model.vit.config.patch_size) ** 2
        image_key, patch_key = jax.random.split(jax.random.fold_in(key, 100))
        order = jax.random.uniform(patch_key, (count, patches)).argsort(-1).argsort(-1)
        hidden = order < round(config.masked_patches * patches)
        some = jax.random.permutation(image_key, count) < round(config.masked_images * count)
        hidden = hidden & some[:, None]
        seen = jax.lax.stop_gradient(teacher.tokens(whole))
        keys = jax.lax.stop_gradient(teacher.project(seen[:, 0]))
        tokens = model.tokens(whole, hidden)
        ids, itself = batch["caption"], jnp.eye(count, dtype=bool)

        def against_keys(cls: Array, left_out: Array | None) -> Array:
            return losses.multi_positive(
                model.predict(cls), keys, ids, ids, temperature=config.temperature,
                left_out=left_out,
            )  # fmt: skip

        value = against_keys(tokens[:, 0], itself)
        if config.local_crops:
            recipe = replace(config.augment, crop_scale=config.local_scale)
            small = [
                against_keys(
                    model.tokens(
                        self._crops(constants, batch, key, 1 + i, recipe, config.local_size)
                    )[:, 0],
                    None,
                )
                for i in range(config.local_crops)
            ]
            value += sum(small) / config.local_crops
        weights = hidden.reshape(-1).astype(jnp.float32)
        scores = jax.lax.stop_gradient(
            teacher.prototypes(losses.normalized(seen[:, 1:].reshape(-1, seen.shape[-1])))
        )
        targets = losses.sinkhorn(scores, temperature=config.teacher_temperature, weights=weights)
        own = losses.normalized(tokens[:, 1:].reshape(-1, tokens.shape[-1]))
        value += config.patch_weight * losses.patch_loss(
            model.prototypes(own), targets, weights, temperature=config.student_temperature
        )
        return value, tokens[:, 0]

    def _synclip(self, model: ImageText, constants, batch, key):
        cls = model.clone.tokens(self._crops(constants, batch, key, 0))[:, 0]
        # Each caption of the batch once: its rows share it.
        ids = batch["caption"]
        first = constants["tokens"][ids[:: self.config.per_caption]]
        text = model.text(first).pooled
        text = jnp.repeat(model.text_projection(text), self.config.per_caption, 0)
        images = model.visual_projection(cls)
        scale = jnp.exp(jnp.minimum(model.logit_scale[...], jnp.log(100.0)))
        if self.config.sigmoid:
            bias = model.logit_bias[...]
            return losses.image_text_sigmoid(images, text, ids, scale=scale, bias=bias), cls
        return losses.image_text(images, text, ids, scale=scale), cls


def clone_task(
    pool: Pool,
    captions: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, "c t"],
    network: NetworkConfig,
    config: CloneConfig,
    *,
    seed: int,
    backbone: Classifier | None = None,
) -> Task:
    """Training of a backbone on the pool; `captions` numbers each image's, whose `tokens` are.

    It starts at random, or with `backbone`'s weights.
    """
    members, counts = caption_members(captions)
    return _task(
        clone_network(network, config, tokens, seed, backbone),
        {"members": members, "counts": counts, "key": jax.random.key(seed)},
        {"images": jnp.asarray(pool.images), "tokens": jnp.asarray(tokens)},
        network,
        config,
        jax.random.fold_in(jax.random.key(seed), 1),
    )


def planned_task(
    network: NetworkConfig,
    config: CloneConfig,
    *,
    images: int,
    captions: int,
    tokens: Int[np.ndarray, "c t"],
) -> Task:
    """The task of `clone_task` of shapes alone: a pool of `images`, as many of each caption."""
    shape, side = jax.ShapeDtypeStruct, network.image_size
    key = jax.random.key(0)
    data = {
        "members": shape((captions, -(-images // captions)), np.int32),
        "counts": shape((captions,), np.int32),
        "key": key,
    }
    constants = {
        "images": shape((images, side, side, 3), np.uint8),
        "tokens": shape(tokens.shape, np.int32),
    }
    model = nnx.eval_shape(lambda: clone_network(network, config, tokens, 0))
    return _task(model, data, constants, network, config, key)


def _task(model, data, constants, network, config, key) -> Task:
    known = data["counts"].shape[0]
    return Task(
        model=model,
        loss=Contrastive(config, network),
        batches=Resident(data, CaptionRows(known, min(config.captions, known), config.per_caption)),
        table=TABLE,
        learns="table",
        key=key,
        constants=constants,
        teacher=config.method == "synclr",
    )


def clone_network(
    network: NetworkConfig,
    config: CloneConfig,
    tokens: Int[np.ndarray, "c t"],
    seed: int,
    backbone: Classifier | None = None,
) -> nnx.Module:
    """The network of a method at its start; every parameter learns."""
    own_key = jax.random.fold_in(jax.random.key(seed), 3)
    rngs, dtype = nnx.Rngs(params=own_key), jnp.dtype(network.dtype)
    parts = config.method == "synclr"
    clone = CloneNetwork(
        backbone_start(network, seed, backbone), config.heads,
        projector=config.method != "synclip", predictor=parts, patches=parts, dtype=dtype,
        rngs=rngs,
    )  # fmt: skip
    if config.method != "synclip":
        return mark_trainable(clone)
    text = CLIPTextConfig(
        vocab_size=int(tokens.max()) + 1,
        hidden_size=network.width,
        intermediate_size=4 * network.width,
        projection_dim=config.heads.outputs,
        num_hidden_layers=config.text_layers,
        num_attention_heads=network.heads,
        max_position_embeddings=tokens.shape[1],
        # A text ends with the highest token, as CLIP's do.
        eos_token_id=int(tokens.max()),
    )
    return mark_trainable(ImageText(clone, text, config.heads.outputs, rngs=rngs))


def backbone_start(
    network: NetworkConfig, seed: int, backbone: Classifier | None = None
) -> nnx.Module:
    """The vision transformer that every method begins with at a seed, or a checkpoint's.

    ValueError for a network of another family, which has no tokens to hide or compare.
    """
    if network.family != "vit":
        raise ValueError(
            f"family: {network.family!r}, but clones compare tokens, which family 'vit' alone has"
        )
    model = network.make(0, jax.random.fold_in(jax.random.key(seed), 2))
    return model if backbone is None else started(model, network, backbone)


def backbone_of(model: nnx.Module) -> nnx.Module:
    """The vision transformer without heads."""
    return model.clone.vit if isinstance(model, ImageText) else model.vit
