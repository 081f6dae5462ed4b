"""Which keys of a file hold which parameter of a network, and filling a network from them.

A parameter mostly has one key. Blocks that run under `lax.scan` are one module of stacked
parameters here and numbered blocks in a file, and some files repeat a module in every block. A
network says so in two class attributes: `stacked`, the names of its stacked modules, and `copied`,
which maps a module to its place in a file, with {} for the number of the block.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.core.errors import UserError, shown
from jaxsynth.weights.names import canonical, from_hf, hf_name, hf_shape, to_hf

Parts = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of one parameter: one each for its layers (`stacked`), or all for the same value."""

    names: tuple[str, ...]
    stacked: bool = False


def keys_of(model: nnx.Module, *, copies: bool = True) -> dict[Parts, Keys]:
    """The keys in Hugging Face's files of every Variable of `model`, by its path.

    Without `copies`, a module that files repeat is under its own name.
    """
    state = nnx.to_flat_state(nnx.state(model))
    stacked: tuple[str, ...] = getattr(model, "stacked", ())
    copied: Mapping[str, str] = getattr(model, "copied", {}) if copies else {}
    depths = {str(path[0]): variable.shape[0] for path, variable in state if path[0] in stacked}
    found = {}
    for path, _ in state:
        head, *rest = path
        if head in stacked:
            layers = range(depths[head])
            found[path] = Keys(tuple(hf_name((head, i, *rest)) for i in layers), stacked=True)
        elif head in copied:
            place = copied[head]
            layers = range(depths[place.partition(".")[0]])
            found[path] = Keys(tuple(hf_name((place.format(i), *rest)) for i in layers))
        else:
            found[path] = Keys((hf_name(path),))
    return found


def storage_dtypes(shapes: Mapping[Parts, tuple[int, ...]], dtype: Any) -> dict[Parts, Any]:
    """The type to store each parameter in: `dtype`, but of norms and scalars float32 at least.

    They are few, and bfloat16 rounds CLIP's logit scale of 4.6052 to 4.59375: a factor of 98.9
    instead of 100. A norm is what has a `scale`; SigLIP's scalars have one axis of size 1.
    """
    norms = {path[:-1] for path in shapes if path[-1] == "scale"}
    wide = jnp.promote_types(dtype, jnp.float32)
    return {
        path: wide if shape in ((), (1,)) or path[:-1] in norms else jnp.dtype(dtype)
        for path, shape in shapes.items()
    }


def stored(state: nnx.State, dtype: Any) -> nnx.State:
    """`state` with each parameter in its `storage_dtypes`."""
    flat = dict(nnx.to_flat_state(state))
    dtypes = storage_dtypes({path: variable.shape for path, variable in flat.items()}, dtype)
    cast = [(path, v.replace(v[...].astype(dtypes[path]))) for path, v in flat.items()]
    return nnx.from_flat_state(cast)


def to_file(model: nnx.Module, dtype: Any = None) -> dict[str, np.ndarray]:
    """Every key of `model`'s file with its tensor, in torch's layout.

    `dtype` None keeps each parameter's; another is that of `storage_dtypes`.
    """
    tensors = {}
    keys = keys_of(model)
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state if dtype is None else stored(state, dtype)):
        value = np.asarray(variable[...])
        layers = value if keys[path].stacked else [value] * len(keys[path].names)
        for name, layer in zip(keys[path].names, layers, strict=True):
            tensors[name] = to_hf(path[-1], layer)
    return tensors


class Filling:
    """Fills the Variables of a network of shapes, key by key; strict about what comes.

    Tensors may come in any order and from several files; each is laid out at once, so that no
    second copy of the network is held.
    """

    def __init__(self, abstract: nnx.Module, dtype: Any, *, copies: bool = True):
        """`abstract` is what `models.describe` gives; `dtype` that of `storage_dtypes`."""
        self._graphdef, state = nnx.split(abstract)
        self._variables = dict(nnx.to_flat_state(state))
        shapes = {path: variable.shape for path, variable in self._variables.items()}
        self._dtypes = storage_dtypes(shapes, dtype)
        self._keys = keys_of(abstract, copies=copies)
        self._places = {
            name: (path, number)
            for path, keys in self._keys.items()
            for number, name in enumerate(keys.names)
        }
        self._sources: dict[str, tuple[Path, str]] = {}
        self._values: dict[Parts, Any] = {}
        self._missing = {path: len(keys.names) for path, keys in self._keys.items()}

    @property
    def names(self) -> list[str]:
        """All keys that it is filled by."""
        return list(self._places)

    def put(self, file: Path, key: str, read: Callable[[tuple[int, ...]], np.ndarray]) -> None:
        """Take the tensor of `key`, which `read` gives in torch's layout for the expected shape.

        UserError for a key that means no parameter, one that comes twice, or a copy that differs
        from the first one.
        """
        name = canonical(key, self._places)
        if name is None:
            return
        if name not in self._places:
            raise UserError(
                f"{file}: unknown key {shown(key)}: the network of its config has no such parameter"
            )
        if name in self._sources:
            other, first = self._sources[name]
            raise UserError(
                f"{file}: key {shown(key)} gives {shown(name)} a second time, after "
                f"{shown(first)} in {other.name}"
            )
        path, number = self._places[name]
        stacked = self._keys[path].stacked
        shape = self._variables[path].shape[1 if stacked else 0 :]
        tensor = from_hf(path[-1], read(hf_shape(path[-1], shape)))
        tensor = tensor.astype(self._dtypes[path], copy=False)
        if stacked:
            if path not in self._values:
                depth = len(self._keys[path].names)
                self._values[path] = np.empty((depth, *shape), self._dtypes[path])
            self._values[path][number] = tensor
        elif path not in self._values:
            # jnp.asarray would compile a program for every shape.
            self._values[path] = jax.device_put(tensor)
        elif not np.array_equal(self._values[path], tensor):
            first = next(other for other in self._keys[path].names if other in self._sources)
            raise UserError(
                f"{file}: {key} differs from {self._sources[first][1]}; expected copies of one "
                "module, because this network has it once"
            )
        self._sources[name] = (file, key)
        self._missing[path] -= 1
        if stacked and not self._missing[path]:
            self._values[path] = jax.device_put(self._values[path])

    def finish(self, where: Path) -> nnx.Module:
        """The filled network; UserError naming `where` and the first key that never came."""
        missing = sorted(self._places.keys() - self._sources.keys())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{where}: key {shown(missing[0])} missing{more}")
        filled = [
            (path, variable.replace(self._values[path]))
            for path, variable in self._variables.items()
        ]
        return nnx.merge(self._graphdef, nnx.from_flat_state(filled))
