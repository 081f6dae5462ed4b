"""Files of motion modules (AnimateDiff), and of LoRA on them, in diffusers' and the authors' names.

| file | names |
|---|---|
| a folder: config.json and safetensors | diffusers' `MotionAdapter` |
| one .safetensors, .ckpt or .pt | the authors': `motion_modules.N.temporal_transformer....` |
| a LoRA of motion modules | `...attn1.to_q.lora.down.weight`, or the authors' `...to_q_lora...` |

A file by itself says neither heads nor groups: they are the published 8, and the base's. The table
of positions that all files hold is computed here; one with others is refused.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsynth.adapters.inject import AdapterState, merge, with_scale
from jaxsynth.adapters.registry import attach
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError, quoted, shown
from jaxsynth.models.diffusion.motion import MotionConfig, MotionModules, check_base, positions
from jaxsynth.models.diffusion.unet import UNet2DConditionConfig
from jaxsynth.weights import hub, recognize
from jaxsynth.weights.adapters import diffusers, lora_files, tensor_files
from jaxsynth.weights.checks import check_counts
from jaxsynth.weights.hf import DIFFUSERS_VERSION
from jaxsynth.weights.layout import Filling, to_file
from jaxsynth.weights.models import describe_of
from jaxsynth.weights.tensors import PICKLED, SUFFIXES, Tensors, expect_floats
from jaxsynth.weights.torch_files.writer import write_pickled

FOLDERS, FILES = ("diffusers",), ("comfyui",)
_CLASS, _HEADS = "MotionAdapter", 8
_RENAMED = {
    ".attention_blocks.0": ".attn1",
    ".attention_blocks.1": ".attn2",
    ".norms.0": ".norm1",
    ".norms.1": ".norm2",
    ".ff_norm": ".norm3",
}
_POSITIONS = re.compile(r"\.pos_(?:embed|encoder)\.pe$")
# What half precision and bfloat16 leave of sines.
_ROUNDING = 0.01
# What of a config shows in the shapes of tensors.
_SHOWN = (
    "block_out_channels",
    "use_motion_mid_block",
    "motion_layers_per_block",
    "motion_max_seq_length",
)


def is_motion(source: Path) -> bool:
    """Whether a path is a folder or a file of motion modules."""
    if source.is_dir():
        config = read_json(source / "config.json", optional=True)
        return isinstance(config, dict) and config.get("_class_name") == _CLASS
    if source.suffix not in SUFFIXES:
        return False
    try:
        return recognize.kind_of(Tensors([source]).keys)[0] == recognize.MOTION
    except UserError:  # the readers of adapters say what is wrong with the file
        return False


def read_motion(
    source: str | Path, base: UNet2DConditionConfig | None = None, *, dtype: Any = jnp.float32
) -> MotionModules:
    """The motion modules of a folder or a file, for this base where it is given.

    `dtype` is that of parameters and computation. UserError naming the file and what it is where
    it holds other things, modules of another version than its config says, or of another base.
    """
    source = Path(source)
    folder = source.is_dir()
    tensors = Tensors(hub.weight_files(source) if folder else [source])
    _check_keys(tensors)
    shapes = {_named(key): shape for key, shape in tensors.shapes().items()}
    where = source / "config.json" if folder else source
    try:
        found = _seen(shapes, source)
        if not folder:
            groups = base.norm_num_groups if base else MotionConfig.motion_norm_num_groups
            config = dataclasses.replace(
                found, motion_num_attention_heads=_HEADS, motion_norm_num_groups=groups
            )
        else:
            config = MotionConfig.from_dict(_config(where))
            check_counts(where, config, *tensors.counts())
            _check_version(where, config, found, shapes)
        if base:
            check_base(config, base)
        filling = Filling(describe_of(where, MotionModules, config, dtype), dtype)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    for file, key, read in tensors.items():
        name = _named(key)
        if _POSITIONS.search(name):
            _check_positions(file, key, read(), config.motion_max_seq_length)
            continue

        def tensor(shape, file=file, key=key, read=read):
            return expect_floats(file, key, read(), shape)

        filling.put(file, name, tensor)
    return filling.finish(tensors.where)


def write_motion(target: str | Path, modules: MotionModules, to: str = "diffusers") -> Path:
    """Writes diffusers' folder, or one file in the authors' names ("comfyui"); the path written.

    UserError for a file of another ending than such files have, or of modules whose heads are not
    those that readers of such files assume.
    """
    target, config = Path(target), modules.config
    tensors = to_file(modules)
    if to in FOLDERS:
        target.mkdir(parents=True, exist_ok=True)
        tensors |= _positions_of(tensors, config, "pos_embed")
        hub.write_tensors(target / hub.DIFFUSERS_WEIGHTS, tensors)
        identity = {"_class_name": _CLASS, "_diffusers_version": DIFFUSERS_VERSION}
        hub.write_json(target / "config.json", {**identity, **dataclasses.asdict(config)})
        return target
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target}: expected a file ending in {', '.join(SUFFIXES)}")
    if set(config.per_level("motion_num_attention_heads")) != {_HEADS}:
        raise UserError(
            f"{target}: motion modules of {config.motion_num_attention_heads} heads, and a file "
            f"without a config is read with {_HEADS}; write diffusers' folder"
        )
    for attention in ("attn1", "attn2"):
        tensors |= _positions_of(tensors, config, f"{attention}.pos_encoder")
    named = {_authors(key): value for key, value in tensors.items()}
    if target.suffix in PICKLED:
        write_pickled(target, {key: np.asarray(x, np.float32) for key, x in named.items()})
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    hub.write_tensors(target, named)
    return target


def with_motion_lora(
    modules: MotionModules, source: str | Path, strength: float = 1.0
) -> MotionModules:
    """The modules with the LoRA of a file in their weights (MotionLoRA, at this strength).

    Of a folder it is diffusers' file.

    Without a configuration in the file, alpha is the rank. UserError naming the file for a LoRA of
    other layers, or of modules of another version or base.
    """
    source = Path(source)
    source = diffusers.find(source)
    tensors, _ = tensor_files.load(source)
    kind, key = recognize.kind_of(list(tensors))
    if not kind.startswith("an adapter"):
        what = recognize.said(kind or "no adapter")
        raise UserError(f"{source}: {what} ({shown(key)}), expected a LoRA of motion modules")
    lora_files.refuse_other_kinds(tensors, source)
    pairs: dict[tuple[str, str], np.ndarray] = {}
    for key, value in tensors.items():
        name = lora_files.canonical(_named(key)).removeprefix("unet.")
        if recognize.MOTION_PLACE not in name:
            raise UserError(
                f"{source}: is a LoRA of other layers ({shown(key)}), expected one of motion "
                "modules; a LoRA of the base is given by --adapter=FILE"
            )
        pairs[lora_files.parse(key, name, source)] = value
    has_middle = any(path.startswith("mid_block.") for path, _ in pairs)
    if has_middle and not modules.config.use_motion_mid_block:
        raise UserError(
            f"{source}: is a LoRA of motion modules v2, which have a middle block, and the motion "
            f"modules are {modules.config.version}"
        )
    config = lora_files.inferred_config(pairs, str(source))
    state = AdapterState(lora_files.arrays_of(pairs, config, source), config)
    try:
        return merge(with_scale(attach(modules, state), strength))
    except UserError as error:
        raise UserError(f"{source}: a LoRA of motion modules of another base: {error}") from error


def write_motion_lora(target: str | Path, state: AdapterState, to: str = "diffusers") -> Path:
    """Writes a LoRA of motion modules in diffusers' names, or in the authors' ("comfyui").

    `state` is of `MotionModules`; such files have no scale, which is put into the factors. The path
    written. UserError for a file of another ending than these have, ValueError for another kind.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: expected a file ending in .safetensors")
    tensors = {}
    for (path, factor), value in lora_files.torch_tensors(state).items():
        end, scale = ("down", 1.0) if factor == "lora_A" else ("up", state.config.scaling_at(path))
        if to in FOLDERS:
            key = f"unet.{path}.lora.{end}.weight"
        else:
            block, _, layer = _authors(f"{path}.").rpartition(".to_")
            key = f"{block}.processor.to_{layer.removesuffix('.').removesuffix('.0')}_lora.{end}"
            key = f"{key}.weight"
        tensors[key] = np.asarray(value * scale, np.float32)
    target.parent.mkdir(parents=True, exist_ok=True)
    hub.write_tensors(target, tensors)
    return target


