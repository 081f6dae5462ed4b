"""The tensors of a checkpoint's files, whether safetensors or PyTorch's own, under their keys."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxsynth.core.errors import UserError
from jaxsynth.weights import hub
from jaxsynth.weights.torch_files.reader import read_state_dict

PICKLED = (".pth", ".pt")
SUFFIXES = (".safetensors", *PICKLED)


class Tensors:
    """The tensors of some files; PyTorch's are read whole, safetensors one by one."""

    def __init__(self, paths: list[Path]):
        """UserError for a file that is of neither kind, or that does not exist."""
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: no such file")
            if path.suffix not in SUFFIXES:
                raise UserError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        self.paths = paths
        self._loaded = {p: _plain_keys(read_state_dict(p)) for p in paths if p.suffix in PICKLED}

    @cached_property
    def keys(self) -> list[str]:
        return [key for _, key, _ in self.items()]

    def items(self) -> Iterator[tuple[Path, str, Callable[[], np.ndarray]]]:
        """File, key, and a function that reads the tensor, which lasts until the next one."""
        for path in self.paths:
            if path in self._loaded:
                for key, value in self._loaded[path].items():
                    yield path, key, lambda value=value: value
                continue
            with hub.opened(path) as handle:
                for key in handle.keys():  # noqa: SIM118, a safetensors handle is no mapping
                    yield path, key, lambda key=key, handle=handle: handle.get_tensor(key)

    @property
    def where(self) -> Path:
        """What an error about all of them names."""
        return self.paths[0] if len(self.paths) == 1 else self.paths[0].parent


def _plain_keys(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the "module." that torch's data parallelism puts before every key."""
    wrapped = all(key.startswith("module.") for key in tensors)
    return {key.removeprefix("module.") if wrapped else key: x for key, x in tensors.items()}
