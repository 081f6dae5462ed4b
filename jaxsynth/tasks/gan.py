"""Training image-to-image GANs: their step, and one network that learns many edits.

The objective is pix2pix's (Isola et al. 2017, arXiv 1611.07004): a discriminator judges pairs of
images, and the generator is also held to its target by L1,

    loss_G = GAN(D(x, G(x)), real) + l1_weight * |G(x) - y|
    loss_D = (GAN(D(x, y), real) + GAN(D(x, G(x)), fake)) / 2

as in the authors' PyTorch code: first D moves, then G against the new D. E2GAN's base learns
several edits by their texts (`train_base`); "denoised neural weights" (arXiv 2407.11966) then needs
LoRAs of very many edits (`gan_together`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Key, UInt8

from jaxsynth.adapters.inject import Trainable, mark_trainable, with_values
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import BelowOne, Count, Natural, NotNegative, OneOf
from jaxsynth.core.words import counted
from jaxsynth.models.clip import CLIPTextModel, CLIPTextTransformer
from jaxsynth.models.gan.e2gan import E2GAN
from jaxsynth.models.gan.patchgan import PatchGAN
from jaxsynth.models.gan.pix2pix import Pix2Pix
from jaxsynth.training import sharding
from jaxsynth.training.config import OPTIMIZERS, TrainingConfig
from jaxsynth.training.trainer import Resident, Task, train
from jaxsynth.weights.tokenizer import Tokenizer

Generator = E2GAN | Pix2Pix
LOSSES = ("lsgan", "vanilla")
# E2GAN's layers have the UNet's names; a LoRA's first factor is the base's where it does not train.
TABLE: sharding.Table = (*sharding.UNET, (r"\.lora_A$", PartitionSpec()))

# What LoRA wraps in E2GAN, as published: all but the residual blocks.
E2GAN_TARGETS = (
    r"(conv_in|downsample|upsample|(down|up)\.\d+)\.conv",
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "net.0.proj",
    "net.2",
    "conv_out",
)


@dataclass(frozen=True)
class GANConfig(TrainingConfig):
    """How a generator and its discriminator train; the defaults are pix2pix's.

    `batch_size` counts images, for each concept where many train together. `loss` is "vanilla"
    (cross entropy) or "lsgan" (least squares, Mao et al. 2016, arXiv 1611.04076). `learning_rate`
    is the generator's, `discriminator_rate` the other's peak; both follow the one schedule.
    """

    steps: Natural = 20_000
    batch_size: Count = 1
    optimizer: Annotated[str, OneOf(*OPTIMIZERS)] = "adam"
    learning_rate: NotNegative = 2e-4
    discriminator_rate: NotNegative = 2e-4
    b1: BelowOne = 0.5
    loss: Literal["lsgan", "vanilla"] = "vanilla"
    l1_weight: NotNegative = 100.0

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss: {self.loss!r}, expected one of {', '.join(LOSSES)}")
        if self.discriminator_rate and not self.learning_rate:
            raise ValueError(
                f"discriminator_rate: {self.discriminator_rate} with learning_rate "
                f"{self.learning_rate}, expected a learning_rate above 0 with it"
            )
        if self.remat is not None:
            raise ValueError(f"remat: {self.remat!r}, but an image-to-image GAN keeps everything")

    def sized(self, examples: int) -> "GANConfig":
        """As of `TrainingConfig`, with the discriminator's rate as a factor of its parameters'."""
        sized = super().sized(examples)
        factor = self.discriminator_rate / self.learning_rate if self.learning_rate else 1.0
        return replace(sized, rates=(*self.rates, (r"^discriminator\.", factor)))


@dataclass(frozen=True)
class Pairs:
    """Photos, and what each of C concepts makes of them.

    `states` and `pooled` are the text encoder's for each of a concept's w wordings, the prompt
    first.
    """

    source: UInt8[np.ndarray, "n h w 3"]
    target: UInt8[np.ndarray, "c n h w 3"]
    states: Float[np.ndarray, "c v t d"]
    pooled: Float[np.ndarray, "c v d"]

    def __post_init__(self):
        if self.target.shape[1:] != self.source.shape:
            raise ValueError(f"Pairs: targets {self.target.shape} of photos {self.source.shape}")
        if not len(self.target) == len(self.states) == len(self.pooled):
            raise ValueError(
                f"Pairs: {counted(len(self.target), 'concept')}, but texts of {len(self.states)} "
                f"and {len(self.pooled)}"
            )

    def __len__(self) -> int:
        return len(self.target)

    def select(self, concepts: Sequence[int]) -> "Pairs":
        """The pairs of some concepts, in this order."""
        rows = list(concepts)
        return replace(
            self, target=self.target[rows], states=self.states[rows], pooled=self.pooled[rows]
        )


def encode_texts(
    encoder: CLIPTextModel | CLIPTextTransformer,
    tokenizer: Tokenizer,
    wordings: Sequence[Sequence[str]],
) -> tuple[Float[np.ndarray, "c v t d"], Float[np.ndarray, "c v d"]]:
    """States of every token and of the whole text, for each concept's wordings.

    UserError unless all concepts have as many wordings.
    """
    counts = {len(texts) for texts in wordings}
    if len(counts) != 1:
        raise UserError(f"texts: concepts of {sorted(counts)} wordings, expected one number")
    ids = tokenizer([text for texts in wordings for text in texts])
    encode = jax.jit(lambda model, ids: model(ids)[:2])
    states, pooled = encode(encoder, jnp.asarray(ids))
    shape = (len(wordings), counts.pop())
    return tuple(np.asarray(x, np.float32).reshape(*shape, *x.shape[1:]) for x in (states, pooled))


def generate(
    model: Generator, images: Float[Array, "b h w 3"], states: Float[Array, "*b t d"]
) -> Float[Array, "b h w 3"]:
    """The generator's images; `states` (t, d) are one text for all. pix2pix reads no text."""
    if isinstance(model, Pix2Pix):
        return model(images)
    return model(images, jnp.broadcast_to(states, (len(images), *states.shape[-2:])))


