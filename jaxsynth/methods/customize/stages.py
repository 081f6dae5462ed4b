"""The stages of a customisation run: drawing, learning, measuring. `run` says in which order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.console import console
from jaxsynth.core.io import file_digest, replacing, write_json
from jaxsynth.core.words import counted
from jaxsynth.data.conditions import as_fractions, source_conditions
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.decode import check_square
from jaxsynth.data.faces import Faces, keypoint_pictures
from jaxsynth.data.pipeline.buckets import Bucket, buckets_of
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.sources.captioned import captions
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.animations import to_strips
from jaxsynth.generation.generate import (
    GenerateConfig,
    Generator,
    drawn_bytes,
    fill_store,
    sample_images,
)
from jaxsynth.generation.image_prompts import ImagePrompt, prompt_of
from jaxsynth.methods.customize.faces import Judge, face_parts, faces_in
from jaxsynth.methods.customize.motion import learned_modules, motion_of, with_domain
from jaxsynth.methods.customize.shots import shots_of
from jaxsynth.methods.customize.techniques import (
    bucket_shapes,
    load,
    name_of,
    prepared,
    save,
    shapes_of,
    texts_of,
)
from jaxsynth.models.diffusion.identity import Identity, IdentityPrompted, identity_of
from jaxsynth.models.diffusion.image_prompt import adapter_of
from jaxsynth.models.diffusion.motion import MotionModules
from jaxsynth.models.diffusion.text_to_image import TextToImage, encode_texts
from jaxsynth.quality.errors import held_out_error
from jaxsynth.quality.features import clip_features
from jaxsynth.quality.similarity import mean_cosine, paired_cosine, text_features
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.customize import Training, customize_task
from jaxsynth.tasks.motion import ClipConfig
from jaxsynth.tasks.told import Told, encode_buckets, encode_told, places_of
from jaxsynth.training.sharding import local_mesh
from jaxsynth.training.space import training_bytes
from jaxsynth.training.trainer import train
from jaxsynth.weights.adapters.identities import read_identity
from jaxsynth.weights.adapters.image_prompts import read_image_adapter
from jaxsynth.weights.hf import Clip, StableDiffusion
from jaxsynth.weights.image_encoder import ImageEncoder

FIGURES = "figures.npz"
SHOWN = 6
# How images are drawn during a training.
SAMPLES = GenerateConfig(num_inference_steps=25)
# Of held-out images, for the error during a training.
MOST_HELD_OUT = 64


@dataclass(frozen=True)
class Drawing:
    """Which images are drawn: those of the base, or of what was learned from it."""

    prompts: tuple[str, ...]
    generate: GenerateConfig
    seed: int
    dtype: str
    references: int = 0
    image_size: int = 0

    @property
    def texts(self) -> list[str]:
        """The prompt of each class of images: each prompt for each image that prompts beside it."""
        return [text for text in self.prompts for _ in range(max(1, self.references))]


def _image_bytes(config: Drawing, *, base: StableDiffusion, **_: Any) -> int:
    side = base.sized(config.image_size).image_size
    return drawn_bytes(len(config.texts), config.generate, side)


@stage(processes="all", space=_image_bytes)
def draw(
    work: Work,
    config: Drawing,
    *,
    base: StableDiffusion,
    learned: Artifact | None = None,
    data: Dataset | None = None,
    encoder: ImageEncoder | None = None,
    faces: Artifact | Faces | None = None,
) -> dict:
    """A store of images of every prompt; each process fills its share of the shards.

    With `references` so many for each prompt, like each of those held-out images of `data` where
    something has learned to.
    """
    adapters, digests, names = None, [], list(config.texts)
    seen: dict[str, Any] = {}
    base = base.sized(config.image_size)
    if data is not None:
        ids = references_of(data, config.references).ids
        names = [f"{text}, like {ids[i % len(ids)]}" for i, text in enumerate(names)]
    if learned is not None:
        if faces is not None and data is not None:
            identity = read_identity(learned.path, base.unet)
            seen = _faces_of(base, data, identity, config.references, names, faces)
        elif encoder is not None and data is not None:
            seen = {"image_prompts": [_image_prompt(learned, config, base, data, encoder)]}
        else:
            base, adapters = load(learned.path, base)
        digests = [file_digest(learned.path / learned.counts["file"])]
    generator = Generator(
        base, config.texts, config.generate, seed=config.seed, adapters=adapters,
        mesh=local_mesh(), **seen,
    )  # fmt: skip
    count = fill_store(
        generator, work.folder, names, config.texts, config.generate, seed=config.seed,
        adapter_digests=digests, description="draw",
    )  # fmt: skip
    return {"images": count}


def _faces_of(
    base: StableDiffusion,
    data: Dataset,
    identity: Identity,
    references: int,
    texts: Sequence[str],
    faces: Artifact | Faces,
) -> dict[str, Any]:
    """The people of held-out images, one for each text in turns, for `Generator`."""
    source = references_of(data, references)
    prompt, control = face_parts(identity, source, faces_in(faces), len(texts), base.image_size)
    return {"image_prompts": [prompt], "controls": [control]}


def _image_prompt(
    learned: Artifact, config: Drawing, base: StableDiffusion, data: Dataset, encoder: ImageEncoder
) -> ImagePrompt:
    """The reference of each text, to a learned adapter."""
    adapter = read_image_adapter(learned.path, base.unet)
    source = references_of(data, config.references)
    images = [[source[i % len(source)].image] for i in range(len(config.texts))]
    return prompt_of(adapter, encoder, images)


def references_of(data: Dataset, count: int) -> ImageSource:
    """So many held-out images, spread evenly."""
    return Subset(data.test, np.linspace(0, len(data.test) - 1, count).round().astype(int))


@dataclass(frozen=True)
class Learning:
    """How a technique learns; `shots` images of each class, or all (0)."""

    training: Training
    word: str
    shots: int
    seed: int
    dtype: str
    image_size: int = 0


def _learned_bytes(
    config: Learning,
    *,
    base: StableDiffusion,
    encoder: ImageEncoder | None = None,
    faces: Artifact | Faces | None = None,
    modules: MotionModules | None = None,
    **_: Any,
) -> int:
    seen = encoder if faces is None else faces_in(faces)
    shapes = shapes_of(config.training, config.word, base, seen, modules)
    return training_bytes(shapes, config.training)


@stage(processes="all", space=_learned_bytes)
def learn(
    work: Work,
    config: Learning,
    *,
    data: Dataset,
    base: StableDiffusion,
    others: Artifact | None = None,
    encoder: ImageEncoder | None = None,
    faces: Artifact | Faces | None = None,
    masks: Path | None = None,
    modules: MotionModules | None = None,
    domain: AdapterState | None = None,
) -> dict:
    """What the technique learned, in one file. `others` are images of the subject's class.

    `encoder` sees images that prompt, `faces` are those in the images, `masks` are a folder of
    masks of the images, `modules` those that a LoRA is learned on, and `domain` an adapter that is
    in the base meanwhile.
    """
    training, crops = config.training, getattr(config.training, "crops_per_image", 1)
    clips = training if isinstance(training, ClipConfig) else None
    key, base = jax.random.key(config.seed), base.sized(config.image_size)
    known = None if faces is None else faces_in(faces)
    start = base if domain is None else with_domain(base, domain)
    pipeline, model = prepared(training, config.word, start, key, known or encoder, modules)
    source = shots_of(data, config.shots, config.seed)
    texts = texts_of(training, config.word, data, source, config.seed)
    shapes, buckets = bucket_shapes(training, base), []
    if shapes:
        buckets = buckets_of(source, shapes, training.buckets.most)
        shapes = [one.shape for one in buckets]
        _tell(buckets, training.batch_size)

    see = None
    if encoder is not None:
        see = partial(encoder, of_patches=getattr(training, "of_patches", False))

    def encoded(images: ImageSource, texts, buckets: Sequence[Bucket]) -> list[Told]:
        if buckets:
            return encode_buckets(pipeline, images, texts, buckets)
        told = encode_told(
            pipeline, images, texts, crops=crops, seed=config.seed, encoder=see, clips=clips
        )
        return [told if known is None else _with_faces(told, images, known, base.image_size)]

    images = encoded(source, texts, buckets)
    unmasked = getattr(training, "unmasked_weight", 1.0)
    if unmasked < 1:
        places = _places(base, source, unmasked, masks, buckets)
        images = [replace(one, places=own) for one, own in zip(images, places, strict=True)]
    prior = None
    if others is not None:
        store = ImageStore(others.path)
        (prompt,) = store.class_names
        # Those of the class keep the prior in every shape that the subject is learned in.
        every = [Bucket(*shape, np.arange(len(store))) for shape in shapes]
        prior = encoded(store, [(prompt,)] * len(store), every)
    evaluate = None
    if training.evaluate_every:
        held_out = Subset(data.test, np.arange(min(MOST_HELD_OUT, len(data.test))))
        into = buckets_of(held_out, shapes) if shapes else []
        told = encoded(held_out, texts_of(training, config.word, data, held_out), into)
        evaluate = _held_out(pipeline, told)
    if clips is None:
        name = name_of(training, config.word)
        sample = _sampler(pipeline, data, name, known or encoder)
    else:
        sample = _film_sampler(base, data, clips, modules)
    task = customize_task(
        pipeline, model, images, training, seed=config.seed, others=prior, evaluate=evaluate,
        sample=sample,
        identity={"base": base.digest},
    )  # fmt: skip
    sized = training.sized(len(source))
    model = train(task, sized, work.training, mesh=work.mesh, description="customize")
    counts: dict[str, Any] = {"images": len(source), "steps": sized.steps}
    if buckets:
        counts["buckets"] = {str(one): len(one.rows) for one in buckets}
    if not work.writes:
        return counts
    write_json(work.folder / "images.json", list(source.ids))
    return counts | {"file": save(work.folder, training, base, model, modules).name}


def _with_faces(told: Told, source: ImageSource, faces: Faces, size: int) -> Told:
    """The images with their faces: embeddings, zeros for none, and pictures of keypoints."""
    own = faces.of(source)
    embeddings = own.embeddings[:, None]
    pictures = keypoint_pictures(source, own.keypoints, size)
    return replace(told, images=embeddings, absent=np.zeros_like(embeddings[0]), condition=pictures)


def _places(
    base: StableDiffusion,
    source: ImageSource,
    unmasked: float,
    folder: Path | None,
    buckets: Sequence[Bucket],
) -> list[np.ndarray]:
    """How much each position of the latents counts, of the images of each bucket.

    Without buckets of all; UserError then for an image that is no square.
    """
    if not buckets:
        check_square(source, "masks")
    sets = [(Subset(source, one.rows), one.shape) for one in buckets]
    return [
        places_of(
            source_conditions(images, "mask", size, folder=folder),
            base.vae.config.downscale,
            unmasked,
        )
        for images, size in sets or [(source, base.image_size)]
    ]


def _tell(buckets: Sequence[Bucket], batch_size: int) -> None:
    few = sum(len(one.rows) < batch_size for one in buckets)
    shown = ", ".join(f"{one}: {counted(len(one.rows), 'image')}" for one in buckets)
    repeats = f"; {few} with fewer images than a batch, in which they come again" if few else ""
    console.print(
        f"{counted(len(buckets), 'bucket')}, each a program to compile: {shown}{repeats}",
        markup=False,
    )


def _held_out(
    pipeline: StableDiffusion, told: Sequence[Told]
) -> Callable[[TextToImage, int], Mapping[str, Any]]:
    """The error of the noise on images that are not learned from, each with its first text.

    Images of several shapes are a `Told` for each.
    """
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)

    def evaluate(model: TextToImage, step: int) -> Mapping[str, Any]:
        errors = [_error(model, schedule, one) for one in told]
        return {"held_out_error": float(np.average(errors, weights=list(map(len, told))))}

    return evaluate


def _error(model: TextToImage, schedule: NoiseSchedule, told: Told) -> float:
    texts = encode_texts(model, told.ids[told.first]).sized(told.sizes[:, 0])
    if told.images is not None:
        tokens = jax.jit(lambda part, x: part(x))(model.image_projections[0], told.images)
        texts = texts.followed_by(tokens)
    texts = jax.tree.map(np.asarray, texts)
    followed = told.condition

    def inputs(rows: np.ndarray) -> dict[str, np.ndarray]:
        more = {} if followed is None else {"condition": as_fractions(followed[rows])}
        return texts.take(rows).inputs() | more

    denoiser = model.unet if followed is None else model
    return held_out_error(denoiser, schedule, told.mean[:, 0], inputs, seed=0)


def _sampler(
    pipeline: StableDiffusion, data: Dataset, name: str, encoder: ImageEncoder | Faces | None
) -> Callable[[TextToImage], np.ndarray]:
    shown = [data.template.format(name)] if name else list(class_prompts(data))[:SHOWN]

    def sample(model: TextToImage) -> np.ndarray:
        if isinstance(model, IdentityPrompted) and isinstance(encoder, Faces):
            own = identity_of(model)
            seen = _faces_of(pipeline, data, own, len(shown), shown, encoder)
            return sample_images(pipeline, shown, SAMPLES, seed=0, **seen)[:, 0]
        if isinstance(encoder, ImageEncoder):
            source = references_of(data, len(shown))
            images = [[source[i].image] for i in range(len(shown))]
            prompts = [prompt_of(adapter_of(model), encoder, images)]
            return sample_images(pipeline, shown, SAMPLES, seed=0, image_prompts=prompts)[:, 0]
        return sample_images(pipeline, shown, SAMPLES, seed=0, model=model)[:, 0]

    return sample


def _film_sampler(
    base: StableDiffusion, data: Dataset, training: ClipConfig, modules: MotionModules | None
) -> Callable[[TextToImage], np.ndarray]:
    """Animations as strips of their frames."""
    shown = list(dict.fromkeys(captions(data, data.test)))[:SHOWN]

    def sample(model: TextToImage) -> np.ndarray:
        motion = motion_of(training, learned_modules(training, base, model, modules))
        return to_strips(sample_images(base, shown, SAMPLES, seed=0, motion=motion)[:, 0])

    return sample


@dataclass(frozen=True)
class Measuring:
    """Which prompts the drawn images are compared with: those of the base."""

    prompts: tuple[str, ...]
    shots: int
    seed: int
    references: int = 0


@stage(format=1)
def measure(
    work: Work,
    config: Measuring,
    *,
    data: Dataset,
    clip: Clip,
    untouched: Artifact,
    drawn: Artifact,
    judge: Artifact | None = None,
) -> dict:
    """Similarity of images before and after to photos that were not learned from; a grid.

    Where each image was to be like a reference, with that one, and with the next one ("others").
    Similarities are those of CLIP's features, or with a `judge` of its embeddings of faces.
    """
    extractor = clip_features(clip)
    seeing = extractor if judge is None else Judge(judge, data)
    learned = shots_of(data, config.shots, config.seed)
    photos = seeing.of_source(data.test)
    texts = text_features(clip, config.prompts)
    found: dict[str, Float[np.ndarray, " n"]] = {
        "photos": mean_cosine(seeing.of_source(learned), photos)
    }
    stores = {"base": ImageStore(untouched.path), "custom": ImageStore(drawn.path)}
    count = config.references
    references = references_of(data, count) if count else None
    for name, store in stores.items():
        labels = np.asarray(store.labels)
        features = clips = extractor.of_source(store)
        if judge is not None:
            features = seeing.of_source(store)
        if references is None:
            found[name] = mean_cosine(features, photos)
        else:
            seen = seeing.of_source(references)
            found[name] = paired_cosine(features, seen[labels % count])
            found[f"{name}_others"] = paired_cosine(features, seen[(labels + 1) % count])
        text = labels // max(1, count)
        found[f"{name}_prompt"] = paired_cosine(clips, texts[text])
    with replacing(work.folder / FIGURES) as path, path.open("wb") as file:
        np.savez(file, **found)
    if references is None:
        _grid(work, data, learned, stores, config.prompts)
    else:
        _reference_grid(work, references, stores, config.prompts)
    return {name: float(values.mean()) for name, values in found.items()}


def _grid(work: Work, data: Dataset, learned: ImageSource, stores, prompts) -> None:
    """Photos learned from and held out, and of each prompt the images before and after."""
    rows, labels = [], []
    for title, source in (("learned from", learned), ("held out", data.test)):
        rows.append([source[i].image for i in range(min(2 * SHOWN, len(source)))])
        labels.append(title)
    for label, prompt in enumerate(prompts):
        row = []
        for store in stores.values():
            own = np.flatnonzero(np.asarray(store.labels) == label)[:SHOWN]
            row += [store[int(i)].image for i in own]
            row += [None] * (SHOWN - len(own))
        rows.append(row)
        labels.append(prompt)
    headings = ["the base", *[""] * (SHOWN - 1), "customised", *[""] * (SHOWN - 1)]
    write_grid(work.folder / "images.png", rows, labels, headings=headings)


def _reference_grid(work: Work, references: ImageSource, stores, prompts) -> None:
    """The images that prompted, and of each prompt the first image of each before and after."""
    count = len(references)
    shown = range(min(2 * SHOWN, count))
    rows, labels = [[references[i].image for i in shown]], ["the image"]
    for number, prompt in enumerate(prompts):
        for name, store in stores.items():
            classes = np.asarray(store.labels)
            first = [np.flatnonzero(classes == number * count + i)[0] for i in shown]
            rows.append([store[int(i)].image for i in first])
            labels.append(f"{prompt}, {'the base' if name == 'base' else 'customised'}")
    write_grid(work.folder / "images.png", rows, labels, headings=[""] * len(shown))
