"""Stages that make sets of images and views of them, for the methods that compare such sets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsynth.adapters.inject import merge
from jaxsynth.adapters.registry import attach
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import file_digest, file_digests_cached, json_digest, write_json
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.decode import square
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompt_banks import PromptBank
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.sources.captioned import Captions
from jaxsynth.data.splits import load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset
from jaxsynth.generation.generate import (
    GenerateConfig,
    Generator,
    drawn_bytes,
    fill_store,
    merges,
)
from jaxsynth.generation.mixtures import MixtureGenerator, Mixtures, dirichlet_of, pair_of
from jaxsynth.generation.pictures import Pictures
from jaxsynth.generation.sampler import image_keys
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.quality.features import clip_features
from jaxsynth.quality.filters import FilterConfig, kept, nearest_shot, shot_shares
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.clip_predictions import class_features, embed, predict
from jaxsynth.training.sharding import local_mesh
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import Clip, StableDiffusion

KEPT_FILE, SHOTS_FILE = "kept.json", "shots.json"


@dataclass(frozen=True)
class Generating:
    """How a set's images are drawn.

    Args:
        image_size: their side in pixels, 0 the base's own.
        strength: that of the noise on the real images with which they begin, where they do.
        mixture: one of `MIXTURES`, where each class has an adapter for each of its shots.
    """

    generate: GenerateConfig
    seed: int
    dtype: str
    image_size: int = 0
    strength: float | None = None
    mixture: str = ""


# Which sum of a class's adapters an image is drawn with.
MIXTURES = {"loft": pair_of, "chimera": dirichlet_of}


def shot_folder(number: int) -> str:
    """Where the adapter of a class's shot lies in the class's folder."""
    return f"{number:04d}"


def with_adapter(base: StableDiffusion, adapter: Artifact | None) -> StableDiffusion:
    """The base with an adapter of all classes in its weights, the base itself for None.

    UserError where the adapter cannot be merged without loss.
    """
    if adapter is None:
        return base
    (file,) = adapter_io.find(adapter.path, ())
    model = attach(base.networks, adapter_io.load(file))
    check_merges(base, model)
    return base.with_networks(merge(model))


def check_merges(base: StableDiffusion, model: TextToImage) -> None:
    """UserError for an adapter that other adapters cannot learn on top of."""
    if not merges(base, model):
        raise UserError(
            "modes: 'stacked' merges the data set's adapter into the base's weights, which needs "
            "dtype float32 and a kind of adapter that can be merged; change one of them, or leave "
            "'stacked' out"
        )


def _image_bytes(config: Generating, *, data: Dataset, base: StableDiffusion, **_: object) -> int:
    side = base.sized(config.image_size).image_size
    return drawn_bytes(data.num_classes, config.generate, side)


@stage(processes="all", space=_image_bytes)
def generate_images(
    work: Work,
    config: Generating,
    *,
    data: Dataset,
    base: StableDiffusion,
    adapter: Artifact | None = None,
    under: Artifact | None = None,
    bank: PromptBank | None = None,
    shots: Artifact | None = None,
    captions: Captions | None = None,
) -> dict:
    """A store of images of every class; each process fills its share of the shards.

    Args:
        adapter: one adapter, or without a bank one for each class, or for each shot of it.
        under: an adapter of all classes that `adapter` was trained on top of.
        bank: where each image's prompt is chosen from, in place of its class's one.
        shots: the real images of its class that images begin with, in turn (SDEdit).
        captions: what the shots show; an image has that of another shot of its class (DISEF).
    """
    base, states, digests = with_adapter(base.sized(config.image_size), under), None, []
    prompts = class_prompts(data) if bank is None else bank.texts
    mixtures = None
    if adapter is not None and config.mixture:
        files = [_shot_files(adapter.path / safe_name(name)) for name in data.class_names]
        mixtures = Mixtures(files, partial(MIXTURES[config.mixture], config.seed))
        digests = [json_digest(file_digests_cached(own)) for own in files]
    elif adapter is not None:
        own = [safe_name(name) for name in data.class_names] if bank is None else []
        files = adapter_io.find(adapter.path, own)
        loaded = [adapter_io.load(file) for file in files]
        states = loaded if len(files) > 1 else loaded[0]
        digests = [file_digest(file) for file in files]
    pictures, choose = None, _chooser(config.seed, bank)
    if shots is not None:
        real = load_shots(shots.path / SHOTS_FILE).train_source(data)
        images, labels = _by_class(real, data, base.image_size), np.asarray(real.labels)
        if captions is not None:
            own = captions.of(real)
            order = np.argsort(labels, kind="stable")
            prompts, choose = tuple(own[i] for i in order), _of_another(labels)
            images = [images[label] for label in labels[order]]
        pictures = Pictures(images, strength=config.strength)
    if mixtures is not None:
        generator: Generator | MixtureGenerator = MixtureGenerator(
            base, prompts, config.generate, mixtures, seed=config.seed, mesh=local_mesh()
        )
    else:
        generator = Generator(
            base, prompts, config.generate, seed=config.seed, adapters=states, pictures=pictures,
            mesh=local_mesh(),
        )  # fmt: skip

    def draw(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        chosen = [choose(*map(int, pair)) for pair in zip(labels, indices, strict=True)]
        # By class and number, so that a picture's noise is the same whatever it is drawn from.
        keys = image_keys(config.seed, labels.astype(np.int32), indices.astype(np.int32))
        return generator.draw(keys, np.array(chosen, np.int32), indices.astype(np.int32))

    count = fill_store(
        draw, work.folder, data.class_names, lambda *pair: prompts[choose(*pair)], config.generate,
        seed=config.seed, adapter_digests=digests, description="generate",
    )  # fmt: skip
    return {"images": count, "prompts": len(prompts), "devices": jax.device_count()}


def _shot_files(folder: Path) -> list[Path]:
    """The adapters of a class's shots, in their order."""
    count = sum(1 for _ in folder.iterdir())
    return adapter_io.find(folder, [shot_folder(i) for i in range(count)])


