"""Whole Stable Diffusions between diffusers' folders and checkpoints in one file.

A folder becomes a file that A1111, ComfyUI and kohya's programs read, and a file a folder that
diffusers reads. What a file has no place for, numbers of heads and the noise schedule among them,
is those programs' own assumption: where the pipeline has another value, the metadata has it for
reading here, and it is said.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.core.errors import UserError
from jaxsynth.weights import hub, recognize
from jaxsynth.weights.hf import KINDS, StableDiffusion, load_pipeline, save_pipeline
from jaxsynth.weights.layout import to_file
from jaxsynth.weights.original_names import TEXT_PROJECTION
from jaxsynth.weights.single_file import families
from jaxsynth.weights.single_file.checkpoint import (
    PREDICTION,
    SETTINGS,
    VELOCITIES,
    ZERO_SNR,
    ZEROES,
    names_of,
)
from jaxsynth.weights.single_file.families import Family
from jaxsynth.weights.single_file.shapes import inferred
from jaxsynth.weights.tensors import SUFFIXES, Tensors

FOLDERS, FILES = ("diffusers",), ("comfyui", "a1111")
# Fields that change no picture, or that only training reads.
_FREE = {"sample_size", "projection_dim", "eos_token_id", "upcast_attention", "force_upcast"}
_ARCHITECTURES = {
    (families.FIRST.name, False): "stable-diffusion-v1",
    (families.FIRST.name, True): "stable-diffusion-v1",
    (families.SECOND.name, False): "stable-diffusion-v2-512",
    (families.SECOND.name, True): "stable-diffusion-v2-768-v",
    (families.XL.name, False): "stable-diffusion-xl-v1-base",
    (families.XL.name, True): "stable-diffusion-xl-v1-base",
}

# What each family is taken to predict, by other programs; SDXL's files have a key for one of both.
_TOLD = {
    families.FIRST.name: ("epsilon",),
    families.SECOND.name: ("v_prediction",),
    families.XL.name: ("epsilon", "v_prediction"),
}


def is_base(source: Path) -> bool:
    """Whether a path is a pipeline's folder, or a file that is a checkpoint of one."""
    if source.is_dir():
        return (source / "model_index.json").is_file()
    if source.suffix not in SUFFIXES:
        return False
    try:
        keys = Tensors([source]).keys
    except UserError:  # the readers of adapters know more kinds of files, and say what is wrong
        return False
    return recognize.kind_of(keys)[0].startswith("a checkpoint")


def convert(source: Path, target: Path, to: str, settings: str = "") -> list[str]:
    """Writes a base in another form, in the type of its own weights; returns what to know.

    `settings` is the folder that a file lacks (`single_file`). UserError as `load_pipeline`, and
    for a network that has no names in a file.
    """
    if to in FILES and target.suffix != ".safetensors":
        raise UserError(f"{target}: expected a file ending in .safetensors")
    files = hub.weight_files(source / "unet") if source.is_dir() else [source]
    name = f"{source}@{settings}" if settings and source.is_file() else source
    pipeline = load_pipeline(name, Tensors(files).dtype(), kinds=KINDS)
    if to in FOLDERS:
        save_pipeline(pipeline, target)
        return []
    return write_single_file(target, pipeline)


