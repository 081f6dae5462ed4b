"""Whole Stable Diffusions between diffusers' folders and checkpoints in one file.

A folder becomes a file that A1111, ComfyUI and kohya's programs read, and a file a folder that
diffusers reads. What a file has no place for, numbers of heads and the noise schedule among them,
is those programs' own assumption: where the pipeline has another value, the metadata has it for
reading here, and it is said.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.weights import hub, recognize, single_file
from jaxsynth.weights.hf import KINDS, StableDiffusion, load_pipeline, save_pipeline
from jaxsynth.weights.layout import to_file
from jaxsynth.weights.pipeline_parts import XL_PIPELINES
from jaxsynth.weights.single_file import HF_CLIP, OPEN_CLIP, PREFIXES, inferred, names_of
from jaxsynth.weights.tensors import SUFFIXES, Tensors

FOLDERS, FILES = ("diffusers",), ("comfyui", "a1111")
# Fields that change no picture, or that only training reads.
_FREE = {"sample_size", "projection_dim", "eos_token_id", "upcast_attention", "force_upcast"}
_ARCHITECTURES = {
    (False, False): "stable-diffusion-v1",
    (False, True): "stable-diffusion-v1",
    (True, False): "stable-diffusion-v2-512",
    (True, True): "stable-diffusion-v2-768-v",
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
    if to in FILES and source.is_dir():
        index = read_json(source / "model_index.json")
        if index.get("_class_name") in XL_PIPELINES:
            raise UserError(f"{source}: is SDXL, which has no form in one file; --to=diffusers")
    files = hub.weight_files(source / "unet") if source.is_dir() else [source]
    name = f"{source}@{settings}" if settings and source.is_file() else source
    pipeline = load_pipeline(name, Tensors(files).dtype(), kinds=KINDS)
    if to in FOLDERS:
        save_pipeline(pipeline, target)
        return []
    return write_single_file(target, pipeline)


def write_single_file(path: Path, pipeline: StableDiffusion) -> list[str]:
    """Writes a pipeline as one safetensors file; returns what other programs assume otherwise.

    A text encoder with OpenCLIP's activation is written in OpenCLIP's names, as 2.x has them, with
    a last layer, of which only the number matters, and a projection, which nothing reads.
    """
    tensors: dict[str, np.ndarray] = {}
    open_clip = pipeline.text_encoder.config.hidden_act == "gelu"
    for part, prefix in PREFIXES.items():
        network = getattr(pipeline, part)
        values = to_file(network)
        if part == "text_encoder":
            tensors |= _open_clip(values, network.config) if open_clip else _hf_clip(values)
            continue
        try:
            names = names_of(part, network.config, values)
        except KeyError as error:
            raise UserError(f"{path}: a checkpoint in one file has no layer {error}") from None
        for name, key in names.items():
            flat = part == "vae" and ".attn_1." in name and values[key].ndim == 2
            tensors[prefix + name] = values[key][:, :, None, None] if flat else values[key]
    kind = pipeline.scheduler_config.get("prediction_type", "epsilon")
    v = kind == "v_prediction"
    settings, notes = _settings(pipeline, {k: x.shape for k, x in tensors.items()}, v)
    if v != open_clip:
        notes.append(f"prediction_type {kind}")
    metadata = {
        "modelspec.architecture": _ARCHITECTURES[open_clip, v],
        single_file.PREDICTION: "v" if v else "epsilon",
        single_file.SETTINGS: json.dumps(settings, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    hub.write_tensors(path, tensors, metadata)
    return _said(path, notes)


def _said(path: Path, notes: list[str]) -> list[str]:
    lines = [f"{path} has no tokenizer: as a base here it is {path}@FOLDER, with one in FOLDER"]
    if notes:
        lines.append(
            "other programs assume other values and make other pictures, or need them set: "
            + ", ".join(notes)
        )
    return lines


def _settings(
    pipeline: StableDiffusion, shapes: dict[str, tuple[int, ...]], v_prediction: bool
) -> tuple[dict[str, Any], list[str]]:
    """What the file's tensors do not tell, and which of that changes pictures."""
    settings: dict[str, Any] = {"scheduler": pipeline.scheduler_config}
    notes = []
    for part, fields in inferred(shapes, v_prediction=v_prediction).items():
        kind, config = single_file.CONFIGS[part], getattr(pipeline, part).config
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
        if value is not None and value != single_file.SCHEDULE.get(name):
            notes.append(f"scheduler {name} {value}")
    return settings, notes


def _each(value: Any, config: Any) -> Any:
    """A number for all levels as one for each."""
    levels = len(getattr(config, "block_out_channels", (0,)))
    return (value,) * levels if isinstance(value, int) else value


def _hf_clip(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {HF_CLIP + key: value for key, value in values.items()}


def _open_clip(values: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    layers, width = config.num_hidden_layers, config.hidden_size
    names = names_of("text_encoder", config, values)
    tensors = {}
    for name, key in names.items():
        head, split, leaf = name.partition(".q_proj.")
        if split:
            three = [values[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            tensors[f"{head}.in_proj_{leaf}"] = np.concatenate(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[name] = values[key]
    last = f"transformer.resblocks.{layers - 1}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace(last, f"transformer.resblocks.{layers}.")] = tensors[name].copy()
    kind = tensors["token_embedding.weight"].dtype
    tensors["text_projection"] = np.eye(width, dtype=kind)
    tensors["logit_scale"] = np.asarray(math.log(100), np.float32)
    return {OPEN_CLIP + name: value for name, value in tensors.items()}
