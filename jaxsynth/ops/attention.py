"""One attention for every network, with a chosen implementation.

`jax.nn.dot_product_attention` is slow on CPU (six times two plain einsums at 1024 tokens), and a
long score matrix does not fit the cache, so on CPU short sequences use two einsums. Long ones are
cut into blocks of queries with a gradient of their own (as in Dao et al. 2022, arXiv 2205.14135) on
every backend, because XLA keeps float32 scores whole: 64 rows of Stable Diffusion's widest layer
need 20.7 GiB of a TPU v5e chip's 15.75. On a GPU cuDNN's flash attention is taken where it applies.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsynth.ops.backend import backend

Implementation = Literal["auto", "einsum", "chunked", "blocks", "xla", "cudnn"]

# Score matrices of more elements per (batch, head) leave the cache of a CPU core; those of all
# heads and rows are a large part of an accelerator's memory.
_CHUNK_ABOVE = 1 << 20
_QUERY_CHUNKS = (256, 128)
# Of all heads at once, so that the products are large and the scores of a block small.
_QUERY_BLOCK = 128


def attention(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n v"],
    *,
    mask: Bool[Array, "#b #n #q k"] | None = None,
    bias: Float[Array, "#b #n q k"] | None = None,
    causal: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "b q n v"]:
    """Scaled dot-product attention, softmax in float32, scale `1/sqrt(d)`.

    `mask` is True where a query may look; `causal` adds the lower-triangular mask; `bias` is added
    to the scores. `implementation` is "einsum" (two products), "chunked" (blocks of queries, one
    head after the other, so that the scores stay in the cache), "blocks" (the same for all heads at
    once), "xla" or "cudnn" (`jax.nn.dot_product_attention`), or "auto". The forms in blocks take no
    bias and have no forward-mode derivative.
    """
    if implementation == "auto":
        implementation = _choose(query, key, mask, bias)
    if implementation in ("xla", "cudnn"):
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, is_causal=causal, implementation=implementation
        )
    if implementation not in ("einsum", "chunked", "blocks"):
        raise ValueError(
            f"attention implementation {implementation!r}: "
            "expected auto, einsum, chunked, blocks, xla or cudnn"
        )
    q_len, k_len = query.shape[1], key.shape[1]
    if causal:
        lower = jnp.tril(jnp.ones((q_len, k_len), bool))[None, None]
        mask = lower if mask is None else jnp.logical_and(mask, lower)
    # (batch, head, token, dim): each head's product is then one contiguous matrix product.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    sizes = (_QUERY_BLOCK,) if implementation == "blocks" else _QUERY_CHUNKS
    fitting = [size for size in sizes if q_len % size == 0]
    if implementation != "einsum" and bias is not None:
        raise ValueError(f"attention implementation {implementation!r}: takes no bias")
    if implementation == "einsum" or not fitting:
        out = _einsum_attention(q, k, v, mask, bias)
    elif implementation == "blocks":
        # Rows and heads stay axes of their own: a loop over them, or one axis made of both, would
        # gather what lies on several devices.
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*q.shape[:3], k_len))
        out = jax.vmap(lambda q, k, v, mask: _blocked(q, k, v, mask, fitting[0], True))(
            q * q.shape[-1] ** -0.5, k, v, mask
        )
    else:
        out = _chunked_attention(q, k, v, mask, fitting[0])
    return jnp.swapaxes(out, 1, 2)


def _choose(query: Array, key: Array, mask: Array | None, bias: Array | None) -> Implementation:
    """The implementation for these shapes on the backend that the program is for."""
    platform, head_dim = backend(), query.shape[-1]
    if platform == "gpu":
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        if half and mask is None and bias is None and head_dim % 8 == 0 and head_dim <= 128:
            return "cudnn"
    if bias is None and query.shape[1] * key.shape[1] >= _CHUNK_ABOVE:
        alone = platform == "cpu" and jax.device_count() == 1
        return "chunked" if alone else "blocks"
    return "einsum" if platform == "cpu" else "xla"


def _einsum_attention(
    q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None = None
) -> Array:
    """Attention over (batch, head, token, dim)."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("bnqd,bnkd->bnqk", q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bnkd->bnqd", weights, v)


