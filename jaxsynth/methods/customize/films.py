"""The stages of what learns motion: animations are drawn, and their motion is measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxsynth.core.io import file_digest, replacing
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.decode import square
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.captioned import captions
from jaxsynth.data.sources.clips import clip_at, window
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset
from jaxsynth.generation.animations import (
    Motion,
    at_once,
    frame_keys,
    from_strips,
    on_linear_schedule,
    to_strips,
)
from jaxsynth.generation.generate import GenerateConfig, Generator, drawn_bytes, fill_store
from jaxsynth.generation.sampler import image_keys
from jaxsynth.methods.customize.motion import load_motion
from jaxsynth.methods.customize.shots import shots_of
from jaxsynth.models.diffusion.motion import MotionModules
from jaxsynth.quality.features import FeatureExtractor, clip_features
from jaxsynth.quality.motion import frame_consistency, frame_difference, frame_shift
from jaxsynth.quality.similarity import paired_cosine, text_features
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.motion import starts
from jaxsynth.training.sharding import local_mesh
from jaxsynth.weights.hf import Clip, StableDiffusion

FIGURES, STRIPS = "figures.npz", "strips.png"
# Clips of the data that are measured, and those of each kind that are shown.
MOST_CLIPS, SHOWN = 64, 3


@dataclass(frozen=True)
class Animating:
    """Which animations are drawn: of the base, of given modules, or of what was learned."""

    prompts: tuple[str, ...]
    generate: GenerateConfig
    seed: int
    dtype: str
    frames: int
    norm: str
    image_size: int = 0


def _strip_bytes(config: Animating, *, base: StableDiffusion, **_: Any) -> int:
    side = base.sized(config.image_size).image_size
    return drawn_bytes(len(config.prompts), config.generate, side, config.frames * side)


@stage(processes="all", space=_strip_bytes)
def animate(
    work: Work,
    config: Animating,
    *,
    base: StableDiffusion,
    modules: MotionModules | None = None,
    learned: Artifact | None = None,
) -> dict:
    """A store of strips, the frames of each animation side by side, of every prompt.

    Without motion modules each frame is an image of its own; noise is the same with and without.
    """
    base, digests = base.sized(config.image_size), []
    if learned is not None:
        modules = load_motion(learned.path, base, modules)
        digests = [file_digest(learned.path / learned.counts["file"])]
    draw, batch = _drawing(base, modules, config)
    generate = replace(config.generate, batch_size=batch)
    count = fill_store(
        lambda labels, numbers: to_strips(draw(labels, numbers)),
        work.folder, config.prompts, config.prompts, generate, seed=config.seed,
        adapter_digests=digests, description="draw",
    )  # fmt: skip
    return {"animations": count}


def _drawing(
    base: StableDiffusion, modules: MotionModules | None, config: Animating
) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], int]:
    """What draws animations by classes and numbers, and how many at once."""
    frames, mesh = config.frames, local_mesh()
    batch = at_once(config.generate.batch_size, frames, mesh)
    generate = replace(config.generate, batch_size=batch * frames)
    motion = None
    if modules is None:
        base = on_linear_schedule(base)
    else:
        motion = Motion(modules, frames, joint_norm=config.norm == "all")
    generator = Generator(
        base, config.prompts, generate, seed=config.seed, motion=motion, mesh=mesh
    )
    if motion is not None:
        return generator, batch

    def draw(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        keys = frame_keys(image_keys(config.seed, labels, numbers), frames)
        images = generator.draw(keys, np.repeat(labels, frames), np.repeat(numbers, frames))
        return images.reshape(-1, frames, *images.shape[1:])

    return draw, batch


@dataclass(frozen=True)
class Filming:
    """Which clips of the data animations are compared with: windows as they are learned."""

    prompts: tuple[str, ...]
    frames: int
    stride: int
    shots: int
    seed: int


@stage(format=1)
def measure_motion(
    work: Work,
    config: Filming,
    *,
    data: Dataset,
    clip: Clip,
    untouched: Artifact,
    drawn: Artifact,
) -> dict:
    """How held-out clips move, and animations before and after; strips of them.

    Of each clip: how much neighbouring frames differ, how alike they are to CLIP, the prompt, the
    shift of a frame in pixels, and of this the part along the mean shift of the clips learned from.
    """
    extractor = clip_features(clip)
    stores = {"base": ImageStore(untouched.path), "custom": ImageStore(drawn.path)}
    clips = {name: _animations(store, config.frames) for name, store in stores.items()}
    side = clips["base"].shape[2]
    held_out = some(data.test)
    clips["clips"] = windows_of(held_out, config.frames, config.stride, side)
    shots = some(shots_of(data, config.shots, config.seed))
    learned = windows_of(shots, config.frames, config.stride, side)
    way = frame_shift(learned).mean(0)
    away = way / max(float(np.linalg.norm(way)), 1e-6)
    texts = {name: [config.prompts[i] for i in store.labels] for name, store in stores.items()}
    texts["clips"] = captions(data, held_out)
    found: dict[str, Float[np.ndarray, "..."]] = {"way": way}
    for name, own in clips.items():
        shift = frame_shift(own)
        figures = {
            "difference": frame_difference(own),
            "speed": np.linalg.norm(shift, axis=1),
            "along": shift @ away,
            **_seen(extractor, clip, own, texts[name]),
        }
        found |= {f"{name}_{key}": values for key, values in figures.items()}
    with replacing(work.folder / FIGURES) as path, path.open("wb") as file:
        np.savez(file, **found)
    _strips(work, learned, clips, stores, config.prompts)
    means = {key: float(x.mean()) for key, x in found.items() if key != "way"}
    return means | {"way": [round(float(x), 4) for x in way]}


def _animations(store: ImageStore, frames: int) -> UInt8[np.ndarray, "n f h w 3"]:
    return from_strips(np.stack([record.image for record in store]), frames)


def some(source: ImageSource) -> ImageSource:
    """At most so many clips as are measured, spread evenly."""
    count = min(len(source), MOST_CLIPS)
    return Subset(source, np.linspace(0, len(source) - 1, count).round().astype(int))


def windows_of(
    source: ImageSource, frames: int, stride: int, side: int
) -> UInt8[np.ndarray, "n f h w 3"]:
    """The middle window of each clip, as squares of so many pixels."""
    found = []
    for i in range(len(source)):
        clip, place = clip_at(source, i)
        (start,) = starts(clip.lengths[place] - window(0, frames, stride)[-1] - 1, 1)
        rows = clip.frames(place, window(start, frames, stride))
        found.append(np.stack([square(frame, side) for frame in rows]))
    return np.stack(found)


def _seen(
    extractor: FeatureExtractor, clip: Clip, clips: UInt8[np.ndarray, "n f h w 3"], texts: list[str]
) -> dict[str, Float[np.ndarray, " n"]]:
    count, frames = clips.shape[:2]
    flat = clips.reshape(-1, *clips.shape[2:])
    source = ArraySource(flat, np.zeros(len(flat), np.int32), [str(i) for i in range(len(flat))])
    features = extractor.of_source(source)
    told = np.repeat(text_features(clip, tuple(texts)), frames, axis=0)
    return {
        "consistency": frame_consistency(features.reshape(count, frames, -1)),
        "prompt": paired_cosine(features, told).reshape(count, frames).mean(1),
    }


def _strips(work: Work, learned: np.ndarray, clips, stores, prompts: tuple[str, ...]) -> None:
    """Clips learned from and held out, and of each prompt animations before and after."""
    first = np.linspace(0, len(learned) - 1, min(SHOWN, len(learned))).round().astype(int)
    rows = [*learned[first], *clips["clips"][:1]]
    labels = ["learned from"] * (len(rows) - 1) + ["held out"]
    for label, prompt in enumerate(prompts):
        for name, store in stores.items():
            own = np.flatnonzero(np.asarray(store.labels) == label)[:SHOWN]
            rows += list(clips[name][own])
            title = "before" if name == "base" else "after"
            labels += [f"{prompt}, {title}"] * len(own)
    write_grid(work.folder / STRIPS, [list(row) for row in rows], labels)
