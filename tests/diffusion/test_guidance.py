"""Guidance: one call of twice the batch equals two calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsynth.diffusion.guidance import classifier_free


def denoise(x, t, condition):
    shift = condition["text"].mean(axis=1)[:, None, None, :] + condition["pooled"][:, None, None]
    return jnp.tanh(x * shift) + t[:, None, None, None] / 1000


@pytest.fixture
def inputs(key):
    kx, kc, ku = jax.random.split(key, 3)
    x, t = jax.random.normal(kx, (3, 4, 4, 2)), jnp.array([1, 500, 900])

    def condition(key, batch):
        return {
            "text": jax.random.normal(key, (batch, 5, 2)),
            "pooled": jax.random.normal(key, (batch, 2)),
        }

    return x, t, condition(kc, 3), condition(ku, 3), condition(ku, 1)


@pytest.mark.parametrize("scale", [2.0, 7.5, 0.0, np.array([1.0, 3.0, 0.5], np.float32)])
def test_one_call_equals_two(scale, inputs):
    x, t, cond, uncond, _ = inputs
    calls = []

    def counted(x, t, condition):
        calls.append(x.shape[0])
        return denoise(x, t, condition)

    guided = classifier_free(counted, scale, cond, uncond)(x, t)
    assert calls == [6]
    without, conditional = denoise(x, t, uncond), denoise(x, t, cond)
    weight = np.reshape(scale, (-1, 1, 1, 1))
    np.testing.assert_allclose(guided, without + weight * (conditional - without), atol=1e-5)


def test_scale_one_skips_the_unconditional_branch(inputs):
    x, t, cond, _, _ = inputs
    calls = []

    def counted(x, t, condition):
        calls.append(x.shape[0])
        return denoise(x, t, condition)

    np.testing.assert_array_equal(
        classifier_free(counted, 1.0, cond, None)(x, t), denoise(x, t, cond)
    )
    assert calls == [3]


def test_one_unconditional_prompt_serves_the_batch(inputs):
    x, t, cond, _, single = inputs
    repeated = jax.tree.map(lambda a: jnp.repeat(a, 3, axis=0), single)
    np.testing.assert_array_equal(
        classifier_free(denoise, 2.0, cond, single)(x, t),
        classifier_free(denoise, 2.0, cond, repeated)(x, t),
    )


def test_dtype_is_the_denoisers(inputs):
    x, t, cond, uncond, _ = inputs
    low = lambda x, t, c: denoise(x, t, c).astype(jnp.bfloat16)  # noqa: E731
    assert classifier_free(low, 2.0, cond, uncond)(x, t).dtype == jnp.bfloat16


def test_mismatches_are_named(inputs):
    _, _, cond, uncond, _ = inputs
    with pytest.raises(ValueError, match="needs `uncond`"):
        classifier_free(denoise, 2.0, cond, None)
    with pytest.raises(ValueError, match="structure"):
        classifier_free(denoise, 2.0, cond, {"text": uncond["text"]})
    with pytest.raises(ValueError, match="does not match"):
        classifier_free(denoise, 2.0, cond, jax.tree.map(lambda a: a[:2], uncond))


@pytest.mark.parametrize("channels", [1, 2])
def test_only_the_first_channels_are_guided(channels, inputs):
    x, t, cond, uncond, _ = inputs
    everything = classifier_free(denoise, 3.0, cond, uncond)(x, t)
    found = classifier_free(denoise, 3.0, cond, uncond, channels=channels)(x, t)
    np.testing.assert_array_equal(found[..., :channels], everything[..., :channels])
    expected = denoise(x, t, cond)[..., channels:]
    np.testing.assert_allclose(found[..., channels:], expected, atol=1e-6)


def test_more_channels_than_there_are_is_an_error(inputs):
    x, t, cond, uncond, _ = inputs
    for channels in (0, 3):
        with pytest.raises(ValueError, match=f"channels {channels}, but the output has 2"):
            classifier_free(denoise, 3.0, cond, uncond, channels=channels)(x, t)
