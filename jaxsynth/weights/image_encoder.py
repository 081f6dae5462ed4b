"""The CLIP that sees the images of prompts, and what it makes of them.

An image tower with its projection, from a whole CLIP's folder or from one that holds the tower
alone, as IP-Adapter's files come with (`image_encoder/`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8

from jaxsynth.core.documents import read_json, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.data.pipeline.augment import EvalTransform
from jaxsynth.models.clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from jaxsynth.weights import hub
from jaxsynth.weights.hf import Clip, describe_clip, load_clip
from jaxsynth.weights.models import describe, load_model

_TOWER = "clip_vision_model"
_CLIP_ALONE = "images as prompts are seen by a CLIP, here and in IP-Adapter's files"
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """A CLIP's image tower and projection, and how its images are prepared."""

    model: CLIPModel | CLIPVisionModelWithProjection
    transform: EvalTransform
    digest: str = ""

    @property
    def vision(self) -> CLIPVisionConfig:
        config = self.model.config
        return config if isinstance(config, CLIPVisionConfig) else config.vision_config

    def features(self, of_patches: bool) -> int:
        """Numbers of the projected feature, or of the state of each patch."""
        if of_patches:
            return self.vision.hidden_size
        return self.model.visual_projection.kernel.get_value().shape[-1]

    def shape(self, of_patches: bool) -> tuple[int, ...]:
        """The shape of the features of one image."""
        width = self.features(of_patches)
        return (self.vision.num_patches + 1, width) if of_patches else (width,)

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], *, of_patches: bool
    ) -> Float[np.ndarray, "n ..."]:
        """(n, f) projected features, or (n, patches + 1, f) states before the last layer.

        The first row is that of no image, n being one more than images: zeros for the projected
        feature, and for the states those of an image of zeros, as IP-Adapter takes them.
        """
        shape = (self.transform.size,) * 2 + (3,)
        found = []
        for start in range(0, len(images) + 1, _BATCH):
            padded = np.zeros((_BATCH, *shape), np.float32)
            end = min(_BATCH, len(images) + 1 - start)
            for row in range(end):
                if start + row:
                    padded[row] = self.transform(images[start + row - 1])
            with jax.default_matmul_precision("highest"):
                made = _encode(self.model, padded, of_patches)
            found.append(np.asarray(made, np.float32)[:end])
        rows = np.concatenate(found)
        if not of_patches:
            rows[0] = 0
        return rows


@jax.jit(static_argnames="of_patches")
def _encode(model, pixels, of_patches: bool) -> jax.Array:
    seen = model.vision_model(pixels)
    return seen.hidden_states[-2] if of_patches else model.visual_projection(seen.pooled)


def describe_image_encoder(name_or_path: str) -> ImageEncoder:
    """An encoder of shapes, from its config alone: no weights are read."""
    folder = _folder(hub.resolve(name_or_path, weights=False))
    if _kind(folder) == "clip":
        return encoder_of(describe_clip(folder))
    config = CLIPVisionConfig.from_dict(read_json(folder / "config.json"))
    model = describe(CLIPVisionModelWithProjection, config)
    return ImageEncoder(model, EvalTransform(config.image_size))


def encoder_of(clip: Clip) -> ImageEncoder:
    """The image tower of a CLIP; UserError for a SigLIP, which no IP-Adapter reads."""
    if not isinstance(clip.model, CLIPModel):
        raise UserError(f"{clip.folder}: a SigLIP, expected a CLIP: {_CLIP_ALONE}")
    return ImageEncoder(clip.model, clip.transform, clip.digest)


def load_image_encoder(name_or_path: str) -> ImageEncoder:
    """From the folder of a CLIP or of its image tower (or `image_encoder` in it), or the hub.

    UserError naming the folder and what it holds instead.
    """
    folder = _folder(hub.resolve(name_or_path))
    if _kind(folder) == "clip":
        return encoder_of(load_clip(folder))
    model = load_model(CLIPVisionModelWithProjection, CLIPVisionConfig, folder)
    path = folder / "preprocessor_config.json"
    settings = read_json(path, optional=True)
    mean, std = (
        take(settings, name, tuple[float, float, float], path, default)
        for name, default in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD))
    )
    digest = hub.digest(hub.weight_files(folder), sorted(folder.glob("*.json")))
    return ImageEncoder(model, EvalTransform(model.config.image_size, mean, std), digest)


def _folder(folder: Path) -> Path:
    inner = folder / "image_encoder"
    return inner if (inner / "config.json").is_file() else folder


def _kind(folder: Path) -> str:
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", _TOWER):
        why = f": {_CLIP_ALONE}" if str(kind).startswith("siglip") else ""
        raise UserError(
            f"{folder / 'config.json'}: model_type {quoted(kind)}, expected clip or {_TOWER}{why}"
        )
    return kind
