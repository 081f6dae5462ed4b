"""MixUp and CutMix of batches on the device, on soft labels.

Both blend each image with a neighbour in its batch (arXiv 1710.09412, 1905.04899). DataDream does
so to a batch with probability 0.2, one of the two at random, inside the real and the synthetic part
separately, so that the weights of the two losses keep their meaning.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def one_hot(
    labels: Int[Array, " b"], num_classes: int, smoothing: float = 0.0
) -> Float[Array, "b c"]:
    """float32 soft labels; `smoothing` spreads that much evenly over all classes."""
    hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return hot * (1 - smoothing) + smoothing / num_classes


def cutmix_mask(
    key: PRNGKeyArray, height: int, width: int, lam: Float[Array, ""]
) -> Float[Array, "h w"]:
    """0 inside a random box of area about 1 - lam (cut at the borders), 1 elsewhere."""
    key_y, key_x = jax.random.split(key)
    centre_y = jax.random.randint(key_y, (), 0, height)
    centre_x = jax.random.randint(key_x, (), 0, width)
    half = 0.5 * jnp.sqrt(1 - lam)
    half_y, half_x = (half * height).astype(jnp.int32), (half * width).astype(jnp.int32)
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
    inside_y = (y >= centre_y - half_y) & (y < centre_y + half_y)
    inside_x = (x >= centre_x - half_x) & (x < centre_x + half_x)
    return 1 - (inside_y & inside_x).astype(jnp.float32)


def _share(key: PRNGKeyArray, alpha: float) -> Float[Array, ""]:
    """A draw of Beta(alpha, alpha); the usual alpha of 1 is the uniform, far cheaper to compile."""
    return jax.random.uniform(key) if alpha == 1 else jax.random.beta(key, alpha, alpha)


def mix(
    key: PRNGKeyArray,
    images: Float[Array, "b h w c"],
    labels: Float[Array, "b k"],
    *,
    enabled: Bool[Array, ""] | bool = True,
    mixup_alpha: float = 1.0,
    cutmix_alpha: float = 1.0,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """MixUp or CutMix, one of them for the whole batch; unchanged where not `enabled`.

    The weight of an image is Beta(alpha, alpha), or for CutMix the area it keeps. An alpha of 0
    takes that one out of the choice. Labels are soft.
    """
    if mixup_alpha < 0 or cutmix_alpha < 0 or mixup_alpha + cutmix_alpha == 0:
        raise ValueError(
            f"mixup_alpha {mixup_alpha}, cutmix_alpha {cutmix_alpha}: expected 0 or more, one above"
        )
    height, width = images.shape[1:3]
    choice_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    weights = []  # (h, w): how much of each pixel stays
    if mixup_alpha:
        lam = _share(mixup_key, mixup_alpha)
        weights.append(jnp.broadcast_to(lam, (height, width)))
    if cutmix_alpha:
        lam = _share(cutmix_key, cutmix_alpha)
        weights.append(cutmix_mask(box_key, height, width, lam))
    weight = jnp.stack(weights)[jax.random.randint(choice_key, (), 0, len(weights))]
    # One weight map serves both, and a map of ones leaves the batch as it was.
    weight = jnp.where(enabled, weight, 1.0).astype(jnp.float32)
    pixels = weight[None, :, :, None].astype(images.dtype)
    kept = weight.mean()
    images = images * pixels + jnp.roll(images, 1, axis=0) * (1 - pixels)
    return images, labels * kept + jnp.roll(labels, 1, axis=0) * (1 - kept)


def mix_batch(
    key: PRNGKeyArray,
    images: Float[Array, "b h w c"],
    labels: Float[Array, "b k"],
    *,
    num_real: int = 0,
    probability: float = 0.2,
    mixup_alpha: float = 1.0,
    cutmix_alpha: float = 1.0,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """With `probability`, mix the batch: its first `num_real` images and the others apart."""
    if not 0 <= num_real <= len(images):
        raise ValueError(f"num_real {num_real}: expected 0 to {len(images)}")
    gate_key, *keys = jax.random.split(key, 3)
    enabled = jax.random.bernoulli(gate_key, probability)
    parts = []
    for part_key, part in zip(keys, (slice(0, num_real), slice(num_real, None)), strict=True):
        if len(images[part]):
            mixed = mix(
                part_key,
                images[part],
                labels[part],
                enabled=enabled,
                mixup_alpha=mixup_alpha,
                cutmix_alpha=cutmix_alpha,
            )
            parts.append(mixed)
    images, labels = (jnp.concatenate(values) for values in zip(*parts, strict=True))
    return images, labels
