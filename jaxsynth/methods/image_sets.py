"""Stages that make sets of images and views of them, for the methods that compare such sets."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import file_digest, write_json
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.decode import square
from jaxsynth.data.prompt_banks import PromptBank
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.splits import load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset
from jaxsynth.generation.generate import GenerateConfig, Generator, drawn_bytes, fill_store
from jaxsynth.generation.pictures import Pictures
from jaxsynth.generation.sampler import image_keys
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
    """How a source's images are drawn; `image_size` is their side in pixels, 0 the base's own."""

    generate: GenerateConfig
    seed: int
    dtype: str
    image_size: int = 0


def _image_bytes(
    config: "Generating | Varying", *, data: Dataset, base: StableDiffusion, **_: object
) -> int:
    side = base.sized(config.image_size).image_size
    return drawn_bytes(data.num_classes, config.generate, side)


@stage(processes="all", space=_image_bytes)
def generate_images(
    work: Work,
    config: Generating,
    *,
    data: Dataset,
    base: StableDiffusion,
    bank: PromptBank,
    adapter: Artifact | None = None,
) -> dict:
    """A store of images of every class, each with the sentence that it was drawn from."""
    state: AdapterState | None = None
    digests = []
    if adapter is not None:
        (file,) = adapter_io.find(adapter.path, ())
        state, digests = adapter_io.load(file), [file_digest(file)]
    generator = Generator(
        base.sized(config.image_size), bank.texts, config.generate, seed=config.seed,
        adapters=state, mesh=local_mesh(),
    )  # fmt: skip

    def choose(label: int, index: int) -> int:
        return bank.choose(config.seed, label, index)

    def draw(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        chosen = np.array([choose(*map(int, pair)) for pair in zip(labels, indices, strict=True)])
        # By class and number, so that a picture's noise is the same whatever it is drawn from.
        keys = image_keys(config.seed, labels.astype(np.int32), indices.astype(np.int32))
        return generator.draw(keys, chosen.astype(np.int32), indices.astype(np.int32))

    count = fill_store(
        draw, work.folder, data.class_names, lambda *pair: bank.texts[choose(*pair)],
        config.generate, seed=config.seed, adapter_digests=digests, description="generate",
    )  # fmt: skip
    return {"images": count, "prompts": len(bank.texts), "devices": jax.device_count()}


@dataclass(frozen=True)
class Varying:
    """How images are drawn that begin with real ones, with noise of `strength` on them."""

    generate: GenerateConfig
    strength: float
    seed: int
    dtype: str
    image_size: int = 0


@stage(processes="all", space=_image_bytes)
def vary_images(
    work: Work, config: Varying, *, data: Dataset, base: StableDiffusion, shots: Artifact
) -> dict:
    """A store of images of every class that begin with its shots, in turn (SDEdit)."""
    base = base.sized(config.image_size)
    real = load_shots(shots.path / SHOTS_FILE).train_source(data)
    labels, prompts = np.asarray(real.labels), class_prompts(data)
    images = [
        np.stack(
            [square(real[int(i)].image, base.image_size) for i in np.flatnonzero(labels == label)]
        )
        for label in range(data.num_classes)
    ]
    generator = Generator(
        base, prompts, config.generate, seed=config.seed,
        pictures=Pictures(images, strength=config.strength), mesh=local_mesh(),
    )  # fmt: skip
    count = fill_store(
        generator, work.folder, data.class_names, prompts, config.generate, seed=config.seed,
        description="generate",
    )  # fmt: skip
    return {"images": count, "strength": config.strength}


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