def _named(key: str) -> str:
    """An authors' key in diffusers' names; diffusers' own are as they are."""
    key = key.removeprefix("module.").replace(".temporal_transformer", "")
    for old, new in _RENAMED.items():
        key = key.replace(old, new)
    return key


def _authors(key: str) -> str:
    """The authors' key of one in diffusers' names."""
    key = re.sub(r"(\.motion_modules\.\d+)", r"\1.temporal_transformer", key)
    for old, new in _RENAMED.items():
        key = key.replace(f"{new}.", f"{old}.")
    return key


def _positions_of(
    tensors: Mapping[str, np.ndarray], config: MotionConfig, name: str
) -> dict[str, np.ndarray]:
    """The tables of positions that files hold, under this name in each block."""
    first = ".norm1.weight"
    return {
        f"{key.removesuffix(first)}.{name}.pe": positions(config.motion_max_seq_length, x.size)[
            None
        ]
        for key, x in tensors.items()
        if key.endswith(first)
    }


def _config(path: Path) -> dict[str, Any]:
    """The content of a config.json; UserError for one of another class."""
    config = read_json(path)
    found = config.get("_class_name", _CLASS)
    if found != _CLASS:
        raise UserError(f"{path}: _class_name {quoted(found)}, expected {_CLASS!r}")
    return config


