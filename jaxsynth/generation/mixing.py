"""Adapters from files, at strengths, in one text-to-image network."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from jaxsynth.adapters.combine import combine
from jaxsynth.adapters.inject import AdapterState, can_merge, merge, with_scale
from jaxsynth.adapters.registry import attach
from jaxsynth.core.errors import UserError
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.weights.hf import StableDiffusion


def mix(
    pipeline: StableDiffusion,
    adapters: Sequence[tuple[str, Mapping[str, AdapterState], float]],
) -> TextToImage:
    """The pipeline's networks with every adapter, (name, states by network, strength).

    W0 + sum_k (W_k - W0), W_k being the weights with adapter k at its strength. One adapter alone
    may be of a kind that cannot be merged; it stays apart, as do all updates of 16-bit weights.
    UserError naming an adapter that does not fit, or that cannot be mixed.
    """
    plain = pipeline.networks
    models = [_attached(pipeline, *adapter) for adapter in adapters]
    if not models:
        return plain
    merges = all(can_merge(model) for model in models)
    if len(models) == 1:
        wide = pipeline.unet.conv_in.kernel[...].dtype == jnp.float32
        return merge(models[0]) if merges and wide else models[0]
    for (name, _, _), model in zip(adapters, models, strict=True):
        if not can_merge(model):
            raise UserError(
                f"{name}: an adapter of this kind cannot be merged into the weights, so that it "
                "cannot be mixed with others; give it alone"
            )
    return combine(plain, models, [1.0] * len(models))


def _attached(
    pipeline: StableDiffusion, name: str, states: Mapping[str, AdapterState], strength: float
) -> TextToImage:
    networks = pipeline.adaptable
    if unknown := sorted(states.keys() - networks.keys()):
        raise UserError(f"{name}: is for {unknown[0]}, expected {' or '.join(networks)}")
    for network, state in states.items():
        try:
            networks[network] = attach(networks[network], state)
        except UserError as error:
            raise UserError(f"{name}: {network}: {error}") from error
    model = TextToImage(**networks)
    return model if strength == 1 else with_scale(model, strength)
