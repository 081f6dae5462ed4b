"""An InstantID of random weights for a small base."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.models.diffusion.controlnet import ControlNet
from jaxsynth.models.diffusion.identity import Identity, initial_identity
from jaxsynth.models.diffusion.image_prompt import (
    ImageAdapter,
    Resampler,
    ResamplerConfig,
    attention_places,
)
from tests.methods.small_base import random_network

FACE = 12


def random_identity(unet, seed: int = 0) -> Identity:
    """Every value random; diffusers reads resamplers of four layers alone."""
    config = ResamplerConfig(FACE, unet.config.cross_attention_dim, tokens=6, hidden=64, depth=4)
    start = initial_identity(unet, config, 2, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)

    def kernel(layer):
        shape = layer.kernel.get_value().shape
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    kernels = {
        path: (kernel(layer.to_k), kernel(layer.to_v))
        for path, layer in attention_places(unet).items()
    }
    adapter = ImageAdapter(random_network(Resampler, config, seed + 1), kernels)
    return Identity(adapter, random_network(ControlNet, start.net.config, seed + 2))
