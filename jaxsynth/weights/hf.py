"""Stable Diffusion pipelines, CLIP and SigLIP folders in and out of Hugging Face's format.

Everything this package trains on or produces is such a folder, because that is what diffusers and
transformers load. Loading is strict in both directions: a key too many, a key too few or a shape
that differs is an error, never a warning, since a silently random layer costs a training run.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxsynth.core.console import console
from jaxsynth.core.documents import checked, read_json, take
from jaxsynth.core.errors import UserError
from jaxsynth.core.places import ASSETS
from jaxsynth.data.pipeline.augment import EvalTransform
from jaxsynth.diffusion.scheduler_config import corrected
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    CLIPConfig,
    CLIPModel,
)
from jaxsynth.models.siglip import SiglipConfig, SiglipModel, TwoTowers
from jaxsynth.ops.resize import Filter
from jaxsynth.weights import hub, published, siglip
from jaxsynth.weights.hub import resolve
from jaxsynth.weights.layout import Filling
from jaxsynth.weights.models import (
    config_at,
    describe,
    describe_of,
    fill,
    load_model,
    save_model,
    stored_shapes,
)
from jaxsynth.weights.pipeline_parts import (
    DIFFUSERS_VERSION,
    EDITING,
    INPAINTING,
    KINDS,
    PIPELINES,
    SINGLE,
    TEXT_TO_IMAGE,
    XL_PIPELINES,
    StableDiffusion,
    TokenizerPair,
    check_end,
    check_pipeline,
    check_texts,
    check_tokenizer,
    is_double,
    kind_of,
    model_index,
    parts_in,
    read_tokenizer,
    zeroes_empty,
)
from jaxsynth.weights.single_file.checkpoint import Checkpoint, find_checkpoint
from jaxsynth.weights.text_tokenizer import TextTokenizer
from jaxsynth.weights.tokenizer import Tokenizer

__all__ = [
    "EDITING",
    "INPAINTING",
    "KINDS",
    "PIPELINES",
    "TEXT_TO_IMAGE",
    "Clip",
    "StableDiffusion",
    "kind_of",
    "load_clip",
    "load_pipeline",
    "read_json",
    "resolve",
    "save_clip",
    "save_pipeline",
]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A CLIP or SigLIP with what its inputs need.

    Images are `(pixels / 255 - mean) / std`, square: the short side is resized and the middle cut
    out, or with `squash` (SigLIP) both sides are resized.
    """

    model: TwoTowers
    tokenizer: Tokenizer | TextTokenizer
    image_size: int
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    folder: Path | None = None
    digest: str = ""
    squash: bool = False
    interpolation: Filter = "bicubic"

    @property
    def transform(self) -> EvalTransform:
        """From an image of any size to what the network is given."""
        return EvalTransform(self.image_size, self.mean, self.std, self.squash, self.interpolation)


def is_here(name_or_path: str | os.PathLike) -> bool:
    """Whether a base is the package's, a folder or a file, and nothing to download."""
    name = os.fspath(name_or_path)
    places = (name, name.rpartition("@")[0] or name)
    return name.split("/")[0] == "tiny" or any(Path(p).expanduser().exists() for p in places)


def has_shapes(name_or_path: str | os.PathLike) -> bool:
    """Whether a base's sizes are at hand: `is_here`, or a published one that is known by its id."""
    return is_here(name_or_path) or os.fspath(name_or_path) in published.PIPELINES


