"""What a CLIP says of images: its logits by the classes' texts, and those of heads put on it.

Logits are cosine similarities between an image and the prompt of each class, times CLIP's logit
scale. Of a SigLIP they are the same: the bias that it adds to the logit of every pair is left out,
as a softmax over classes is the same with and without it. A network may have two parts more, which
are trained with it (`tasks.clip_classifier`):

- `class_head`: rows in the place of the classes' text features (2SFS, arXiv 2503.11609);
- `visual_head`: a linear classifier of the image tower's class token, whose probabilities are mixed
  with those by texts (ImagineFSL, CVPR 2025).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from jaxsynth.adapters.inject import Constant, Trainable, with_attributes
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.batches import eval_batches
from jaxsynth.data.prompts import check_template
from jaxsynth.models.siglip import TwoTowers
from jaxsynth.training import sharding
from jaxsynth.weights.hf import Clip

T = TypeVar("T")

# The shares of the visual head that validation images choose among.
SHARES = tuple(i / 10 for i in range(11))


class VisualHead(nnx.Module):
    """A linear classifier of the class token, which begins at 0, and its `share` in predictions."""

    def __init__(self, width: int, classes: int, share: float):
        self.kernel = Trainable(jnp.zeros((width, classes)))
        self.bias = Trainable(jnp.zeros(classes))
        self.share = Constant(jnp.float32(share))

    def __call__(self, token: Float[Array, "b d"]) -> Float[Array, "b c"]:
        token = token.astype(jnp.float32)
        return jnp.matmul(token, self.kernel[...], precision="highest") + self.bias[...]


class ClassHead(nnx.Module):
    """A row for each class, which image features are compared with."""

    def __init__(self, rows: Float[Array, "c p"]):
        self.rows = Trainable(rows)


def with_visual_head(model: TwoTowers, classes: int, share: float) -> TwoTowers:
    """A copy with a visual head that has learned nothing yet."""
    width = model.config.vision_config.hidden_size
    return with_attributes(model, visual_head=VisualHead(width, classes, share))


def with_class_head(model: TwoTowers, rows: Float[Array, "c p"]) -> TwoTowers:
    """A copy whose classes are told by these rows and no longer by texts."""
    return with_attributes(model, class_head=ClassHead(rows))


def has_visual_head(model: TwoTowers) -> bool:
    return getattr(model, "visual_head", None) is not None


def class_features(
    model: TwoTowers, ids: Int[Array, "c t"], *, remat: str | None = None
) -> Float[Array, "c p"]:
    """What images are compared with: the class head's rows, or the normalized texts' features."""
    if getattr(model, "class_head", None) is not None:
        return model.class_head.rows[...]
    return encode_text(model, ids, remat=remat)


# Compiled once for all evaluations of a training.
@partial(jax.jit, static_argnames="remat")
def encode_text(model: TwoTowers, ids: Array, *, remat: str | None = None) -> Array:
    """Normalized text features (c, p)."""
    text = model.encode_text(ids, remat=remat).astype(jnp.float32)
    return text / jnp.linalg.norm(text, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames="remat")
def head_logits(
    model: TwoTowers, text: Array, pixels: Array, *, remat: str | None = None
) -> tuple[Array, ...]:
    """The logits (b, c) by `class_features`, and those of the visual head where there is one."""
    token = model.vision_model(pixels, remat=remat).pooled
    image = model.project_image(token).astype(jnp.float32)
    image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
    # Logits are up to 100 times a cosine: the few bits that TPUs keep by default would show.
    cosines = jnp.matmul(image, text.T, precision="highest")
    by_text = jnp.exp(model.logit_scale[...].astype(jnp.float32)) * cosines
    if not has_visual_head(model):
        return (by_text,)
    return by_text, model.visual_head(token)


@jax.jit
def fuse(
    by_text: Float[Array, "b c"], visual: Float[Array, "b c"], share: Float[Array, ""]
) -> Float[Array, "b c"]:
    """The logarithm of the probabilities, `share` of them the visual head's."""
    return jnp.logaddexp(
        jnp.log1p(-share) + jax.nn.log_softmax(by_text),
        jnp.log(share) + jax.nn.log_softmax(visual),
    )


@jax.jit
def _compare(model: TwoTowers, text: Array, pixels: Array) -> Array:
    by_head = head_logits(model, text, pixels)
    return fuse(*by_head, model.visual_head.share[...]) if len(by_head) > 1 else by_head[0]


@jax.jit
def _both(model: TwoTowers, text: Array, pixels: Array) -> Array:
    return jnp.stack(head_logits(model, text, pixels), axis=1)


