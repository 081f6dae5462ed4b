"""Stages of generated weights: edits, the base, LoRAs, generators, ablation, comparison.

`run` says in which order. A small image editor (E2GAN) learns a few concepts by their texts and is
frozen. Many concepts get a LoRA around it, all trained together from one shared start, and a
diffusion model learns to make such LoRAs from texts.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters.flatten import Layout, canonical
from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.core.records import to_json
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.procedural.concepts import Concept, LanguageServer, ask_concepts, save_concepts
from jaxsynth.generation.edited import EditConfig
from jaxsynth.methods.weightgen.collection import (
    WeightCollection,
    read_collection,
    write_collection,
)
from jaxsynth.methods.weightgen.comparison import compare, ways
from jaxsynth.methods.weightgen.config import Variant
from jaxsynth.methods.weightgen.editors import Adapter, Editors, Networks, Scratch
from jaxsynth.methods.weightgen.edits import Edits, Scene, write_edits
from jaxsynth.methods.weightgen.generator import (
    Baselines,
    TextReader,
    WeightGenerator,
    fitted,
    load_generator,
    save_generator,
    train_generator,
)
from jaxsynth.methods.weightgen.scores import unexplained
from jaxsynth.models.diffusion.weight_unet import WeightUNet
from jaxsynth.runs.stage import TIMES, Artifact, Work, stage
from jaxsynth.tasks.gan import GANConfig
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.hf import StableDiffusion

CONCEPTS, COLLECTION = "concepts.json", "collection.safetensors"
ABLATION, COMPARISON = "ablation.json", "comparison.json"
# Before the names of generators among a stage's inputs.
GENERATOR = "generator "


@dataclass(frozen=True)
class Asking:
    """Which concepts a language model is asked for, `each` of every family."""

    model: str
    families: tuple[str, ...]
    each: int
    seed: int


@stage()
def ask_server(work: Work, config: Asking, *, server: str) -> dict:
    """Concepts that a language model names; it is asked once only."""
    asked = LanguageServer(server, config.model)
    found: list[Concept] = []
    for family in config.families:
        found += ask_concepts(asked, family, config.each, seed=config.seed)
    save_concepts(work.folder / CONCEPTS, found)
    return {"concepts": len(found)}


@dataclass(frozen=True)
class Editing:
    """Photos that a diffusion model edits."""

    scene: Scene
    how: EditConfig


def _edit_bytes(config: Editing, *, data: Dataset, model: StableDiffusion) -> int:
    scene, side = config.scene, data.train[0].image.shape[0]
    return len(scene.concepts) * (scene.photos + scene.held_out) * 3 * side * side


@stage(space=_edit_bytes)
def edit_photos(work: Work, config: Editing, *, data: Dataset, model: StableDiffusion) -> dict:
    """The photos of every concept after its edit."""
    write_edits(work.folder, config.scene, data, model, config.how)
    return {"concepts": len(config.scene.concepts)}


@dataclass(frozen=True)
class BaseTraining:
    """The editor, trained by text on the scene's concepts."""

    scene: Scene
    networks: Networks
    train: GANConfig


def _editor_bytes(config: BaseTraining, *, text: StableDiffusion, **_: Any) -> int:
    networks, key = _networks(config.networks, text), jax.random.key(0)
    makers = (networks.make_generator, networks.make_discriminator)
    models = [nnx.eval_shape(lambda make=make: mark_trainable(make(key))) for make in makers]
    return sum(training_bytes(model, config.train) for model in models)


@stage(processes="all", space=_editor_bytes)
def train_editor(
    work: Work,
    config: BaseTraining,
    *,
    data: Dataset,
    text: StableDiffusion,
    edited: Artifact | None = None,
) -> dict:
    """The editor's two networks."""
    editors = _editors(config.scene, config.networks, data, text, edited)
    return editors.train_base(
        work.folder, work.training, config.train, mesh=work.mesh, write=work.writes
    )


@dataclass(frozen=True)
class Collecting:
    """LoRAs of the scene's concepts around the base, from one start."""

    scene: Scene
    networks: Networks
    adapter: Adapter
    train: GANConfig
    checkpoints: int
    every: int
    group: int
    share: Literal["none", "words"]
    own: float


def _collection_bytes(config: Collecting, *, text: StableDiffusion, **_: Any) -> int:
    networks, key = _networks(config.networks, text), jax.random.key(0)
    lora = nnx.eval_shape(lambda: config.adapter.add(networks.make_generator(key), key))
    judge = nnx.eval_shape(lambda: mark_trainable(networks.make_discriminator(key)))
    count = len(config.scene.concepts)
    kept = 4 * count * config.checkpoints * config.adapter.layout(networks).num_values
    return (
        training_bytes(lora, config.train, count=count)
        + training_bytes(judge, config.train, count=count)
        + 2 * kept
    )


