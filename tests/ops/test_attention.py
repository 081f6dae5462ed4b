"""Every implementation of attention against torch's, with masks, and what it refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from jaxsynth.ops.attention import attention
from jaxsynth.ops.backend import compiling_for
from jaxsynth.training.sharding import BATCH, make_mesh
from tests.models.torch_parity import relative_error


def arrays(queries: int, keys: int, dim: int = 8):
    rng = np.random.default_rng(0)
    lengths = (queries, keys, keys)
    return [rng.normal(size=(2, length, 3, dim)).astype(np.float32) for length in lengths]


def reference(query, key, value, mask=None, causal=False):
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (query, key, value))
    if causal:
        lower = np.tril(np.ones((query.shape[1], key.shape[1]), bool))
        mask = lower if mask is None else mask & lower
    mask = None if mask is None else torch.from_numpy(mask)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize("implementation", ["auto", "einsum", "chunked", "blocks", "xla"])
@pytest.mark.parametrize("masking", ["none", "mask", "causal", "both"])
def test_same_as_torch(implementation, masking):
    length = 256
    query, key, value = arrays(length, length)
    mask = None
    if masking in ("mask", "both"):
        mask = np.random.default_rng(1).random((2, 1, 1, length)) < 0.7
        mask[..., 0] = True  # A query with nothing to look at has no defined answer.
    causal = masking in ("causal", "both")
    expected = reference(query, key, value, mask, causal)
    actual = attention(
        *map(jnp.asarray, (query, key, value)),
        mask=mask,
        causal=causal,
        implementation=implementation,
    )
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("implementation", ["auto", "einsum", "xla"])
def test_a_bias_is_added_to_the_scores(implementation):
    """Also under vmap, as windows of images share their bias; blocks of queries take none."""
    query, key, value = arrays(6, 6)
    bias = np.random.default_rng(1).normal(size=(1, 3, 6, 6)).astype(np.float32)
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.from_numpy(bias).expand(2, -1, -1, -1)
    )

    def one(*qkv):
        return attention(*qkv, bias=jnp.asarray(bias), implementation=implementation)

    given = [jnp.asarray(x) for x in (query, key, value)]
    expected = expected.transpose(1, 2).numpy()
    assert relative_error(one(*given), expected) < 1e-5
    assert relative_error(jax.vmap(one)(*(x[:, None] for x in given))[:, 0], expected) < 1e-5
    for how in ("chunked", "blocks"):
        with pytest.raises(ValueError, match="takes no bias"):
            attention(*given, bias=jnp.asarray(bias), implementation=how)


def squares(how, *qkv, mask=None):
    return jnp.square(attention(*qkv, mask=mask, implementation=how)).sum()


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_queries_have_the_same_gradient(masked):
    arguments = arrays(1024, 1024, dim=4)
    mask = np.random.default_rng(1).random((2, 1, 1024, 1024)) < 0.7 if masked else None
    chunked, blocks, plain = (
        jax.jit(jax.grad(partial(squares, how, mask=mask), argnums=(0, 1, 2)))(*arguments)
        for how in ("chunked", "blocks", "einsum")
    )
    for one, other, expected in zip(chunked, blocks, plain, strict=True):
        assert relative_error(one, expected) < 1e-4
        assert relative_error(other, expected) < 1e-4


@pytest.mark.parametrize("platform", ["", "tpu", "gpu"])
def test_no_backend_keeps_the_scores_of_long_sequences(platform):
    """Also where one function was traced for another backend before."""
    gradient = jax.jit(jax.grad(partial(squares, "auto"), argnums=(0, 1, 2)))
    short, long = arrays(512, 512), arrays(1024, 1024)
    with compiling_for(platform):
        assert "512,512]" in str(gradient.trace(*short).jaxpr)
        assert "1024,1024]" not in str(gradient.trace(*long).jaxpr)


def test_long_sequences_stay_on_their_devices():
    """A loop over heads would gather the rows of all devices."""
    mesh = make_mesh(data=4, fsdp=2)
    place = NamedSharding(mesh, BATCH)
    row = jax.ShapeDtypeStruct((16, 1024, 4, 8), jnp.float32, sharding=place)
    gradient = jax.jit(jax.grad(partial(squares, "auto"), argnums=(0, 1, 2)))
    assert "all-gather" not in gradient.lower(row, row, row).compile().as_text()


def test_half_precision_scores_are_float32():
    """Scores of a few hundred differ by less than bfloat16 can hold, and still rank the keys."""
    query = jnp.full((1, 1, 1, 64), 8.0, jnp.bfloat16)
    key = jnp.full((1, 2, 1, 64), 5.0, jnp.bfloat16).at[0, 1, 0, :].set(5.03125)
    value = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    score = 64 * 8.0 * 0.03125 / 8.0
    expected = 1 / (1 + np.exp(-score))
    out = attention(query, key, value, implementation="einsum")
    assert abs(float(out[0, 0, 0, 0]) - expected) < 5e-3


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'flash'"):
        attention(*arrays(4, 4), implementation="flash")