def write_single_file(path: Path, pipeline: StableDiffusion) -> list[str]:
    """Writes a pipeline as one safetensors file; returns what other programs assume otherwise.

    One text encoder with OpenCLIP's activation is written in OpenCLIP's names, as 2.x has them,
    with a last layer, of which only the number matters, and a projection, which nothing reads.
    SDXL's second is written so whole. What programs tell by keys of SDXL, they are given.
    """
    family = _family(pipeline)
    tensors: dict[str, np.ndarray] = {}
    for part, prefix in family.prefixes.items():
        network = getattr(pipeline, part)
        values = to_file(network)
        if part == family.open_clip:
            own = _open_clip(values, names_of(part, network.config, values))
            if not family.double:
                own = _with_end(own, network.config)
        elif part in family.texts:
            own = values
        else:
            own = _original(path, part, network.config, values)
        tensors |= {prefix + name: value for name, value in own.items()}
    scheduler = pipeline.scheduler_config
    kind = scheduler.get("prediction_type", "epsilon")
    v, ends_in_noise = kind == "v_prediction", bool(scheduler.get("rescale_betas_zero_snr"))
    settings, notes = _settings(pipeline, family, {k: x.shape for k, x in tensors.items()}, v)
    if family.double and v:
        tensors[VELOCITIES] = np.zeros(0, np.float32)
        if ends_in_noise:
            tensors[ZERO_SNR] = np.zeros(0, np.float32)
    elif ends_in_noise:
        notes.append("scheduler rescale_betas_zero_snr True")
    if kind not in _TOLD[family.name]:
        notes.append(f"prediction_type {kind}")
    metadata = {
        "modelspec.architecture": _ARCHITECTURES[family.name, v],
        PREDICTION: "v" if v else "epsilon",
        SETTINGS: json.dumps(settings, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    hub.write_tensors(path, tensors, metadata)
    return _said(path, notes)


def _family(pipeline: StableDiffusion) -> Family:
    if pipeline.text_encoder_2 is not None:
        return families.XL
    open_clip = pipeline.text_encoder.config.hidden_act == "gelu"
    return families.SECOND if open_clip else families.FIRST


def _original(
    path: Path, part: str, config: Any, values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A UNet or an autoencoder in the original code's names; UserError where it has none."""
    try:
        names = names_of(part, config, values)
    except KeyError as error:
        raise UserError(f"{path}: a checkpoint in one file has no layer {error}") from None
    found = {}
    for name, key in names.items():
        flat = part == "vae" and ".attn_1." in name and values[key].ndim == 2
        found[name] = values[key][:, :, None, None] if flat else values[key]
    return found


def _said(path: Path, notes: list[str]) -> list[str]:
    lines = [f"{path} has no tokenizer: as a base here it is {path}@FOLDER, with one in FOLDER"]
    if notes:
        lines.append(
            "other programs assume other values and make other pictures, or need them set: "
            + ", ".join(notes)
        )
    return lines


def _settings(
    pipeline: StableDiffusion,
    family: Family,
    shapes: dict[str, tuple[int, ...]],
    v_prediction: bool,
) -> tuple[dict[str, Any], list[str]]:
    """What the file's tensors do not tell, and which of that changes pictures."""
    settings: dict[str, Any] = {"scheduler": pipeline.scheduler_config}
    if family.double:
        settings[ZEROES] = pipeline.zeroes_empty
    notes = []
    for part, fields in inferred(family, shapes, v_prediction=v_prediction).items():
        kind, config = family.parts[part][1], getattr(pipeline, part).config
        assumed = kind.from_dict(fields)
        for field in dataclasses.fields(kind):
            value = getattr(config, field.name)
            other = getattr(assumed, field.name)
            if value == other or _each(value, config) == _each(other, config):
                continue
            settings.setdefault(part, {})[field.name] = value
            if field.name not in _FREE:
                notes.append(f"{part} {field.name} {value} (they: {other})")
    for name in ("beta_start", "beta_end", "beta_schedule", "trained_betas"):
        value = pipeline.scheduler_config.get(name)
        if value is not None and value != families.SCHEDULE.get(name):
            notes.append(f"scheduler {name} {value}")
    return settings, notes


def _each(value: Any, config: Any) -> Any:
    """A number for all levels as one for each."""
    levels = len(getattr(config, "block_out_channels", (0,)))
    return (value,) * levels if isinstance(value, int) else value


def _open_clip(values: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """A text encoder in OpenCLIP's names, q, k and v in one."""
    tensors = {}
    for name, key in names.items():
        head, split, leaf = name.partition(".q_proj.")
        if split:
            three = [values[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            tensors[f"{head}.in_proj_{leaf}"] = np.concatenate(three)
        elif name == TEXT_PROJECTION:
            tensors[name] = np.ascontiguousarray(values[key].T)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[name] = values[key]
    return tensors | {"logit_scale": np.asarray(math.log(100), np.float32)}


def _with_end(tensors: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """With the tower's last layer and its projection, which 2.x ships and nothing reads."""
    layers, found = config.num_hidden_layers, dict(tensors)
    last = f"transformer.resblocks.{layers - 1}."
    for name in [name for name in tensors if name.startswith(last)]:
        found[name.replace(last, f"transformer.resblocks.{layers}.")] = tensors[name].copy()
    kind = tensors["token_embedding.weight"].dtype
    return found | {TEXT_PROJECTION: np.eye(config.hidden_size, dtype=kind)}