def _chooser(seed: int, bank: PromptBank | None) -> Callable[[int, int], int]:
    """Which prompt image `index` of class `label` is drawn from."""
    return (lambda label, _: label) if bank is None else partial(bank.choose, seed)


def _of_another(labels: np.ndarray) -> Callable[[int, int], int]:
    """Prompts are of the shots, class by class: of n the image takes its picture's neighbor's, from
    the n-th image on that of the next, so that pictures meet all captions but their own."""
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts

    def choose(label: int, index: int) -> int:
        turn, place = divmod(index, int(counts[label]))
        others = max(int(counts[label]) - 1, 1)
        return int(starts[label] + (place + 1 + turn % others) % counts[label])

    return choose


def _by_class(real: ImageSource, data: Dataset, size: int) -> list[np.ndarray]:
    """The images of each class as squares (n, size, size, 3)."""
    labels = np.asarray(real.labels)
    return [
        np.stack([square(real[int(i)].image, size) for i in np.flatnonzero(labels == label)])
        for label in range(data.num_classes)
    ]


@dataclass(frozen=True)
class Filtering:
    """Which of a set's images are kept. Filters that look at real images see the first `shots` of
    each class."""

    keep: FilterConfig
    shots: int = 0


@stage()
def filter_images(
    work: Work,
    config: Filtering,
    *,
    data: Dataset,
    clip: Clip,
    images: Artifact,
    shots: Artifact | None = None,
) -> dict:
    """The places of the images that stay in their store."""
    store, keep = ImageStore(images.path), config.keep
    extractor, labels = clip_features(clip), np.asarray(store.labels)
    features, near = extractor.of_source(store), None
    if keep.needs_shots:
        assert shots is not None
        real = first_shots(shots, data, config.shots)
        known, known_labels = extractor.of_source(real), np.asarray(real.labels)
        near, _ = nearest_shot(features, labels, known, known_labels)
    if keep.judge == "shots":
        shares = shot_shares(features, known, known_labels, data.num_classes)
    else:
        logits = predict(clip, clip.model, class_prompts(data), store, mesh=local_mesh())
        shares = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    places, counts = kept(shares, features, labels, keep, near)
    write_json(work.folder / KEPT_FILE, places.tolist())
    return {"kept": len(places), **counts}


def first_shots(shots: Artifact, data: Dataset, count: int) -> Subset:
    """The first `count` of each class of the shots that a stage drew."""
    drawn = load_shots(shots.path / SHOTS_FILE)
    return replace(drawn, train=tuple(ids[:count] for ids in drawn.train)).train_source(data)


@dataclass(frozen=True)
class Retrieving:
    """How photos are chosen for the classes: so many of each, the nearest to its texts or shots.

    They are cut to squares of `size` pixels, as images that are generated are.
    """

    query: str
    generate: GenerateConfig
    size: int


def _retrieved_bytes(config: Retrieving, *, data: Dataset, **_: object) -> int:
    return drawn_bytes(data.num_classes, config.generate, config.size)


@stage(processes="all", space=_retrieved_bytes)
def retrieve_images(
    work: Work,
    config: Retrieving,
    *,
    data: Dataset,
    clip: Clip,
    shots: Artifact,
    pool: ImageSource | None = None,
) -> dict:
    """A store of real photos for every class, chosen from a pool without looking at labels.

    The rival that generated images have to beat (Geng et al. 2024, arXiv 2406.05184). Without a
    pool it is the training images of the data set that are no shots. A photo may serve several
    classes, as nothing says which is its own.
    """
    drawn = load_shots(shots.path / SHOTS_FILE)
    if pool is None:
        seen = {id_ for lists in (drawn.train, drawn.val) for ids in lists for id_ in ids}
        ids = data.train.ids
        pool = Subset(data.train, [i for i in range(len(ids)) if ids[i] not in seen])
    count = config.generate.images_per_class
    if len(pool) < count:
        raise UserError(
            f"pool: {len(pool)} photos, but {count} are asked for of each class "
            "(generate.images_per_class)"
        )
    if config.query == "texts":
        ids = jnp.asarray(clip.tokenizer(list(class_prompts(data))))
        queries = np.asarray(class_features(clip.model, ids))
    else:
        real = drawn.train_source(data)
        known, labels = embed(clip, clip.model, real), np.asarray(real.labels)
        queries = np.stack([known[labels == c].mean(0) for c in range(data.num_classes)])
    cosines = embed(clip, clip.model, pool) @ queries.T
    chosen = np.argsort(-cosines, axis=0, kind="stable")[:count]

    def draw(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        places = chosen[indices, labels]
        return np.stack([square(pool[int(i)].image, config.size) for i in places])

    total = fill_store(
        draw, work.folder, data.class_names, lambda *pair: pool.ids[chosen[pair[1], pair[0]]],
        replace(config.generate, guidance_scale=0.0), seed=0, description="retrieve",
    )  # fmt: skip
    return {"images": total, "pool": len(pool), "photos": len(np.unique(chosen))}
