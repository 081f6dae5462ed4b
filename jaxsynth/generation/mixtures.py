"""Images drawn with a weighted sum of several adapters each, another one for every image.

LoFT fuses the adapters of two images of a class, all pairs in turn; ChimeraLoRA sums the heads of
all images of a class with weights of a uniform Dirichlet distribution. The sums are made for one
batch at a time, so that as many lie on the device as a batch has images.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, UInt8

from jaxsynth.adapters.inject import AdapterState, Constant, Trainable, load_state, stack
from jaxsynth.adapters.mixing import mix
from jaxsynth.adapters.registry import attach
from jaxsynth.generation.conditioners import Text
from jaxsynth.generation.generate import GenerateConfig, Generator
from jaxsynth.training import sharding
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import StableDiffusion

# Adapters of single images that are kept in memory: of rank 2 on SD 2.1 about a gigabyte.
MOST_KEPT = 1_000

# Which adapters of its class an image is drawn with, and their weights.
Mixture = tuple[Sequence[int], Sequence[float]]


def pair_of(seed: int, label: int, index: int, count: int) -> Mixture:
    """LoFT's: all pairs of the class's `count` adapters in shuffled order, again and again."""
    pairs = list(itertools.combinations(range(count), 2)) or [(0, 0)]
    order = np.random.default_rng([seed, label]).permutation(len(pairs))
    return pairs[order[index % len(pairs)]], (0.5, 0.5)


def dirichlet_of(seed: int, label: int, index: int, count: int) -> Mixture:
    """ChimeraLoRA's: all `count` of the class, with weights uniform over those that sum to 1."""
    weights = np.random.default_rng([seed, label, index]).dirichlet(np.ones(count))
    return range(count), weights.tolist()


class Mixtures:
    """The adapter of each image: `mixtures(label, index)`.

    Args:
        files: for each class the adapter files of its images.
        choose: `(label, index, count) -> Mixture`.
    """

    def __init__(self, files: Sequence[Sequence[Path]], choose: Callable[[int, int, int], Mixture]):
        self._files, self._choose = files, choose
        self._load = lru_cache(MOST_KEPT)(adapter_io.load)

    def __call__(self, label: int, index: int) -> AdapterState:
        own = self._files[label]
        which, weights = self._choose(label, index, len(own))
        return mix([self._load(own[i]) for i in which], weights)


class MixtureGenerator:
    """`Generator` with an adapter of each image's own, which `adapters` makes.

    `prompts` are the classes' texts.
    """

    def __init__(
        self,
        pipeline: StableDiffusion,
        prompts: Sequence[str],
        config: GenerateConfig,
        adapters: Callable[[int, int], AdapterState],
        *,
        seed: int,
        mesh: Mesh | None = None,
    ):
        # The surgery once, and the frozen arrays where they shall lie: what differs between images
        # are the adapters' values.
        model = attach(pipeline.networks, adapters(0, 0))
        if mesh is not None:
            graphdef, own, constants, frozen = nnx.split(model, Trainable, Constant, ...)
            model = nnx.merge(graphdef, own, constants, sharding.shard(frozen, mesh, Text.table))
            graphdef, state = nnx.split(pipeline.vae)
            vae = nnx.merge(graphdef, sharding.shard(state, mesh, sharding.VAE))
            pipeline = dataclasses.replace(pipeline, vae=vae)
        self._pipeline, self._prompts, self._config = pipeline, list(prompts), config
        self._adapters, self._seed, self._mesh, self._model = adapters, seed, mesh, model
        self._fill = jax.jit(jax.vmap(lambda state: nnx.state(load_state(model, state), Trainable)))

    def draw(
        self,
        keys: Key[Array, " b"],
        labels: Int[np.ndarray, " b"],
        indices: Int[np.ndarray, " b"],
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """Images number `indices` of classes `labels`, at most a batch of them."""
        count = len(labels)
        # One program for a last batch of fewer.
        filled = np.resize(np.arange(count), self._config.batch_size)
        states = [self._adapters(int(labels[i]), int(indices[i])) for i in range(count)]
        own = self._fill(stack([states[i] for i in filled]))
        generator = Generator(
            self._pipeline,
            [self._prompts[labels[i]] for i in filled],
            self._config,
            seed=self._seed,
            model=self._model,
            factors=own,
            mesh=self._mesh,
        )
        return generator.draw(keys, np.arange(count, dtype=np.int32), indices)