def _check_version(
    path: Path, config: MotionConfig, found: MotionConfig, shapes: Mapping[str, Any]
) -> None:
    """UserError for a config of other modules than the weights."""
    placed = any(_POSITIONS.search(key) for key in shapes)
    for field in _SHOWN if placed else _SHOWN[:-1]:
        count = field == "motion_layers_per_block"
        own, theirs = (x.per_level(field) if count else getattr(x, field) for x in (config, found))
        if own != theirs:
            raise UserError(
                f"{path}: is of motion modules {config.version} ({field} {own}), and the weights "
                f"are of {found.version} ({theirs})"
            )


def _check_positions(path: Path, key: str, value: np.ndarray, length: int) -> None:
    """UserError for positions that are not those computed here."""
    expect_floats(path, key, value)
    if value.ndim != 3 or value.shape[:2] != (1, length) or value.shape[2] % 2:
        raise UserError(f"{path}: {key}: shape {value.shape}, expected (1, {length}, channels)")
    table = np.asarray(value[0], np.float32)
    if np.abs(table - positions(*table.shape)).max() > _ROUNDING:
        raise UserError(f"{path}: {key}: positions of another kind than AnimateDiff's sinusoids")


def _check_keys(tensors: Tensors) -> None:
    """UserError naming what the files are where they hold other things than motion modules."""
    keys, where = tensors.keys, tensors.where
    others = [key for key in keys if recognize.MOTION_PLACE not in key]
    kind, key = recognize.kind_of(keys)
    if len(others) == len(keys):
        raise UserError(
            f"{where}: {recognize.said(kind or 'no network')} ({shown(key)}), expected motion "
            "modules of AnimateDiff"
        )
    if kind.startswith("an adapter"):
        raise UserError(
            f"{where}: is a LoRA ({shown(key)}), expected motion modules; one of motion modules is "
            "given by --motion-lora=FILE"
        )
    if others:
        raise UserError(f"{where}: {shown(others[0])} is of no motion module")


def _seen(shapes: Mapping[str, tuple[int, ...]], source: Path) -> MotionConfig:
    """The config that the shapes show, of one head and one group."""
    places = {
        tuple(map(int, found.groups())): shapes[key][0] if shapes[key] else 0
        for key in shapes
        if (found := re.match(r"down_blocks\.(\d+)\.motion_modules\.(\d+)\.norm\.weight$", key))
    }
    levels = sorted({level for level, _ in places})
    if not levels or levels != list(range(len(levels))):
        raise UserError(f"{source}: motion modules of levels {levels}, expected 0, 1, ...")
    counts = tuple(sum(level == own for own, _ in places) for level in levels)
    lengths = [x[1] for key, x in shapes.items() if _POSITIONS.search(key) and len(x) > 1]
    return MotionConfig(
        block_out_channels=tuple(places[level, 0] for level in levels),
        motion_layers_per_block=counts if len(set(counts)) > 1 else counts[0],
        motion_num_attention_heads=1,
        motion_norm_num_groups=1,
        motion_max_seq_length=max(lengths, default=MotionConfig.motion_max_seq_length),
        use_motion_mid_block=any(key.startswith("mid_block.") for key in shapes),
    )
