"""Single networks in and out of folders in Hugging Face's format: config.json and weights.

Loading is strict in both directions: a key too many, a key too few or a shape that differs is an
error, never a warning, since a silently random layer costs a training run.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.models.clip import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
)
from jaxsynth.models.diffusion.controlnet import ControlNet
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.models.diffusion.unet import UNet2DCondition
from jaxsynth.models.diffusion.vae import AutoencoderKL
from jaxsynth.models.siglip import SiglipModel, SiglipTextModel, SiglipVisionModel
from jaxsynth.weights import hub
from jaxsynth.weights.checks import check_counts
from jaxsynth.weights.layout import Filling, stored, to_file
from jaxsynth.weights.pipeline_parts import (
    DIFFUSERS_VERSION,
)
from jaxsynth.weights.tensors import Tensors, expect_floats

Model = TypeVar("Model", bound=nnx.Module)

_TRANSFORMERS = {
    CLIPModel: "clip",
    CLIPTextModel: "clip_text_model",
    CLIPTextModelWithProjection: "clip_text_model",
    CLIPVisionModel: "clip_vision_model",
    SiglipModel: "siglip",
    SiglipTextModel: "siglip_text_model",
    SiglipVisionModel: "siglip_vision_model",
}
_DIFFUSERS = {
    AutoencoderKL: "AutoencoderKL",
    ControlNet: "ControlNetModel",
    DiT: "DiTTransformer2DModel",
    UNet2DCondition: "UNet2DConditionModel",
}


class _OneKey:
    """Stands in for `nnx.Rngs` where no value is computed.

    Under tracing `nnx.Rngs` counts its keys in a traced variable, and each count makes JAX search
    the whole program so far: 8.6 s of processor time for Stable Diffusion's U-Net, 0.9 s with this.
    """

    def __init__(self):
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def describe(model_cls: Callable[..., Model], config: Any, dtype: Any = jnp.float32) -> Model:
    """A network of `jax.ShapeDtypeStruct`s: its structure and shapes, without any value.

    Traced once for each config, which is frozen; each caller gets a copy to change.
    """
    graphdef, state = _split(model_cls, config, dtype)
    return nnx.merge(graphdef, jax.tree.map(lambda shape: shape, state))


@functools.lru_cache(maxsize=32)
def _split(model_cls: Callable[..., Model], config: Any, dtype: Any) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: model_cls(config, dtype=dtype, rngs=_OneKey())))


def describe_of(
    path: Path, model_cls: Callable[..., Model], config: Any, dtype: Any = jnp.float32
) -> Model:
    """`describe` for a config read from `path`; UserError naming it if there is no such network.

    Sizes may each be valid and together make shapes that JAX refuses.
    """
    try:
        return describe(model_cls, config, dtype)
    except (ValueError, TypeError, ArithmeticError, IndexError) as error:
        reason = quoted(str(error).partition("\n")[0], 200)[1:-1]
        raise UserError(f"{path}: no {model_cls.__name__} can have this shape: {reason}") from error


def load_model(
    model_cls: Callable[..., Model],
    config_cls: type,
    folder: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
) -> Model:
    """A network from config.json and the weights (one file or shards) in `folder`.

    Parameters are stored in `dtype` (norms and scalars in float32 at least); `compute_dtype`
    (default: `dtype`) is what layers compute in.
    UserError naming file and key for an unknown, missing or doubly given key, a shape other than
    the config's, an integer tensor, a file that is cut short, or a config field not supported.
    """
    folder = Path(folder)
    config = config_at(config_cls, folder / "config.json")
    compute = dtype if compute_dtype is None else compute_dtype
    weights = Tensors(hub.weight_files(folder))
    check_counts(folder / "config.json", config, *weights.counts())
    filling = Filling(describe_of(folder / "config.json", model_cls, config, compute), dtype)
    fill(filling, weights.items())
    return filling.finish(weights.where)


def stored_shapes(model: Model, dtype: Any) -> Model:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.eval_shape(lambda values: stored(values, dtype), state))


def fill(filling: Filling, weights: Iterable[tuple[Path, str, Callable[[], np.ndarray]]]) -> None:
    """Put all tensors of some files (`Tensors.items`) into a network."""
    for file, key, read in weights:

        def tensor(shape, file=file, key=key, read=read):
            return expect_floats(file, key, read(), shape)

        filling.put(file, key, tensor)


def save_model(
    model: nnx.Module,
    config: Mapping[str, Any] | None,
    folder: str | os.PathLike,
    dtype: Any = None,
) -> None:
    """Write config.json and one safetensors file that diffusers or transformers loads.

    `config` None takes the model's own; `dtype` None keeps each parameter's, another spares norms
    and scalars as `load_model` does. A model that still has
    adapter layers is a ValueError: merge it first.
    """
    folder = Path(folder)
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        if "base" in path:
            raise ValueError(
                f"save_model: {'.'.join(map(str, path))} belongs to an adapter layer; "
                "merge the adapters or save them on their own"
            )
    tensors = to_file(model, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    name = _weights_name(model)
    hub.write_tensors(folder / name, tensors)
    written = dataclasses.asdict(model.config) if config is None else dict(config)
    hub.write_json(folder / "config.json", {**_identity(model), **written})


def config_at(config_cls: type, path: Path) -> Any:
    try:
        return config_cls.from_dict(read_json(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _weights_name(model: nnx.Module) -> str:
    if type(model) in _TRANSFORMERS:
        return hub.TRANSFORMERS_WEIGHTS
    return hub.DIFFUSERS_WEIGHTS


def _identity(model: nnx.Module) -> dict[str, Any]:
    """What the other libraries need to recognise a config.json."""
    if type(model) in _TRANSFORMERS:
        kind = type(model).__name__
        # transformers would compute in the type that is stored: half precision, for small files.
        return {
            "architectures": [kind],
            "model_type": _TRANSFORMERS[type(model)],
            "torch_dtype": "float32",
        }
    name = _DIFFUSERS.get(type(model), type(model).__name__)
    return {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
