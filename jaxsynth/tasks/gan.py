"""Training image-to-image GANs: their step, and one network that learns many edits.

The objective is pix2pix's (Isola et al. 2017, arXiv 1611.07004): a discriminator judges pairs of
images, and the generator is also held to its target by L1,

    loss_G = GAN(D(x, G(x)), real) + l1_weight * |G(x) - y|
    loss_D = (GAN(D(x, y), real) + GAN(D(x, G(x)), fake)) / 2

as in the authors' PyTorch code: first D moves, then G against the new D. E2GAN's base learns
several edits by their texts (`train_base`); "denoised neural weights" (arXiv 2407.11966) then needs
LoRAs of very many edits (`gan_together`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from jaxsynth.adapters.inject import Trainable, mark_trainable, with_values
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.core.errors import UserError
from jaxsynth.data.procedural.concepts import Concept
from jaxsynth.models.clip import CLIPTextModel, CLIPTextTransformer
from jaxsynth.models.gan.e2gan import E2GAN
from jaxsynth.models.gan.patchgan import PatchGAN
from jaxsynth.models.gan.pix2pix import Pix2Pix
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.loop import Constant, fit
from jaxsynth.training.metrics import MetricsWriter
from jaxsynth.training.step import StepFn, TrainState
from jaxsynth.weights.tokenizer import Tokenizer

Generator = E2GAN | Pix2Pix
LOSSES = ("lsgan", "vanilla")
SCHEDULES = ("constant", "cosine")

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
class GANConfig:
    """How a generator and its discriminator train; the defaults are pix2pix's.

    `batch_size` counts images, for each concept where many train together. `loss` is "vanilla"
    (cross entropy) or "lsgan" (least squares, Mao et al. 2016, arXiv 1611.04076). `schedule` is
    that of both rates: "constant", or falling to 0 as a "cosine" over `steps`.
    """

    steps: int = 20_000
    batch_size: int = 1
    learning_rate: float = 2e-4
    discriminator_rate: float = 2e-4
    b1: float = 0.5
    b2: float = 0.999
    loss: Literal["lsgan", "vanilla"] = "vanilla"
    l1_weight: float = 100.0
    schedule: Literal["constant", "cosine"] = "constant"
    checkpoint_every: int = 1000

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, known in (("loss", LOSSES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )


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
                f"Pairs: {len(self.target)} concepts, but texts of {len(self.states)} and "
                f"{len(self.pooled)}"
            )

    def __len__(self) -> int:
        return len(self.target)

    def select(self, concepts: Sequence[int]) -> "Pairs":
        """The pairs of some concepts, in this order."""
        rows = list(concepts)
        return replace(
            self, target=self.target[rows], states=self.states[rows], pooled=self.pooled[rows]
        )


def make_pairs(
    concepts: Sequence[Concept],
    photos: UInt8[np.ndarray, "n h w 3"],
    texts: tuple[np.ndarray, np.ndarray],
) -> Pairs:
    """The pairs of concepts with procedural edits; `texts` are what `encode_texts` gave."""
    return Pairs(photos, np.stack([concept.apply(photos) for concept in concepts]), *texts)


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


@dataclass(frozen=True)
class Networks:
    """The structures of a generator and a discriminator: what a compiled step depends on.

    Where `stacked`, the generator is C adapters on one base, and batches have an axis of C before
    the images; the discriminator is one for all.
    """

    generator: nnx.GraphDef
    discriminator: nnx.GraphDef
    stacked: bool = False

    def fakes(self, trainable: Any, frozen: Any, source: Array, states: Array) -> Array:
        """What the generator makes of (*c, b, h, w, 3)."""

        def one(trainable, source, states):
            return generate(nnx.merge(self.generator, trainable, frozen), source, states)

        return (jax.vmap(one) if self.stacked else one)(trainable, source, states)

    def logits(self, trainable: Any, source: Array, image: Array, pooled: Array) -> Array:
        """The discriminator's, (*c, b, h2, w2, 1), of pairs with their texts (*c, b, d)."""
        model = nnx.merge(self.discriminator, trainable)
        lead = image.shape[:-3]
        flat = [x.reshape(-1, *x.shape[len(lead) :]) for x in (source, image, pooled)]
        found = model(*flat[:2], flat[2] if model.config.text_dim else None)
        return found.reshape(*lead, *found.shape[1:])


# The batch of a step, from its key: "source" and "target" (*c, b, h, w, 3) in [-1, 1], the text's
# "states" (*b, t, d) or (c, t, d), and "pooled" (*c, b, d).
Draw = Callable[[Array, dict[str, Array]], dict[str, Array]]


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


def training_data(pairs: Pairs) -> dict[str, Array]:
    """What batches are drawn from, on the device."""
    return {
        name: jnp.asarray(getattr(pairs, name)) for name in ("source", "target", "states", "pooled")
    }


def optimizers(config: GANConfig) -> dict[str, optax.GradientTransformation]:
    """Adam for each of the two networks."""

    def adam(rate: float) -> optax.GradientTransformation:
        falls = config.schedule == "cosine"
        rates = optax.cosine_decay_schedule(rate, config.steps) if falls else rate
        return optax.adam(rates, b1=config.b1, b2=config.b2)

    return {
        "generator": adam(config.learning_rate),
        "discriminator": adam(config.discriminator_rate),
    }


