"""One attention for every network, with a chosen implementation.

`jax.nn.dot_product_attention` is slow on CPU (six times two plain einsums at 1024 tokens), and a
long score matrix does not fit the cache, so on CPU short sequences use two einsums and long ones
are cut into blocks of queries; on a GPU cuDNN's flash attention is taken where it applies.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Implementation = Literal["auto", "einsum", "chunked", "xla", "cudnn"]

# Score matrices larger than this many elements per (batch, head) leave the cache of a CPU core.
_CHUNK_ABOVE = 1 << 20
_QUERY_CHUNK = 128


def attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    *,
    mask: Bool[Array, "#b #n #q k"] | None = None,
    causal: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "b q n d"]:
    """Scaled dot-product attention, softmax in float32, scale `1/sqrt(d)`.

    `mask` is True where a query may look; `causal` adds the lower-triangular mask. `implementation`
    is "einsum" (two products), "chunked" (blocks of 128 queries, so that the score matrix stays in
    the cache), "xla" or "cudnn" (`jax.nn.dot_product_attention`), or "auto".
    """
    if implementation == "auto":
        implementation = _choose(query, key, mask)
    if implementation in ("xla", "cudnn"):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=causal, implementation=implementation
        )
    if implementation not in ("einsum", "chunked"):
        raise ValueError(
            f"attention implementation {implementation!r}: "
            "expected auto, einsum, chunked, xla or cudnn"
        )
    q_len, k_len = query.shape[1], key.shape[1]
    if causal:
        lower = jnp.tril(jnp.ones((q_len, k_len), bool))[None, None]
        mask = lower if mask is None else jnp.logical_and(mask, lower)
    # (batch, head, token, dim): each head's product is then one contiguous matrix product.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    if implementation == "einsum" or q_len % _QUERY_CHUNK:
        out = _einsum_attention(q, k, v, mask)
    else:
        out = _chunked_attention(q, k, v, mask)
    return jnp.swapaxes(out, 1, 2)


def _choose(query: Array, key: Array, mask: Array | None) -> Implementation:
    """The fastest implementation for these shapes on the default backend."""
    backend = jax.default_backend()
    head_dim = query.shape[-1]
    if backend == "gpu":
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        if half and mask is None and head_dim % 8 == 0 and head_dim <= 128:
            return "cudnn"
        return "xla"
    if backend == "cpu" and query.shape[1] * key.shape[1] >= _CHUNK_ABOVE:
        return "chunked"
    return "einsum" if backend == "cpu" else "xla"


def _einsum_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention over (batch, head, token, dim)."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("bnqd,bnkd->bnqk", q * scale, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bnkd->bnqd", weights, v)


def _chunked_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention over blocks of queries; recomputed in the backward pass, so memory stays linear."""
    batch, heads, q_len, dim = q.shape
    blocks = q_len // _QUERY_CHUNK
    q_blocks = jnp.moveaxis(q.reshape(batch, heads, blocks, _QUERY_CHUNK, dim), 2, 0)
    if mask is None:
        out = jax.lax.map(
            jax.checkpoint(lambda block: _einsum_attention(block, k, v, None)), q_blocks
        )
    else:
        full = jnp.broadcast_to(mask, (*mask.shape[:2], q_len, mask.shape[3]))
        shape = (*full.shape[:2], blocks, _QUERY_CHUNK, full.shape[3])
        mask_blocks = jnp.moveaxis(full.reshape(shape), 2, 0)
        body = jax.checkpoint(lambda pair: _einsum_attention(pair[0], k, v, pair[1]))
        out = jax.lax.map(body, (q_blocks, mask_blocks))
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, q_len, dim)
