"""Files of IP-Adapter: what makes tokens of an image, and the kernels of each cross-attention.

| file | what is in it |
|---|---|
| .safetensors | image_proj.*, ip_adapter.N.to_k_ip.weight, ip_adapter.N.to_v_ip.weight |
| .bin | {"image_proj": {...}, "ip_adapter": {"N.to_k_ip.weight": ...}} |

N counts the attentions of the UNet, of itself and to the text in turns, so that it is 1, 3, 5, ...:
first on the way down, then on the way up, and last in the middle. diffusers' folder has the file in
`models/` with its image encoder in `models/image_encoder/`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.core.errors import UserError, shown
from jaxsynth.models.diffusion.image_prompt import (
    HEAD_DIM,
    ImageAdapter,
    ImageProjection,
    ProjectionConfig,
    Resampler,
    ResamplerConfig,
    attention_places,
)
from jaxsynth.weights import hub
from jaxsynth.weights.adapters import tensor_files
from jaxsynth.weights.layout import Filling, to_file
from jaxsynth.weights.models import describe
from jaxsynth.weights.tensors import PICKLED, expect_floats
from jaxsynth.weights.torch_files.writer import write_pickled

FILE = "ip-adapter.safetensors"
_PROJECTION, _KERNELS = "image_proj", "ip_adapter"
# The bases that attend to so many numbers.
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
# What else goes by the name, by a key that only it has.
_OTHERS = {
    "proj.3.weight": "an IP-Adapter Full Face, whose tokens are those of all patches",
    "perceiver_resampler.proj_in.weight": "an IP-Adapter FaceID Plus, which needs a face encoder",
    "norm.weight proj.0.weight": "an IP-Adapter FaceID, which needs a face encoder",
}


def find_image_adapter(source: str | Path) -> Path:
    """The file of an IP-Adapter: `source`, or the one in that folder or in its `models`.

    UserError where there is none, or several.
    """
    source = Path(source)
    if source.is_file():
        return source
    endings = (".safetensors", *PICKLED)
    for folder in (source, source / "models"):
        found = sorted(
            path for path in folder.glob("ip-adapter*") if path.suffix in endings and path.is_file()
        )
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{folder}: holds {names}; say which")
    raise UserError(f"{source}: no IP-Adapter here, expected a file or {FILE} in it")


def read_image_adapter(source: str | Path, unet: nnx.Module) -> ImageAdapter:
    """The adapter of a file, for this UNet; UserError naming the file and what does not fit."""
    file = find_image_adapter(source)
    parts = _parts(file)
    projection = _read_projection(file, parts[_PROJECTION], unet.config.cross_attention_dim)
    return ImageAdapter(projection, _read_kernels(file, parts[_KERNELS], unet))


def write_image_adapter(path: str | Path, adapter: ImageAdapter) -> Path:
    """Writes one file, a .bin or a .safetensors by its ending, or `FILE` into a folder."""
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLED):
        path = path / FILE
    kernels = {}
    for row, pair in enumerate(adapter.kernels.values()):
        for name, kernel in zip("kv", pair, strict=True):
            weight = np.asarray(kernel, np.float32).T
            kernels[f"{2 * row + 1}.to_{name}_ip.weight"] = weight
    parts = {_PROJECTION: to_file(adapter.projection, jnp.float32), _KERNELS: kernels}
    if path.suffix in PICKLED:
        write_pickled(path, parts)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{part}.{key}": value for part, own in parts.items() for key, value in own.items()}
    hub.write_tensors(path, flat)
    return path


def _parts(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of both parts."""
    content: Mapping[Any, Any] = tensor_files.nested(file)
    if not content:
        flat = tensor_files.load(file)[0]
        content = {}
        for key, value in flat.items():
            part, _, name = key.partition(".")
            content.setdefault(part, {})[name] = value
    if set(content) != {_PROJECTION, _KERNELS}:
        raise UserError(
            f"{file}: holds {shown(sorted(map(str, content)))}, expected the {_PROJECTION} and "
            f"{_KERNELS} of an IP-Adapter"
        )
    return {part: {str(k): np.asarray(v) for k, v in own.items()} for part, own in content.items()}


