"""How alike images are to photos and to texts, by the cosine of features.

DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, section 4.1) measures subject fidelity as the mean
cosine between the features of generated and of real images over all pairs (CLIP-I), and prompt
fidelity as that between an image and its prompt (CLIP-T). Means of values from one network compare
with each other alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from jaxsynth.weights.hf import Clip


def mean_cosine(
    features: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"]
) -> Float32[np.ndarray, " n"]:
    """Of each row its cosine with all of `others`, averaged over them."""
    return _unit(features) @ _unit(others).mean(0)


def paired_cosine(
    features: Float[np.ndarray, "n d"], others: Float[np.ndarray, "n d"]
) -> Float32[np.ndarray, " n"]:
    """Of each row its cosine with that row of `others`."""
    return (_unit(features) * _unit(others)).sum(1)


def text_features(clip: Clip, texts: tuple[str, ...]) -> Float32[np.ndarray, "n d"]:
    """CLIP's projected features of texts, not normalised."""
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda model, ids: model.encode_text(ids))(
            clip.model, jnp.asarray(clip.tokenizer(texts))
        )
    return np.asarray(found, np.float32)


def class_spread(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
    """How diverse images of a class are: sqrt(mean |f - m|^2), averaged over classes.

    f are features of length 1, m their mean over the class: 0 where all are alike, up to 1.
    """
    unit, found = _unit(features), []
    for label in np.unique(labels):
        own = unit[labels == label]
        found.append(np.sqrt(np.square(own - own.mean(0)).sum(1).mean()))
    return float(np.mean(found))


def _unit(features: np.ndarray) -> np.ndarray:
    values = np.asarray(features, np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)
