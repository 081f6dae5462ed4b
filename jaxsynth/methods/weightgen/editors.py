"""The image editors of a run: the base, LoRAs of all concepts, fine-tuning, and pix2pix.

It puts `training.gan` together for the stages of `weightgen`, which then speak of concepts by their
number only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from jaxsynth.adapters.inject import AdapterState, extract, freeze, load_state, mark_trainable
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.data.procedural.concepts import Concept
from jaxsynth.methods.weightgen.baselines import word_counts, words
from jaxsynth.methods.weightgen.edits import Edits
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
from jaxsynth.tasks.weight_generator import TextReader
from jaxsynth.weights.adapters.native import read_network, write_state

# Concepts whose edited photos are kept in memory.
T = TypeVar("T", bound=nnx.Module)
_KEPT = 256
SHARED = ("none", "words")
_GENERATOR, _DISCRIMINATOR = "generator.safetensors", "discriminator.safetensors"


@dataclass(frozen=True)
class EditorConfig:
    """The networks and how they are trained: the base, all LoRAs together, one LoRA fine-tuned, and
    pix2pix from scratch.

    Held-out errors are measured after `tune_at` and `scratch_at` steps; the LoRAs' checkpoints are
    `every` steps apart. `group` LoRAs train together, 0: all. With `share` "words" a LoRA is the
    sum of a part for all, one for each word of its prompt that other prompts have too, and `own` of
    its own (`training.gan_together.mixture`). Without `train_down` every LoRA keeps the A of the
    shared start and trains B alone: a layer's change is then linear in what is trained, so a mean
    or a prediction of weights is one of changes. `pairs` is how many photos of a single concept
    fine-tuning and training from scratch have, 0: all. Widths of texts follow from the text
    encoder.
    """

    generator: E2GANConfig = field(default_factory=E2GANConfig)
    discriminator: PatchGANConfig = field(default_factory=PatchGANConfig)
    pix2pix: Pix2PixConfig = field(default_factory=Pix2PixConfig)
    base: GANConfig = field(default_factory=GANConfig)
    together: GANConfig = field(default_factory=GANConfig)
    tune: GANConfig = field(default_factory=GANConfig)
    scratch: GANConfig = field(default_factory=GANConfig)
    every: int = 50
    group: int = 0
    share: Literal["none", "words"] = "none"
    own: float = 0.3
    train_down: bool = True
    pairs: int = 0
    tune_at: tuple[int, ...] = (0, 5, 10, 20, 50, 100, 200)
    scratch_at: tuple[int, ...] = (0, 100, 400)

    def __post_init__(self):
        for name in ("tune_at", "scratch_at"):
            steps = getattr(self, name)
            if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0:
                raise ValueError(f"{name} is {steps}, expected rising numbers of steps")
        if self.share not in SHARED:
            raise ValueError(f"share is {self.share!r}, expected one of {', '.join(SHARED)}")
        if self.share != "none" and self.group:
            raise ValueError(
                f"group is {self.group}, but with share {self.share!r} all train together"
            )


class Editors:
    """The networks of one seed. Concepts are numbers into `concepts`, the base's first."""

    def __init__(
        self,
        config: EditorConfig,
        lora: LoRAConfig,
        read: TextReader,
        concepts: Sequence[Concept],
        photos: UInt8[np.ndarray, "n h w 3"],
        held_out: UInt8[np.ndarray, "m h w 3"],
        edits: Edits,
        *,
        seed: int,
    ):
        self.lora, self.edits, self.seed = lora, edits, seed
        self.config = with_text_width(config, read.encoder.config.hidden_size)
        self.concepts, self.photos, self.held_out = list(concepts), photos, held_out
        self.texts = encode_texts(read.encoder, read.tokenizer, [c.texts for c in concepts])
        self._edited = lru_cache(maxsize=_KEPT)(self._edit)
        self._adapted: E2GAN | None = None

    def pairs(self, rows: Sequence[int], *, held_out: bool = False) -> Pairs:
        """Photos and the edits of some concepts; made when asked for, as all would not fit."""
        source = self.held_out if held_out else self.photos
        targets = np.stack([self._edited(row, held_out) for row in rows])
        return Pairs(source, targets, *(x[list(rows)] for x in self.texts))

    def _edit(self, row: int, held_out: bool) -> UInt8[np.ndarray, "n h w 3"]:
        return self.edits(self.concepts[row], self.held_out if held_out else self.photos)

    def train_base(self, folder: Path, count: int) -> dict:
        """Trains the base on the first concepts and writes both networks; returns its held-out L1.

        All that is trained lies in files of `folder`, as other stages read it.
        """
        config = self.config
        key = jax.random.key(self.seed)
        generator = E2GAN(config.generator, rngs=nnx.Rngs(jax.random.fold_in(key, 0)))
        discriminator = PatchGAN(config.discriminator, rngs=nnx.Rngs(jax.random.fold_in(key, 1)))
        rows = range(count)
        generator, discriminator = train_base(
            generator, discriminator, self.pairs(rows), config.base, folder / ".training",
            seed=self.seed, description="base",
        )  # fmt: skip
        for name, model in ((_GENERATOR, generator), (_DISCRIMINATOR, discriminator)):
            write_state(folder / name, extract(mark_trainable(model)))
        errors = [self._error(generator, row) for row in rows]
        return {"l1": float(np.mean(errors)), "parameters": _size(generator)}

    def base(self, folder: Path) -> tuple[E2GAN, PatchGAN]:
        """The two networks that `train_base` wrote."""
        config = self.config
        return (
            read_network(nnx.eval_shape(lambda: E2GAN(config.generator, rngs=nnx.Rngs(0))),
                  folder / _GENERATOR),
            read_network(nnx.eval_shape(lambda: PatchGAN(config.discriminator, rngs=nnx.Rngs(0))),
                  folder / _DISCRIMINATOR),
        )  # fmt: skip

    def adapted(self, folder: Path) -> E2GAN:
        """The base with the LoRA that all concepts start from."""
        if self._adapted is None:
            key = jax.random.fold_in(jax.random.key(self.seed), 2)
            model = adapted(self.base(folder)[0], self.lora, key)
            self._adapted = model if self.config.train_down else freeze(model, ["lora_A"])
        return self._adapted

    def start(self, folder: Path) -> AdapterState:
        """The state that all concepts start from."""
        return extract(self.adapted(folder))

    def train_together(
        self,
        folder: Path,
        rows: Sequence[int],
        training: Path,
        *,
        keep: int,
        mesh: Mesh | None = None,
    ) -> tuple[list[list[AdapterState]], list[float]]:
        """The last `keep` checkpoints of each concept's LoRA, and the held-out L1 of the last."""
        start, judge = self.adapted(folder), self.base(folder)[1]
        count = self.config.group or len(rows)
        states: list[list[AdapterState]] = []
        for first in range(0, len(rows), count):
            part = rows[first : first + count]
            states += train_together(
                start, judge, self.pairs(part), self.config.together, training / str(first),
                seed=self.seed, checkpoints=keep, every=self.config.every,
                shared=self._shared(part), own=self.config.own, mesh=mesh,
                description=f"{len(part)} LoRAs",
            )  # fmt: skip
        errors = [
            self._error(load_state(start, own[-1]), row)
            for row, own in zip(rows, states, strict=True)
        ]
        return states, errors

    def _shared(self, rows: Sequence[int]) -> Float[np.ndarray, "c f"] | None:
        """Which words that several prompts have each one has."""
        if self.config.share == "none":
            return None
        prompts = [self.concepts[row].prompt for row in rows]
        known = Counter(word for prompt in prompts for word in set(words(prompt)))
        return word_counts(prompts, sorted(w for w, count in known.items() if count > 1))

    def tune(
        self,
        folder: Path,
        rows: Sequence[int],
        states: Sequence[AdapterState],
        at: Sequence[int],
        *,
        fd: bool = False,
    ) -> Curves:
        """Concept by concept from a state each, measured after the steps of `at`.

        With `fd` also by the Frechet distance in the features of the shipped CLIP.
        """
        judge = self.base(folder)[1]
        found = []
        for row, state in zip(rows, states, strict=True):
            start = load_state(self.adapted(folder), state)
            found.append(self._curve(start, judge, row, self.config.tune, at, fd))
        return _curves(found)

    def scratch(self, rows: Sequence[int], *, fd: bool = False) -> Curves:
        """pix2pix from random weights, concept by concept."""
        config = self.config
        keys = [jax.random.fold_in(jax.random.key(self.seed), 3 + i) for i in range(2)]
        start = mark_trainable(Pix2Pix(config.pix2pix, rngs=nnx.Rngs(keys[0])))
        plain = replace(config.discriminator, text_dim=0)
        judge = PatchGAN(plain, rngs=nnx.Rngs(keys[1]))
        return _curves(
            [self._curve(start, judge, row, config.scratch, config.scratch_at, fd) for row in rows]
        )

    def _curve(
        self,
        start: Generator,
        judge: PatchGAN,
        row: int,
        config: GANConfig,
        at: Sequence[int],
        fd: bool,
    ) -> Curve:
        # Every start sees the same photos of a concept in the same order.
        pairs, count = self.pairs([row]), self.config.pairs or len(self.photos)
        few = replace(pairs, source=pairs.source[:count], target=pairs.target[:, :count])
        return fine_tune(
            start, judge, few, self.pairs([row], held_out=True), config, at=at,
            seed=self.seed + row, features=self._clip.features if fd else None,
        )[0]  # fmt: skip

    @cached_property
    def _clip(self) -> FeatureExtractor:
        return clip_extractor(batch_size=min(64, len(self.held_out)))

    def draw(
        self, folder: Path, rows: Sequence[int], states: Sequence[AdapterState]
    ) -> UInt8[np.ndarray, "c h w 3"]:
        """The held-out photo of most contrast as each concept's state edits it."""
        photo, made = self.held_out[[self._shown]], []
        for row, state in zip(rows, states, strict=True):
            model = load_state(self.adapted(folder), state)
            made.append(edit_images(model, photo, self.texts[0][row, 0])[0])
        return np.stack(made)

    def examples(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """That photo, and what each concept should make of it."""
        pairs = self.pairs(rows, held_out=True)
        return np.stack([pairs.source[self._shown]] * len(rows)), pairs.target[:, self._shown]

    @property
    def _shown(self) -> int:
        return int(np.argmax(self.held_out.std((1, 2, 3))))

    def _error(self, model: Generator, row: int) -> float:
        return held_out_error(model, self.pairs([row], held_out=True))


def with_text_width(config: EditorConfig, width: int) -> EditorConfig:
    """The networks for texts of this width."""
    return replace(
        config,
        generator=replace(config.generator, cross_attention_dim=width),
        discriminator=replace(config.discriminator, text_dim=width),
    )


def held_out_error(model: Generator, held: Pairs) -> float:
    """The L1 of one concept's edits, in the unit of pixels in [0, 1]."""
    return l1_error(edit_images(model, held.source, held.states[0, 0]), held.target[0])


def _curves(found: Sequence[Curve]) -> Curves:
    seconds = [one.seconds[-1] / max(one.steps[-1], 1) for one in found]
    step = float(np.median(seconds))
    return Curves(found[0].steps, [one.l1 for one in found], 0.0, step, [one.fd for one in found])


def _size(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model)))
