"""Networks of shapes: their structure, without any value.

A plan compiles a program for a network that is not here; what builds the program must then work on
`jax.ShapeDtypeStruct`s as it does on arrays.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def is_abstract(model: nnx.Module) -> bool:
    """Whether the network holds shapes instead of values."""
    leaves = jax.tree.leaves(nnx.state(model))
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def transform(function: Callable[[Model], nnx.Module], model: Model) -> nnx.Module:
    """`function(model)`; of a network of shapes the result is one too."""
    return nnx.eval_shape(function, model) if is_abstract(model) else function(model)
