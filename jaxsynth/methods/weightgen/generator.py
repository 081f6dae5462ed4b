"""From a text to an adapter's weights: the trained denoiser with all that it needs around it.

A generator reads a text (frozen CLIP encoder), denoises all blocks of the adapter, undoes the
normalisation and adds what a plain predictor says, where it was trained on the rest of one
(`residual`). Its weights are then compared with those that it learnt from: where the norm of a
layer is out of their range, or not finite, the fallback is taken instead.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxsynth.adapters.flatten import PER, Layout, Per
from jaxsynth.adapters.inject import AdapterState, extract, mark_trainable
from jaxsynth.core.config import to_dataclass
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import write_json
from jaxsynth.core.limits import NotNegative, check_limits
from jaxsynth.methods.weightgen.baselines import (
    Ridge,
    choose_features,
    nearest,
    nearest_other,
    word_counts,
    words,
)
from jaxsynth.methods.weightgen.collection import Statistics, WeightCollection
from jaxsynth.models.clip import CLIPTextModel
from jaxsynth.models.diffusion.weight_unet import WeightUNet, WeightUNetConfig
from jaxsynth.tasks.weight_diffusion import (
    WeightData,
    WeightTrainConfig,
    denoise,
    few_steps,
    recover,
    train,
)
from jaxsynth.weights.adapters.native import read_network, write_state
from jaxsynth.weights.tokenizer import Tokenizer

Prior = Literal["none", "mean", "nearest", "ridge"]
PRIORS = ("none", "mean", "nearest", "ridge")
_WEIGHTS, _SETTINGS = "generator.safetensors", "generator.json"


@dataclass(frozen=True)
class GeneratorConfig:
    """A generator of weights and how it learns.

    `network`'s block and text widths are the collection's and the text encoder's. `per` is what is
    normalised together: the values of a layer "group" (as published), of an "array", or each
    "value" by itself. `residual` names the plain prediction that the network learns the rest of.
    `guard` is how far a layer's norm may leave the range seen in training (2: from half the least
    to twice the largest), 0 lets all pass.
    """

    network: WeightUNetConfig = field(default_factory=WeightUNetConfig)
    train: WeightTrainConfig = field(default_factory=WeightTrainConfig)
    per: Per = "group"
    residual: Prior = "none"
    guard: NotNegative = 2.0

    def __post_init__(self):
        check_limits(self)
        for name, value, known in (("per", self.per, PER), ("residual", self.residual, PRIORS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        if self.guard != 0 and self.guard < 1:
            raise ValueError(f"guard is {self.guard}, expected 0 or at least 1")


@dataclass(frozen=True)
class TextReader:
    """A frozen text encoder with its tokenizer."""

    encoder: CLIPTextModel
    tokenizer: Tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[Float[Array, "m t d"], dict[str, np.ndarray]]:
        """The states of all tokens, and features of whole texts.

        "pooled" is the state at the end of the text, "tokens" the mean over its words' states.
        """
        ids = self.tokenizer(list(texts))
        states, pooled = _encode(self.encoder, jnp.asarray(ids))
        ends = (ids == self.tokenizer.eos_token_id).argmax(1)
        place = np.arange(ids.shape[1])[None]
        inside = ((place > 0) & (place < ends[:, None]))[..., None]
        summed = (np.asarray(states) * inside).sum(1) / np.maximum(inside.sum(1), 1)
        return states, {"pooled": np.asarray(pooled), "tokens": summed}


@jax.jit
def _encode(encoder: CLIPTextModel, ids: Array) -> tuple[Array, Array]:
    out = encoder(ids)
    return out.last_hidden_state, out.pooled


class Baselines:
    """The plain predictors of a collection: they are compared with, and generated on top of.

    Weights of a concept are the mean of its checkpoints. Which features of the texts serve (the
    encoder's, or which words occur) is chosen by ridge regression's leave-one-out error.
    """

    def __init__(self, collection: WeightCollection, read: TextReader):
        self.collection, self.layout, self._read = collection, collection.layout, read
        self.vocabulary = sorted({w for texts in collection.texts for w in words(texts[0])})
        self._prompts = [texts[0] for texts in collection.texts]
        self.blocks = collection.blocks.mean(1)
        # All arrays count alike, as they do in the generator's loss.
        parts = self.layout.parts("array")[self.layout.mask]
        self._scale = collection.statistics("array").std[parts]
        self._values = self.scaled(self.blocks)
        self.features, self.ridge = self._chosen

    def scaled(self, blocks: Float[np.ndarray, "m n v"]) -> Float[np.ndarray, "m values"]:
        """The values of blocks in units of their array's standard deviation."""
        return blocks[:, self.layout.mask] / self._scale

    @cached_property
    def _chosen(self) -> tuple[str, Ridge]:
        return choose_features(self._own, self._values)

    @cached_property
    def _own(self) -> dict[str, np.ndarray]:
        return self._features(self._prompts)

    def _features(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        counted = word_counts(texts, self.vocabulary)
        return {**self._read(texts)[1], "words": counted}

    @property
    def mean(self) -> Float[np.ndarray, "n v"]:
        """The mean over all concepts."""
        return self.blocks.mean(0)

    @cached_property
    def spread(self) -> Float[np.ndarray, "n v"]:
        """The standard deviation of each value over the concepts."""
        return self.blocks.std(0)

    def nearest(self, texts: Sequence[str]) -> np.ndarray:
        """The number of the concept with the most similar prompt, for each text."""
        return nearest(self._own[self.features], self._features(texts)[self.features])

    def predict(self, kind: Prior, texts: Sequence[str]) -> Float[np.ndarray, "m n v"]:
        """Blocks for texts; "none" predicts zeros."""
        if kind == "nearest":
            return self.blocks[self.nearest(texts)]
        if kind == "ridge":
            return self._filled(self.ridge(self._features(texts)[self.features]))
        start = self.mean if kind == "mean" else np.zeros_like(self.mean)
        return np.repeat(start[None], len(texts), axis=0)

    def left_out(self, kind: Prior) -> Float[np.ndarray, "c n v"]:
        """The prediction for each concept of the collection from the others alone.

        What a generator adds to: on its own concepts a predictor errs less than on new ones.
        """
        if kind == "nearest":
            return self.blocks[nearest_other(self._own[self.features])]
        if kind == "ridge":
            return self._filled(self.ridge.left_out)
        return self.predict(kind, self._prompts)

    def _filled(self, values: Float[np.ndarray, "m values"]) -> Float[np.ndarray, "m n v"]:
        blocks = np.zeros((len(values), *self.layout.mask.shape), np.float32)
        blocks[:, self.layout.mask] = values * self._scale
        return blocks


@dataclass(frozen=True)
class Generated:
    """Blocks for each text; `ratios` (m, groups) are their norms over the collection's mean norms.

    Where `replaced`, the fallback stands in their place.
    """

    blocks: Float[np.ndarray, "m n v"]
    ratios: Float[np.ndarray, "m g"]
    replaced: Bool[np.ndarray, " m"]


@dataclass(frozen=True)
class WeightGenerator:
    """Makes the weights of an adapter from a text; see the module's description."""

    model: WeightUNet
    config: GeneratorConfig
    baselines: Baselines
    read: TextReader
    statistics: Statistics

    @property
    def layout(self) -> Layout:
        return self.baselines.layout

    def __call__(
        self,
        texts: Sequence[str],
        *,
        seed: int,
        t: int | None = None,
        steps: int = 1,
        fallback: Float[np.ndarray, "n v"] | None = None,
    ) -> Generated:
        """Weights for each text, all from one noise.

        In one step, taking the noise for weights at time `t` (None: the last), or in `steps` steps.
        `fallback` is the mean of the collection by default.
        """
        key, total = jax.random.key(seed), self.config.train.num_train_timesteps
        if t is not None and not 0 <= t < total:
            raise ValueError(f"t is {t}, expected 0 to {total - 1}")
        context, _ = self.read(texts)
        count = self.layout.num_blocks
        if steps == 1:
            time = jnp.asarray(total - 1 if t is None else t, jnp.int32)
            schedule = self.config.train.noise_schedule()
            found = recover(self.model, schedule, context, time, key, count=count)
        else:
            sampler = few_steps(self.config.train, steps)
            found = denoise(self.model, sampler, context, key, count=count)
        blocks = self.statistics.restored(np.asarray(found), self.layout)
        blocks = blocks + self.baselines.predict(self.config.residual, texts)
        return self._guarded(blocks, self.baselines.mean if fallback is None else fallback)

    def states(self, generated: Generated) -> list[AdapterState]:
        """The adapters that lie in generated blocks."""
        return [self.layout.from_blocks(jnp.asarray(blocks)) for blocks in generated.blocks]

    @cached_property
    def norms(self) -> Float[np.ndarray, "ck g"]:
        """The norms of every layer group of every checkpoint that was learnt from."""
        blocks = self.baselines.collection.blocks
        return group_norms(blocks.reshape(-1, *blocks.shape[2:]), self.layout)

    def _guarded(self, blocks: np.ndarray, fallback: np.ndarray) -> Generated:
        norms = group_norms(blocks, self.layout)
        typical = np.maximum(self.norms.mean(0), 1e-12)
        bad = ~np.isfinite(blocks).all((1, 2))
        if self.config.guard:
            low = self.norms.min(0) / self.config.guard
            high = self.norms.max(0) * self.config.guard
            bad |= ~((norms >= low) & (norms <= high)).all(1)
        kept = np.where(bad[:, None, None], fallback, blocks).astype(np.float32)
        return Generated(kept, norms / typical, bad)


def group_norms(blocks: Float[np.ndarray, "m n v"], layout: Layout) -> Float[np.ndarray, "m g"]:
    """The Euclidean norm of each layer group's values."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(np.asarray(blocks, np.float64)).sum(-1)
        sums = [
            squares[:, layout.group_index == group].sum(1) for group in range(len(layout.groups))
        ]
        return np.sqrt(np.stack(sums, axis=1))


def train_generator(
    collection: WeightCollection,
    read: TextReader,
    config: GeneratorConfig,
    folder: Path,
    *,
    seed: int,
    baselines: Baselines | None = None,
    mesh: Mesh | None = None,
    description: str = "generator",
) -> WeightGenerator:
    """A generator of weights like those of `collection`; resumes from `folder/checkpoints`."""
    baselines = baselines or Baselines(collection, read)
    layout = collection.layout
    rest = collection.blocks - baselines.left_out(config.residual)[:, None]
    statistics = Statistics.of(rest, layout, config.per)
    context, counts = _contexts(collection, read)
    data = WeightData(statistics.normalised(rest, layout), context, counts, layout.mask)
    network = fitted(config.network, layout, context.shape[-1])
    model = WeightUNet(network, rngs=nnx.Rngs(seed))
    model = train(model, data, config.train, folder, seed=seed, mesh=mesh, description=description)
    return WeightGenerator(model, config, baselines, read, statistics)


def fitted(network: WeightUNetConfig, layout: Layout, text_width: int) -> WeightUNetConfig:
    """The network's shape for a layout's blocks and texts of this width."""
    return dataclasses.replace(network, sample_size=layout.block, cross_attention_dim=text_width)


def _contexts(collection: WeightCollection, read: TextReader) -> tuple[np.ndarray, np.ndarray]:
    """The states of every concept's texts, filled up to one number of texts, and their numbers."""
    counts = np.array([len(texts) for texts in collection.texts])
    states, _ = read([text for texts in collection.texts for text in texts])
    states = np.asarray(states)
    found = np.zeros((len(counts), counts.max(), *states.shape[1:]), np.float32)
    ends = np.cumsum(counts)
    for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
        found[row, :count] = states[end - count : end]
    return found, counts


def save_generator(generator: WeightGenerator, folder: Path) -> None:
    """Write the network and what its output means; the collection stays where it is."""
    settings = {
        "config": dataclasses.asdict(generator.config),
        "base": generator.baselines.collection.base,
        "layout": generator.layout.to_json(),
        "mean": generator.statistics.mean.tolist(),
        "std": generator.statistics.std.tolist(),
        "text_width": generator.model.config.cross_attention_dim,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder / _WEIGHTS, extract(mark_trainable(generator.model)))
    write_json(folder / _SETTINGS, settings, indent=None)


def load_generator(
    folder: Path,
    collection: WeightCollection,
    read: TextReader,
    *,
    baselines: Baselines | None = None,
) -> WeightGenerator:
    """Read what `save_generator` wrote.

    Raises UserError where the collection is not of the base or layout that it was trained for.
    """
    settings = read_json(folder / _SETTINGS)
    where = folder / _SETTINGS
    try:
        base, layout = settings["base"], Layout.from_json(settings["layout"])
        config = to_dataclass(GeneratorConfig, settings["config"], path=f"{where}: config")
        mean, std = (np.asarray(settings[name], np.float32) for name in ("mean", "std"))
        width = int(settings["text_width"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if collection.base != base:
        raise UserError(
            f"{where}: trained on adapters of base {base}, the collection's are of "
            f"{collection.base}"
        )
    if collection.layout.to_json() != layout.to_json():
        raise UserError(f"{where}: trained on blocks of another layout than the collection's")
    network = fitted(config.network, layout, width)
    plain = nnx.eval_shape(lambda: WeightUNet(network, rngs=nnx.Rngs(0)))
    return WeightGenerator(
        read_network(plain, folder / _WEIGHTS),
        config,
        baselines or Baselines(collection, read),
        read,
        Statistics(config.per, mean, std),
    )
