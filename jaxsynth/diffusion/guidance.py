"""Classifier-free guidance as a wrapper of a denoiser.

Both branches go through the network in one call of twice the batch, which keeps an accelerator
busier than two calls and leaves one network call inside a sampler's scan.

Source: arXiv 2207.12598, in Stable Diffusion's convention, where scale 1 is no guidance. Rescaling:
arXiv 2305.08891, section 3.4.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from jaxsynth.core.words import counted


def classifier_free(
    denoise: Callable[[Array, Array, PyTree], Array],
    guidance_scale: float | Float[Array, "..."],
    cond: PyTree[Shaped[Array, "b ..."]],
    uncond: PyTree[Shaped[Array, "_ ..."]] | None,
    *,
    channels: int | None = None,
    rescale: float = 0.0,
) -> Callable[[Array, Array], Array]:
    """(x, t) -> uncond + guidance_scale * (cond - uncond), from `denoise(x, t, condition)`.

    `cond` and `uncond` are pytrees of one structure with the batch first; a leaf of `uncond` may
    have batch 1 (one empty prompt for all). `guidance_scale` is a number, or an array (b,) with a
    scale per image. The Python number 1.0 skips the unconditional branch, and `uncond` may then be
    None. Raises ValueError where structures or batches differ.

    `channels` guides only so many of the first channels of the output; the rest, among them a
    learned variance, are the conditional branch's. For DiT: 3 in the authors' sampler (of the 4
    of the noise, as their published figures are measured), 4 in diffusers' pipeline.

    `rescale` brings each output by that share to the standard deviation of its conditional branch,
    which large scales exceed, so that images are over-exposed where the schedule ends in noise
    alone (zero terminal SNR; 0.7 is usual there).
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return lambda x, t: denoise(x, t, cond)
    if uncond is None:
        raise ValueError(f"classifier_free: guidance_scale {guidance_scale} needs `uncond`")
    if jax.tree.structure(cond) != jax.tree.structure(uncond):
        raise ValueError(
            "classifier_free: cond and uncond differ in structure: "
            f"{jax.tree.structure(cond)} and {jax.tree.structure(uncond)}"
        )
    both = jax.tree.map(_stack, uncond, cond)
    scale = jnp.asarray(guidance_scale, jnp.float32)

    def guided(x: Array, t: Array) -> Array:
        output = denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        without, conditional = jnp.split(output.astype(jnp.float32), 2)
        weight = scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
        mixed = without + weight * (conditional - without)
        if channels is not None and not 0 < channels <= output.shape[-1]:
            raise ValueError(
                f"classifier_free: channels {channels}, but the output has {output.shape[-1]}"
            )
        own = slice(channels)
        guided = _rescaled(mixed[..., own], conditional[..., own], rescale)
        whole = jnp.concatenate([guided, conditional[..., guided.shape[-1] :]], axis=-1)
        return whole.astype(output.dtype)

    return guided


def _rescaled(
    mixed: Float[Array, "b ... c"], conditional: Float[Array, "b ... c"], share: float
) -> Float[Array, "b ... c"]:
    """`mixed`, of which a share has the standard deviation of `conditional`, by example."""
    if not share:
        return mixed
    axes = tuple(range(1, mixed.ndim))
    ratio = conditional.std(axes, keepdims=True) / mixed.std(axes, keepdims=True)
    return mixed * (share * ratio + 1 - share)


def guide(
    denoise: Callable[[Array, Array, PyTree], Array],
    scales: Sequence[float],
    branches: Sequence[PyTree[Shaped[Array, "_ ..."]]],
    *,
    channels: int | None = None,
    rescale: float = 0.0,
) -> Callable[[Array, Array], Array]:
    """`classifier_free` for two branches, `nested` for more; the least informed branch is first.

    ValueError where `channels` or `rescale` are given for more than two.
    """
    if len(branches) == 2 and len(scales) == 1:
        uncond, cond = branches
        return classifier_free(denoise, scales[0], cond, uncond, channels=channels, rescale=rescale)
    if channels is not None or rescale:
        raise ValueError(
            f"guide: channels {channels} and rescale {rescale} for {len(branches)} branches, "
            "expected two"
        )
    return nested(denoise, scales, branches)


def nested(
    denoise: Callable[[Array, Array, PyTree], Array],
    scales: Sequence[float],
    conditions: Sequence[PyTree[Shaped[Array, "_ ..."]]],
) -> Callable[[Array, Array], Array]:
    """(x, t) -> e(c_0) + sum_k scales[k] * (e(c_k+1) - e(c_k)), from `denoise(x, t, condition)`.

    Conditions that say more and more, with a scale for each step. InstructPix2Pix's guidance
    (Brooks et al. 2023, arXiv 2211.09800, equation 3) has nothing, the image, and the image with
    the instruction; with a single scale it is `classifier_free`. All branches go through the
    network in one call. Scales of 1 only need the last one. Leaves have the batch first, and may
    have batch 1. ValueError unless there is one condition more than scales.
    """
    if len(conditions) != len(scales) + 1 or not scales:
        raise ValueError(
            f"nested: {counted(len(conditions), 'condition')} for {len(scales)} scales"
        )
    if all(isinstance(scale, int | float) and scale == 1 for scale in scales):
        return lambda x, t: denoise(x, t, conditions[-1])
    joined = conditions[-1]
    for one in reversed(conditions[:-1]):
        joined = jax.tree.map(_before, one, conditions[-1], joined)

    def guided(x: Array, t: Array) -> Array:
        count = len(conditions)
        output = denoise(jnp.concatenate([x] * count), jnp.concatenate([t] * count), joined)
        parts = jnp.split(output.astype(jnp.float32), count)
        mixed = parts[0]
        for scale, less, more in zip(scales, parts, parts[1:], strict=False):
            mixed = mixed + scale * (more - less)
        return mixed.astype(output.dtype)

    return guided


def _before(one: Array, like: Array, joined: Array) -> Array:
    """`one`, with the batch of `like`, in front of what is joined already."""
    return jnp.concatenate([_stack(one, like)[: len(like)], joined])


def _stack(uncond: Array, cond: Array) -> Array:
    if uncond.shape[0] not in (1, cond.shape[0]) or uncond.shape[1:] != cond.shape[1:]:
        raise ValueError(
            f"classifier_free: uncond {uncond.shape} does not match cond {cond.shape}; expected "
            "the same shape or batch 1"
        )
    return jnp.concatenate([jnp.broadcast_to(uncond, cond.shape).astype(cond.dtype), cond])