def _read_projection(
    file: Path, tensors: dict[str, np.ndarray], width: int
) -> ImageProjection | Resampler:
    for keys, name in _OTHERS.items():
        if all(key in tensors for key in keys.split()):
            raise UserError(f"{file}: is {name}; expected an IP-Adapter of a CLIP's image, or Plus")
    kind: Any
    if "proj.weight" in tensors and tensors["proj.weight"].ndim == 2:
        rows, features = tensors["proj.weight"].shape
        own = tensors["norm.weight"].size if "norm.weight" in tensors else width
        _check_width(file, own, width)
        kind, config = ImageProjection, ProjectionConfig(features, width, max(1, rows // width))
    elif all(key in tensors for key in ("latents", "proj_in.weight", "proj_out.weight")):
        _, queries, hidden = tensors["latents"].shape
        depth = len({key.split(".")[1] for key in tensors if key.startswith("layers.")})
        _check_width(file, tensors["proj_out.weight"].shape[0], width)
        if hidden % HEAD_DIM:
            raise UserError(f"{file}: latents of {hidden}, expected a multiple of {HEAD_DIM}")
        features = tensors["proj_in.weight"].shape[1]
        kind, config = Resampler, ResamplerConfig(features, width, queries, hidden, depth)
    else:
        raise UserError(
            f"{file}: {_PROJECTION} has keys such as {shown(sorted(tensors)[:3])}, expected proj "
            "and norm (IP-Adapter), or latents, proj_in and layers (Plus)"
        )
    filling = Filling(describe(kind, config), jnp.float32)
    for key, value in tensors.items():
        name = f"{_PROJECTION}.{key}"
        filling.put(file, key, lambda shape, v=value, n=name: expect_floats(file, n, v, shape))
    return filling.finish(file)


def _check_width(file: Path, found: int, width: int) -> None:
    if found != width:
        own, base = (f" ({_WIDTHS[x]})" if x in _WIDTHS else "" for x in (found, width))
        raise UserError(
            f"{file}: makes tokens of {found} numbers{own}, and the base attends to {width}{base}: "
            "the adapter is for another base"
        )


def width_of_base(width: object) -> str:
    """What bases whose texts' states have so many numbers are called."""
    found = _WIDTHS.get(width) if isinstance(width, int) else None
    return found or "Stable Diffusion 1 or 2"


def _read_kernels(file: Path, tensors: dict[str, np.ndarray], unet: nnx.Module) -> dict:
    places = attention_places(unet)
    expected = {
        f"{2 * row + 1}.to_{name}_ip.weight": (path, getattr(layer, f"to_{name}"))
        for row, (path, layer) in enumerate(places.items())
        for name in "kv"
    }
    if lora := next((key for key in tensors if "lora" in key), ""):
        raise UserError(f"{file}: {lora} is of an IP-Adapter FaceID, which needs a face encoder")
    if tensors.keys() != expected.keys():
        count, of = len(tensors) // 2, len(places)
        rows = sorted({key.partition(".")[0] for key in tensors}, key=lambda x: (len(x), x))
        raise UserError(
            f"{file}: is for {count} cross-attentions ({', '.join(rows[:3])}, ..., {rows[-1]}), "
            f"and the base has {of} (1, 3, ..., {2 * of - 1}): the adapter is for another base"
            + (", SDXL" if count == 70 else "")
        )
    kernels: dict[str, dict[str, Any]] = {path: {} for path in places}
    for key, (path, layer) in expected.items():
        shape = layer.kernel.get_value().shape[::-1]
        found = expect_floats(file, f"{_KERNELS}.{key} ({path})", tensors[key], shape)
        kernels[path][key[-len("k_ip.weight")]] = jnp.asarray(found.T, jnp.float32)
    return {path: (own["k"], own["v"]) for path, own in kernels.items()}
