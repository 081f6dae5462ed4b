"""The image editors of a run: the base, LoRAs of all concepts, fine-tuning, and pix2pix.

It puts `tasks.gan` together for the stages of `weightgen`, which then speak of concepts by their
number only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from jaxsynth.adapters.flatten import Layout
from jaxsynth.adapters.inject import (
    AdapterState,
    extract,
    freeze,
    load_state,
    mark_trainable,
    trainable_variables,
)
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core.limits import Count, Distinct, Finite, Natural, check_limits
from jaxsynth.data.procedural.concepts import Concept
from jaxsynth.methods.weightgen.baselines import word_counts, words
from jaxsynth.methods.weightgen.edits import Edits
from jaxsynth.methods.weightgen.generator import TextReader
from jaxsynth.methods.weightgen.scores import Curves
from jaxsynth.models.gan.e2gan import E2GAN, E2GANConfig
from jaxsynth.models.gan.patchgan import PatchGAN, PatchGANConfig
from jaxsynth.models.gan.pix2pix import Pix2Pix, Pix2PixConfig
from jaxsynth.quality.features import FeatureExtractor, clip_extractor
from jaxsynth.tasks.gan import (
    GANConfig,
    Generator,
    Pairs,
    adapted,
    edit_images,
    encode_texts,
    l1_error,
    train_base,
)
from jaxsynth.tasks.gan_finetune import Curve, fine_tune
from jaxsynth.tasks.gan_together import train_together
from jaxsynth.weights.adapters.native import read_network, write_state

SHARED = ("none", "words")
_GENERATOR, _DISCRIMINATOR = "generator.safetensors", "discriminator.safetensors"


@dataclass(frozen=True)
class EditorConfig:
    """The networks and how they are trained: the base, all LoRAs together, one LoRA fine-tuned, and
    pix2pix from scratch.

    Held-out errors are measured after `tune_at` and `scratch_at` steps; the LoRAs' checkpoints are
    `every` steps apart. `group` LoRAs train together, 0: all, or as many as `Config.memory` allows.
    With `share` "words" a LoRA is the sum of a part for all, one for each word of its prompt that
    other prompts have too, and `own` of its own (`tasks.gan_together.mixture`). Without
    `train_down` every LoRA keeps the A of the shared start and trains B alone: a layer's change is
    then linear in what is trained, so a mean or a prediction of weights is one of changes. `pairs`
    is how many photos of a single concept fine-tuning and training from scratch have, 0: all.
    Widths of texts follow from the text encoder.
    """

    generator: E2GANConfig = field(default_factory=E2GANConfig)
    discriminator: PatchGANConfig = field(default_factory=PatchGANConfig)
    pix2pix: Pix2PixConfig = field(default_factory=Pix2PixConfig)
    base: GANConfig = field(default_factory=GANConfig)
    together: GANConfig = field(default_factory=GANConfig)
    tune: GANConfig = field(default_factory=GANConfig)
    scratch: GANConfig = field(default_factory=GANConfig)
    every: Count = 50
    group: Natural = 0
    share: Literal["none", "words"] = "none"
    own: Finite = 0.3
    train_down: bool = True
    pairs: Natural = 0
    tune_at: Annotated[tuple[Natural, ...], Distinct()] = (0, 5, 10, 20, 50, 100, 200)
    scratch_at: Annotated[tuple[Natural, ...], Distinct()] = (0, 100, 400)

    def __post_init__(self):
        check_limits(self)
        for name in ("tune_at", "scratch_at"):
            steps = getattr(self, name)
            if list(steps) != sorted(set(steps)):
                raise ValueError(f"{name} is {steps}, expected rising numbers of steps")
        if self.share not in SHARED:
            raise ValueError(f"share is {self.share!r}, expected one of {', '.join(SHARED)}")
        if self.share != "none" and self.group:
            raise ValueError(
                f"group is {self.group}, but with share {self.share!r} all train together"
            )


@dataclass(frozen=True)
class Networks:
    """The two networks of the editor; widths of texts follow from the text encoder."""

    generator: E2GANConfig
    discriminator: PatchGANConfig

    def with_text(self, width: int) -> "Networks":
        """The networks for texts of this width."""
        return Networks(
            replace(self.generator, cross_attention_dim=width),
            replace(self.discriminator, text_dim=width),
        )

    def make_generator(self, key: Array) -> E2GAN:
        return E2GAN(self.generator, rngs=nnx.Rngs(key))

    def make_discriminator(self, key: Array) -> PatchGAN:
        return PatchGAN(self.discriminator, rngs=nnx.Rngs(key))


@dataclass(frozen=True)
class Adapter:
    """The LoRA of every concept, and the values in a block of its weights.

    Without `train_down` it keeps the A of the shared start.
    """

    lora: LoRAConfig
    train_down: bool
    block: int

    def add(self, generator: E2GAN, key: Array) -> E2GAN:
        """The base with the LoRA that all concepts start from."""
        model = adapted(generator, self.lora, key)
        return model if self.train_down else freeze(model, ["lora_A"])

    def layout(self, networks: Networks) -> Layout:
        """Where the values of a LoRA lie in blocks; it follows from shapes alone."""
        key = jax.random.key(0)
        model = nnx.eval_shape(lambda: self.add(networks.make_generator(key), key))
        arrays = {name: one.get_value() for name, one in trainable_variables(model).items()}
        return Layout.of(AdapterState(arrays, self.lora), self.block)


@dataclass(frozen=True)
class Scratch:
    """pix2pix from random weights, measured after the steps `at`."""

    network: Pix2PixConfig
    train: GANConfig
    at: tuple[int, ...]


def shared_words(concepts: Sequence[Concept]) -> Float[np.ndarray, "c f"]:
    """Which of the words that several prompts have each prompt has."""
    prompts = [concept.prompt for concept in concepts]
    known = Counter(word for prompt in prompts for word in set(words(prompt)))
    return word_counts(prompts, sorted(word for word, count in known.items() if count > 1))


class Editors:
    """The networks of one seed, on one scene; `base` is the folder that `train_base` wrote to."""

    def __init__(
        self,
        networks: Networks,
        read: TextReader,
        edits: Edits,
        *,
        base: Path | None = None,
        adapter: Adapter | None = None,
    ):
        self.networks = networks.with_text(read.encoder.config.hidden_size)
        self.edits, self.folder, self.adapter = edits, base, adapter
        self.scene, self.seed = edits.scene, edits.scene.seed
        wordings = [concept.texts for concept in self.scene.concepts]
        self.texts = encode_texts(read.encoder, read.tokenizer, wordings)

    def pairs(self, rows: Sequence[int], *, held_out: bool = False) -> Pairs:
        """Photos and the edits of some concepts; made when asked for, as all would not fit."""
        name = "held_out" if held_out else "photos"
        own = [row - self.scene.first for row in rows]
        return Pairs(self.edits.photos[name], self.edits(rows, name), *(x[own] for x in self.texts))

    def train_base(
        self, folder: Path, training: Path, config: GANConfig, *, mesh: Mesh | None, write: bool
    ) -> dict:
        """Trains the base on the scene's concepts; returns its size and its held-out L1.

        All that is trained lies in files of `folder`, as other stages read it, where this process
        is the one to `write`.
        """
        key = jax.random.key(self.seed)
        generator = self.networks.make_generator(jax.random.fold_in(key, 0))
        discriminator = self.networks.make_discriminator(jax.random.fold_in(key, 1))
        rows = self.scene.rows
        generator, discriminator = train_base(
            generator, discriminator, self.pairs(rows), config, training, seed=self.seed,
            mesh=mesh, description="base",
        )  # fmt: skip
        if not write:
            return {}
        for name, model in ((_GENERATOR, generator), (_DISCRIMINATOR, discriminator)):
            write_state(folder / name, extract(mark_trainable(model)))
        errors = [self._error(generator, row) for row in rows]
        return {"l1": float(np.mean(errors)), "parameters": _size(generator)}

    @cached_property
    def base(self) -> tuple[E2GAN, PatchGAN]:
        """The two networks that `train_base` wrote."""
        key = jax.random.key(0)
        generator = nnx.eval_shape(lambda: self.networks.make_generator(key))
        discriminator = nnx.eval_shape(lambda: self.networks.make_discriminator(key))
        return (
            read_network(generator, self.folder / _GENERATOR),
            read_network(discriminator, self.folder / _DISCRIMINATOR),
        )

    @cached_property
    def adapted(self) -> E2GAN:
        """The base with the LoRA that all concepts start from."""
        return self.adapter.add(self.base[0], jax.random.fold_in(jax.random.key(self.seed), 2))

    @property
    def start(self) -> AdapterState:
        """The state that all concepts start from."""
        return extract(self.adapted)

    def train_together(
        self,
        training: Path,
        config: GANConfig,
        *,
        keep: int,
        every: int,
        group: int = 0,
        share: Literal["none", "words"] = "none",
        own: float = 0.3,
        mesh: Mesh | None = None,
    ) -> list[list[AdapterState]]:
        """The last `keep` checkpoints of each concept's LoRA, `group` of them trained together."""
        rows, count = self.scene.rows, group or len(self.scene.rows)
        states: list[list[AdapterState]] = []
        for first in range(0, len(rows), count):
            part = rows[first : first + count]
            shared = None if share == "none" else shared_words(self.scene.concepts)
            states += train_together(
                self.adapted, self.base[1], self.pairs(part), config, training / str(first),
                seed=self.seed, checkpoints=keep, every=every, shared=shared, own=own, mesh=mesh,
                description=f"{len(part)} LoRAs",
            )  # fmt: skip
        return states

    def errors(self, states: Sequence[AdapterState]) -> list[float]:
        """The held-out L1 of a LoRA of each concept."""
        return [
            self._error(load_state(self.adapted, state), row)
            for row, state in zip(self.scene.rows, states, strict=True)
        ]

    def tune(
        self,
        config: GANConfig,
        states: Sequence[AdapterState],
        at: Sequence[int],
        *,
        pairs: int,
        fd: bool = False,
    ) -> Curves:
        """Concept by concept from a state each, on `pairs` photos (0: all), measured after `at`.

        With `fd` also by the Frechet distance in the features of the shipped CLIP.
        """
        found = []
        for row, state in zip(self.scene.rows, states, strict=True):
            start = load_state(self.adapted, state)
            found.append(self._curve(start, self.base[1], row, config, at, pairs, fd))
        return _curves(found)

    def scratch(self, scratch: Scratch, *, pairs: int, fd: bool = False) -> Curves:
        """pix2pix from random weights, concept by concept."""
        keys = [jax.random.fold_in(jax.random.key(self.seed), 3 + i) for i in range(2)]
        start = mark_trainable(Pix2Pix(scratch.network, rngs=nnx.Rngs(keys[0])))
        plain = replace(self.networks.discriminator, text_dim=0)
        judge = PatchGAN(plain, rngs=nnx.Rngs(keys[1]))
        return _curves(
            [
                self._curve(start, judge, row, scratch.train, scratch.at, pairs, fd)
                for row in self.scene.rows
            ]
        )

    def _curve(
        self,
        start: Generator,
        judge: PatchGAN,
        row: int,
        config: GANConfig,
        at: Sequence[int],
        count: int,
        fd: bool,
    ) -> Curve:
        # Every start sees the same photos of a concept in the same order.
        pairs = self.pairs([row])
        count = count or len(pairs.source)
        few = replace(pairs, source=pairs.source[:count], target=pairs.target[:, :count])
        return fine_tune(
            start, judge, few, self.pairs([row], held_out=True), config, at=at,
            seed=self.seed + row, features=self._clip.features if fd else None,
        )[0]  # fmt: skip

    @cached_property
    def _clip(self) -> FeatureExtractor:
        return clip_extractor(batch_size=min(64, self.scene.held_out))

    def draw(
        self, rows: Sequence[int], states: Sequence[AdapterState]
    ) -> UInt8[np.ndarray, "c h w 3"]:
        """The held-out photo of most contrast as each concept's state edits it."""
        photo, made = self.edits.photos["held_out"][[self._shown]], []
        for row, state in zip(rows, states, strict=True):
            model = load_state(self.adapted, state)
            made.append(edit_images(model, photo, self.texts[0][row - self.scene.first, 0])[0])
        return np.stack(made)

    def examples(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """That photo, and what each concept should make of it."""
        pairs = self.pairs(rows, held_out=True)
        return np.stack([pairs.source[self._shown]] * len(rows)), pairs.target[:, self._shown]

    @property
    def _shown(self) -> int:
        return int(np.argmax(self.edits.photos["held_out"].std((1, 2, 3))))

    def _error(self, model: Generator, row: int) -> float:
        return held_out_error(model, self.pairs([row], held_out=True))


def held_out_error(model: Generator, held: Pairs) -> float:
    """The L1 of one concept's edits, in the unit of pixels in [0, 1]."""
    return l1_error(edit_images(model, held.source, held.states[0, 0]), held.target[0])


def _curves(found: Sequence[Curve]) -> Curves:
    seconds = [one.seconds[-1] / max(one.steps[-1], 1) for one in found]
    step = float(np.median(seconds))
    return Curves(found[0].steps, [one.l1 for one in found], 0.0, step, [one.fd for one in found])


def _size(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model)))
