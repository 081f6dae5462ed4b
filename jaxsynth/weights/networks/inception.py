"""The weights of InceptionV3 from a file that a user has: safetensors, or PyTorch's own format.

Published FIDs are measured with one set of weights, which pytorch-fid and torch-fidelity distribute
as pt_inception-2015-12-05-6726825d.pth; it is not shipped here. Loading is as strict as for every
other network, except for what a network without classifier and training has no place for.
"""

import hashlib
import os
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxsynth.core.errors import UserError, shown
from jaxsynth.models.classifiers.inception import InceptionV3
from jaxsynth.weights.names import from_hf, hf_name, hf_shape
from jaxsynth.weights.tensors import SUFFIXES, Tensors, expect_floats

# The classifiers, and a counter that PyTorch's batch norm keeps while training.
_UNUSED = re.compile(r"(fc|AuxLogits)\..*|.*\.num_batches_tracked")


def load_inception(path: str | os.PathLike) -> tuple[InceptionV3, str]:
    """The network and the sha256 of its tensors, which is the same for every file format.

    `path` is a .safetensors, .pth or .pt file, or a folder with a single one. Keys of the
    classifiers (`fc.*`, `AuxLogits.*`) and `*.num_batches_tracked` are passed over; any other key
    that is unknown, a missing one, another shape or an integer tensor is a UserError naming it.
    """
    file = _file(Path(path).expanduser())
    graphdef, state = nnx.split(nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    targets = {hf_name(path): path for path in flat}
    values, digests = {}, {}
    for _, key, read in Tensors([file]).items():
        if _UNUSED.fullmatch(key):
            continue
        if key not in targets:
            raise UserError(
                f"{file}: unknown key {shown(key)}: the FID's InceptionV3 has no such one"
            )
        path = targets[key]
        shape, tensor = hf_shape(path[-1], flat[path].shape), read()
        expect_floats(file, key, tensor, shape)
        tensor = np.ascontiguousarray(tensor, np.float32)
        digests[key] = hashlib.sha256(tensor.tobytes()).hexdigest()
        values[path] = jax.device_put(from_hf(path[-1], tensor))
    missing = sorted(targets.keys() - digests.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{file}: key {shown(missing[0])} missing{more}")
    loaded = [(path, variable.replace(values[path])) for path, variable in flat.items()]
    model = nnx.merge(graphdef, nnx.from_flat_state(loaded))
    text = "\n".join(f"{key} {digests[key]}" for key in sorted(digests))
    return model, hashlib.sha256(text.encode()).hexdigest()


def _file(path: Path) -> Path:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        return path
    if not path.is_dir():
        raise UserError(
            f"{path}: no such file or folder, expected InceptionV3's weights, for example "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        )
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path}: expected one file of {', '.join(SUFFIXES)}, found {names}")
    return found[0]