@stage(processes="all", space=_collection_bytes)
def collect_adapters(
    work: Work,
    config: Collecting,
    *,
    base: Artifact,
    data: Dataset,
    text: StableDiffusion,
    edited: Artifact | None = None,
) -> dict:
    """The LoRAs' last checkpoints, as blocks."""
    editors = _editors(
        config.scene, config.networks, data, text, edited, base=base, adapter=config.adapter
    )
    states = editors.train_together(
        work.training, config.train, keep=config.checkpoints, every=config.every,
        group=config.group, share=config.share, own=config.own, mesh=work.mesh,
    )  # fmt: skip
    if not work.writes:
        return {}
    layout, concepts = config.adapter.layout(editors.networks), config.scene.concepts
    texts = [concept.texts for concept in concepts]
    families = [concept.family for concept in concepts]
    found = WeightCollection.of(states, texts, families, layout, base.digest)
    write_collection(work.folder / COLLECTION, found)
    return {
        "concepts": len(concepts),
        "checkpoints": config.checkpoints,
        "blocks": layout.num_blocks,
        "values": layout.num_values,
        "l1": float(np.mean(editors.errors([own[-1] for own in states]))),
    }


@dataclass(frozen=True)
class GeneratorTraining:
    """One generator of weights; `networks` and `adapter` tell where weights lie in blocks."""

    variant: Variant
    networks: Networks
    adapter: Adapter
    seed: int


def _generator_bytes(config: GeneratorTraining, *, text: StableDiffusion, **_: Any) -> int:
    layout = _layout(config.adapter, config.networks, _reader(text))
    generator, width = config.variant.generator, text.text_encoder.config.hidden_size
    network = fitted(generator.network, layout, width)
    model = nnx.eval_shape(lambda: mark_trainable(WeightUNet(network, rngs=nnx.Rngs(0))))
    return training_bytes(model, generator.train)


@stage(processes="all", space=_generator_bytes)
def train_weights(
    work: Work,
    config: GeneratorTraining,
    *,
    base: Artifact,
    collection: Artifact,
    text: StableDiffusion,
) -> dict:
    """A denoiser of the collection's weights."""
    read, variant = _reader(text), config.variant
    layout = _layout(config.adapter, config.networks, read)
    baselines = _baselines(collection, layout, base, read, variant.canonical)
    made = train_generator(
        baselines.collection, read, variant.generator, work.training, seed=config.seed,
        baselines=baselines, mesh=work.mesh, description="generator",
    )  # fmt: skip
    if not work.writes:
        return {}
    save_generator(made, work.folder)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(made.model)),
        "features": baselines.features,
        "ridge_left_out": unexplained(baselines.left_out("ridge"), baselines),
    }


@dataclass(frozen=True)
class Ablation:
    """Every generator, and the plain predictors, on concepts that nothing else is measured on."""

    scene: Scene
    networks: Networks
    adapter: Adapter
    variants: Mapping[str, Variant]
    few_steps: int
    tune: GANConfig
    at: tuple[int, ...]
    pairs: int


@stage()
def ablate(
    work: Work,
    config: Ablation,
    *,
    base: Artifact,
    collection: Artifact,
    data: Dataset,
    text: StableDiffusion,
    edited: Artifact | None = None,
    **generators: Artifact,
) -> dict:
    """The mean L1 of each after so many steps; the generator with the least is chosen."""
    editors = _editors(
        config.scene, config.networks, data, text, edited, base=base, adapter=config.adapter
    )
    read, texts, found = _reader(text), config.scene.prompts, {}
    layout = config.adapter.layout(editors.networks)

    def judged(blocks: np.ndarray, replaced: float = 0.0) -> dict:
        states = [layout.from_blocks(jnp.asarray(own)) for own in blocks]
        curves = editors.tune(config.tune, states, config.at, pairs=config.pairs)
        return {"l1": curves.l1.mean(0), "replaced": replaced}

    plain = _baselines(collection, layout, base, read, "none")
    for kind in ("mean", "nearest", "ridge"):
        found[kind] = judged(plain.predict(kind, texts))
    for name, variant in config.variants.items():
        generator = _generator(
            generators[GENERATOR + name], variant, collection, layout, base, read
        )
        for label, how in ways(variant, config.few_steps).items():
            one = generator(texts, seed=config.scene.seed, **how)
            found[f"{name}, {label}"] = judged(one.blocks, float(one.replaced.mean()))
    own = {key: value for key, value in found.items() if ", " in key}
    chosen = min(own, key=lambda key: np.mean(own[key]["l1"]))
    table = {"steps": list(config.at), "variants": found, "chosen": chosen}
    write_json(work.folder / ABLATION, to_json(table))
    return {"chosen": chosen}