@jax.jit
def _embed(model: TwoTowers, text: None, pixels: Array) -> Array:
    return model.encode_image(pixels).astype(jnp.float32)


def predict(
    clip: Clip,
    model: TwoTowers,
    prompts: Sequence[str],
    source: ImageSource,
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "n c"]:
    """Logits of every image of `source`, in order; `model` is `clip.model` or an adapted copy.

    Of a model with a visual head they are logarithms of the mixed probabilities. Every process
    computes all of them, on its own devices: `mesh` is one of those only.
    """
    text = class_features(model, jnp.asarray(clip.tokenizer(list(prompts))))
    return _each(clip, model, text, _compare, source, batch_size, mesh)


def embed(
    clip: Clip, model: TwoTowers, source: ImageSource, *, batch_size: int = 64
) -> Float[np.ndarray, "n p"]:
    """Normalized image features of every image of `source`, in order."""
    found = _each(clip, model, None, _embed, source, batch_size, None)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def with_best_share(
    clip: Clip, model: TwoTowers, prompts: Sequence[str], source: ImageSource
) -> TwoTowers:
    """A copy whose visual head has the share that is most often right on `source`.

    Of equal ones the nearest to a half, which prefers neither head.
    """
    text = class_features(model, jnp.asarray(clip.tokenizer(list(prompts))))
    both = _each(clip, model, text, _both, source, 64, None)
    labels = np.asarray(source.labels)
    right = [
        (np.asarray(fuse(both[:, 0], both[:, 1], jnp.float32(x))).argmax(-1) == labels).mean()
        for x in SHARES
    ]
    return with_share(model, max(SHARES, key=lambda x: (right[SHARES.index(x)], -abs(x - 0.5))))


def with_share(model: TwoTowers, share: float) -> TwoTowers:
    """A copy whose visual head has another share."""
    head = with_attributes(model.visual_head, share=Constant(jnp.float32(share)))
    return with_attributes(model, visual_head=head)


def _each(
    clip: Clip,
    model: TwoTowers,
    text: Array | None,
    forward: Callable[[TwoTowers, Array | None, Array], Array],
    source: ImageSource,
    batch_size: int,
    mesh: Mesh | None,
) -> np.ndarray:
    """`forward(model, text, pixels)` of every image of `source`, in order."""
    put = jnp.asarray
    if mesh is not None:
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, sharding.replicate(state, mesh))
        text = sharding.replicate(text, mesh)
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        batch_size = -(-batch_size // parts) * parts
        put = partial(jax.device_put, device=NamedSharding(mesh, sharding.BATCH))
    out: np.ndarray | None = None
    for batch in eval_batches(source, batch_size, clip.transform):
        valid = batch["valid"]
        found = np.asarray(forward(model, text, put(batch["image"])))[valid]
        if out is None:
            out = np.zeros((len(source), *found.shape[1:]), np.float32)
        out[batch["index"][valid]] = found
    assert out is not None  # `eval_batches` refuses an empty source
    return out


def of_pixels(
    clip: Clip, model: TwoTowers, names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Partial:
    """A function of images (b, h, w, 3) in [0, 1], of the CLIP's size, to float32 logits (b, c).

    A class's text is the mean of its normalised embeddings in all `templates`, normalised again
    (Radford et al. 2021, section 3.1.4). The normalisation of pixels is inside; `model` is
    `clip.model` or an adapted copy, its weights arguments.
    """
    texts = [
        class_features(model, jnp.asarray(clip.tokenizer([each.format(x) for x in names])))
        for each in map(check_template, templates)
    ]
    text = sum(texts[1:], texts[0]) / len(texts)
    if len(texts) > 1:
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
    return Partial(_of_pixels, model, text, jnp.asarray(clip.mean), jnp.asarray(clip.std))


def _of_pixels(model: TwoTowers, text: Array, mean: Array, std: Array, images: Array) -> Array:
    return _compare(model, text, (images - mean) / std)


def scores(
    logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], class_names: Sequence[str]
) -> dict:
    """Top-1 over images, its mean over classes (macro), and each class's, as fractions."""
    right = logits.argmax(-1) == labels
    per_class = {
        name: float(right[labels == c].mean()) if (labels == c).any() else None
        for c, name in enumerate(class_names)
    }
    known = [value for value in per_class.values() if value is not None]
    return {
        "top1": float(right.mean()),
        "macro": float(np.mean(known)),
        "per_class": per_class,
        "images": len(labels),
    }
