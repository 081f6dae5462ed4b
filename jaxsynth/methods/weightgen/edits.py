"""Where a run's pairs of images come from: procedural edits, or a diffusion model for editing.

Procedural edits cost nothing and are made when asked for. A diffusion model takes many evaluations
for each image, so its images are a stage's files, one for each concept and set of photos: a run
that was killed finds the finished ones there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from jaxsynth.core.arrays import read_array
from jaxsynth.core.io import replacing
from jaxsynth.core.places import MaybePipeline
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.procedural.concepts import Concept
from jaxsynth.generation.edited import EditConfig, edit_images
from jaxsynth.weights.hf import StableDiffusion

KINDS = ("procedural", "diffusion")
# Concepts whose edited photos are kept in memory.
_KEPT = 256

Photos = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class EditsConfig:
    """`kind` "diffusion" edits by an InstructPix2Pix folder or hub id `model`, as `how` says."""

    kind: Literal["procedural", "diffusion"] = "procedural"
    model: MaybePipeline = ""
    how: EditConfig = field(default_factory=EditConfig)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"edits.kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if (self.kind == "diffusion") != bool(self.model):
            raise ValueError(
                f"edits.model is {self.model!r}: expected a folder or hub id where edits.kind is "
                "'diffusion', and none otherwise"
            )
        if self.kind == "procedural" and self.how != EditConfig():
            raise ValueError("edits.how: procedural edits have no settings")


@dataclass(frozen=True)
class Scene:
    """Which photos are seen and which concepts change them.

    `photos` of a data set's training part to learn from and `held_out` ones of its test part to
    measure on are drawn by `seed`. The concepts are numbers `first` and up of all that a run has.
    """

    concepts: tuple[Concept, ...]
    first: int
    photos: int
    held_out: int
    seed: int

    @property
    def rows(self) -> range:
        """The concepts' numbers."""
        return range(self.first, self.first + len(self.concepts))

    @property
    def prompts(self) -> list[str]:
        return [concept.prompt for concept in self.concepts]


def draw_photos(data: Dataset, scene: Scene) -> dict[str, Photos]:
    """The "photos" and the "held_out" ones. ValueError where the data set has too few."""
    rng, found = np.random.default_rng(scene.seed), {}
    for name, source, count in (
        ("photos", data.train, scene.photos),
        ("held_out", data.test, scene.held_out),
    ):
        if count > len(source):
            raise ValueError(f"{name}: {count} asked for, the data set has {len(source)}")
        order = rng.permutation(len(source))[:count]
        found[name] = np.stack([source[int(i)].image for i in order])
    return found


def write_edits(
    folder: Path, scene: Scene, data: Dataset, model: StableDiffusion, how: EditConfig
) -> None:
    """The edits of every concept by a diffusion model, as files that `Edits` reads."""
    for name, photos in draw_photos(data, scene).items():
        for row, concept in zip(scene.rows, scene.concepts, strict=True):
            path = _file(folder, name, row)
            if path.is_file():
                continue
            prompts = [concept.prompt] * len(photos)
            made = edit_images(model, photos, prompts, how, seed=scene.seed)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, made)


class Edits:
    """A scene's photos as its concepts change them; made or read when asked for.

    `folder` holds what `write_edits` wrote; without it the concepts' own edits are procedural.
    """

    def __init__(self, scene: Scene, data: Dataset, folder: Path | None = None):
        self.scene, self.folder = scene, folder
        self.photos = draw_photos(data, scene)
        self._edited = lru_cache(maxsize=_KEPT)(self._edit)

    def __call__(self, rows: Sequence[int], name: str) -> UInt8[np.ndarray, "c n h w 3"]:
        """The "photos" or "held_out" ones after the edits of these concepts.

        UserError where a concept has no procedural edit.
        """
        return np.stack([self._edited(row, name) for row in rows])

    def _edit(self, row: int, name: str) -> Photos:
        if self.folder is not None:
            return read_array(_file(self.folder, name, row))
        return self.scene.concepts[row - self.scene.first].apply(self.photos[name])


def _file(folder: Path, name: str, row: int) -> Path:
    return folder / f"{name}-{row:05d}.npy"