def init_gan(
    generator: Any, discriminator: Any, config: GANConfig, key: Key[Array, ""]
) -> TrainState:
    """A state at step 0 from the trainable values of the two networks (copied)."""
    trainable = jax.tree.map(jnp.copy, {"generator": generator, "discriminator": discriminator})
    tx = optimizers(config)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state={name: tx[name].init(values) for name, values in trainable.items()},
        ema=None,
        key=jnp.copy(key),
    )


def make_step(networks: Networks, config: GANConfig, draw: Draw) -> StepFn:
    """`step(state, frozen, data) -> (state, metrics)`: the discriminator moves, then the generator.

    `frozen` is the generator's; `data` is `training_data`'s. Losses of stacked generators are
    summed, so each gets the gradient of its own alone; their metrics have an axis of C. With a
    "mix" in `data` the generator's state holds the parts that `mixed` adds up.
    """
    tx = optimizers(config)
    norm = jax.vmap(optax.tree.norm) if networks.stacked else optax.tree.norm

    def mean(values: Array) -> Array:
        """Over all but the axis of concepts."""
        return values.mean(tuple(range(int(networks.stacked), values.ndim)))

    def step(state: TrainState, frozen: Any, data: dict[str, Array]):
        batch = draw(jax.random.fold_in(state.key, state.step), data)
        source, target, pooled = (batch[name] for name in ("source", "target", "pooled"))
        before = state.trainable

        def of_generator(trainable):
            if "mix" in data:
                trainable = mixed(data["mix"], trainable)
            return networks.fakes(trainable, frozen, source, batch["states"])

        fake, pull_back = jax.vjp(of_generator, before["generator"])

        def discriminator_loss(trainable):
            real = networks.logits(trainable, source, target, pooled)
            false = networks.logits(trainable, source, fake, pooled)
            errors = gan_error(real, True, config.loss), gan_error(false, False, config.loss)
            return sum(error.mean() for error in errors) / 2

        loss_d, grads_d = jax.value_and_grad(discriminator_loss)(before["discriminator"])
        discriminator, opt_d = _moved(tx["discriminator"], grads_d, state, "discriminator")

        def generator_loss(fake):
            logits = networks.logits(discriminator, source, fake, pooled)
            fooling = mean(gan_error(logits, True, config.loss))
            l1 = mean(jnp.abs(fake - target).astype(jnp.float32))
            total = fooling + config.l1_weight * l1
            return total.sum(), (total, l1, fooling)

        grad_fake, (loss, l1, fooling) = jax.grad(generator_loss, has_aux=True)(fake)
        (grads_g,) = pull_back(grad_fake)
        generator, opt_g = _moved(tx["generator"], grads_g, state, "generator")
        new = TrainState(
            step=state.step + 1,
            trainable={"generator": generator, "discriminator": discriminator},
            opt_state={"generator": opt_g, "discriminator": opt_d},
            ema=None,
            key=state.key,
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm(grads_g),
            "l1": l1,
            "gan": fooling,
            "discriminator": loss_d,
        }
        return new, metrics

    return step


def mixed(mix: Float[Array, "c p"], parts: Any) -> Any:
    """The adapters, stacked, from their stacked parts."""
    return jax.tree.map(lambda x: jnp.tensordot(mix.astype(x.dtype), x, axes=1), parts)


def _moved(tx: optax.GradientTransformation, grads: Any, state: TrainState, name: str):
    updates, opt_state = tx.update(grads, state.opt_state[name], state.trainable[name])
    return optax.apply_updates(state.trainable[name], updates), opt_state


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
    description: str = "train the base",
) -> tuple[E2GAN, PatchGAN]:
    """Both networks after training on all concepts, by their texts; resumes from `folder`."""
    marked = mark_trainable(generator), mark_trainable(discriminator)
    (graph_g, trainable_g, frozen), (graph_d, trainable_d) = (
        nnx.split(marked[0], Trainable, ...),
        nnx.split(marked[1]),
    )
    state = init_gan(trainable_g, trainable_d, config, jax.random.key(seed))
    draw = partial(draw_mixed, count=config.batch_size)
    step = make_step(Networks(graph_g, graph_d), config, draw)
    state = fit_gan(state, frozen, training_data(pairs), step, config, folder, description)
    return (
        with_values(generator, state.trainable["generator"]),
        with_values(discriminator, state.trainable["discriminator"]),
    )


def fit_gan(
    state: TrainState,
    frozen: Any,
    data: dict[str, Array],
    step: StepFn,
    config: GANConfig,
    folder: Path,
    description: str,
) -> TrainState:
    """The state after `config.steps`; resumes from `folder`."""
    with (
        Checkpoints(
            folder / "checkpoints", every=config.checkpoint_every, keep=1, identity={}
        ) as checkpoint,
        MetricsWriter(folder) as metrics,
    ):
        return fit(
            state,
            frozen,
            Constant(data),
            step,
            steps=config.steps,
            checkpoint=checkpoint,
            metrics=metrics,
            description=description,
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
