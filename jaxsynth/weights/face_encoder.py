"""What sees faces: embeddings of a face recognition network, precomputed or made here.

InstantID was trained with ArcFace (Deng et al. 2019, arXiv 1801.07698): 512 numbers of a face that
is cut out by its five keypoints, not normalized. Such a network comes as an ONNX file
(antelopev2's glintr100.onnx), which ONNX Runtime runs (`pip install 'jaxsynth[faces]'`); any other
encoder needs no more than `FaceEncoder`. A vision transformer of this package sees faces as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from jaxsynth.core.arrays import read_array, read_arrays
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import file_digest
from jaxsynth.data.decode import square
from jaxsynth.models.classifiers.vit import ViTForImageClassification
from jaxsynth.weights.networks.classifiers import Classifier, load_classifier

# Where ArcFace has the keypoints, (x, y) in a picture of 112 pixels.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
     [70.7299, 92.2041]]
)  # fmt: skip
_SIDE = 112
_BATCH = 64


class FaceEncoder(Protocol):
    """An embedding of the face in each image, whose five keypoints (x, y) are given."""

    @property
    def width(self) -> int: ...
    @property
    def digest(self) -> str: ...

    def __call__(
        self,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        keypoints: Float[np.ndarray, "n 5 2"],
    ) -> Float[np.ndarray, "n d"]: ...


@dataclass(frozen=True)
class OnnxFaceEncoder:
    """ArcFace in an ONNX file: of a face of `side` pixels in [-1, 1], channels first."""

    session: Any
    width: int
    side: int
    digest: str

    def __call__(
        self,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        keypoints: Float[np.ndarray, "n 5 2"],
    ) -> Float[np.ndarray, "n d"]:
        """The embeddings, one face at a time."""
        name, found = self.session.get_inputs()[0].name, []
        for image, points in zip(images, keypoints, strict=True):
            face = aligned(image, points, self.side)
            pixels = (face.astype(np.float32) - 127.5) / 127.5
            (row,) = self.session.run(None, {name: np.moveaxis(pixels, -1, 0)[None]})[0]
            found.append(row)
        return np.asarray(found, np.float32)


@dataclass(frozen=True)
class ClassifierFaceEncoder:
    """The class token of a vision transformer that tells people apart, of whole pictures."""

    classifier: Classifier

    @property
    def width(self) -> int:
        return self.classifier.model.config.hidden_size

    @property
    def digest(self) -> str:
        return self.classifier.digest

    def __call__(
        self,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        keypoints: Float[np.ndarray, "n 5 2"],
    ) -> Float[np.ndarray, "n d"]:
        """The embeddings; where the keypoints are is not looked at."""
        made = self.classifier.preprocessing
        found = []
        for start in range(0, len(images), _BATCH):
            part = [square(image, made.image_size) for image in images[start : start + _BATCH]]
            pixels = np.zeros((_BATCH, *part[0].shape), np.float32)
            pixels[: len(part)] = (np.stack(part) / 255 - made.mean) / made.std
            with jax.default_matmul_precision("highest"):
                rows = _class_tokens(self.classifier.model, pixels)
            found.append(np.asarray(rows, np.float32)[: len(part)])
        return np.concatenate(found)


@jax.jit
def _class_tokens(model: ViTForImageClassification, pixels: Array) -> Array:
    return model.tokens(pixels)[:, 0]


def load_face_encoder(source: str | Path) -> FaceEncoder:
    """The encoder of an ONNX file, or of a vision transformer's folder; UserError for others."""
    source = Path(source)
    if not source.is_dir():
        return load_onnx_encoder(source)
    classifier = load_classifier(source)
    if not isinstance(classifier.model, ViTForImageClassification):
        raise UserError(
            f"{source}: a {classifier.model.config.model_type}, expected a vision transformer "
            "that tells people apart (vit), or the file of an ONNX encoder"
        )
    return ClassifierFaceEncoder(classifier)


def load_onnx_encoder(path: str | Path) -> OnnxFaceEncoder:
    """The encoder of an ONNX file; UserError where it is none, or ONNX Runtime is not installed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a face encoder (.onnx)")
    try:
        import onnxruntime  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError(
            f"{path}: a face encoder needs ONNX Runtime: pip install 'jaxsynth[faces]' ({error}); "
            "or give embeddings that were made elsewhere (.npy, .npz)"
        ) from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many types for damaged files
        raise UserError(f"{path}: cannot be read as ONNX ({type(error).__name__})") from None
    reads, makes = session.get_inputs()[0].shape, session.get_outputs()[0].shape
    sides = [side for side in reads[2:] if isinstance(side, int)]
    square = len(reads) == 4 and reads[1] == 3 and len(set(sides)) < 2
    if not square or len(makes) != 2 or not isinstance(makes[1], int):
        raise UserError(
            f"{path}: reads {reads} and makes {makes}, expected a face encoder of (n, 3, side, "
            "side) and (n, width)"
        )
    return OnnxFaceEncoder(session, makes[1], sides[0] if sides else _SIDE, file_digest(path))


def aligned(
    image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "5 2"], side: int = _SIDE
) -> UInt8[np.ndarray, "s s 3"]:
    """The face cut out as ArcFace sees it: turned, moved and sized to `TEMPLATE`, bilinear.

    The similarity has the least squares of distances (Umeyama 1991). UserError for keypoints that
    no face has, such as five times the same.
    """
    target = TEMPLATE * side / _SIDE
    centre, mean = target.mean(0), points.mean(0)
    # As complex numbers a similarity is a product: target - centre = factor * (points - mean).
    ours, theirs = (x @ np.array([1, 1j]) for x in (points - mean, target - centre))
    factor = np.vdot(ours, theirs) / max(float(np.vdot(ours, ours).real), 1e-12)
    if abs(factor) < 1e-6:
        raise UserError(f"keypoints: no face has its points like {points.tolist()}")
    # Back, from pixels of the face to those of the image.
    a, b = (1 / factor).real, (1 / factor).imag
    matrix = (a, -b, mean[0] - a * centre[0] + b * centre[1],
              b, a, mean[1] - b * centre[0] - a * centre[1])  # fmt: skip
    # Pillow's coordinates are those of pixels' corners.
    corner = (
        matrix[0], matrix[1], matrix[2] + 0.5 - 0.5 * (matrix[0] + matrix[1]),
        matrix[3], matrix[4], matrix[5] + 0.5 - 0.5 * (matrix[3] + matrix[4]),
    )  # fmt: skip
    cut = Image.fromarray(image).transform(
        (side, side), Image.Transform.AFFINE, corner, Image.Resampling.BILINEAR
    )
    return np.array(cut)


def read_embeddings(path: str | Path) -> Float[np.ndarray, "n d"]:
    """Embeddings of one face, a row for each picture of it, from an .npy or .npz ("embeddings").

    UserError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix == ".npz":
        values = read_arrays(path, ("embeddings",))["embeddings"]
    elif path.suffix == ".npy":
        values = read_array(path)
    else:
        raise UserError(f"{path}: expected embeddings of a face (.npy, .npz)")
    if values.ndim == 1:
        values = values[None]
    if values.ndim != 2 or not values.size or not np.issubdtype(values.dtype, np.floating):
        raise UserError(
            f"{path}: embeddings of {values.dtype} {values.shape}, expected floats (n, width)"
        )
    if not np.isfinite(values).all():
        raise UserError(f"{path}: embeddings are not finite")
    return values.astype(np.float32)