def pipeline_configs(
    name_or_path: str | os.PathLike, kinds: Sequence[str] = TEXT_TO_IMAGE
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of a pipeline's networks by part, and its scheduler's; no weights are read.

    Of a hub id that is known (`weights.published`) no file is read either. `kinds` as in
    `load_pipeline`.
    """
    if (known := _known(name_or_path)) is not None:
        parts_in(Path(name_or_path), _index_of_known(known), kinds)
        return known.networks, dict(known.scheduler)
    checkpoint = find_checkpoint(name_or_path)
    if checkpoint is not None:
        check_texts(checkpoint.path, checkpoint.family.double, kinds)
        return checkpoint.configs, checkpoint.scheduler
    folder = resolve(name_or_path, weights=False)
    return _configs_in(folder, parts_in(folder, _index_of(folder), kinds))


def _known(name_or_path: str | os.PathLike) -> published.Published | None:
    return None if is_here(name_or_path) else published.PIPELINES.get(os.fspath(name_or_path))


def _index_of_known(known: published.Published) -> dict[str, Any]:
    return model_index("", known.kind, zeroes=known.zeroes_empty)


def _index_of(folder: Path) -> dict[str, Any]:
    """model_index.json, or what it would say: a plan needs the networks' configs alone."""
    if index := read_json(folder / "model_index.json", optional=True):
        return index
    double = (folder / "text_encoder_2").is_dir()
    return model_index("", (XL_PIPELINES if double else PIPELINES)[0], zeroes=double)


def _configs_in(
    folder: Path, parts: Mapping[str, tuple[type, type]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    configs = {
        part: config_at(kind, folder / part / "config.json") for part, (_, kind) in parts.items()
    }
    return configs, read_json(folder / "scheduler" / "scheduler_config.json")


def describe_pipeline(
    name_or_path: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = None,
    kinds: Sequence[str] = TEXT_TO_IMAGE,
) -> StableDiffusion:
    """A pipeline of shapes, from its configs and tokenizer alone: no weights are read.

    Of a published one (`weights.published`) nothing is read: its tokenizer makes as many ids of a
    text, of another vocabulary, and `folder` is None. `kinds` as in `load_pipeline`.
    """
    compute = dtype if compute_dtype is None else compute_dtype
    folder, parts, zeroes = None, SINGLE, False
    if (known := _known(name_or_path)) is not None:
        parts = parts_in(Path(name_or_path), _index_of_known(known), kinds)
        zeroes = known.zeroes_empty
        configs, scheduler = known.networks, dict(known.scheduler)
        tokenizer = _stand_in_tokenizer(name_or_path)
        tokenizer = TokenizerPair(tokenizer, tokenizer) if is_double(parts) else tokenizer
    elif (checkpoint := find_checkpoint(name_or_path)) is not None:
        configs, scheduler, folder = checkpoint.configs, checkpoint.scheduler, checkpoint.path
        check_texts(folder, checkpoint.family.double, kinds)
        parts, zeroes = checkpoint.family.parts, checkpoint.zeroes_empty
        tokenizer = checkpoint.tokenizer
    else:
        folder = resolve(name_or_path, weights=False)
        index = _index_of(folder)
        parts = parts_in(folder, index, kinds)
        configs, scheduler = _configs_in(folder, parts)
        tokenizer, zeroes = read_tokenizer(folder, parts), zeroes_empty(folder, index, parts)
    networks = {
        part: stored_shapes(describe(kind, configs[part], compute), dtype)
        for part, (kind, _) in parts.items()
    }
    return StableDiffusion(
        **networks, tokenizer=tokenizer, scheduler_config=scheduler, folder=folder,
        zeroes_empty=zeroes,
    )  # fmt: skip


def load_networks(name_or_path: str | os.PathLike) -> dict[str, nnx.Module]:
    """The networks of a pipeline that adapters are for; of a file, without a tokenizer."""
    checkpoint = find_checkpoint(name_or_path)
    if checkpoint is not None:
        names = ("unet", *checkpoint.family.texts)
        return _parts_of(checkpoint, names, dtype=jnp.float32, compute_dtype=None)
    return load_pipeline(name_or_path).adaptable


def describe_clip(
    name_or_path: str | os.PathLike, dtype: Any = jnp.float32, *, compute_dtype: Any = None
) -> Clip:
    """A CLIP of shapes, as `describe_pipeline`: no weights are read, of a published one nothing."""
    compute = dtype if compute_dtype is None else compute_dtype
    config = None if is_here(name_or_path) else published.CLIPS.get(os.fspath(name_or_path))
    if config is not None:
        folder = None
        tokens = config.text_config.max_position_embeddings
        tokenizer = _stand_in_tokenizer(name_or_path, tokens)
    else:
        folder = resolve(name_or_path, weights=False)
        if siglip.is_siglip(folder):
            config = config_at(SiglipConfig, folder / "config.json")
            tokenizer = siglip.read_tokenizer(folder, config.text_config)
        else:
            config, tokenizer = config_at(CLIPConfig, folder / "config.json"), Tokenizer(folder)
    kind = SiglipModel if isinstance(config, SiglipConfig) else CLIPModel
    model = stored_shapes(describe(kind, config, compute), dtype)
    return Clip(model, tokenizer, config.vision_config.image_size, folder=folder)


def _stand_in_tokenizer(name: str | os.PathLike, tokens: int = published.TOKENS) -> Tokenizer:
    """One for shapes: as many ids of a text as the published one makes."""
    _say_once((f"{name}: planned from its published sizes, no file of it is read",))
    return Tokenizer(ASSETS / "tiny" / "tokenizer", max_length=tokens)


def load_pipeline(
    name_or_path: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = None,
    kinds: Sequence[str] = TEXT_TO_IMAGE,
) -> StableDiffusion:
    """A Stable Diffusion 1.x, 2.x or XL pipeline from a folder, the package ("tiny") or the hub.

    Or from a checkpoint in one file, FILE or FILE@FOLDER (`single_file`). `kinds` are those that
    are asked for: text to image, or only that with one text encoder (`PIPELINES`: not SDXL), or
    also `EDITING` (InstructPix2Pix, whose denoiser reads an image's latents beside the noisy ones)
    and `INPAINTING` (a mask and an image's latents).

    UserError as for `load_model`, and where the parts do not fit together.
    """
    dtypes = {"dtype": dtype, "compute_dtype": compute_dtype}
    checkpoint = find_checkpoint(name_or_path)
    if checkpoint is not None:
        return _load_checkpoint(checkpoint, kinds, **dtypes)
    folder = resolve(name_or_path)
    index = read_json(folder / "model_index.json")
    parts = parts_in(folder, index, kinds)
    networks: dict[str, Any] = {
        part: load_model(model, config, folder / part, **dtypes)
        for part, (model, config) in parts.items()
    }
    tokenizer = read_tokenizer(folder, parts)
    check_pipeline(folder, networks, tokenizer, index["_class_name"])
    return StableDiffusion(
        **networks, tokenizer=tokenizer, scheduler_config=read_scheduler(folder, index),
        folder=folder, digest=_digest(folder, list(parts)),
        zeroes_empty=zeroes_empty(folder, index, parts),
    )  # fmt: skip


def _parts_of(
    checkpoint: Checkpoint, names: Iterable[str], *, dtype: Any, compute_dtype: Any
) -> dict[str, Any]:
    compute, path = dtype if compute_dtype is None else compute_dtype, checkpoint.path
    checkpoint.check()
    parts = {}
    for part in names:
        config = checkpoint.configs[part]
        filling = Filling(
            describe_of(path, checkpoint.family.parts[part][0], config, compute), dtype
        )
        fill(filling, checkpoint.tensors(part, filling.names))
        parts[part] = filling.finish(path)
    return parts


def _load_checkpoint(
    checkpoint: Checkpoint, kinds: Sequence[str], **dtypes: Any
) -> StableDiffusion:
    path = checkpoint.path
    check_texts(path, checkpoint.family.double, kinds)
    parts = _parts_of(checkpoint, checkpoint.family.parts, **dtypes)
    found = kind_of(parts["unet"], parts["vae"])
    kind = found if found in kinds else kinds[0]
    check_pipeline(path, parts, checkpoint.tokenizer, kind)
    scheduler, notes = corrected(checkpoint.scheduler)
    _say_once(tuple(f"{path}: {note}" for note in (*checkpoint.notes, *notes)))
    return StableDiffusion(
        **parts, tokenizer=checkpoint.tokenizer, scheduler_config=scheduler, folder=path,
        digest=hub.digest([path], checkpoint.settings_files),
        zeroes_empty=checkpoint.zeroes_empty,
    )  # fmt: skip


def _digest(folder: Path, parts: Sequence[str]) -> str:
    """Of all that a pipeline of these networks is read from."""
    weights = [file for part in parts for file in hub.weight_files(folder / part)]
    settings = [folder / "model_index.json", *(folder / part / "config.json" for part in parts)]
    tokenizers = [folder / "tokenizer_2"] if "text_encoder_2" in parts else []
    return hub.digest(weights, [*settings, folder / "scheduler", folder / "tokenizer", *tokenizers])


def read_scheduler(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's config as the pipeline of `index` (model_index.json) uses it.

    What a pipeline corrects in it is said on the console, once for each folder.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    entry = index.get("scheduler")
    named = entry[-1] if isinstance(entry, list) and entry else None
    text_to_image = index.get("_class_name") in TEXT_TO_IMAGE
    config = read_json(path)
    checked(path, NoiseSchedule.from_config, config)
    config, notes = corrected(config, named, text_to_image=text_to_image)
    checked(path, NoiseSchedule.from_config, config)
    _say_once(tuple(f"{path}: {note}, as diffusers' pipeline corrects it" for note in notes))
    return config


@functools.cache
def _say_once(lines: tuple[str, ...]) -> None:
    for line in lines:
        console.print(line, markup=False)


def save_pipeline(pipeline: StableDiffusion, folder: str | os.PathLike, dtype: Any = None) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained(folder)` and we load.

    Of a pipeline for editing or inpainting, or of SDXL, one that diffusers' pipeline for it loads.
    `dtype` None keeps each parameter's. The scheduler's class is its config's `_class_name`.
    """
    folder = Path(folder)
    scheduler = pipeline.scheduler_config.get("_class_name")
    if not scheduler:
        raise ValueError("save_pipeline: scheduler_config has no _class_name, e.g. 'DDIMScheduler'")
    kind = kind_of(pipeline.unet, pipeline.vae)
    networks = {"vae": pipeline.vae, **pipeline.adaptable}
    check_pipeline(folder, networks, pipeline.tokenizer, kind)
    tokenizers = {"": pipeline.tokenizer}
    if isinstance(pipeline.tokenizer, TokenizerPair):
        tokenizers = {"": pipeline.tokenizer.first, "_2": pipeline.tokenizer.second}
    for part in ("unet", "vae"):
        save_model(networks[part], None, folder / part, dtype)
    for end, tokenizer in tokenizers.items():
        network = networks[f"text_encoder{end}"]
        config = dataclasses.asdict(network.config) | _ids(tokenizer)
        save_model(network, config, folder / f"text_encoder{end}", dtype)
        tokenizer.save(folder / f"tokenizer{end}")
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler_config = {"_diffusers_version": DIFFUSERS_VERSION, **pipeline.scheduler_config}
    hub.write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config)
    index = model_index(scheduler, kind, zeroes=pipeline.zeroes_empty)
    hub.write_json(folder / "model_index.json", index)


def load_clip(
    name_or_path: str | os.PathLike, dtype: Any = jnp.float32, *, compute_dtype: Any = None
) -> Clip:
    """A CLIP or SigLIP with its tokenizer from a folder, the package ("tiny/clip") or the hub.

    Mean and standard deviation are preprocessor_config.json's, or OpenAI's where a CLIP has no such
    file. UserError as for `load_model`, where the parts do not fit together, and for SigLIP 2's
    NaFlex.
    """
    folder = resolve(name_or_path)
    types = {"dtype": dtype, "compute_dtype": compute_dtype}
    if siglip.is_siglip(folder):
        model = load_model(SiglipModel, SiglipConfig, folder, **types)
        tokenizer = siglip.read_tokenizer(folder, model.config.text_config)
        seen = siglip.read_preprocessing(folder, model.config.vision_config)
        return Clip(
            model, tokenizer, seen.image_size, seen.mean, seen.std, folder, _clip_digest(folder),
            squash=True, interpolation=seen.interpolation,
        )  # fmt: skip
    model = load_model(CLIPModel, CLIPConfig, folder, **types)
    tokenizer = Tokenizer(folder)
    check_tokenizer(folder, tokenizer, model.config.text_config)
    check_end(folder, tokenizer, model.config.text_config)
    path = folder / "preprocessor_config.json"
    settings = read_json(path, optional=True)
    size = _image_size(path, settings, model.config.vision_config.image_size)
    statistics = {}
    for name, default in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        values = take(settings, name, tuple[float, float, float], path, default)
        statistics[name.removeprefix("image_")] = values
    return Clip(model, tokenizer, size, **statistics, folder=folder, digest=_clip_digest(folder))


def _clip_digest(folder: Path) -> str:
    return hub.digest(hub.weight_files(folder), sorted(folder.glob("*.*")))


def _image_size(path: Path, settings: Mapping[str, Any], expected: int) -> int:
    """The side of the images; UserError if the preprocessor's is not the network's."""
    name = "crop_size" if "crop_size" in settings else "size"
    size = take(settings, name, dict[str, int] | int, path, expected)
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if sides != {expected}:
        found = sorted(sides)[0] if sides else "empty"
        raise UserError(f"{path}: {name} is {found}, but the network's image_size is {expected}")
    return expected


def save_clip(clip: Clip, folder: str | os.PathLike, dtype: Any = None) -> None:
    """Write a folder that transformers' CLIPModel, CLIPTokenizer and CLIPProcessor load.

    Of a SigLIP, its SiglipModel, PreTrainedTokenizerFast and SiglipImageProcessor.
    """
    folder = Path(folder)
    if isinstance(clip.model, SiglipModel):
        siglip.save(clip.model, clip.tokenizer, clip.transform, folder, dtype)
        return
    check_tokenizer(folder, clip.tokenizer, clip.model.config.text_config)
    check_end(folder, clip.tokenizer, clip.model.config.text_config)
    config = dataclasses.asdict(clip.model.config)
    config["text_config"].update(_ids(clip.tokenizer), model_type="clip_text_model")
    config["vision_config"]["model_type"] = "clip_vision_model"
    save_model(clip.model, config, folder, dtype)
    clip.tokenizer.save(folder)
    size = clip.image_size
    preprocessor = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(clip.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(clip.std),
        # PIL's number for bicubic.
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    hub.write_json(folder / "preprocessor_config.json", preprocessor)


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Fields that transformers would otherwise fill with ids beyond a small vocabulary."""
    return {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
