"""Diffusion transformers in and out: diffusers' folders, and the authors' checkpoint files.

diffusers (0.42) keeps a copy of both embedders in every block, which must agree here; the authors'
files are flat state dicts with names and a fused query, key and value of their own, and no
configuration. Loading is strict in both directions, as everywhere.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError, shown
from jaxsynth.models.diffusion.dit import DiT, DiTConfig, position_embedding
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.weights import hub
from jaxsynth.weights.hf import DIFFUSERS_VERSION
from jaxsynth.weights.hub import resolve
from jaxsynth.weights.layout import Filling
from jaxsynth.weights.models import describe, load_model, save_model
from jaxsynth.weights.tensors import expect_floats
from jaxsynth.weights.torch_files.reader import read_state_dict

# How the published networks were trained and are sampled (arXiv 2212.09748, section 5): linear
# betas, learned variances, steps spread evenly over all timesteps.
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "variance_type": "learned_range",
}
# The same noise, drawn from by DDIM: what a network that is trained here is sampled with.
DDIM_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}

_CHECKPOINTS = (".pt", ".pth")
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_embedder.linear_1",
    "t_embedder.mlp.2": "time_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_INSIDE = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.proj": ("attn1.to_out.0",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
# Heads by width (arXiv 2212.09748, table 1): the one thing that no tensor's shape tells.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


@dataclasses.dataclass(frozen=True)
class DiTPipeline:
    """A class-conditional latent diffusion pipeline; `vae` None is one without an autoencoder.

    `scheduler_config` is the published networks' where the source has none. `id2label` names the
    classes, which may go without. `digest` is the sha256 of the weight files, "" if not loaded.
    """

    transformer: DiT
    vae: AutoencoderKL | None = None
    scheduler_config: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SCHEDULER))
    id2label: dict[int, str] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    digest: str = ""


def load_dit(
    name_or_path: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = None,
    config: DiTConfig | None = None,
) -> DiTPipeline:
    """A pipeline from a diffusers folder or hub id, a transformer's folder, or a .pt file.

    A .pt file is the authors' state dict, flat or under "ema" or "model"; its configuration follows
    from its tensors, or is `config` where the number of heads does not (widths other than the
    published). UserError naming file and key as for `models.load_model`, for copies of an embedder
    that differ, and where the parts do not fit together.
    """
    path = Path(name_or_path).expanduser()
    dtypes = {"dtype": dtype, "compute_dtype": compute_dtype}
    if path.is_file() and path.suffix in _CHECKPOINTS:
        transformer = _load_checkpoint(path, config, **dtypes)
        return DiTPipeline(transformer, folder=path.parent, digest=hub.digest([path]))
    if config is not None:
        raise ValueError(f"load_dit: config is for a .pt file, {name_or_path} has its own")
    folder = resolve(name_or_path)
    if not (folder / "model_index.json").is_file():
        transformer = load_model(DiT, DiTConfig, folder, **dtypes)
        digest = hub.digest(hub.weight_files(folder), [folder / "config.json"])
        return DiTPipeline(transformer, folder=folder, digest=digest)
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "DiTPipeline":
        raise UserError(
            f"{folder / 'model_index.json'}: _class_name "
            f"{shown(index.get('_class_name'))}, expected 'DiTPipeline'"
        )
    transformer = load_model(DiT, DiTConfig, folder / "transformer", **dtypes)
    names = _labels(folder, index.get("id2label"), transformer.config)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    parts, vae = ["transformer"], None
    # diffusers' way to say that a pipeline goes without a part.
    if index.get("vae") != [None, None]:
        vae = load_model(AutoencoderKL, AutoencoderKLConfig, folder / "vae", **dtypes)
        parts.append("vae")
    weights = [hub.weight_files(folder / part) for part in parts]
    settings = [folder / "model_index.json", *(folder / part / "config.json" for part in parts)]
    files = [file for part in weights for file in part]
    digest = hub.digest(files, [*settings, folder / "scheduler"])
    pipeline = DiTPipeline(transformer, vae, scheduler, names, folder, digest)
    if vae is not None:
        _check(folder, pipeline)
    return pipeline


def save_dit(pipeline: DiTPipeline, folder: str | os.PathLike, dtype: Any = None) -> None:
    """Write a folder that diffusers' DiTPipeline and we load, or the transformer's if it is alone.

    `dtype` None keeps each parameter's. diffusers ignores `freq_shift` 0 (it warns, and computes
    with 1), and refuses the patch kernel of a network with `condition_channels`.
    """
    folder = Path(folder)
    config = pipeline.transformer.config.to_dict()
    if pipeline.vae is None:
        save_model(pipeline.transformer, config, folder, dtype)
        return
    scheduler = pipeline.scheduler_config.get("_class_name")
    if not scheduler:
        raise ValueError("save_dit: scheduler_config has no _class_name, e.g. 'DDPMScheduler'")
    _check(folder, pipeline)
    save_model(pipeline.transformer, config, folder / "transformer", dtype)
    save_model(pipeline.vae, None, folder / "vae", dtype)
    (folder / "scheduler").mkdir(exist_ok=True)
    written = {"_diffusers_version": DIFFUSERS_VERSION, **pipeline.scheduler_config}
    hub.write_json(folder / "scheduler" / "scheduler_config.json", written)
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "id2label": {str(number): name for number, name in sorted(pipeline.id2label.items())},
        "scheduler": ["diffusers", scheduler],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    hub.write_json(folder / "model_index.json", index)


def _labels(folder: Path, names: Any, config: DiTConfig) -> dict[int, str]:
    if names is None:
        return {}
    where = folder / "model_index.json"
    if not isinstance(names, Mapping):
        raise UserError(f"{where}: id2label: expected an object, got {type(names).__name__}")
    labels = {}
    for key, name in names.items():
        if not key.isdecimal() or int(key) >= config.num_embeds_ada_norm:
            raise UserError(
                f"{where}: id2label: {shown(key)}, expected numbers below num_embeds_ada_norm "
                f"{config.num_embeds_ada_norm}"
            )
        labels[int(key)] = name
    return labels


def _check(folder: Path, pipeline: DiTPipeline) -> None:
    found, latent = pipeline.transformer.config.in_channels, pipeline.vae.config.latent_channels
    if found != latent:
        raise UserError(
            f"{folder}: transformer in_channels is {found}, but vae latent_channels is {latent}"
        )


def _load_checkpoint(
    path: Path, config: DiTConfig | None, *, dtype: Any, compute_dtype: Any
) -> DiT:
    tensors = read_state_dict(path)
    depth = len({match[1] for match in map(_BLOCK.fullmatch, tensors) if match})
    _check_keys(path, tensors, depth)
    config = config or _config_of(path, tensors, depth)
    compute = dtype if compute_dtype is None else compute_dtype
    filling = Filling(describe(DiT, config, compute), dtype, copies=False)
    side = config.sample_size // config.patch_size
    positions = position_embedding(side, side, config.hidden_size, side)
    found = tensors.pop("pos_embed")
    if found.shape != (1, *positions.shape) or np.abs(found[0] - positions).max() > 1e-3:
        raise UserError(
            f"{path}: pos_embed {found.shape}: not the sines and cosines of {side} x {side} "
            "patches, which are the only positions here"
        )
    for key, tensor in tensors.items():
        for name, part in _translated(key, tensor):
            filling.put(path, name, partial(_part, path, key, part))
    return filling.finish(path)


def _part(path: Path, key: str, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return expect_floats(path, key, part, shape)


def _check_keys(path: Path, tensors: Mapping[str, np.ndarray], depth: int) -> None:
    """The authors' keys, all of them and no other, for so many blocks."""
    blocks = range(max(depth, 1))
    modules = [*_OUTSIDE, *(f"blocks.{i}.{module}" for i in blocks for module in _INSIDE)]
    expected = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    expected = expected - {"y_embedder.embedding_table.bias"} | {"pos_embed"}
    unknown = sorted(tensors.keys() - expected)
    if unknown:
        raise UserError(
            f"{path}: unknown key {shown(unknown[0])} in a DiT checkpoint of the authors"
        )
    missing = sorted(expected - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{path}: key {shown(missing[0])} missing{more}")


def _config_of(path: Path, tensors: Mapping[str, np.ndarray], depth: int) -> DiTConfig:
    """The configuration that the shapes tell; a wrong one shows as a shape that does not fit."""
    shape = tensors["x_embedder.proj.weight"].shape
    if len(shape) != 4:
        raise UserError(f"{path}: x_embedder.proj.weight: shape {shape}, expected 4 axes")
    width, channels, patch = shape[:3]
    if width not in _HEADS:
        raise UserError(
            f"{path}: width {width} is none of the published {sorted(_HEADS)}, so the number of "
            "heads is unknown; give a `config`"
        )
    heads = _HEADS[width]
    return DiTConfig(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=tensors["final_layer.linear.bias"].size // patch**2,
        num_layers=depth,
        sample_size=round(tensors["pos_embed"].shape[1] ** 0.5) * patch,
        patch_size=patch,
        num_embeds_ada_norm=len(tensors["y_embedder.embedding_table.weight"]) - 1,
        norm_eps=1e-6,
        freq_shift=0,
    )


def _translated(key: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The key here (or the three, for a fused projection) and the tensor of each."""
    block = _BLOCK.fullmatch(key)
    if block is None:
        module, _, leaf = key.rpartition(".")
        yield f"{_OUTSIDE[module]}.{leaf}", tensor
        return
    number, module, leaf = block.groups()
    names = _INSIDE[module]
    for name, part in zip(names, np.array_split(tensor, len(names)), strict=True):
        yield f"transformer_blocks.{number}.{name}.{leaf}", part
