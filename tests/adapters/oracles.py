"""A convolution and a linear layer in NNX and in torch, wrapped by us and by peft or LyCORIS."""

import functools

import jax
import numpy as np
import torch
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.weights.adapters import factors
from tests.adapters.nets import scrambled
from tests.models.torch_parity import copy_weights, nchw, randomise

TARGETS = ("conv", "linear")
SHAPE = (2, 4, 5, 4)


class Pair(nnx.Module):
    """A strided convolution with lopsided padding, and a linear layer; NHWC."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(4, 12, (2, 2), strides=2, padding=((1, 1), (0, 0)), rngs=rngs)
        self.linear = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, images):
        return self.linear(jax.nn.silu(self.conv(images)))


class TorchPair(torch.nn.Module):
    """`Pair` in torch; NCHW in, NHWC out."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 12, 2, stride=2, padding=(1, 0))
        self.linear = torch.nn.Linear(12, 8)

    def forward(self, images):
        hidden = torch.nn.functional.silu(self.conv(images)).permute(0, 2, 3, 1)
        # peft's OFT takes whatever has four axes for images with channels first.
        return self.linear(hidden.flatten(1, 2)).unflatten(1, hidden.shape[1:3])


def adapted(config, seed: int = 2) -> tuple[Pair, TorchPair]:
    """Our pair with random factors, and the torch pair with the same base weights."""
    plain, model = randomise(TorchPair()), Pair(rngs=nnx.Rngs(0))
    copy_weights(plain, model)
    model = registry.add(model, config, rngs=nnx.Rngs(0))
    state = scrambled(inject.extract(model), seed)
    # Magnitudes are lengths.
    arrays = {
        name: 1 + 0.1 * value if name.endswith("magnitude") else value
        for name, value in state.arrays.items()
    }
    return inject.load_state(model, inject.AdapterState(arrays, state.config)), plain


@functools.cache
def _random(shape) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def images() -> np.ndarray:
    return _random(SHAPE)


def results(model):
    """Outputs, gradients by name, merged kernels by layer: one compiled program."""
    graphdef, trainable, frozen = nnx.split(model, inject.Trainable, ...)

    @jax.jit
    def run(trainable, frozen):
        def loss(t):
            out = nnx.merge(graphdef, t, frozen)(images())
            return (out * _random(out.shape)).sum(), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        merged = inject.layers(inject.merge(nnx.merge(graphdef, trainable, frozen)))
        return out, grads, {name: nnx.state(merged[name], nnx.Param) for name in TARGETS}

    out, grads, merged = run(trainable, frozen)
    found = inject.extract(nnx.merge(graphdef, grads, frozen)).arrays
    return out, found, merged


def check(
    model, forward, parameter, merged_weight=None, *, wrong=(), scales=None, offsets=None, atol=1e-5
):
    """Outputs, gradients and merged weights equal those of torch.

    `parameter(layer, factor)` is the torch parameter of one of our factors; `merged_weight(layer)`
    torch's merged weight. `wrong` are parameters whose gradient the peer has wrong; by factor, the
    peer's are ours times one of `scales` and plus one of `offsets`.
    """
    scales, offsets = scales or {}, offsets or {}
    state = inject.extract(model).arrays
    tucker = {
        name.rpartition(".")[0] for name in state if name.endswith(("_t1", "_t2", "lora_mid"))
    }

    def as_torch(name, value, like, power=1):
        path, _, factor = name.rpartition(".")
        value = np.asarray(value)
        if factor in ("oft_R", "boft_R") and like.shape[-1] == like.shape[-2] > 1:
            value = factors.upper_blocks(value)
        else:
            value = factors.to_torch(factor, value, tucker=path in tucker)
        return value.reshape(like.shape) * scales.get(factor, 1.0) ** power

    taken = {}
    with torch.no_grad():
        for name, value in state.items():
            path, _, factor = name.rpartition(".")
            taken[name] = parameter(path, factor)
            value = as_torch(name, value, taken[name]) + offsets.get(factor, 0.0)
            taken[name].copy_(torch.from_numpy(np.array(value)))
    expected = forward(nchw(images()))
    (expected * torch.from_numpy(_random(tuple(expected.shape)))).sum().backward()
    out, grads, merged = results(model)
    np.testing.assert_allclose(out, expected.detach(), atol=atol * np.abs(out).max())
    for name, torch_parameter in taken.items():
        if name in wrong:
            continue
        wanted = torch_parameter.grad.numpy()
        found = as_torch(name, grads[name], wanted, power=-1)
        if name.endswith("ft_R") and found.shape[-1] == found.shape[-2]:
            wanted = np.triu(wanted, 1)
        bound = atol * max(np.abs(wanted).max(), 1e-3)
        np.testing.assert_allclose(found, wanted, atol=bound, err_msg=name)
        assert np.abs(wanted).max() > 1e-3, name
    if merged_weight is not None:
        for name in {name.rpartition(".")[0] for name in state}:
            wanted = merged_weight(name).detach().numpy()
            found = factors.to_torch("kernel", np.asarray(merged[name].kernel[...]))
            np.testing.assert_allclose(found, wanted, atol=atol * np.abs(wanted).max())