def gan_error(logits: Array, real: bool, loss: str) -> Array:
    """What each patch's logit costs if it is to say `real`, float32."""
    logits = logits.astype(jnp.float32)
    if loss == "lsgan":
        return jnp.square(logits - real)
    return jax.nn.softplus(-logits if real else logits)


class GAN(nnx.Module):
    """The two networks of a training: paths start with "generator." or "discriminator."."""

    def __init__(self, generator: Generator, discriminator: PatchGAN):
        self.generator = generator
        self.discriminator = discriminator


@dataclass(frozen=True)
class _Objective:
    """What both phases need. Where `stacked`, the generator's trainable values are those of C
    adapters on one base, and batches have an axis of C before the images; the discriminator is one
    for all."""

    loss: str
    stacked: bool = False

    def fakes(self, model: GAN, mix: Array | None, batch: dict[str, Array]) -> Array:
        """What the generator makes of (*c, b, h, w, 3)."""
        source, states = batch["source"], batch["states"]
        if not self.stacked:
            return generate(model.generator, source, states)
        graphdef, values, rest = nnx.split(model.generator, Trainable, ...)
        if mix is not None:
            values = mixed(mix, values)

        def one(values, source, states):
            return generate(nnx.merge(graphdef, values, rest), source, states)

        return jax.vmap(one)(values, source, states)

    def logits(self, model: GAN, batch: dict[str, Array], image: Array) -> Array:
        """The discriminator's, (*c, b, h2, w2, 1), of pairs with their texts (*c, b, d)."""
        judge, lead = model.discriminator, image.shape[:-3]
        flat = [
            x.reshape(-1, *x.shape[len(lead) :]) for x in (batch["source"], image, batch["pooled"])
        ]
        found = judge(*flat[:2], flat[2] if judge.config.text_dim else None)
        return found.reshape(*lead, *found.shape[1:])


