"""Copying a torch network's weights by name into an NNX one, for the parity tests."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxsynth.weights import layout, names


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every tensor random and none zero: biases and norms must matter in the comparison."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.2 * noise + (1.0 if "norm" in name and "weight" in name else 0.0))
    return module.eval()


def copy_weights(module: torch.nn.Module, model: nnx.Module) -> None:
    """Fill `model` from `module`: every tensor used once, every variable filled, shapes equal."""
    tensors = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    keys_of = layout.keys_of(model)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        keys = keys_of[path]
        values = [names.from_hf(path[-1], tensors.pop(name)) for name in keys.names]
        value = np.stack(values) if keys.stacked else values[0]
        assert value.shape == variable.shape, (path, value.shape, variable.shape)
        _node(model, path).set_value(jnp.asarray(value))
    assert not tensors, f"left over: {sorted(tensors)}"


def _node(model: nnx.Module, path):
    node = model
    for part in path:
        node = node[part] if isinstance(part, int) else getattr(node, part)
    return node


def relative_error(actual, expected) -> float:
    """Largest absolute difference over the largest absolute value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)