def _chunked_attention(q: Array, k: Array, v: Array, mask: Array | None, size: int) -> Array:
    """Attention over (batch, head, token, dim) by blocks of `size` queries of one head."""
    batch, heads, q_len, dim = q.shape
    if mask is not None:
        mask = jnp.broadcast_to(mask, (batch, heads, q_len, k.shape[2]))
    q, k, v, mask = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (q, k, v, mask))
    out = _blocked(q * dim**-0.5, k, v, mask, size, False)
    return out.reshape(batch, heads, q_len, -1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocked(q: Array, k: Array, v: Array, mask: Array | None, size: int, together: bool) -> Array:
    """Attention of scaled queries over (head, token, dim); the gradient recomputes the scores.

    Heads are computed `together` or one after the other.
    """
    return _blocked_forward(q, k, v, mask, size, together)[0]


def _over_heads(function: Callable, arrays: Any, together: bool) -> Any:
    return jax.vmap(function)(arrays) if together else jax.lax.map(function, arrays)


def _blocked_forward(q: Array, k: Array, v: Array, mask: Array | None, size: int, together: bool):
    def head(arrays):
        q, mask, k, v = arrays

        def block(arrays):
            scores = _scores(*arrays, k)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            # Dividing the outputs instead of the weights: there are fewer of them.
            out = jnp.einsum("qk,kd->qd", weights.astype(v.dtype), v) / total
            return out.astype(v.dtype), top, total

        return jax.lax.map(block, (q, mask))

    found = _over_heads(head, (_split(q, size), _split(mask, size), k, v), together)
    out, top, total = (x.reshape(*q.shape[:2], -1) for x in found)
    return out, (q, k, v, mask, out, top, total)


def _blocked_backward(size: int, together: bool, residuals, gradient: Array):
    """A CPU product that sums over the rows of its left factor is several times slower than one of
    contiguous rows, so queries and gradients also come transposed, and dk and dv leave so.
    """
    q, k, v, mask, out, top, total = residuals
    scaled = gradient.astype(jnp.float32) / total
    offset = jnp.sum(scaled * out, axis=-1, keepdims=True)
    scaled = scaled.astype(v.dtype)

    def head(arrays):
        blocks, k, v = arrays

        def block(sums, arrays):
            q, q_t, g, g_t, mask, top, offset = arrays
            weights = jnp.exp(_scores(q, mask, k) - top)
            d_weights = jnp.einsum("qd,kd->qk", g, v, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - offset)).astype(k.dtype)
            dk = sums[0] + jnp.einsum("dq,qk->dk", q_t, d_scores)
            dv = sums[1] + jnp.einsum("dq,qk->dk", g_t, weights.astype(v.dtype))
            return (dk, dv), jnp.einsum("qk,kd->qd", d_scores, k)

        zeros = tuple(jnp.zeros(x.shape[::-1], jnp.float32) for x in (k, v))
        (dk, dv), dq = jax.lax.scan(block, zeros, blocks)
        return dq, dk, dv

    q_blocks, g_blocks = _split(q, size), _split(scaled, size)
    pairs = (q_blocks, jnp.swapaxes(q_blocks, -1, -2), g_blocks, jnp.swapaxes(g_blocks, -1, -2))
    blocks = (*pairs, *(_split(x, size) for x in (mask, top, offset)))
    dq, dk, dv = _over_heads(head, (blocks, k, v), together)
    dk, dv = (jnp.swapaxes(x, -1, -2) for x in (dk, dv))
    return dq.reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _scores(q: Array, mask: Array | None, k: Array) -> Array:
    scores = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32)
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def _split(x: Array | None, size: int) -> Array | None:
    """(head, token, ...) as (head, block, token of the block, ...)."""
    return None if x is None else x.reshape(x.shape[0], -1, size, *x.shape[2:])
