"""The losses of synthetic clones, as functions of features.

- Multi-positive contrastive (StableRep, Tian et al. 2023, arXiv 2306.00984; SynCLR, Tian et al.
  2024, arXiv 2312.17742). Of SimCLR (Chen et al. 2020, arXiv 2002.05709) it is the case in which
  the positives are the views of one image.
- iBOT's patch loss with Sinkhorn-Knopp centring (Zhou et al. 2022, arXiv 2111.07832; Caron et al.
  2020, arXiv 2006.09882).
- Image and text: softmax (CLIP, arXiv 2103.00020) and sigmoid (SigLIP, arXiv 2303.15343), where
  pairs that share a caption are matches too.

Each is over a whole batch. On a mesh, rows lie over the devices and XLA gathers one side's
features, (batch, dim), and nothing larger; the scores (batch, batch) stay cut by rows. Float32
throughout.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# What stands in for a score that is left out: exp of it is 0 in float32.
_OUT = -1e9


def normalized(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Features of length 1, float32."""
    features = features.astype(jnp.float32)
    return features * jax.lax.rsqrt(jnp.square(features).sum(-1, keepdims=True) + 1e-12)


def multi_positive(
    queries: Float[Array, "n d"],
    keys: Float[Array, "m d"],
    query_ids: Int[Array, " n"],
    key_ids: Int[Array, " m"],
    *,
    temperature: float,
    left_out: Bool[Array, "n m"] | None = None,
) -> Float[Array, ""]:
    """-mean_i sum_j p_ij log softmax_j(q_i . k_j / t), p_i uniform over the keys of i's id.

    Features are normalized here. Pairs that are `left_out` (an image and itself) are neither
    positives nor in the softmax. Queries without a positive do not count.
    """
    scores = _products(normalized(queries), normalized(keys)) / temperature
    match = query_ids[:, None] == key_ids[None]
    if left_out is not None:
        scores = jnp.where(left_out, _OUT, scores)
        match = match & ~left_out
    count = match.sum(-1)
    target = match / jnp.maximum(count, 1)[:, None]
    each = -(target * jax.nn.log_softmax(scores, -1)).sum(-1)
    return each.sum() / jnp.maximum((count > 0).sum(), 1)


def sinkhorn(
    scores: Float[Array, "n k"],
    *,
    temperature: Float[Array, ""] | float,
    weights: Float[Array, " n"] | None = None,
    iterations: int = 3,
) -> Float[Array, "n k"]:
    """Assignments of rows to prototypes: each row sums to 1, each prototype gets as much.

    Alternately the columns of exp(scores / temperature) are made to sum to 1/k and the rows to 1/n.
    Rows of weight 0 take no part. In logarithms, so that nothing overflows.
    """
    logs = scores.astype(jnp.float32) / temperature
    taken = jnp.ones(len(scores), bool) if weights is None else weights > 0
    count = jnp.maximum(taken.sum(), 1)
    for _ in range(iterations):
        # Also between: normalizing a row that takes no part would bring it back.
        logs = jnp.where(taken[:, None], logs, _OUT)
        logs = logs - jax.nn.logsumexp(logs, 0, keepdims=True) - jnp.log(scores.shape[1])
        logs = logs - jax.nn.logsumexp(logs, 1, keepdims=True) - jnp.log(count)
    return jnp.exp(logs) * count * taken[:, None]


def patch_loss(
    student: Float[Array, "n k"],
    targets: Float[Array, "n k"],
    weights: Float[Array, " n"],
    *,
    temperature: float,
) -> Float[Array, ""]:
    """-sum_i w_i sum_k t_ik log softmax(student_i / temperature)_k / sum_i w_i."""
    logs = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, -1)
    each = -(targets * logs).sum(-1)
    return (weights * each).sum() / jnp.maximum(weights.sum(), 1)


def image_text(
    images: Float[Array, "n d"],
    texts: Float[Array, "n d"],
    ids: Int[Array, " n"],
    *,
    scale: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """Half the cross entropy from images to texts and half the reverse, of scale * cosines.

    Rows of one id match each other, uniformly; with distinct ids it is CLIP's loss.
    """
    return 0.5 * (
        multi_positive(images, texts, ids, ids, temperature=1 / scale)
        + multi_positive(texts, images, ids, ids, temperature=1 / scale)
    )


def image_text_sigmoid(
    images: Float[Array, "n d"],
    texts: Float[Array, "n d"],
    ids: Int[Array, " n"],
    *,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """-sum_ij log sigmoid(z_ij (scale * cos_ij + bias)) / n, z_ij 1 where ids match, else -1."""
    scores = scale * _products(normalized(images), normalized(texts)) + bias
    sign = jnp.where(ids[:, None] == ids[None], 1.0, -1.0)
    return -jax.nn.log_sigmoid(sign * scores).sum() / len(images)


def spread(features: Float[Array, "n d"]) -> dict[str, Array]:
    """Measures of collapse, of the normalized features.

    "feature_std": the mean over dimensions of the deviation times sqrt(d): 1 where the features are
    spread evenly over the sphere, 0 where all are alike (Chen and He 2021, arXiv 2011.10566).
    "effective_rank": exp of the entropy of the covariance's normalized eigenvalues (Roy and
    Vetterli 2007), 1 where they lie on a line, at most d.
    """
    z = normalized(features)
    apart = z - z.mean(0)
    dims = z.shape[1]
    covariance = _products(apart.T, apart.T) / len(z)
    values = jnp.maximum(jnp.linalg.eigvalsh(covariance), 0)
    shares = values / jnp.maximum(values.sum(), 1e-12)
    entropy = -(shares * jnp.log(jnp.maximum(shares, 1e-12))).sum()
    return {
        "feature_std": jnp.sqrt(jnp.square(apart).mean(0)).mean() * jnp.sqrt(float(dims)),
        "effective_rank": jnp.exp(entropy),
    }


def _products(one: Float[Array, "n d"], other: Float[Array, "m d"]) -> Float[Array, "n m"]:
    # Divided by a temperature of 0.1 the bits that accelerators keep by default would show.
    return jnp.matmul(one, other.T, precision="highest")
