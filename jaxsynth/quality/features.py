"""The networks in whose features images are compared, and files of precomputed statistics.

A figure means nothing without the network that made it and the way its images were resized (Parmar
et al. 2022, arXiv 2104.11222), so both are part of an extractor's identity, and results carry it.
CLIP's image tower is the default, since one is shipped; InceptionV3 gives the published FIDs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

from jaxsynth.core.arrays import read_arrays
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import replacing
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.batches import eval_batches
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.models.classifiers import inception
from jaxsynth.quality.metrics import Statistics
from jaxsynth.weights.hf import Clip, load_clip
from jaxsynth.weights.networks.inception import load_inception

# How an image comes to Inception's 299 x 299 (see `inception_transform`).
RESIZES = ("tensorflow", "pytorch", "clean")


@dataclass(frozen=True)
class FeatureExtractor:
    """A network with its preprocessing: uint8 images of any size in, float32 features out.

    `digest` is the sha256 of its weights. `transform(image (h, w, 3), None)` prepares one image on
    the host, `forward` is compiled for batches of `batch_size`, which do not change the features.
    """

    name: str
    digest: str
    preprocessing: str
    dimensions: int
    transform: Callable[[np.ndarray, None], np.ndarray]
    forward: Callable[[Array], Array]
    batch_size: int

    @property
    def identity(self) -> dict[str, Any]:
        """What a figure has to say about the network that made it; equal only if comparable."""
        return {
            "network": self.name,
            "digest": self.digest,
            "preprocessing": self.preprocessing,
            "dimensions": self.dimensions,
        }

    @property
    def label(self) -> str:
        """The identity in one line, for files of statistics."""
        return f"{self.name} ({self.preprocessing}) {self.digest}"

    def features(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n d"]:
        """Features of images in memory."""
        ids = tuple(map(str, range(len(images))))
        return self.of_source(ArraySource(images, np.zeros(len(images), np.int32), ids))

    def of_source(self, source: ImageSource) -> Float32[np.ndarray, "n d"]:
        """Features of every image of a source, in its order; images may differ in size.

        UserError naming the image whose features are not finite.
        """
        found = np.empty((len(source), self.dimensions), np.float32)
        for batch in eval_batches(source, self.batch_size, self.transform):
            values, valid = np.asarray(self.forward(jnp.asarray(batch["image"]))), batch["valid"]
            found[batch["index"][valid]] = values[valid]
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            image = source.ids[int(np.argmin(finite))]
            raise UserError(f"{self.name}: the features of image {image!r} are not finite")
        return found


def clip_extractor(
    name_or_path: str | os.PathLike = "tiny/clip", *, batch_size: int = 64
) -> FeatureExtractor:
    """Projected image embeddings of a CLIP folder, not normalised, as clean-fid's CLIP-FID.

    Images are prepared as for the classifier: short side (bicubic), centre, CLIP's mean and std;
    of a SigLIP both sides, without a crop.
    """
    path = Path(name_or_path).expanduser()
    name = path.resolve().name if path.is_dir() else os.fspath(name_or_path)
    return clip_features(load_clip(name_or_path), name=name, batch_size=batch_size)


def clip_features(clip: Clip, *, name: str = "", batch_size: int = 64) -> FeatureExtractor:
    """`clip_extractor` of a CLIP that is loaded."""
    size = clip.image_size
    cut = f"both sides to {size} {clip.interpolation}"
    return FeatureExtractor(
        name=f"CLIP {name}".strip(),
        digest=clip.digest,
        preprocessing=cut if clip.squash else f"short side to {size} bicubic, centre",
        dimensions=clip.model.config.projection_dim,
        transform=clip.transform,
        forward=_compile(clip.model, lambda model, pixels: model.encode_image(pixels)),
        batch_size=batch_size,
    )


def inception_extractor(
    path: str | os.PathLike, *, resize: str = "tensorflow", batch_size: int = 64
) -> FeatureExtractor:
    """The last pooling of InceptionV3 (2048), from the weights at `path` (see `load_inception`).

    `resize` is the protocol: "tensorflow" (the original; the ADM and DiT evaluations, reference
    batches and torch-fidelity), "pytorch" (pytorch-fid) or "clean" (clean-fid).
    """
    if resize not in RESIZES:
        raise UserError(f"resize: {resize!r}, expected one of {', '.join(RESIZES)}")
    model, digest = load_inception(path)
    return FeatureExtractor(
        name="InceptionV3",
        digest=digest,
        preprocessing=f"{resize} resize to {inception.IMAGE_SIZE}",
        dimensions=inception.FEATURES,
        transform=partial(inception_transform, resize=resize),
        forward=_compile(model, lambda model, pixels: model(pixels)),
        batch_size=batch_size,
    )


def _compile(
    model: nnx.Module, apply: Callable[[Any, Array], Array]
) -> Callable[[Array], Float[Array, "b d"]]:
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, pixels: apply(nnx.merge(graphdef, state), pixels))

    def forward(pixels: Array) -> Array:
        # Else TPUs and recent GPUs round products to 8 or 10 bits, and figures depend on the chip.
        with jax.default_matmul_precision("highest"):
            return compiled(state, pixels)

    return forward


def inception_transform(
    image: UInt8[np.ndarray, "h w 3"],
    rng: None = None,
    *,
    resize: str = "tensorflow",
    size: int = inception.IMAGE_SIZE,
) -> Float32[np.ndarray, "size size 3"]:
    """An image in [-1, 1], stretched to a square, in one of the three ways in use.

    "tensorflow": bilinear between the pixels around `i * h / size` (no half-pixel centres, as in
    TensorFlow 1), then (x - 128) / 128. "pytorch": bilinear around `(i + 1/2) * h / size - 1/2`,
    then 2 x / 255 - 1. "clean": PIL's bicubic in float, which averages when it shrinks as neither
    of the others does, clipped to 0..255, then (x - 128) / 128.
    """
    if resize == "clean":
        channels = [
            Image.fromarray(image[..., c].astype(np.float32)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
            for c in range(3)
        ]
        pixels = np.clip(np.stack([np.asarray(c) for c in channels], axis=-1), 0, 255)
    else:
        centred = resize == "pytorch"
        pixels = _interpolate(image.astype(np.float32), size, 0, centred)
        pixels = _interpolate(pixels, size, 1, centred)
    return pixels / np.float32(127.5) - 1 if resize == "pytorch" else (pixels - 128) / 128


def _interpolate(x: np.ndarray, size: int, axis: int, centred: bool) -> np.ndarray:
    """Linear interpolation along an axis, without averaging; edges repeat."""
    length = x.shape[axis]
    half = 0.5 if centred else 0.0
    place = np.clip((np.arange(size) + half) * (length / size) - half, 0, length - 1)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, length - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    weight = (place - below).astype(np.float32).reshape(shape)
    low = x.take(below, axis)
    return low + (x.take(above, axis) - low) * weight


def write_statistics(path: str | os.PathLike, statistics: Statistics) -> None:
    """An .npz of `mu` and `sigma`, as pytorch-fid and the ADM evaluations read, and our own
    `count` and `network`."""
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: expected a name ending in .npz")
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mu,
            sigma=statistics.sigma,
            count=np.int64(statistics.count),
            network=np.str_(statistics.network),
        )


def read_statistics(
    path: str | os.PathLike, extractor: FeatureExtractor | None = None
) -> Statistics:
    """`mu` and `sigma` of an .npz: ours, pytorch-fid's, or a reference batch of ADM or DiT.

    UserError for a file that is cut short, lacks a key, holds pickled objects, or whose network or
    dimensions are known and are not the extractor's. Foreign files do not say their network.
    """
    path = Path(path)
    arrays = read_arrays(path, ("mu", "sigma"), optional=("count", "network"))
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape}, expected (d,) and (d, d)")
    for name in ("mu", "sigma"):
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name}: expected finite floats, found {arrays[name].dtype}")
    count, network = arrays.get("count", np.int64(0)), arrays.get("network", np.str_(""))
    for name, found, kinds in (("count", count, "iu"), ("network", network, "U")):
        if found.ndim or found.dtype.kind not in kinds:
            raise UserError(f"{path}: {name}: {found.dtype} {found.shape}, expected a single one")
    network = str(network)
    if extractor is not None:
        if network and network != extractor.label:
            raise UserError(f"{path}: made by {network}, but images go to {extractor.label}")
        if len(mu) != extractor.dimensions:
            raise UserError(
                f"{path}: {len(mu)} dimensions, but {extractor.name} has {extractor.dimensions}"
            )
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), int(count), network)


def read_images(path: str | os.PathLike) -> ArraySource:
    """The images of an .npz of samples (ADM, DiT): `arr_0` uint8 (n, h, w, 3), labels in `arr_1`.

    Without `arr_1` all labels are 0.
    """
    path = Path(path)
    arrays = read_arrays(path, ("arr_0",), optional=("arr_1",))
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"{path}: arr_0: {images.dtype} {images.shape}, expected uint8 (n, h, w, 3)"
        )
    labels = arrays.get("arr_1", np.zeros(len(images), np.int32))
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: arr_1: {labels.dtype} {labels.shape}, expected {len(images)} integer labels"
        )
    ids = tuple(f"{path.name}/{i}" for i in range(len(images)))
    return ArraySource(images, labels.astype(np.int32), ids)
