"""Files of InstantID: the adapter of identities and the folder of its IdentityNet.

| in the folder | what is in it |
|---|---|
| ip-adapter.bin (.safetensors) | `image_prompts`' parts, of which a resampler reads embeddings |
| ControlNetModel/ | IdentityNet, a ControlNet's config.json and weights in diffusers' form |
"""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.models.diffusion.controlnet import ControlNet, ControlNetConfig
from jaxsynth.models.diffusion.identity import Identity
from jaxsynth.models.diffusion.image_prompt import Resampler
from jaxsynth.weights.adapters.image_prompts import (
    find_image_adapter,
    read_image_adapter,
    width_of_base,
    write_image_adapter,
)
from jaxsynth.weights.models import load_model, save_model

FILE, NET = "ip-adapter.bin", "ControlNetModel"
_CLASS = "ControlNetModel"


def find_identity(source: str | Path) -> tuple[Path, Path]:
    """The adapter's file and IdentityNet's folder in a folder; UserError for what is missing."""
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder, expected one with {FILE} and {NET}/")
    net = source / NET
    if not (net / "config.json").is_file():
        raise UserError(f"{source}: no {NET}/config.json here, which an InstantID's folder has")
    return find_image_adapter(source), net


def read_identity(source: str | Path, unet: nnx.Module) -> Identity:
    """The InstantID of a folder, for this UNet.

    UserError naming the file and what does not fit; for one of another base, which it is of.
    """
    file, folder = find_identity(source)
    path = folder / "config.json"
    config = read_json(path)
    if config.get("_class_name", _CLASS) != _CLASS:
        raise UserError(f"{path}: _class_name {quoted(config['_class_name'])}, expected {_CLASS}")
    found = _family(config.get("addition_embed_type"), config.get("cross_attention_dim"))
    expected = _family(unet.config.addition_embed_type, unet.config.cross_attention_dim)
    if found != expected:
        raise UserError(f"{source}: is an InstantID of {found}, and the base is {expected}")
    adapter = read_image_adapter(file, unet)
    if not isinstance(adapter.projection, Resampler):
        raise UserError(
            f"{file}: makes tokens by one linear layer, expected the resampler of an InstantID "
            "(latents, proj_in, layers); an IP-Adapter is given by --image-adapter"
        )
    net = load_model(ControlNet, ControlNetConfig, folder)
    if net.config.conditioning_channels != 3:
        raise UserError(
            f"{path}: conditioning_channels {net.config.conditioning_channels}, expected 3 of a "
            "picture of keypoints"
        )
    return Identity(adapter, net)


def write_identity(folder: str | Path, identity: Identity) -> Path:
    """Writes a folder that `read_identity` and diffusers read; returns the adapter's file."""
    folder = Path(folder)
    save_model(identity.net, None, folder / NET, jnp.float32)
    return write_image_adapter(folder / FILE, identity.adapter)


def _family(addition: object, width: object) -> str:
    """What a base of this embedding and context is called, with its width."""
    name = "SDXL" if addition == "text_time" else width_of_base(width)
    return f"{name} (cross_attention_dim {width})"