@dataclass(frozen=True)
class DiscriminatorLoss(_Objective):
    """What the discriminator's judgement of real and generated images costs."""

    def __call__(self, model: GAN, mix: Array | None, batch: dict[str, Array], key: Array):
        real = self.logits(model, batch, batch["target"])
        false = self.logits(model, batch, self.fakes(model, mix, batch))
        errors = gan_error(real, True, self.loss), gan_error(false, False, self.loss)
        value = sum(error.mean() for error in errors) / 2
        return value, {"discriminator": value}


@dataclass(frozen=True)
class GeneratorLoss(_Objective):
    """What the generator's images cost against the discriminator and their targets.

    Losses of stacked generators are summed, so each gets the gradient of its own alone; "l1" and
    "gan" have an axis of C.
    """

    l1_weight: float = 100.0

    def __call__(self, model: GAN, mix: Array | None, batch: dict[str, Array], key: Array):
        def mean(values: Array) -> Array:
            """Over all but the axis of concepts."""
            return values.mean(tuple(range(int(self.stacked), values.ndim)))

        fake = self.fakes(model, mix, batch)
        fooling = mean(gan_error(self.logits(model, batch, fake), True, self.loss))
        l1 = mean(jnp.abs(fake - batch["target"]).astype(jnp.float32))
        return (fooling + self.l1_weight * l1).sum(), {"l1": l1, "gan": fooling}


# Batches are "source" and "target" (*c, b, h, w, 3) in [-1, 1], the text's "states" (*b, t, d) or
# (c, t, d), and "pooled" (*c, b, d).
def draw_mixed(key: Key[Array, ""], data: dict[str, Array], *, count: int) -> dict[str, Array]:
    """`count` pairs of any concepts, each asked for in any of its wordings."""
    keys = jax.random.split(key, 3)
    concepts = jax.random.randint(keys[0], (count,), 0, data["target"].shape[0])
    wording = jax.random.randint(keys[1], (count,), 0, data["states"].shape[1])
    rows = jax.random.randint(keys[2], (count,), 0, len(data["source"]))
    return {
        "source": _values(data["source"][rows]),
        "target": _values(data["target"][concepts, rows]),
        "states": data["states"][concepts, wording],
        "pooled": data["pooled"][concepts, wording],
    }


def draw_each(key: Key[Array, ""], data: dict[str, Array], *, count: int) -> dict[str, Array]:
    """`count` pairs of every concept, asked for by its prompt: the same photos for all.

    What differs between two concepts' adapters is then due to the edits alone. With photos drawn
    for each, a ridge regression from the texts found nothing in the weights of left-out concepts.
    """
    concepts = data["target"].shape[0]
    rows = jax.random.randint(key, (count,), 0, len(data["source"]))
    source, pooled = _values(data["source"][rows]), data["pooled"][:, :1]
    return {
        "source": jnp.broadcast_to(source, (concepts, *source.shape)),
        "target": _values(data["target"][:, rows]),
        "states": data["states"][:, 0],
        "pooled": jnp.broadcast_to(pooled, (concepts, count, pooled.shape[-1])),
    }


def draw_one(key: Key[Array, ""], data: dict[str, Array], *, count: int) -> dict[str, Array]:
    """`draw_each` of a single concept, without its axis."""
    return {name: value[0] for name, value in draw_each(key, data, count=count).items()}


def _values(pixels: Array) -> Array:
    return pixels.astype(jnp.float32) / 127.5 - 1


@dataclass(frozen=True)
class PairBatches:
    """Batches of `count` images: of any concepts ("mixed"), of every one, or of a single one."""

    kind: Literal["mixed", "each", "one"]
    count: int

    def __call__(self, step: Array, data: dict[str, Array]) -> dict[str, Array]:
        draw = {"mixed": draw_mixed, "each": draw_each, "one": draw_one}[self.kind]
        return draw(jax.random.fold_in(data["order"], step), data, count=self.count)


def training_data(pairs: Pairs) -> dict[str, np.ndarray]:
    """The arrays that batches are drawn from."""
    return {name: getattr(pairs, name) for name in ("source", "target", "states", "pooled")}


