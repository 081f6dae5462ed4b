"""Shapes and number types that functions say of their arrays, checked as quick tests call them.

jaxtyping's import hook gives `checked` two functions for each function of the package: one with its
arguments, called before it, and one with its result as well, called after it. Only the second is
checked, and only what says a shape: a function's own message about wrong input comes first, and is
what the tests ask for. Constructors are not: a pytree is also made of shardings and of shapes.
"""

import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jax
import numpy as np
from jaxtyping import AbstractArray, PyTree

_check = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError))


def checked(made: Callable) -> Callable:
    """`made`, which raises TypeError where an argument or the result is not what it says."""
    hints = getattr(made, "__annotations__", {})
    shapes = {name: _of_any_array(hint) for name, hint in hints.items() if _says_shape(hint)}
    if hints.get("return") is Any or not shapes or made.__name__ == "__init__":
        return made
    made.__annotations__ = shapes
    return _check(made)


def _says_shape(hint: Any) -> bool:
    return _is_array(hint) or any(map(_says_shape, _parts(hint)))


def _of_any_array(hint: Any) -> Any:
    """The hint with NumPy's arrays beside JAX's: what is written for one takes the other."""
    if _is_array(hint):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str]
    if not _says_shape(hint):
        return hint
    parts = [_of_any_array(part) for part in _parts(hint)]
    if getattr(hint, "leaftype", None) is not None:
        return PyTree[parts[0]]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return functools.reduce(operator.or_, parts)
    return typing.get_origin(hint)[tuple(parts)]


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _parts(hint: Any) -> tuple[Any, ...]:
    if leaf := getattr(hint, "leaftype", None):
        return (leaf,)
    return typing.get_args(hint)