@dataclass(frozen=True)
class Comparison:
    """Unseen concepts from every kind of initial weights.

    `noise` is the standard deviation of the noise on the nearest concept's weights, relative to
    each weight's spread over the concepts.
    """

    scene: Scene
    networks: Networks
    adapter: Adapter
    variants: Mapping[str, Variant]
    few_steps: int
    tune: GANConfig
    at: tuple[int, ...]
    pairs: int
    scratch: Scratch
    noise: float


@stage(format=2)
def compare_weights(
    work: Work,
    config: Comparison,
    *,
    base: Artifact,
    collection: Artifact,
    ablation: Artifact,
    data: Dataset,
    text: StableDiffusion,
    edited: Artifact | None = None,
    **generators: Artifact,
) -> dict:
    """Curves of fine-tuning from the weights of the chosen generator and of all baselines."""
    editors = _editors(
        config.scene, config.networks, data, text, edited, base=base, adapter=config.adapter
    )
    read, layout = _reader(text), config.adapter.layout(editors.networks)
    table = read_json(ablation.path / ABLATION, finite=False)
    name = table["chosen"].rpartition(", ")[0]
    variant, chosen = config.variants[name], generators[GENERATOR + name]
    result, times = compare(
        work.folder, editors, layout, _generator(chosen, variant, collection, layout, base, read),
        _baselines(collection, layout, base, read, "none"), variant, tune=config.tune, at=config.at,
        pairs=config.pairs, scratch=config.scratch, few_steps=config.few_steps, noise=config.noise,
    )  # fmt: skip
    parts = {"base": base, "collection": collection, "generator": chosen}
    result |= {
        "ablation": table,
        "sizes": {**collection.counts, **chosen.counts},
    }
    write_json(work.folder / COMPARISON, to_json(result))
    # Seconds differ between two runs of the same, so they are no part of the artifact.
    costs = {key: one.manifest["seconds"] for key, one in parts.items()}
    write_json(work.folder / TIMES, {**times, "costs": costs})
    return {key: float(one["l1"][:, 0].mean()) for key, one in result["inits"].items()}


def _editors(
    scene: Scene,
    networks: Networks,
    data: Dataset,
    text: StableDiffusion,
    edited: Artifact | None,
    *,
    base: Artifact | None = None,
    adapter: Adapter | None = None,
) -> Editors:
    return Editors(
        networks,
        _reader(text),
        Edits(scene, data, None if edited is None else edited.path),
        base=None if base is None else base.path,
        adapter=adapter,
    )


def _reader(text: StableDiffusion) -> TextReader:
    return TextReader(text.text_encoder, text.tokenizer)


def _networks(networks: Networks, text: StableDiffusion) -> Networks:
    return networks.with_text(text.text_encoder.config.hidden_size)


def _layout(adapter: Adapter, networks: Networks, read: TextReader) -> Layout:
    return adapter.layout(networks.with_text(read.encoder.config.hidden_size))


def _baselines(
    collection: Artifact, layout: Layout, base: Artifact, read: TextReader, kind: str
) -> Baselines:
    """The plain predictors over the collection, in one choice of factors."""
    found = read_collection(collection.path / COLLECTION, layout, base.digest)
    return Baselines(found if kind == "none" else in_canonical(found, kind), read)


def in_canonical(found: WeightCollection, kind: str) -> WeightCollection:
    """The same LoRAs in other factors: by "svd", or "aligned" to the first concept's."""
    layout = found.layout
    first = layout.from_blocks(jnp.asarray(found.blocks[0, -1]))
    reference = canonical(first) if kind == "aligned" else None

    @jax.jit
    def turn(blocks):
        one = lambda x: layout.to_blocks(canonical(layout.from_blocks(x), reference))  # noqa: E731
        return jax.lax.map(one, blocks)

    flat = found.blocks.reshape(-1, *found.blocks.shape[2:])
    blocks = np.asarray(turn(jnp.asarray(flat))).reshape(found.blocks.shape)
    return dataclasses.replace(found, blocks=blocks)


def _generator(
    artifact: Artifact,
    variant: Variant,
    collection: Artifact,
    layout: Layout,
    base: Artifact,
    read: TextReader,
) -> WeightGenerator:
    baselines = _baselines(collection, layout, base, read, variant.canonical)
    return load_generator(artifact.path, baselines.collection, read, baselines=baselines)
