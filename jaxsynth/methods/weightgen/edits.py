"""Where a run's pairs of images come from: procedural edits, or a diffusion model for editing.

Procedural edits cost nothing and are made when asked for. A diffusion model takes many evaluations
for each image, so what it made stays on disk, a file for each concept and set of photos, under the
digest of all that decides it: a run that goes on finds it there.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from jaxsynth.core.io import replacing
from jaxsynth.data.procedural.concepts import Concept
from jaxsynth.generation.edited import EditConfig, edit_images
from jaxsynth.weights.hf import StableDiffusion, load_pipeline

KINDS = ("procedural", "diffusion")


@dataclass(frozen=True)
class EditsConfig:
    """`kind` "diffusion" edits by an InstructPix2Pix folder or hub id `model`, as `how` says."""

    kind: Literal["procedural", "diffusion"] = "procedural"
    model: str = ""
    how: EditConfig = field(default_factory=EditConfig)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"edits.kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if (self.kind == "diffusion") != bool(self.model):
            raise ValueError(
                f"edits.model is {self.model!r}: expected a folder or hub id where edits.kind is "
                "'diffusion', and none otherwise"
            )


class Edits:
    """Photos as concepts change them; `folder` keeps what a diffusion model made."""

    def __init__(self, config: EditsConfig, folder: Path, *, seed: int):
        self.config, self.folder, self.seed = config, folder, seed

    @cached_property
    def pipeline(self) -> StableDiffusion:
        """The diffusion model."""
        return load_pipeline(self.config.model, editing=True)

    @property
    def identity(self) -> dict[str, Any]:
        """What a stage that reads edited photos has to say about them."""
        digest = self.pipeline.digest if self.config.kind == "diffusion" else ""
        return {**dataclasses.asdict(self.config), "digest": digest}

    def __call__(
        self, concept: Concept, photos: UInt8[np.ndarray, "n h w 3"]
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """The photos after the concept's edit.

        UserError where the concept has no procedural edit, or the model does not fit the photos.
        """
        if self.config.kind == "procedural":
            return concept.apply(photos)
        path = self.folder / f"{self._name(concept, photos)}.npy"
        if path.is_file():
            return np.load(path)
        prompts = [concept.prompt] * len(photos)
        made = edit_images(self.pipeline, photos, prompts, self.config.how, seed=self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, made)
        return made

    def _name(self, concept: Concept, photos: np.ndarray) -> str:
        said = json.dumps([self.identity, concept.prompt, self.seed, photos.shape], sort_keys=True)
        return hashlib.sha256(said.encode() + photos.tobytes()).hexdigest()[:32]
