"""One small network, in NNX and in torch, with every layer type that adapters wrap."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.models.layers import conv2d

TARGETS = ("down", "mix", "blocks.0", "blocks.1")
# alpha != rank everywhere, or an error in the scale would not show.
CONFIG = LoRAConfig(
    rank=3, alpha=7, targets=TARGETS, rank_pattern={"mix": 2}, alpha_pattern={r"blocks\.0": 5}
)


class Net(nnx.Module):
    """A strided convolution, a pointwise one, and two linear layers in a list; NHWC."""

    def __init__(self, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.down = conv2d(3, 8, 3, stride=2, dtype=dtype, rngs=rngs)
        self.mix = conv2d(8, 8, 1, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.Linear(8, 8, dtype=dtype, rngs=rngs),
                nnx.Linear(8, 6, use_bias=False, dtype=dtype, rngs=rngs),
            ]
        )

    def __call__(self, images):
        hidden = jax.nn.silu(self.mix(jax.nn.silu(self.down(images))))
        return self.blocks[1](jax.nn.silu(self.blocks[0](hidden)))


class TorchNet(torch.nn.Module):
    """`Net` in torch; NCHW in, NHWC out."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mix = torch.nn.Conv2d(8, 8, 1)
        self.blocks = torch.nn.ModuleList(
            [torch.nn.Linear(8, 8), torch.nn.Linear(8, 6, bias=False)]
        )

    def forward(self, images):
        act = torch.nn.functional.silu
        hidden = act(self.mix(act(self.down(images)))).permute(0, 2, 3, 1)
        return self.blocks[1](act(self.blocks[0](hidden)))


def randomised(state: inject.AdapterState, seed: int) -> inject.AdapterState:
    """Every factor random and none zero."""
    keys = jax.random.split(jax.random.key(seed), len(state.arrays))
    arrays = {
        name: 0.3 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, state.arrays.items(), strict=True)
    }
    return inject.AdapterState(arrays, state.config)


def scrambled(state: inject.AdapterState, seed: int) -> inject.AdapterState:
    """The same from NumPy: for many kinds of factors, each shape of which JAX would compile."""
    generator = np.random.default_rng(seed)
    arrays = {
        name: jnp.asarray(0.3 * generator.standard_normal(value.shape), jnp.float32)
        for name, value in state.arrays.items()
    }
    return inject.AdapterState(arrays, state.config)