def gan_task(
    generator: Generator,
    discriminator: PatchGAN,
    data: dict[str, Any],
    config: GANConfig,
    *,
    seed: int,
    batches: Literal["mixed", "each", "one"],
    mix: Float[np.ndarray, "c p"] | None = None,
) -> Task:
    """A training of what is `Trainable` in `generator` and of all of `discriminator`.

    `data` is what `training_data` gives, or its shapes for a plan. "each" stacks the concepts: the
    trainable values of `generator` have an axis of them, or of the parts that `mix` adds up.

    Raises:
        UserError: `accumulate` where the batch is not of mixed concepts.
    """
    stacked = batches == "each"
    if batches != "mixed" and config.accumulate > 1:
        raise UserError(
            f"accumulate: {config.accumulate}, but a batch of {batches!r} concepts is not cut"
        )
    key = jax.random.key(seed)
    return Task(
        model=GAN(generator, mark_trainable(discriminator)),
        loss={
            "discriminator": DiscriminatorLoss(config.loss, stacked),
            "generator": GeneratorLoss(config.loss, stacked, config.l1_weight),
        },
        batches=Resident(
            {**data, "order": key},
            PairBatches(batches, config.batch_size),
            sharded=("target", "states", "pooled") if stacked else (),
        ),
        table=TABLE,
        key=key,
        constants=mix,
        identity={"batches": batches, "parts": 0 if mix is None else mix.shape[1]},
        learns={
            "generator": "stack" if stacked else "replicate",
            "discriminator": "replicate",
        },
    )


def mixed(mix: Float[Array, "c p"], parts: Any) -> Any:
    """The adapters, stacked, from their stacked parts."""
    return jax.tree.map(lambda x: jnp.tensordot(mix.astype(x.dtype), x, axes=1), parts)


def adapted(
    generator: E2GAN, config: LoRAConfig, key: Key[Array, ""], *, also: Sequence[str] = ()
) -> E2GAN:
    """The base with fresh LoRA, and with the parameters that `also` names trained in place.

    `also` are patterns as of `mark_trainable`: the paper's groups hold norms' parameters too.
    """
    model = add_lora(generator, config, rngs=key)
    return mark_trainable(model, list(also)) if also else model


def train_base(
    generator: E2GAN,
    discriminator: PatchGAN,
    pairs: Pairs,
    config: GANConfig,
    folder: Path,
    *,
    seed: int,
    mesh: Mesh | None = None,
    description: str = "train the base",
) -> tuple[E2GAN, PatchGAN]:
    """Both networks after training on all concepts, by their texts; resumes from `folder`."""
    task = gan_task(
        mark_trainable(generator), discriminator, training_data(pairs), config, seed=seed,
        batches="mixed",
    )  # fmt: skip
    sized = config.sized(len(pairs) * len(pairs.source))
    trained = train(task, sized, folder, mesh=mesh, description=description)
    return (
        with_values(generator, nnx.state(trained.generator)),
        with_values(discriminator, nnx.state(trained.discriminator)),
    )


def edit_images(
    model: Generator,
    images: UInt8[np.ndarray, "n h w 3"],
    states: Float[np.ndarray, "t d"],
    *,
    batch_size: int = 64,
) -> UInt8[np.ndarray, "n h w 3"]:
    """The images after the edit of a text, whose states these are."""
    graphdef, values = nnx.split(model)
    made = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        # One compiled shape: the last batch is filled up.
        rows = np.resize(np.arange(len(part)), min(batch_size, len(images)))
        made.append(np.asarray(_edit(graphdef, values, part[rows], states))[: len(part)])
    return np.concatenate(made)


@partial(jax.jit, static_argnums=0)
def _edit(graphdef: nnx.GraphDef, values: Any, images: Array, states: Array) -> Array:
    found = generate(nnx.merge(graphdef, values), _values(images), states)
    return jnp.round((jnp.clip(found.astype(jnp.float32), -1, 1) + 1) * 127.5).astype(jnp.uint8)


def l1_error(made: UInt8[np.ndarray, "n h w 3"], target: UInt8[np.ndarray, "n h w 3"]) -> float:
    """Mean absolute difference of pixels in [0, 1]."""
    return float(np.abs(made.astype(np.float32) - target).mean() / 255)
