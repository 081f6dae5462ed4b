"""How alike images are to photos and to texts, by the cosine of features.

DreamBooth (Ruiz et al. 2023, arXiv 2208.12242, section 4.1) measures subject fidelity as the mean
cosine between the features of generated and of real images over all pairs (CLIP-I), and prompt
fidelity as that between an image and its prompt (CLIP-T). Means of values from one network compare
with each other alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

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


def _unit(features: np.ndarray) -> np.ndarray:
    values = np.asarray(features, np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)
